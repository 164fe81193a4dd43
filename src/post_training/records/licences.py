"""Licences as the hub's cards state them, carried along with what was fetched from there.

    a fetched model     its README.md, the card, lies in its folder
    a fetched split     fetched.json has what the card of the repository stated
    run.json            "licences": {the setting that named it: licence}, where one is known
    an input's made_by  the same of the run that made it

A licence decides no bits, so it is in no identity. Where no card states one, nothing is recorded.
"""

from pathlib import Path
from typing import Any

from post_training.core import yaml
from post_training.core.errors import UsageError
from post_training.records.artifact import FETCHED

_CARD = "README.md"
_LONGEST = 200


def licence_in_card(folder: Path) -> str | None:
    """What the YAML above the text of README.md states; None without a card, or where it states
    none that can be read. Several are joined by commas; for `other` it is its license_name.

    Source: https://huggingface.co/docs/hub/repositories-licenses
    """
    try:
        text = (folder / _CARD).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    opening, _, rest = text.removeprefix("\ufeff").partition("\n")
    front, end, _ = rest.partition("\n---")
    if opening.strip() != "---" or not end:
        return None
    try:
        stated = yaml.load(front + "\n", _CARD).data
    except UsageError:
        return None
    if not isinstance(stated, dict):
        return None
    found = stated.get("license")
    if found == "other":
        found = stated.get("license_name") or found
    names = found if isinstance(found, list) else [found]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        return None
    return " ".join(", ".join(names).split())[:_LONGEST]


def licences_of_models(inputs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """{key: licence} of those inputs of a run that were fetched from the hub."""
    found = {
        key: licence_in_card(Path(value["path"]))
        for key, value in inputs.items()
        if value.get("made_by", {}).get("stage") == FETCHED
    }
    return {key: licence for key, licence in found.items() if licence is not None}


def hub_name_of(made_by: dict[str, Any] | None) -> str | None:
    """ORG/NAME of a fetched input; None of any other."""
    if made_by is None or made_by["stage"] != FETCHED:
        return None
    _, name, *_ = made_by["run_id"].split()
    return name
