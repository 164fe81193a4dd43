"""Runs beside each other: each in a process of its own, in turn, and a table of their medians."""

import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

Runs = list[dict[str, Any]]


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a new process. Ends this one with the error of the other."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        error, result = receiver.recv()
    except EOFError:
        error, result = "it was killed", None
    process.join()
    if error is not None:
        sys.exit(f"{function} failed: {error}")
    return result


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if "VERBOSE" not in os.environ:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        sender.send((None, function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))


def in_turn(
    folder: Path, repetitions: int, sides: Mapping[str, Callable[[Path], dict[str, Any]]]
) -> dict[str, Runs]:
    """A slow moment of the machine falls on every side alike."""
    results: dict[str, Runs] = {name: [] for name in sides}
    for repetition in range(repetitions):
        for index, (name, side) in enumerate(sides.items()):
            output = folder / f"{repetition}-{index}"
            results[name].append(in_process(side, output))
            shutil.rmtree(output, ignore_errors=True)
    return results


def report(results: Mapping[str, Runs], beside: Mapping[str, str]) -> None:
    """beside: to which row the ratios of a row are. A step's time is the median of a run's; the
    ratio is the median over the repetitions, whose runs were neighbours in time."""
    print(
        f"{'':18}{'step s':>8}{'fastest':>9}{'ratio':>7}{'from':>6}{'to':>6}"
        f"{'before MiB':>12}{'peak MiB':>10}{'ratio':>7}{'step adds':>11}{'ratio':>7}"
    )
    for name, runs in results.items():
        steps = [median(run["step_s"]) for run in runs]
        before, peak, added = (_median(runs, key) for key in _MEMORY)
        ratios = peak_ratio = added_ratio = ""
        if name in beside:
            others = results[beside[name]]
            each = sorted(
                step / median(other["step_s"]) for step, other in zip(steps, others, strict=True)
            )
            ratios = f"{median(each):7.2f}{each[0]:6.2f}{each[-1]:6.2f}"
            _, peak_other, added_other = (_median(others, key) for key in _MEMORY)
            peak_ratio, added_ratio = f"{peak / peak_other:.2f}", f"{added / added_other:.2f}"
        fastest = min(min(run["step_s"]) for run in runs)
        print(
            f"{name:18}{median(steps):8.3f}{fastest:9.3f}{ratios:19}{before:12,.0f}{peak:10,.0f}"
            f"{peak_ratio:>7}{added:11,.0f}{added_ratio:>7}",
            flush=True,
        )


def _added(run: dict[str, Any]) -> float:
    return run["peak_mib"] - run["before_mib"]


_MEMORY: tuple[Callable[[dict[str, Any]], float], ...] = (
    lambda run: run["before_mib"],
    lambda run: run["peak_mib"],
    _added,
)


def _median(runs: Runs, figure: Callable[[dict[str, Any]], float]) -> float:
    return median(map(figure, runs))
