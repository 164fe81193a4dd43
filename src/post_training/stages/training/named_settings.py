"""Settings that depend on a name beside them: `optimizer_args` of `optimizer`, and the like."""

import json
from typing import Any

from pydantic import ValidationError

from post_training.config.faults import explain
from post_training.config.model import Config


def complete(name: str, model: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the defaults of `model`, so that the recipe says each value that counts.

    Errors: ValueError, one line with every fault.
    """
    known = list(model.model_fields)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{name} takes {', '.join(known) or 'none'} (got {', '.join(unknown)})")
    try:
        settings = model.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        faults = explain(model, error, given, lambda path: "")
        raise ValueError(f"{name}: {'; '.join(faults)}") from None
    return settings.model_dump(mode="json", exclude_none=True)
