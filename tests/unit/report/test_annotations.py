"""Distributions and examples of annotated rows."""

import json
from array import array

from post_training.report.annotations import (
    describe_distribution,
    read_annotations,
    read_pair_figures,
)


def branch(text, reward, **more):
    messages = [{"role": "assistant", "parts": [{"type": "response", "content": text}]}]
    return {"messages": messages, "rewards": {"right": reward}, "finish_reason": "stop", **more}


def write_rows(run_dir, rows):
    (run_dir / "dataset").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "dataset/rows.jsonl").write_text(text)
    return run_dir


def row(prompt, *branches):
    opening = {"role": "user", "content": prompt}
    return {"initial_prompt": opening, "conversation_branches": list(branches)}


def test_distribution_has_quantiles_of_the_nearest_rank_and_every_value_in_a_bin():
    found = describe_distribution(array("d", [5, 1, 2, 4]))
    names = ("least", "5%", "25%", "median", "75%", "95%", "largest")
    assert [found[name] for name in names] == [1, 1, 2, 4, 4, 5, 5]
    counts = found["histogram"]["counts"]
    assert (counts[0], sum(counts), counts[-1]) == (1, 4, 1)


def test_annotations_have_every_number_of_a_branch_and_why_it_ended(tmp_path):
    rows = [
        row("a?", branch("x", 1.0, completion_length=3), branch("y", 0.0, completion_length=9)),
        row("b?", branch("z", 4.0, completion_length=5, finish_reason="length")),
    ]
    found = read_annotations(write_rows(tmp_path, rows), 1 << 20)
    assert (found.num_rows, found.num_branches, found.is_whole) == (2, 3, True)
    assert found.finish_reasons == {"stop": 2, "length": 1}
    assert set(found.distributions) == {"completion length (tokens)", "reward: right"}
    assert found.distributions["reward: right"]["largest"] == 4.0
    assert [(each.prompt, each.completion) for each in found.best] == [("b?", "z"), ("a?", "x")]
    assert [(each.prompt, each.completion) for each in found.worst] == [("a?", "y")]


def test_annotations_of_many_rows_have_the_best_and_worst_of_all(tmp_path):
    rows = [row(f"{n}?", branch("up", float(n)), branch("down", -float(n))) for n in range(1000)]
    found = read_annotations(write_rows(tmp_path, rows), 1 << 30)
    assert [each.reward for each in found.best] == [999.0, 998.0, 997.0]
    assert [each.reward for each in found.worst] == [-999.0, -998.0, -997.0]


def test_annotations_of_a_large_dataset_are_of_its_first_rows_and_say_so(tmp_path):
    rows = [row(f"{n}?", branch("x", 1.0)) for n in range(100)]
    found = read_annotations(write_rows(tmp_path, rows), 2000)
    assert 1 < found.num_rows < 100
    assert not found.is_whole


def test_rows_without_branches_and_damaged_figures_are_no_annotations(tmp_path):
    assert read_annotations(tmp_path, 1 << 20) is None
    assert read_annotations(write_rows(tmp_path, [{"messages": []}]), 1 << 20) is None
    assert read_pair_figures(tmp_path) is None
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.json").write_text("{")
    assert read_pair_figures(tmp_path) is None
