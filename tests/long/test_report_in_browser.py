"""The pages in Chromium: what axe-core finds, on laptop and phone, and use by keyboard alone."""

import json
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest

from helpers.browser import LAPTOP, PHONE, Browser, start_browser
from helpers.finished_runs import finish_run
from post_training.report.annotations import describe_distribution
from post_training.report.page import render_list, write_page
from post_training.report.view import read_view
from post_training.stages.registry import find_config_class

pytestmark = pytest.mark.long

# Carries axe-core 4.12.1. Of the package nothing is imported, and what it needs is not installed: a
# browser's driver of 50 MB.
AXE = "axe-playwright-python==0.1.8"
AXE_SHA256 = "fdd263c998388f1a8e67cad02677e612d946248bd44d163be5e8650ea31f95f8"
PAGES = ("training", "annotation", "preference", "verdict", "list")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def trained(folder: Path, name: str, **changes) -> Path:
    run_dir = finish_run(folder, name, **changes)
    lines = []
    for step in range(1, 41):
        figures = {"loss": 2.5 / step**0.3, "learning_rate": 1e-5 * step, "grad_norm": 1 / step}
        timing = {"tokens_per_s": 9000 + 10 * step, "peak_memory_bytes": 3 << 30}
        lines.append({"step": step, "num_tokens": 512 * step, **figures, "timing": timing})
        if step % 10 == 0:
            lines.append({"step": step, "eval": {"loss": 2.6 / step**0.3}, "timing": {}})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "gsm8k", "read_as": "messages", "num_rows": 7473, "num_used": 7400}
    counts = {"num_sequences": 900, "num_tokens": 2_400_000, "num_trained_tokens": 900_000}
    write_json(
        run_dir / "data/prepared.json",
        {
            "sources": [{**source, "num_tokens": 2_000_000},
                        {**source, "name": "own/rows.jsonl", "num_tokens": 400_000}],
            "counts": counts,
            "rejected": {"longer than max_length": 73},
        },
    )  # fmt: skip
    return run_dir


def annotated(folder: Path) -> Path:
    run_dir = finish_run(folder, "annotated")
    (run_dir / "metrics.jsonl").unlink()
    rows = []
    for number in range(30):
        branches = [
            {
                "messages": [
                    {"role": "assistant", "parts": [{"content": f"It is {number}. " * 9}]}
                ],
                "rewards": {"is_right": float(each), "brevity": number / 30 - each},
                "completion_length": 12 * number + each,
                "finish_reason": "length" if number % 7 == 0 else "stop",
            }
            for each in (0, 1)
        ]
        prompt = {"role": "user", "content": f"How many apples are {number} apples? " * 4}
        rows.append({"initial_prompt": prompt, "conversation_branches": branches})
    (run_dir / "dataset").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "dataset/rows.jsonl").write_text(text)
    return run_dir


