"""`post-training data inspect` and `count` of pairs, and what training will read of each source."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from helpers.dpo_runs import preference_rows
from helpers.sft_runs import changed
from helpers.tokenize_runs import write_lines
from post_training.cli.inspect import (
    count_config,
    inspect_config,
    load_settings,
    open_prepared,
)
from post_training.data.order import row_stream
from post_training.stages.context import StageContext


@pytest.fixture
def dpo_config(config: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    """Of two sources, with 9 and 4 pairs: the second with reference logprobs."""
    monkeypatch.chdir(tmp_path)
    rows = preference_rows(13)
    figures = {"ref_chosen_logprob": -3.25, "ref_rejected_logprob": -5.5}
    write_lines(tmp_path / "sums.jsonl", *rows[:9])
    write_lines(tmp_path / "more.jsonl", *({**row, **figures} for row in rows[9:]))
    others = {key: config[key] for key in ("model", "training", "num_threads", "seed")}
    datasets = [{"path": "sums.jsonl"}, {"path": "more.jsonl"}]
    return {
        **others,
        "data": {"chat_template": "chatml", "datasets": datasets, "num_workers": 1},
        "dpo": {},
        "loss": {"name": "dpo", "beta": 0.1},
    }


def write(config: dict[str, Any], name: str = "dpo.yaml") -> Path:
    Path(name).write_text(json.dumps(config))
    return Path(name)


def inspect(config: dict[str, Any], **settings: Any) -> None:
    inspect_config(write(config), [], **{"num_samples": 1, "row": None, "html": None, **settings})


def count(config: dict[str, Any], capfd: Any, *, per_sample: Path | None = None) -> dict[str, Any]:
    count_config(write(config), [], as_json=True, per_sample=per_sample)
    return json.loads(capfd.readouterr().out)


def test_inspect_shows_a_prompt_once_and_both_answers(dpo_config: dict[str, Any], capfd: Any):
    inspect(changed(dpo_config, **{"data.datasets": [{"path": "sums.jsonl"}]}), num_samples=2)
    shown = capfd.readouterr().out
    assert shown.count("What is 1 + 1?<|im_end|>") == 1
    assert "⟦1 + 1 = 2.<|im_end|>⟧" in shown
    assert "⟦3 so<|im_end|>⟧" in shown
    assert "── prompt of pair 2 of sums.jsonl: " in shown
    assert "── chosen of pair 2 of sums.jsonl: " in shown
    # Of four reference rewards, how many are at most the answer's.
    assert "trained, quantile 0.5\n" in shown
    assert "trained, quantile 1" in shown


def test_inspect_row_of_pairs_is_the_one_that_training_reads(
    dpo_config: dict[str, Any], tmp_path: Path, capfd: Any
):
    from post_training.models.load import load_tokenizer
    from post_training.stages.prepared_data import PairPreparation
    from post_training.train.config import DpoConfig

    limits = {"packing": "bfd", "max_seq_length": 256}
    config = DpoConfig.model_validate({**dpo_config, "dpo": limits})
    tokenizer = load_tokenizer(config.model.path)
    (tmp_path / "run").mkdir()
    context = StageContext(tmp_path / "run", input_fingerprints={})
    dataset = PairPreparation(
        context, config.data, config.dpo, tokenizer, config.seed
    ).open_or_prepare()
    capfd.readouterr()
    for row in range(len(dataset)):
        inspect({**dpo_config, "dpo": limits}, row=row + 1)
        shown = capfd.readouterr().out
        pairs = dataset.read(row)
        assert shown.count("── chosen of pair") == len(pairs)
        for pair in pairs:
            for ids in (pair.prefix, pair.chosen.ids, pair.rejected.ids):
                spelled = " ".join(map(str, ids.tolist()))
                assert spelled in shown.replace("⟦", "").replace("⟧", "")


def test_inspect_tells_reference_logprobs_and_what_was_cut(dpo_config: dict[str, Any], capfd: Any):
    more = changed(dpo_config, **{"data.datasets": [{"path": "more.jsonl"}]})
    inspect(more)
    assert "trained, reference logprob -3.25 nats" in capfd.readouterr().out
    cut = changed(more, dpo={"max_prompt_length": 5})
    inspect(cut, html=Path("page.html"))
    page = Path("page.html").read_text()
    assert "5 tokens, 0 trained, the pair was cut by max_prompt_length" in page
    assert "reference logprob" not in page


def test_count_of_pairs_adds_up(dpo_config: dict[str, Any], capfd: Any):
    counts = count(dpo_config, capfd, per_sample=Path("pairs.tsv"))
    first, second, both = counts["sources"]
    assert (first["num_pairs"], second["num_pairs"], both["num_pairs"]) == (9, 4, 13)
    assert (first["num_with_reference"], second["num_with_reference"]) == (0, 4)
    title, *lines = (line.split("\t") for line in Path("pairs.tsv").read_text().splitlines())
    table = [dict(zip(title, line, strict=True)) for line in lines]
    for name in ("prompt", "chosen", "rejected"):
        assert both[name] == round(sum(int(row[name]) for row in table) / 13, 1)
    for row in table:
        answers = int(row["chosen"]) + int(row["rejected"])
        assert int(row["tokens"]) == 2 * int(row["prompt"]) + answers
    longer = sum(int(row["chosen"]) > int(row["rejected"]) for row in table)
    assert both["chosen_longer"] == round(longer / 13, 4)
    assert both["num_trained_tokens"] == sum(int(row["trained"]) for row in table)
    assert sum(each["num_sequences"] for each in counts["lengths"]) == 13


def test_count_says_what_training_reads_of_each_source(dpo_config: dict[str, Any], capfd: Any):
    """20 batches of 8 of 13 rows: 12 epochs and 4 rows more."""
    config = changed(dpo_config, **{"training.max_steps": 20})
    counts = count(config, capfd, per_sample=Path("pairs.tsv"))
    lines = [line.split("\t") for line in Path("pairs.tsv").read_text().splitlines()[1:]]
    read = [lines[row] for row in islice(row_stream(13, config["seed"]), 160)]
    assert [int(line[0]) for line in lines] == list(range(1, 14))  # a row a pair, in order
    reading = counts["reading"]
    assert (reading["num_steps"], reading["num_rows"]) == (20, 160)
    all_tokens = sum(int(line[3]) for line in read)
    for name, source in zip(("sums.jsonl", "more.jsonl"), reading["sources"], strict=True):
        own = [line for line in read if line[1] == name]
        assert (source["name"], source["num_read"]) == (name, len(own))
        assert source["num_tokens"] == sum(int(line[3]) for line in own)
        assert source["num_trained_tokens"] == sum(int(line[4]) for line in own)
        assert source["share_of_tokens"] == round(source["num_tokens"] / all_tokens, 6)


def test_count_table_of_pairs_for_a_person(dpo_config: dict[str, Any], capfd: Any):
    count_config(write(dpo_config), [], as_json=False, per_sample=None)
    shown = capfd.readouterr().out
    assert "training reads 96 rows in 12 steps, 7.38 epochs of 13 rows" in shown
    assert "pairs by length, in tokens" in shown
    assert "chosen longer" in shown


def test_configuration_of_prepare_with_pairs_is_of_no_run(dpo_config: dict[str, Any], capfd: Any):
    own = {"tokenizer": dpo_config["model"]["path"], "data": dpo_config["data"], "dpo": {}}
    counts = count(own, capfd)
    assert (counts["reading"]["num_steps"], counts["reading"]["num_rows"]) == (None, 13)


def test_reward_model_reads_texts_where_dpo_reads_the_sampled_ids(dpo_config: dict[str, Any]):
    """Sampled ids may be another tokenizer's, and `rewards` has the text alone."""
    row = preference_rows(1)[0]
    sampled = {"prompt_token_ids": [9, 8], "chosen_token_ids": [7], "rejected_token_ids": [6, 5]}
    write_lines(Path("sums.jsonl"), {**row, **sampled})
    dpo = changed(dpo_config, **{"data.datasets": [{"path": "sums.jsonl"}]})
    rewards = {key: cell for key, cell in dpo.items() if key not in ("dpo", "loss")}
    texts, read_as = {}, {}
    for name, own in (("dpo", dpo), ("pairs", {**rewards, "pairs": {}})):
        with open_prepared(load_settings(write(own), []), None) as (dataset, tokenizer):
            [pair] = dataset.read(0)
            assert dataset.record["identity"][name] is not None
            ids = [[*pair.prefix, *answer.ids] for answer in (pair.chosen, pair.rejected)]
            texts[name] = [tokenizer.decode(each) for each in ids]
            columns = dataset.record["sources"][0]["columns"]
            read_as[name] = {each["name"]: each["read_as"] for each in columns}
    assert texts["dpo"] == [tokenizer.decode(each) for each in ([9, 8, 7], [9, 8, 6, 5])]
    for said, text in zip((row["chosen"], row["rejected"]), texts["pairs"], strict=True):
        expected = tokenizer.apply_chat_template([*row["prompt"], *said], tokenize=False)
        assert text == expected
    # And it is told so.
    assert {read_as["dpo"][column] for column in sampled} == {"figure"}
    assert {read_as["pairs"][column] for column in sampled} == {None}


def test_configuration_of_a_reward_model_is_read_as_pairs(dpo_config: dict[str, Any], capfd: Any):
    rewards = {key: cell for key, cell in dpo_config.items() if key not in ("dpo", "loss")}
    assert count(rewards, capfd)["sources"][-1]["num_pairs"] == 13
