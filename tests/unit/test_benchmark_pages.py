"""`make benchmarks` writes what was measured into a page, and nothing else of it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE_ALL = Path(__file__).parents[2] / "reproducibility/benchmarks/measure_all"
MEASUREMENTS = runpy.run_path(str(MEASURE_ALL))["MEASUREMENTS"]
PAGES = sorted({measurement.page for measurement in MEASUREMENTS.values()})
# {(program, where, arguments): a measurement that starts it so}
PROGRAMS = {
    (each.program, each.in_image, *each.arguments): name for name, each in MEASUREMENTS.items()
}
PAGE = "# A page\n\nWhat it says.\n"
FIRST = """# A page

What it says.

## As last measured

<!-- measured: start -->
`make benchmarks NAMES=start`: two cores

```text
a  1
b  2
```
<!-- end: start -->
"""


@pytest.fixture(scope="module")
def with_measured():
    return runpy.run_path(str(MEASURE_ALL))["with_measured"]


def test_page_gets_what_was_measured_at_its_end(with_measured):
    assert with_measured(PAGE, "start", "two cores", "a  1  \nb  2\n") == FIRST


def test_page_measured_again_has_the_new_figures_in_the_old_ones_place(with_measured):
    page = with_measured(FIRST, "chunks", "two cores", "c 3\n") + "\nWhat follows.\n"
    again = with_measured(page, "start", "four cores", "a  9\n")
    assert again == page.replace("two cores\n\n```text\na  1\nb  2", "four cores\n\n```text\na  9")
    assert again.count("## As last measured") == 1


def test_measurement_that_is_none_is_told_with_those_that_are():
    done = subprocess.run([sys.executable, MEASURE_ALL, "strat"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no measurement strat (there are start, images," in done.stderr


@pytest.mark.image
@pytest.mark.parametrize("name", PROGRAMS.values())
def test_program_starts_with_the_arguments_that_make_benchmarks_gives_it(name: str, image_edf):
    """Where it runs: what it imports is there, and its options are known."""
    done = subprocess.run([*MEASUREMENTS[name].command(), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    # argparse says nothing of unknown options where `--help` follows.
    words = [word for word in MEASUREMENTS[name].arguments if not word.isdigit()]
    assert [word for word in words if word not in done.stdout] == []


@pytest.mark.parametrize("name", PAGES)
def test_figures_of_a_page_stand_where_make_benchmarks_puts_them(name: str):
    """Else the next run would leave old ones beside the new."""
    page = (MEASURE_ALL.parent / name / "README.md").read_text()
    measured = re.findall(r"<!-- measured: (\S+) -->.*?<!-- end: \1 -->\n", page, re.DOTALL)
    assert measured
    assert {MEASUREMENTS[each].page for each in measured} == {name}
    page = re.sub(r"<!-- measured: (\S+) -->.*?<!-- end: \1 -->\n", "", page, flags=re.DOTALL)
    by_program, _, by_hand = page.partition("## Measured by hand\n")
    assert not re.findall(r"^\|.*\d.*$", by_program, re.MULTILINE)
    assert not by_hand or "No command measures this" in by_hand
