"""The page of runs: complete as text, from nowhere else, and never of what it must not hold."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import hash_files
from post_training.records.check import check_run
from post_training.report import page
from post_training.report.page import leave_page, write_page
from post_training.report.view import PAGE, read_view
from post_training.stages.registry import find_config_class


class Parsed(HTMLParser):
    """ids, links, and the text outside of scripts and styles; errors where tags don't match."""

    VOID = frozenset({"meta", "br", "input", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.text, self.open = [], [], [], "", []
        self.scripts, self.policy = [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []
        if found.get("http-equiv"):
            self.policy = found["content"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append([found.get("type"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1][1] += data
        elif self.open[-1:] != ["style"]:
            self.text += data


def view_of(run_dir):
    return read_view(run_dir, find_config_class, most_bytes=1 << 20)


def page_of(*run_dirs, target):
    write_page([view_of(run_dir) for run_dir in run_dirs], target)
    return Parsed(target.read_text())


def test_page_of_a_run_tells_its_record_and_needs_nothing_else(finished_run, tmp_path):
    run_dir = finished_run("one")
    found = page_of(run_dir, target=tmp_path / "page.html")
    record = json.loads((run_dir / "run.json").read_text())
    for told in (
        record["identity"],
        record["image"]["oci_digest"],
        record["recipe_hash"],
        record["outputs"]["artifacts"]["model"]["fingerprint"],
        *(value["fingerprint"] for value in record["inputs"].values()),
        record["run_id"],
    ):
        assert told in found.text
    assert found.sources == []
    assert all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_summary_has_the_steps_of_the_run_and_not_those_that_were_timed(finished_run):
    view = view_of(finished_run("one"))
    metrics = {"num_steps": 20, "timing": {"num_steps": 17, "step_s": 0.5}}
    assert replace(view, record={**view.record, "metrics": metrics}).figures == {
        "num_steps": 20,
        "step_s": 0.5,
    }


def test_page_lets_in_its_own_scripts_alone(finished_run, tmp_path):
    found = page_of(finished_run("one"), target=tmp_path / "page.html")
    scripts = [text for kind, text in found.scripts if kind is None]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts]
    assert re.findall(r"'sha256-([^']+)'", found.policy) == [each.decode() for each in digests]
    assert "default-src 'none'" in found.policy
    assert "http" not in found.policy


def test_page_holds_the_numbers_that_its_charts_draw(finished_run, tmp_path):
    found = page_of(finished_run("one", loss=2.0), target=tmp_path / "page.html")
    [data] = [json.loads(text) for kind, text in found.scripts if kind == "application/json"]
    assert data["axes"][0]["train"]["step"] == [1, 2]
    assert data["charts"][0]["series"][0] | {"axis": 0} == {
        "run": 0, "axis": 0, "name": "loss", "values": [2.0, 1.0]
    }  # fmt: skip


def test_page_of_several_runs_names_the_settings_that_differ(finished_run, tmp_path):
    runs = finished_run("one", seed=1, **{"training.learning_rate": 1e-05}), finished_run("two")
    found = page_of(*runs, target=tmp_path / "page.html")
    differing = found.text[found.text.index("What differs") : found.text.index("one: not the")]
    assert "training.learning_rate" in differing
    assert "(absent)" in differing
    assert "num_threads" not in differing


def test_page_shows_what_rows_say_as_text(finished_run, tmp_path):
    run_dir = finished_run("one")
    (run_dir / "dataset").mkdir()
    evil = "</script><script>alert(1)</script>"
    row = {
        "initial_prompt": {"role": "user", "content": evil},
        "conversation_branches": [
            {"messages": [{"content": evil}], "rewards": {evil: 1.0}, evil: 2.0}
        ],
    }
    (run_dir / "dataset/rows.jsonl").write_text(json.dumps(row) + "\n")
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, evil: 1.0}) + "\n")
    found = page_of(run_dir, target=tmp_path / "page.html")
    assert [kind for kind, _ in found.scripts] == ["application/json", None, None]
    assert evil in found.text


def test_page_links_to_the_report_of_what_made_an_input(finished_run, tmp_path):
    maker = finished_run("maker")
    (maker / PAGE).write_text("a report")
    run_dir = finished_run("one")
    record = json.loads((run_dir / "run.json").read_text())
    record["inputs"]["model.path"] |= {
        "path": str(maker / "model"),
        "made_by": {
            "kind": "model", "stage": "sft", "run_id": "sft-1", "lineage_hash": 64 * "a",
            "recipe_hash": 64 * "b", "image": None, "inputs": {},
        },
    }  # fmt: skip
    (run_dir / "run.json").write_text(json.dumps(record))
    found = page_of(run_dir, target=run_dir / PAGE)
    assert "../maker/report.html" in found.links
    assert "was changed by hand" in found.text


def test_page_tells_the_verdict_of_a_reproduction(finished_run, tmp_path):
    run_dir, again = finished_run("one"), finished_run("one-reproduced-1")
    run_id = json.loads((run_dir / "run.json").read_text())["run_id"]
    told = {"reproduces": run_id, "verdict": "identical: 4 files", "machine_differences": []}
    (again / "reproduction.json").write_text(json.dumps(told))
    [verdict] = view_of(run_dir).verdicts
    assert (verdict.grade, str(verdict)) == (
        "identical", "run again in one-reproduced-1: identical: 4 files",
    )  # fmt: skip
    assert verdict.detail == "4 files"
    [own] = view_of(again).verdicts
    assert str(own) == f"as a reproduction of {run_id}: identical: 4 files"
    for other in ({"reproduces": "sft-of-somebody-else"}, {"verdict": 3}):
        (again / "reproduction.json").write_text(json.dumps({**told, **other}))
        assert view_of(run_dir).verdicts == []


def test_page_replaces_a_page_and_no_other_file(finished_run, tmp_path):
    run_dir, target = finished_run("one"), tmp_path / "page.html"
    page_of(run_dir, target=target)
    page_of(run_dir, target=target)
    target.write_text("mine")
    with pytest.raises(UsageError, match="there already, and no report"):
        page_of(run_dir, target=target)
    assert target.read_text() == "mine"


def test_report_of_a_finished_run_is_in_no_record(finished_run):
    run_dir = finished_run("one")
    before = hash_files(run_dir)
    assert leave_page(run_dir, find_config_class) == run_dir / PAGE
    after = hash_files(run_dir)
    after.pop(PAGE)
    assert after == before
    assert check_run(run_dir).faults == []


def test_report_that_cannot_be_made_is_a_warning(finished_run, monkeypatch, capsys):
    run_dir = finished_run("one")
    monkeypatch.setattr(page, "_CARRIER", "no-such-package")
    page._uplot.cache_clear()
    assert leave_page(run_dir, find_config_class) is None
    assert "warning: no report.html: the package no-such-package" in capsys.readouterr().err
    assert not (run_dir / PAGE).exists()
    page._uplot.cache_clear()


def test_only_the_bytes_that_uplot_published_get_into_a_page(monkeypatch):
    monkeypatch.setitem(page._UPLOT, "uplot.min.css", 64 * "0")
    page._uplot.cache_clear()
    with pytest.raises(PostTrainingError, match=r"not the bytes of uPlot 1\.6\.31"):
        page._uplot("uplot.min.css")
    page._uplot.cache_clear()


@pytest.mark.parametrize(
    ("key", "value"), [("attempts", [{"started": "a"}]), ("inputs", {"x": {"path": 1}})]
)
def test_damaged_record_is_told_and_no_page_is_written(finished_run, tmp_path, key, value):
    run_dir = finished_run("one")
    record = json.loads((run_dir / "run.json").read_text())
    if key == "attempts":
        value = [{**record["attempts"][0], **value[0]}]
    else:
        value = {"x": {"fingerprint": "f", "made_by": {}, **value["x"]}}
    (run_dir / "run.json").write_text(json.dumps({**record, key: value}))
    with pytest.raises(UsageError, match="no record any more"):
        page_of(run_dir, target=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
