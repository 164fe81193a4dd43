"""Samples are those of the model, the same for any chunks, order and workers."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.annotation_stages import run_stage
from helpers.row_files import read_rows
from helpers.tiny_models import make_model
from post_training.annotate.config import SamplingConfig
from post_training.annotate.samplers import Endings, draw, prompt_seed, random_numbers
from post_training.models.load import load_tokenizer

N = 4


@pytest.fixture(scope="module")
def prompts(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(dataset.read_text().splitlines(keepends=True)[:7]))
    return path


def settings(model: Path, data: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(data)}]},
        "sampling": {"n": N, "max_tokens": 12},
        "chunk_rows": 3,
        "num_threads": 1,
        "seed": 5,
        **more,
    }


@pytest.fixture(scope="module")
def expected(model: Path, prompts: Path, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("expected")
    run_stage("generate", settings(model, prompts), run_dir)
    return run_dir


def samples(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [b for b in row["conversation_branches"] if b["is_reference_completion"]]


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "dataset/rows.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_samples_have_the_same_bytes_for_any_chunks(chunk_rows, model, prompts, expected, tmp_path):
    run_stage("generate", settings(model, prompts, chunk_rows=chunk_rows), tmp_path)
    assert digest(tmp_path) == digest(expected)


def test_samples_have_the_same_bytes_for_any_workers(model, prompts, expected, tmp_path):
    for index in (2, 0):
        workers = {"index": index, "count": 3}
        run_stage("generate", settings(model, prompts, workers=workers), tmp_path)
    run_stage("generate", settings(model, prompts), tmp_path)
    assert digest(tmp_path) == digest(expected)


def test_samples_do_not_depend_on_the_order_of_the_prompts(model, prompts, expected, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(prompts.read_text().splitlines(keepends=True)[::-1]))
    run_stage("generate", settings(model, data), tmp_path / "run")
    assert read_rows(tmp_path / "run") == read_rows(expected)[::-1]


def test_samples_of_another_seed_differ_and_those_of_a_prompt_do_too(
    model, prompts, expected, tmp_path
):
    run_stage("generate", settings(model, prompts, seed=6), tmp_path)
    for row, other in zip(read_rows(expected), read_rows(tmp_path), strict=True):
        ids = [tuple(sample["completion_token_ids"]) for sample in samples(row)]
        assert len(set(ids)) == N
        assert ids != [tuple(sample["completion_token_ids"]) for sample in samples(other)]


def test_stored_logprobs_are_the_models_at_temperature_1(model, prompts, expected, tmp_path):
    tokenizer = load_tokenizer(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    changed = {"n": N, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    run_stage("generate", settings(model, prompts, sampling=changed), tmp_path)
    for row in [*read_rows(expected), *read_rows(tmp_path)]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["initial_prompt"]["content"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert row["prompt_length"] == len(prompt)
        for sample in samples(row):
            ids = sample["completion_token_ids"]
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)[range(len(ids)), ids]
            found = torch.tensor(sample["completion_token_logprobs"], dtype=torch.float64)
            torch.testing.assert_close(found, logprobs, rtol=0, atol=1e-5)
            assert found.float().double().equal(found)  # float32, and no digit lost
            assert sample["completion_length"] == len(ids)


def test_sample_that_was_cut_off_says_so_and_can_be_left_out(
    model, prompts, expected, tmp_path, capsys
):
    tokenizer = load_tokenizer(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    more = {"sampling": {"n": N, "max_tokens": 60, "temperature": 3.0}}
    result = run_stage("generate", settings(model, prompts, **more), tmp_path / "all")
    found = [sample for row in read_rows(tmp_path / "all") for sample in samples(row)]
    reasons = [sample["finish_reason"] for sample in found]
    assert set(reasons) == {"stop", "length"}
    num_cut = reasons.count("length")
    assert result.metrics["num_truncated"] == num_cut
    told = f"{num_cut} of {len(found)} samples were cut off at sampling.max_tokens: 60: "
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"{told}kept, and select leaves them out (exclude_truncated)"
    for sample in found:
        ids = sample["completion_token_ids"]
        ends = ids[-1] in (end, tokenizer.eos_token_id)
        assert sample["finish_reason"] == ("stop" if ends else "length")
        assert ends or len(ids) == 60
        text = tokenizer.decode(ids[:-1] if ends else ids, skip_special_tokens=True)
        assert sample["messages"][0]["parts"][0]["content"] == text
    run_stage("generate", settings(model, prompts, exclude_truncated=True, **more), tmp_path / "b")
    kept = [sample for row in read_rows(tmp_path / "b") for sample in samples(row)]
    assert kept == [sample for sample in found if sample["finish_reason"] == "stop"]
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"{told}left out (exclude_truncated)"


def test_stop_text_ends_a_sample_and_is_not_part_of_its_text(model, prompts, expected, tmp_path):
    tokenizer = load_tokenizer(model)
    before = [s for row in read_rows(expected) for s in samples(row)]
    # Not of a character whose bytes are of several tokens: half of it is another one.
    stop = next(text for s in before if len(text := text_of(s)[3:5]) == 2 and text.isascii())
    more = {"sampling": {"n": N, "max_tokens": 12, "stop": [stop, "never said"]}}
    run_stage("generate", settings(model, prompts, **more), tmp_path)
    after = [s for row in read_rows(tmp_path) for s in samples(row)]
    assert any(one != other for one, other in zip(before, after, strict=True))
    for one, other in zip(before, after, strict=True):
        length = len(other["completion_token_ids"])
        assert other["completion_token_ids"] == one["completion_token_ids"][:length]
        if stop in text_of(one):
            assert text_of(other) == text_of(one).partition(stop)[0]
            assert stop in tokenizer.decode(other["completion_token_ids"])
            assert stop not in tokenizer.decode(other["completion_token_ids"][:-1])
            assert other["finish_reason"] == "stop"
        else:
            assert other == one


def test_text_ends_before_the_first_of_several_stop_texts(model):
    tokenizer = load_tokenizer(model).backend_tokenizer
    endings = Endings(frozenset(), ("four", "two", "five"), tokenizer)
    ids = tokenizer.encode("one two three four", add_special_tokens=False).ids
    assert endings.text(ids) == "one "


def text_of(sample: dict[str, Any]) -> str:
    return sample["messages"][0]["parts"][0]["content"]


def test_temperature_0_is_the_likeliest_token(model, prompts, tmp_path):
    more = {"sampling": {"n": 1, "temperature": 0, "max_tokens": 8}}
    run_stage("generate", settings(model, prompts, **more), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(model)
    for row in read_rows(tmp_path):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["initial_prompt"]["content"]}],
            add_generation_prompt=True, return_dict=False, return_tensors="pt",
        )  # fmt: skip
        found = plain.generate(prompt, do_sample=False, max_new_tokens=8, top_k=None, top_p=None)
        [sample] = samples(row)
        ids = sample["completion_token_ids"]
        assert found[0, prompt.shape[1] :].tolist()[: len(ids)] == ids


def test_prompt_that_fills_the_model_is_a_bad_row(model, prompts, tmp_path):
    data = tmp_path / "long.jsonl"
    rows = [{"question": "?" * n, "answer": "!"} for n in (2000, 3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_stage("generate", settings(model, data), tmp_path / "run")
    assert (result.metrics["num_rows"], result.metrics["num_rejected"]) == (1, 1)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_draw_follows_the_distribution(top_p):
    probs = torch.tensor([0.1, 0.0, 0.5, 0.3, 0.1])
    logits = probs.log().expand(20_000, -1)
    generators = [random_numbers(7 + j) for j in range(20_000)]
    found = draw(logits, SamplingConfig(n=2, top_p=top_p), generators)
    kept = probs if top_p == 1 else torch.tensor([0, 0, 0.5, 0.3, 0])
    expected = kept / kept.sum()
    counts = torch.bincount(found, minlength=5) / 20_000
    # Four standard deviations of a share of 20,000.
    torch.testing.assert_close(counts, expected, rtol=0, atol=4 * math.sqrt(0.25 / 20_000))
    assert counts[expected == 0].eq(0).all()


def test_prompt_seeds_are_spaced_and_of_recipe_and_prompt_alone():
    seeds = [prompt_seed(3, f"prompt {n}", 10) for n in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(b - a for a, b in zip(sorted(seeds)[:-1], sorted(seeds)[1:], strict=True)) >= 10
    assert all(0 <= seed < 2**62 and seed % 16 == 0 for seed in seeds)
    # sha256("3 prompt 0"), its first 8 bytes, two bits off, four cleared.
    number = int(hashlib.sha256(b"3 prompt 0").hexdigest()[:16], 16) >> 2
    assert seeds[0] == number - number % 16
    assert prompt_seed(4, "prompt 0", 10) != seeds[0]


def test_no_two_samples_of_20000_prompts_draw_by_the_same_numbers():
    """Seeds that differ in their upper bits alone are streams of their own too."""
    seeds = [prompt_seed(0, f"id{n}", 10) + j for n in range(20_000) for j in range(10)]
    low = [seed & 0xFFFFFFFF for seed in seeds]
    assert len(set(low)) < len(low)  # id6843 and id8691: torch's generator gave both one stream
    assert len({random_numbers(seed).random() for seed in seeds}) == len(seeds)


def test_several_samples_at_temperature_0_are_refused():
    with pytest.raises(ValueError, match="temperature 0 gives one sample 10 times"):
        SamplingConfig(temperature=0)


def test_model_with_a_state_instead_of_keys_and_values_is_sampled(model, prompts, tmp_path):
    """Linear attention and convolutions: the prompt is read once for each sample."""
    folder = tmp_path / "model"
    layers = ["conv", "full_attention"]
    made = make_model("lfm2", model, folder, block_multiple_of=8, layer_types=layers)
    for name, chunk_rows in (("one", 100), ("other", 1)):
        run_stage("generate", settings(folder, prompts, chunk_rows=chunk_rows), tmp_path / name)
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "other")
    for row in read_rows(tmp_path / "one"):
        for sample in row["conversation_branches"][1:]:
            drawn = sample["completion_token_ids"]
            with torch.no_grad():
                logits = made(torch.tensor([row["prompt_token_ids"] + drawn])).logits[0]
            logprobs = logits[-len(drawn) - 1 : -1].log_softmax(-1)[range(len(drawn)), drawn]
            assert sample["completion_token_logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)
