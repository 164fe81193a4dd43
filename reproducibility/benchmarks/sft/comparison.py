"""Runs beside each other: each in a process of its own, in turn, and a table of their medians."""

import argparse
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]
GSM8K = REPOSITORY.parent / "shared/data/gsm8k/train.jsonl"
SUMS = REPOSITORY / "reproducibility/demo/arithmetic.jsonl"
Runs = list[dict[str, Any]]


def parse_options(description: str, known: Iterable[str]) -> argparse.Namespace:
    """The command line of a program with the measurements `known`; all of them where none is named.

    Sets the number of threads, which is read when torch is imported, in every process alike.
    """
    parser = argparse.ArgumentParser(description=description)
    # Not `choices`: argparse would refuse that no name is given.
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(known))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="timed in each run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--corpus", type=Path, default=GSM8K if GSM8K.exists() else SUMS)
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in known]:
        parser.error(f"there is no measurement {unknown[0]}")
    options.what = options.what or list(known)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    return options


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
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
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
    """beside: the row to which the ratios of a row are. A run's time is the median of its steps; a
    ratio of times is the median over the repetitions, of runs that were neighbours in time."""
    print(
        f"{'':18}{'step s':>8}{'fastest':>9}{'ratio':>7}{'CPU s':>8}{'ratio':>7}"
        f"{'from':>6}{'to':>6}"
        f"{'before MiB':>12}{'peak MiB':>10}{'ratio':>7}{'step adds':>11}{'ratio':>7}"
    )
    for name, runs in results.items():
        clock, cpu = _medians(runs, "step_s"), _medians(runs, "cpu_s")
        before = median(run["before_mib"] for run in runs)
        peak = median(run["peak_mib"] for run in runs)
        added = median(run["peak_mib"] - run["before_mib"] for run in runs)
        clock_ratio = cpu_ratio = peak_ratio = added_ratio = ""
        if name in beside:
            others = results[beside[name]]
            clock_ratio = f"{median(_ratios(clock, _medians(others, 'step_s'))):.2f}"
            each = _ratios(cpu, _medians(others, "cpu_s"))
            cpu_ratio = f"{median(each):7.2f}{min(each):6.2f}{max(each):6.2f}"
            peak_ratio = f"{peak / median(run['peak_mib'] for run in others):.2f}"
            of_others = median(run["peak_mib"] - run["before_mib"] for run in others)
            added_ratio = f"{added / of_others:.2f}"
        fastest = min(min(run["step_s"]) for run in runs)
        print(
            f"{name:18}{median(clock):8.3f}{fastest:9.3f}{clock_ratio:>7}{median(cpu):8.3f}"
            f"{cpu_ratio:19}{before:12,.0f}{peak:10,.0f}{peak_ratio:>7}{added:11,.0f}"
            f"{added_ratio:>7}",
            flush=True,
        )


def _medians(runs: Runs, key: str) -> list[float]:
    return [median(run[key]) for run in runs]


def _ratios(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]
