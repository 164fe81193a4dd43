"""From preference rows to pairs on disk: what is trained, what is cut, and what is left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.encoded_rows import encoder as make_encoder
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.data.config import DataConfig, PairConfig
from post_training.data.pairs.dataset import Pair, PairDataset, length_in_row
from post_training.data.pairs.prepare import PairEncoder, prepare_pairs
from post_training.data.reading import Reader, open_sources
from post_training.data.rows import COMPLETION

ROW = {"prompt": "1 + 1?", "chosen": "two", "rejected": "three"}
PROMPT_TEXT = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def prepare(
    folder: Path,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    data: dict[str, Any] | None = None,
    name: str = "chatml",
    num_ids: int | None = None,
    **limits: Any,
) -> PairDataset:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "chat_template": name,
        "datasets": [{"path": folder / "rows.jsonl"}],
        **(data or {}),
    }
    config = DataConfig.model_validate(settings)
    sources, formats = open_sources(config)
    state = PairEncoder(
        Reader(config, formats),
        make_encoder(tokenizer, name),
        PairConfig(**limits),
        num_ids or len(tokenizer),
    )
    prepare_pairs(
        folder / "pairs",
        state,
        sources,
        seed=3,
        identity={"references": [None]},
        rejects_path=folder / "rejects.jsonl",
        on_progress=lambda *_: None,
    )
    return PairDataset.open(folder / "pairs")


def texts(pair: Pair, tokenizer: Any) -> tuple[str, str, str]:
    parts = (pair.prefix, pair.chosen.ids, pair.rejected.ids)
    prefix, chosen, rejected = (tokenizer.decode(part) for part in parts)
    return prefix, chosen, rejected


def trained(answer: Any, tokenizer: Any) -> str:
    return tokenizer.decode(answer.ids[answer.kinds == COMPLETION])


def test_pairs_share_their_prompt_and_train_each_answer_with_its_end(
    tokenizer: Any, tmp_path: Path
):
    [pair] = prepare(tmp_path, tokenizer, [ROW]).read(0)
    prefix, chosen, rejected = texts(pair, tokenizer)
    assert prefix == PROMPT_TEXT
    assert chosen.startswith("two<|im_end|>")
    assert rejected.startswith("three<|im_end|>")
    assert trained(pair.chosen, tokenizer) == "two<|im_end|>"
    assert trained(pair.rejected, tokenizer) == "three<|im_end|>"


def test_pairs_of_a_template_without_tokens_of_its_own_are_the_ids_of_the_whole_texts(
    tokenizers: dict[str, Any], tmp_path: Path
):
    """Where a token may straddle the end of the prompt, both answers keep their own."""
    tokenizer = tokenizers["byte-level"]
    rows = [{"prompt": "the question", "chosen": answer, "rejected": "in er"} for answer in
            ("answer", "\n\nthe", " an an", "\nin")]  # fmt: skip
    dataset = prepare(tmp_path, tokenizer, rows, name="tulu")
    for number, row in enumerate(rows):
        pair = dataset.read_pair(number)
        for answer, side in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            found = np.concatenate([pair.prefix, answer.ids]).tolist()
            text = f"<|user|>\n{row['prompt']}\n<|assistant|>\n{row[side]}{tokenizer.eos_token}"
            expected = tokenizer.encode(text, add_special_tokens=False)
            assert found[: len(expected)] == expected, row


def test_pairs_with_token_ids_are_not_tokenised_again(tokenizer: Any, tmp_path: Path):
    row = ROW | {"prompt_token_ids": [9, 8, 7], "rejected_token_ids": [5, 6]}
    both = row | {"chosen_token_ids": [5, 5, 4]}
    dataset = prepare(tmp_path, tokenizer, [both, row])
    pair, mixed = dataset.read_pair(0), dataset.read_pair(1)
    assert pair.prefix.tolist() == [9, 8, 7]
    assert pair.chosen.ids.tolist() == [5, 5, 4]
    assert pair.rejected.kinds.tolist() == [COMPLETION] * 2
    # Chosen was written by somebody else: rendered with its prompt, and they begin differently.
    assert mixed.rejected.ids.tolist()[-5:] == [9, 8, 7, 5, 6]
    assert trained(mixed.chosen, tokenizer) == "two<|im_end|>"


def test_pairs_may_hold_ids_that_the_model_embeds_and_its_tokenizer_lacks(
    tokenizer: Any, tmp_path: Path
):
    row = ROW | {"prompt_token_ids": [9], "rejected_token_ids": [len(tokenizer) + 3]}
    with pytest.raises(PostTrainingError, match="must be from 0 to 260"):
        prepare(tmp_path / "refused", tokenizer, [row])
    dataset = prepare(tmp_path / "taken", tokenizer, [row], num_ids=300)
    assert dataset.read_pair(0).rejected.ids[-1] == len(tokenizer) + 3


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({"chosen_token_ids": [1, 999], "prompt_token_ids": [1]}, "must be from 0 to 260"),
        ({"ref_chosen_logprob": 0.5}, "ref_chosen_logprob: must be ≤ 0"),
        ({"rejected_quantile_reward": 1.5}, "must be from 0 to 1"),
        ({"ref_rewards": 1.0}, "ref_rewards: must be a list"),
    ],
)
def test_pairs_of_rows_with_wrong_figures_are_refused(
    figures: dict[str, Any], problem: str, tokenizer: Any, tmp_path: Path
):
    with pytest.raises(PostTrainingError, match=problem):
        prepare(tmp_path, tokenizer, [ROW | figures])


@pytest.mark.parametrize(
    ("keep", "expected"), [("end", PROMPT_TEXT[-2:]), ("start", "<|im_start|>u")]
)
def test_pairs_with_long_prompts_keep_the_end_that_is_asked_for(
    keep: str, expected: str, tokenizer: Any, tmp_path: Path
):
    dataset = prepare(tmp_path, tokenizer, [ROW], max_prompt_length=2, keep_prompt=keep)
    [pair] = dataset.read(0)
    assert texts(pair, tokenizer)[0] == expected
    assert pair.is_cut
    assert dataset.record["counts"]["num_truncated_prompts"] == 1


def test_pairs_with_answers_that_are_cut_are_left_out_unless_asked_for(
    tokenizer: Any, tmp_path: Path
):
    rows = [
        ROW | {"ref_chosen_logprob": -1.0, "ref_rejected_logprob": -2.0},
        {"prompt": "?", "chosen": "a", "rejected": "b", "chosen_is_truncated": False},
        {"prompt": "?", "chosen": "a", "rejected": "b", "chosen_is_truncated": True},
    ]
    dropped = prepare(tmp_path / "dropped", tokenizer, rows, max_completion_length=4)
    assert dropped.record["rejected"] == {"truncated": 2}
    assert dropped.num_pairs == 1
    limits = {"max_completion_length": 4, "truncated_completions": "train"}
    kept = prepare(tmp_path / "kept", tokenizer, rows, **limits)
    assert kept.num_pairs == 3
    assert texts(kept.read_pair(0), tokenizer)[1:] == ("two<|im_end|>", "thre")
    assert kept.record["counts"]["num_truncated_completions"] == 1
    # The logprobs are of the whole answers.
    assert np.isnan(kept.read_pair(0).figures[:, 0]).all()


@pytest.mark.parametrize(
    ("limits", "figures", "expected"),
    [
        ({}, {"chosen_quantile_reward": 0.9}, (0.9, 4.0)),
        ({}, {}, (0.75, 4.0)),
        ({"num_ref_rewards": 2}, {"chosen_quantile_reward": 0.9}, (0.5, 2.0)),
    ],
)
def test_pairs_have_the_quantiles_of_the_data_or_of_its_reference_rewards(
    limits: dict[str, Any],
    figures: dict[str, Any],
    expected: tuple[float, float],
    tokenizer: Any,
    tmp_path: Path,
):
    own = {"ref_rewards": [3.0, 1.0, 2.0, 0.0], "chosen_reward": 2, "rejected_reward": -1}
    [pair] = prepare(tmp_path, tokenizer, [ROW | own | figures], **limits).read(0)
    assert tuple(pair.figures[0, 1:].tolist()) == expected
    assert pair.figures[1, 1] == 0.0


def test_pairs_with_fewer_reference_rewards_than_asked_for_are_refused(
    tokenizer: Any, tmp_path: Path
):
    own = {"ref_rewards": [3.0], "chosen_reward": 2, "rejected_reward": -1}
    with pytest.raises(PostTrainingError, match="num_ref_rewards 2 needs chosen_reward and as"):
        prepare(tmp_path, tokenizer, [ROW | own], num_ref_rewards=2)


@pytest.mark.parametrize("share", [True, False])
def test_packed_rows_hold_whole_pairs_within_their_length(
    share: bool, tokenizer: Any, tmp_path: Path
):
    rows = [ROW | {"prompt": "?" * n, "chosen": "x" * (n % 7 + 1)} for n in range(1, 40)]
    limits = {"packing": "bfd", "max_seq_length": 300, "share_prompt": share}
    dataset = prepare(tmp_path, tokenizer, rows, **limits)
    pairs = [dataset.read(row) for row in range(len(dataset))]
    assert sorted(pair.number for own in pairs for pair in own) == list(range(39))
    for own in pairs:
        lengths = [length_in_row(dataset.pairs[p.number], share_prompt=share) for p in own]
        assert sum(lengths) <= 300
    assert len(dataset) < 39
    too_long = ROW | {"prompt": "?" * 300}
    rest = prepare(tmp_path / "other", tokenizer, [too_long, ROW], **limits)
    assert rest.record["rejected"] == {"too-long": 1}


def test_pairs_are_the_same_bytes_for_any_number_of_workers(tokenizer: Any, tmp_path: Path):
    rows = [ROW | {"prompt": f"{n} " + "why " * 400, "ref_rewards": [n]} for n in range(2000)]
    hashes = []
    for workers in (1, 3):
        data = {"num_workers": workers, "deduplicate": True}
        prepare(tmp_path / str(workers), tokenizer, rows + rows[:9], data)
        hashes.append(hash_files(tmp_path / str(workers) / "pairs"))
    assert hashes[0] == hashes[1]
    record = json.loads((tmp_path / "1/pairs/prepared.json").read_text())
    assert record["rejected"] == {"duplicate": 9}


def test_row_with_one_answer_is_no_pair(tokenizer: Any, tmp_path: Path):
    with pytest.raises(PostTrainingError, match="the row has one answer, and preferences have two"):
        prepare(tmp_path, tokenizer, [{"prompt": "?", "completion": "!"}])


def test_pairs_that_are_the_same_up_to_the_limit_train_nothing(tmp_path: Path, tokenizer: Any):
    same = {**ROW, "chosen": "one two", "rejected": "one three"}
    data = {"on_error": "quarantine"}
    limits = {"max_completion_length": 4, "truncated_completions": "train"}
    dataset = prepare(tmp_path, tokenizer, [same, ROW], data, **limits)
    assert len(dataset) == 1
    [reject] = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (1, "untrained")
    assert reject["problem"] == (
        "chosen and rejected are the same tokens up to dpo.max_completion_length"
    )


def test_pairs_that_are_all_cut_off_are_told_with_the_setting_and_no_temporary_path(
    tokenizer: Any, tmp_path: Path
):
    rows = [ROW | {"chosen_is_truncated": True}] * 3
    with pytest.raises(PostTrainingError) as error:
        prepare(tmp_path, tokenizer, rows)
    problem = "no pair to train on: 3 rows left out: 3 truncated (truncated_completions: drop)"
    assert error.value.problem == problem
    assert "set truncated_completions: train" in str(error.value.hint)
    assert ".tmp" not in str(error.value)
    assert len(prepare(tmp_path, tokenizer, rows, truncated_completions="train")) == 3
