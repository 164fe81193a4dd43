"""Where the lines of metrics.jsonl go besides: TensorBoard (RUN/tensorboard), W&B (RUN/wandb).

metrics.jsonl is the truth and a reporter shows it. Started again after a kill, a reporter gets all
lines up to the checkpoint anew, so what it shows has no hole and nothing twice, and it may join a
run late. A reporter never ends a run: one that fails is told of once, and left out from then on.

    {"step": 10, "loss": 2.1, "timing": {"step_s": 0.5, …}}   train/loss, timing/step_s at step 10
    {"step": 10, "eval": {"loss": 2.2}, …}                    eval/loss at step 10
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from post_training.records.run_record import read_record
from post_training.stages.context import StageContext
from post_training.train.training_config import LoggingConfig

Line = dict[str, Any]


class Reporter(Protocol):
    """Any method may fail with any error."""

    name: str

    def start(self, lines: Sequence[Line]) -> None:
        """Show these lines and no others."""

    def write(self, line: Line) -> None: ...

    def close(self, *, failed: bool) -> None:
        """failed: the run ends with an error, or was stopped."""


class Reporters:
    """A context in which the run takes place. warn: gets one line for each reporter that fails."""

    def __init__(
        self, reporters: Sequence[Reporter] = (), warn: Callable[[str], None] | None = None
    ):
        assert warn is not None or not reporters
        self._reporters = list(reporters)
        self._warn = warn
        self._is_started = False

    def __enter__(self) -> "Reporters":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_started:
            self._each(lambda reporter: reporter.close(failed=error is not None))

    def start(self, lines: Sequence[Line]) -> None:
        self._is_started = True
        self._each(lambda reporter: reporter.start(lines))

    def write(self, line: Line) -> None:
        self._each(lambda reporter: reporter.write(line))

    def _each(self, action: Callable[[Reporter], None]) -> None:
        for reporter in list(self._reporters):
            try:
                action(reporter)
            except Exception as error:
                self._reporters.remove(reporter)
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._warn(f"warning: {reporter.name} is left out from now on: {reason}")


def open_reporters(
    config: LoggingConfig, context: StageContext, settings: dict[str, Any]
) -> Reporters:
    """What `report_to` asks for, on rank 0; nobody on the others. settings: of the run, to show."""
    if not context.ranks.is_writer:
        return Reporters()
    reporters: list[Reporter] = []
    for name in dict.fromkeys(config.report_to):
        if name == "tensorboard":
            from post_training.train.tensorboard import TensorBoard

            reporters.append(TensorBoard(context.run_dir / name))
        else:
            from post_training.train.weights_and_biases import WeightsAndBiases

            run_id = read_record(context.run_dir)["run_id"]
            reporters.append(
                WeightsAndBiases(config, context.run_dir, run_id, settings, context.log)
            )
    return Reporters(reporters, context.log)


def scalars(line: Line) -> dict[str, float]:
    """{"train/loss": 2.1, …}: every number of a line but its step."""
    groups = {
        "eval": line.get("eval", {}),
        "train": {name: value for name, value in line.items() if name != "step"},
        "timing": line.get("timing", {}),
    }
    return {
        f"{group}/{name}": value
        for group, values in groups.items()
        for name, value in values.items()
        if isinstance(value, int | float)
    }
