"""`entrypoint logprobs`: figures against plain transformers, on branches and on finished pairs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.annotation_stages import run_stage
from helpers.branch_rows import branch, data, prompt_row
from helpers.row_files import read_rows, write_rows
from post_training.core.errors import PostTrainingError
from post_training.models.reference import Reference


@pytest.fixture(scope="module")
def exact(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


def expected(exact: Any, prompt: list[int], completion: list[int]) -> float:
    with torch.no_grad():
        logprobs = exact(input_ids=torch.tensor([prompt + completion])).logits.log_softmax(-1)[0]
    return sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))


def text_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """As transformers renders it: the generation prompt, and the answer to the end of its turn."""
    user = {"role": "user", "content": prompt}
    before = tokenizer.apply_chat_template(
        [user], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(
        [user, {"role": "assistant", "content": answer}], tokenize=True, return_dict=False
    )
    assert whole[: len(before)] == before
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return before, whole[len(before) : len(whole) - whole[::-1].index(end)]


def rows(number: int = 5) -> list[dict[str, Any]]:
    return [
        prompt_row(
            f"p{n}",
            f"What is {n} + {n}?",
            [branch(f"{n} + {n} = {value}" + "!" * (value % 5)) for value in range(n + 2)],
        )
        for n in range(number)
    ]


def run(run_dir: Path, path: Path, rows_path: Path, **more: Any) -> list[dict[str, Any]]:
    settings = {"model": {"path": str(path)}, "chunk_rows": 2, "num_threads": 1, **more}
    settings["data"] = data(rows_path, chat_template="chatml")
    run_stage("logprobs", settings, run_dir)
    return read_rows(run_dir)


def test_logprobs_of_texts_are_those_that_training_sees(model, exact, tokenizer, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows())
    found = run(tmp_path / "run", model, path)
    assert [row["conversation_id"] for row in found] == [f"p{n}" for n in range(5)]
    for row in found:
        for each in row["conversation_branches"]:
            [part] = each["messages"][0]["parts"]
            ids = text_ids(tokenizer, row["initial_prompt"]["content"], part["content"])
            assert each["completion_length"] == len(ids[1])
            close = pytest.approx(expected(exact, *ids), abs=1e-5 * len(ids[1]))
            assert each["completion_ref_logprob"] == close


def test_logprobs_after_a_prompt_of_several_turns(model, exact, tokenizer, tmp_path: Path):
    turns = [("user", "What is 1 + 1?"), ("assistant", "1 + 1 = 2"), ("user", "And 2 + 2?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": "2 + 2 = 4"}])
    [row] = run(tmp_path / "run", model, path)
    [found] = row["conversation_branches"]
    before = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = [*tokenizer.encode("2 + 2 = 4"), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert found["completion_length"] == len(answer)
    close = pytest.approx(expected(exact, before, answer), abs=1e-5 * len(answer))
    assert found["completion_ref_logprob"] == close


def test_logprobs_of_sampled_ids_never_look_at_the_text(model, exact, tokenizer, tmp_path: Path):
    # The ids of its characters one by one, not those that the tokenizer would merge.
    sampled = [tokenizer.convert_tokens_to_ids(c) for c in "What"]
    assert tokenizer.encode("What") != sampled
    row = prompt_row("a", "What is it?", [branch("What", completion_token_ids=sampled)])
    [found] = run(tmp_path / "run", model, write_rows(tmp_path / "rows.jsonl", [row]))
    [scored] = found["conversation_branches"]
    prompt, _ = text_ids(tokenizer, "What is it?", "x")
    assert scored["completion_length"] == 4
    close = pytest.approx(expected(exact, prompt, sampled), abs=1e-4)
    assert scored["completion_ref_logprob"] == close


def test_logprobs_of_samples_of_another_template_are_refused(model, tokenizer, tmp_path: Path):
    sampled = branch("x", completion_token_ids=[5])
    prompt, _ = text_ids(tokenizer, "What?", "x")
    row = prompt_row("a", "What?", [sampled], prompt_token_ids=prompt)
    run(tmp_path / "same", model, write_rows(tmp_path / "same.jsonl", [row]))
    row["prompt_token_ids"] = prompt[:-1]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(PostTrainingError, match=r"a: prompt_token_ids: .* sampled after other"):
        run(tmp_path / "run", model, path)


def test_logprobs_of_finished_pairs_are_those_of_their_branches(model, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows())
    of_branches = run(tmp_path / "branches", model, path)
    pairs = []
    for row in of_branches:
        user = {"role": "user", "content": row["initial_prompt"]["content"]}
        one, other = (
            {"role": "assistant", "content": each["messages"][0]["parts"][0]["content"]}
            for each in row["conversation_branches"][:2]
        )
        pairs.append({"prompt": [user], "chosen": [one], "rejected": [other], "chosen_reward": 1})
    found = run(tmp_path / "pairs", model, write_rows(tmp_path / "pairs.jsonl", pairs))
    for row, pair, source in zip(of_branches, found, pairs, strict=True):
        one, other = row["conversation_branches"][:2]
        # Other neighbours, so other shapes.
        for side, own in (("chosen", one), ("rejected", other)):
            close = pytest.approx(own["completion_ref_logprob"], abs=1e-4)
            assert pair[f"ref_{side}_logprob"] == close
            assert pair[f"{side}_length"] == own["completion_length"]
        assert {key: pair[key] for key in source} == source


def test_logprobs_bytes_do_not_depend_on_the_chunks(model, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows(6))
    whole = run(tmp_path / "whole", model, path, chunk_rows=100)
    assert run(tmp_path / "single", model, path, chunk_rows=1) == whole
    read = [tmp_path / name / "dataset/rows.jsonl" for name in ("whole", "single")]
    assert read[0].read_bytes() == read[1].read_bytes()


def test_logprobs_say_whose_they_are(model, init_model, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows(1))
    other = init_model(tmp_path / "other", hidden_size=16)
    references = []
    for name, settings in (
        ("one", {"path": str(model)}),
        ("again", {"path": str(model)}),
        ("other", {"path": str(other)}),
        ("bfloat16", {"path": str(model), "dtype": "bfloat16"}),
    ):
        run(tmp_path / name, model, path, model=settings)
        references.append(Reference.read(tmp_path / name / "dataset"))
    one, again, of_other, of_bfloat16 = references
    one.check(again, "rows")
    with pytest.raises(PostTrainingError, match="another model: weights"):
        one.check(of_other, "rows")
    with pytest.raises(PostTrainingError, match="another model: dtype"):
        one.check(of_bfloat16, "rows")


def test_logprobs_of_an_answer_beyond_the_models_positions_name_it(model, tmp_path: Path):
    row = prompt_row("long", "What?", [branch("!?" * 200)])
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(PostTrainingError, match=r"long: conversation_branches\[0\].*reads 128\)"):
        run(tmp_path / "run", model, path)