def paired(folder: Path) -> Path:
    run_dir = finish_run(folder, "paired")
    lines = [
        {"step": step, "loss": 0.69 / step,
         "rewards/chosen": step / 9, "rewards/rejected": -step / 9,
         "rewards/margins": step / 4, "rewards/accuracies": 1 - 1 / (1 + step), "kl": step / 50,
         "num_tokens": 512 * step, "timing": {}}
        for step in range(1, 20)
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = [number / 10 for number in range(60)]
    write_json(
        run_dir / "report/report.json",
        {
            "num_pairs": 60,
            "num_prompts": 80,
            "prompts_without_a_pair": {"all_rewards_are_equal": 20},
            "pairs_by_source": {"policy": 50, "gsm8k": 10},
            "distributions": {
                name: describe_distribution(array("d", values))
                for name in ("reward of chosen", "reward of rejected", "margin")
            },
        },
    )
    return run_dir


def list_of_runs() -> str:
    def entry(name, state, **known):
        figures = {"stage": "sft", "done": None, "step": None, "loss": None, "tokens_per_s": None,
                   "time_left_s": None, "reason": None}  # fmt: skip
        shown = SimpleNamespace(**{**figures, "state": state, **known})
        return SimpleNamespace(name=name, href=f"/run/{name}", spark="█▅▃▂▁", state=shown)

    states = [
        entry("sft/one", "running", done=0.4, step=40, loss=1.2, tokens_per_s=9000.0,
              time_left_s=4000.0),
        entry("sft/two", "failed", reason="training.lr: must be > 0 (got -1)"),
        entry("sft/three", "finished", done=1.0, step=100, loss=0.9),
        entry("queued", "queued", stage=None),
    ]  # fmt: skip
    return render_list(states, "/users/someone/work/runs", 10)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    first = trained(folder, "trained", loss=3.0)
    again = trained(folder, "trained-reproduced-1", seed=2)
    record = json.loads((first / "run.json").read_text())
    told = {"reproduces": record["run_id"], "machine_differences": ["processor"]}
    verdict = "differs: step 7: the same rows, loss is 2.0, then 1.0"
    write_json(again / "reproduction.json", {**told, "verdict": verdict})
    runs = {
        "training": [first],
        "annotation": [annotated(folder)],
        "preference": [paired(folder)],
        "verdict": [first, again],
    }
    made = {name: folder / f"{name}.html" for name in PAGES}
    for name, run_dirs in runs.items():
        views = [read_view(each, find_config_class, most_bytes=1 << 20) for each in run_dirs]
        write_page(views, made[name])
    made["list"].write_text(list_of_runs())
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with start_browser(tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """axe-core's script."""
    folder = tmp_path_factory.mktemp("axe")
    (folder / "asked.txt").write_text(f"{AXE} --hash=sha256:{AXE_SHA256}\n")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    subprocess.run([*download, "--requirement", "asked.txt"], cwd=folder, check=True)
    [wheel] = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        return archive.read("axe_playwright_python/axe.min.js").decode()


def violations(browser: Browser, axe: str) -> list[str]:
    """`rule: what is wrong (where)`, of all that is shown once every part is opened."""
    browser.evaluate(
        "document.querySelectorAll('details').forEach((each) => { each.open = true; })"
    )
    browser.evaluate(axe)
    found = browser.evaluate("axe.run().then((found) => found.violations)")
    return [
        f"{rule['id']}: {node['failureSummary']} ({node['html']})"
        for rule in found
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize(("size", "scheme"), [(LAPTOP, "light"), (PHONE, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_and_no_script_fails(pages, browser, axe, name, size, scheme):
    browser.open(pages[name], size=size, scheme=scheme)
    assert browser.complaints == []
    num_drawn = browser.evaluate("document.querySelectorAll('.plot canvas').length")
    assert num_drawn == browser.evaluate("document.querySelectorAll('.plot').length")
    assert (num_drawn > 0) is (name != "list")
    assert violations(browser, axe) == []
    # Nothing sticks out at the side: what is too wide is scrolled in a box of its own.
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_axe_finds_what_is_wrong(pages, browser, axe, tmp_path):
    text = pages["annotation"].read_text().replace("--quiet: #545b64", "--quiet: #cccccc")
    (tmp_path / "page.html").write_text(text)
    browser.open(tmp_path / "page.html")
    assert any(line.startswith("color-contrast: ") for line in violations(browser, axe))


def test_page_is_used_by_keyboard(pages, browser):
    browser.open(pages["training"])

    def focused(what: str):
        return browser.evaluate(f"document.activeElement.{what}")

    browser.press("Tab")
    assert focused("className") == "skip"
    browser.press("Enter")
    while focused("dataset.axis") != "tokens":
        browser.press("Tab")
        assert focused("tagName") != "BODY", "no way to the button by keyboard"
    browser.press(" ")
    assert focused("ariaPressed") == "true"
    label = "document.querySelector('.plot .u-legend .u-label').textContent"
    assert browser.evaluate(label) == "tokens"
    while focused("role") != "switch":
        browser.press("Tab")
    for is_shown in ("false", "true"):
        browser.press("Enter")
        assert focused("ariaChecked") == is_shown
        row = "document.activeElement.closest('.u-series').classList.contains('u-off')"
        assert browser.evaluate(row) is (is_shown == "false")
    while focused("tagName") != "SUMMARY":
        browser.press("Tab")
    browser.press("Enter")
    assert focused("parentElement.open") is True
