"""What each step's program is told, and how it says what it found.

A result is one line, `RESULT {json}`, printed as soon as it is known: where a step runs out of
time, what it found before is kept. `run` reads them.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PREFIX = "RESULT "


@dataclass(frozen=True)
class Step:
    """device: cpu or cuda. tiny: with models that any CPU can train, to try the programs out.
    folder: for temporary files."""

    device: str
    tiny: bool
    folder: Path

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"

    def tell(self, what: str, **figures: Any) -> None:
        print(PREFIX + json.dumps({"what": what, **figures}), flush=True)

    def check(self, what: str, good: bool, **figures: Any) -> None:
        """Something that has to hold."""
        self.tell(what, good=bool(good), **figures)

    def skip(self, what: str, reason: str) -> None:
        self.tell(what, skipped=reason)

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Tell what `measure` returns; an error of it (a full memory, say) is told in its place,
        and the step goes on."""
        try:
            figures = measure()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            line = (str(error).strip() or "no reason given").splitlines()[0][:300]
            self.tell(what, error=f"{type(error).__name__}: {line}")
            return None
        self.tell(what, **figures)
        return figures


def start(description: str) -> Step:
    """The step of this process, from its command line; ready to compute on its device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    from post_training.models.quiet import quiet_libraries

    quiet_libraries(options.folder / "cache")
    return Step(options.device, options.tiny, options.folder)


def without_liger() -> str | None:
    """Why its kernels can't be run here."""
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None
