"""A look at a model: what it is asked, what it says, and which folders are models."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.sft_runs import changed
from post_training.annotate.chat import Speaker, find_model, main
from post_training.annotate.config import SamplingConfig
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.rows import Message
from post_training.models.load import load_model, load_tokenizer

GREEDY = SamplingConfig(n=1, temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def trained(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter, in our template plain; the model's own is chatml."""
    from helpers.stage_process import start_entrypoint

    folder = tmp_path_factory.mktemp("trained")
    columns = {"prompt": "question", "completion": "answer"}
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {
            "chat_template": "tulu",
            "datasets": [{"path": str(dataset), "columns": columns}],
        },
        "training": {"max_steps": 2, "effective_batch_size": 2, "learning_rate": 0.01},
        "sft": {"max_seq_length": 96},
        "lora": {"rank": 2, "alpha": 4.0},
        "checkpointing": {"save_steps": 1, "inference_checkpoint_steps": 1},
        "num_threads": 1,
    }
    (folder / "sft.yaml").write_text(json.dumps(changed(config)))
    process = start_entrypoint(["sft", str(folder / "sft.yaml"), "--unpinned"], folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run"


def naive_greedy(path: Path, prompt: list[int], number: int) -> list[tuple[int, float]]:
    """Without a cache, in float64: the likeliest token each time."""
    model = load_model(path, dtype="float32", attn_implementation="eager").double()
    ids, drawn = list(prompt), []
    with torch.no_grad():
        for _ in range(number):
            logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(logprobs.argmax())
            drawn.append((token, float(logprobs[token])))
            ids.append(token)
    return drawn


def test_answer_is_the_likeliest_tokens_with_their_logprobs(model: Path):
    speaker = Speaker(find_model(model), None, GREEDY, None)
    ids = speaker.encode([Message("user", "What is 1 + 1?")])
    tokens = list(speaker.answer(ids, seed=0))
    expected = naive_greedy(model, ids, len(tokens))
    assert [token.id for token in tokens] == [token for token, _ in expected]
    assert [token.logprob for token in tokens] == pytest.approx(
        [logprob for _, logprob in expected], abs=1e-4
    )
    text = load_tokenizer(model).decode(ids)
    assert text == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_same_seed_draws_the_same_and_another_draws_others(model: Path):
    settings = SamplingConfig(n=1, temperature=1.0, max_tokens=8)
    speaker = Speaker(find_model(model), None, settings, None)
    ids = speaker.encode([Message("user", "Hello")])
    first, again, other = ([t.id for t in speaker.answer(ids, seed)] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("place", "is_adapter"),
    [
        (".", False),
        ("model", False),
        ("adapter", True),
        ("checkpoints/checkpoint-1", True),
        ("inference_checkpoints/step-1", False),
    ],
)
def test_every_folder_of_a_run_is_asked_in_the_template_of_its_training(
    trained: Path, model: Path, place: str, is_adapter: bool
):
    found = find_model(trained / place)
    assert found.template == "tulu"
    assert (found.adapter is not None) == is_adapter
    if is_adapter:
        assert found.base == model
    speaker = Speaker(found, None, GREEDY, None)
    ids = speaker.encode([Message("user", "Hi")])
    assert speaker.tokenizer.decode(ids).startswith("<|user|>\nHi\n<|assistant|>\n")
    assert list(speaker.answer(ids, seed=0))


def test_adapter_says_what_the_merged_model_says(trained: Path):
    said = []
    for place in ("model", "adapter"):
        speaker = Speaker(find_model(trained / place), None, GREEDY, None)
        ids = speaker.encode([Message("user", "Hi")])
        said.append([token.id for token in speaker.answer(ids, seed=0)])
    assert said[0] == said[1]


def test_adapter_of_an_unknown_model_asks_for_it(trained: Path, model: Path, tmp_path: Path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((trained / "adapter" / name).read_bytes())
    with pytest.raises(UsageError, match="its model is not known: nothing names it"):
        find_model(tmp_path)
    assert find_model(tmp_path, model).base == model


def test_base_for_a_model_that_is_no_adapter_is_refused(model: Path):
    with pytest.raises(UsageError, match="--base: only for an adapter"):
        find_model(model, model)


def test_chat_reads_turns_from_a_pipe_and_remembers_them_until_new(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    typed = "Hello\n\nAnd then?\n/new\nHello\n/nothing\n/quit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["chat", str(model), "--tokens", "--max-tokens", "4"]) == 0
    said = capsys.readouterr()
    prompts = [line for line in said.out.splitlines() if line.startswith("prompt: ")]
    assert len(prompts) == 3
    assert prompts[0] == prompts[2] != prompts[1]
    # The second turn has the first one before it, with its answer.
    assert prompts[1].split(": ")[2].startswith(prompts[0].split(": ")[2])
    assert "no command /nothing" in said.err


def test_generate_answers_each_prompt_as_json(model: Path, capsys: Any):
    words = ["generate", str(model), "--prompt", "a", "--prompt", "b", "--json"]
    assert main([*words, "--max-tokens", "3", "-n", "2", "--temperature", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "a", "b", "b"]
    assert rows[0]["completion_token_ids"] != rows[1]["completion_token_ids"]
    for row in rows:
        assert len(row["completion_token_ids"]) == len(row["completion_token_logprobs"])
        assert row["finish_reason"] in ("stop", "length")


def test_generate_takes_model_template_and_sampling_of_a_configuration(
    model: Path, tmp_path: Path, capsys: Any
):
    config = {
        "model": {"path": str(model)},
        "data": {"chat_template": "tulu", "datasets": [{"path": "rows.jsonl"}]},
        "sampling": {"n": 3, "max_tokens": 2},
    }
    (tmp_path / "generate.yaml").write_text(json.dumps(config))
    main(["generate", str(tmp_path / "generate.yaml"), "--prompt", "a", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert load_tokenizer(model).decode(rows[0]["prompt_token_ids"]).startswith("<|user|>\na")


def test_raw_prompt_stands_in_no_template(model: Path, capsys: Any):
    main(["generate", str(model), "--prompt", "1 + 1 =", "--raw", "--json", "--max-tokens", "1"])
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert load_tokenizer(model).decode(row["prompt_token_ids"]) == "1 + 1 ="


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-tokens", "0"], "--max-tokens: Input should be greater than 0 (got 0)"),
        (["--template", "nosuch"], "--template: no such template: nosuch (there are "),
        (["--prompt", "\udcff"], "the text holds half a character (lone surrogate)"),
        (["-n", "2"], "n: temperature 0 gives one sample 2 times; set n: 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(words: list[str], told: str, model: Path):
    with pytest.raises(UsageError) as raised:
        main(["generate", str(model), "--prompt", "a", *words])
    assert told in str(raised.value)


def test_adapter_that_does_not_fit_is_refused_in_one_line(
    trained: Path, model: Path, tmp_path: Path
):
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    found = find_model(adapter, model)
    weights = load_file(adapter / "adapter_model.safetensors")
    (name, first), *others = weights.items()

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(PostTrainingError) as raised:
            Speaker(found, None, GREEDY, None)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert f"it lacks 1 matrices: {name}" in refusal(dict(others))
    other = name.replace("layers.0", "layers.7")
    assert f"the model has no place for 1: {other}" in refusal({**weights, other: first.clone()})
    assert "the adapter can't be added" in refusal({**weights, name: torch.ones(3, 5)})
    (adapter / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(PostTrainingError, match="cut off, or no safetensors file"):
        Speaker(found, None, GREEDY, None)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(PostTrainingError, match="must be a JSON object"):
        find_model(adapter)


def test_chat_refuses_bytes_that_are_no_text(model: Path, monkeypatch: pytest.MonkeyPatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(UsageError, match="stdin: must be text in UTF-8"):
        main(["chat", str(model)])
