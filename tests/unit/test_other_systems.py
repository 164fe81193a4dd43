"""The table of what five other systems can do: each line has its proof, and each proof exists."""

import re
from pathlib import Path

import pytest

from post_training.core import yaml

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
TABLE = yaml.load(
    (Path(__file__).parent / "other_systems.yaml").read_text(), "other_systems.yaml"
).data
LINES_OF_A_SYSTEM = {"A": 51, "B": 46, "C": 50, "D": 38, "E": 16}


def problem_with(proof: str) -> str | None:
    """Why this is no proof: no such page, heading, file of tests or test."""
    if proof.startswith(("docs/", "installation/")):
        page, _, anchor = proof.partition("#")
        if not (REPOSITORY / page).is_file():
            return f"no page {page}"
        headings = re.findall(r"^#+ (.*)$", (REPOSITORY / page).read_text(), re.MULTILINE)
        anchors = {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }
        return f"no heading #{anchor} in {page}" if anchor and anchor not in anchors else None
    file, _, function = proof.partition("::")
    if not (TESTS / file).is_file() or not Path(file).name.startswith("test_"):
        return f"no file of tests tests/{file}"
    has_it = re.search(rf"^def {re.escape(function)}\(", (TESTS / file).read_text(), re.MULTILINE)
    return f"no test {function} in tests/{file}" if function and not has_it else None


def test_every_line_of_every_system_is_in_the_table():
    wanted = [
        f"{system}{number}"
        for system, count in LINES_OF_A_SYSTEM.items()
        for number in range(1, count + 1)
    ]
    assert list(TABLE) == wanted


@pytest.mark.parametrize("line", TABLE)
def test_line_has_a_proof_that_exists_or_says_what_is_missing(line):
    entry = TABLE[line]
    if entry["state"] == "open":
        assert entry["todo"]
        assert entry["subject"]
        return
    assert entry["state"] in ("done", "instead", "outside")
    assert entry["proof"]
    assert [problem for proof in entry["proof"] if (problem := problem_with(proof))] == []
    is_page = [proof.startswith(("docs/", "installation/")) for proof in entry["proof"]]
    # Done is what a test shows, but for what a page itself is; what is otherwise is explained.
    assert any(is_page) if entry["state"] != "done" else not all(is_page)


def test_proofs_that_are_not_there_are_noticed():
    assert problem_with("unit/test_docs.py::test_commands_of_the_page_exist") is None
    assert problem_with("unit/test_docs.py::test_nothing") == (
        "no test test_nothing in tests/unit/test_docs.py"
    )
    assert problem_with("unit/test_nowhere.py") == "no file of tests tests/unit/test_nowhere.py"
    assert problem_with("docs/guides/nowhere.md") == "no page docs/guides/nowhere.md"
    assert problem_with("docs/guides/sft.md#nowhere") == "no heading #nowhere in docs/guides/sft.md"
