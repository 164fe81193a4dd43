"""The table of runs that `runs list` and `pipeline status` print."""

from post_training.report.curves import sparkline
from post_training.report.page import duration
from post_training.slurm.runs import RunState

HEADER = ["state", "job", "attempts", "done", "loss", "so far", "tokens/s", "time left", "why"]


def cells(state: RunState) -> list[str]:
    """The state under `HEADER`; what is not known is empty."""
    done = "" if state.done is None else f"{state.done:.0%}"
    if state.step is not None:
        done = f"{done} (step {state.step})".lstrip()
    attempts = str(len(state.attempts) or "")
    if state.num_failures:
        attempts += f" ({state.num_failures} failed)"
    why = state.reason.splitlines()[0] if state.reason else ""
    if state.slurm_state:
        why = f"{why} (Slurm: {state.slurm_state})".lstrip()
    return [
        state.state,
        state.job_ids[0] if state.job_ids else "",
        attempts,
        done,
        "" if state.loss is None else f"{state.loss:.4g}",
        sparkline(state.losses),
        "" if state.tokens_per_s is None else f"{state.tokens_per_s:,.0f}",
        "" if state.time_left_s is None else duration(state.time_left_s),
        why,
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they have to be; the last one ends where it ends."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )
