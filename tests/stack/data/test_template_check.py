"""`post-training template check`: what is found of a template."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.encoded_rows import assistant, user
from post_training.core.errors import UsageError
from post_training.data.chat.templates import template_text
from post_training.data.inspection.template_check import check_template, page_of_report
from post_training.data.rows import Conversation

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def outcomes(text: str, tokenizer: Any) -> dict[str, tuple[str, str]]:
    tokenizer.chat_template = text
    report = check_template("model", tokenizer)
    return {finding.subject: (finding.outcome, finding.said) for finding in report.findings}


def test_template_equal_to_one_of_ours_is_found_so(tokenizer: Any):
    found = outcomes(TURNS, tokenizer)
    assert found["use"] == ("pass", "turns are found by a server's prompts")
    assert found["beside chatml"] == ("pass", "the same text")
    assert found["history"][0] == found["server"][0] == found["ids"][0] == "pass"
    assert found["expresses"] == ("warning", "no calls, steps, thought, tools: refused")


def test_marks_that_take_part_of_the_prompt_are_not_what_a_server_sends(tokenizer: Any):
    marks = template_text("chatml").replace(
        "{{- '<|im_start|>assistant\\n' -}}\n    {%- gen", "{%- gen"
    )
    marks = marks.replace(
        "{{- message['content'] + '<|im_end|>' -}}\n    {%- endgen",
        "{{- '<|im_start|>assistant\\n' + message['content'] + '<|im_end|>' -}}\n    {%- endgen",
    )
    assert marks.count("'<|im_start|>assistant\\n' + message") == 1
    outcome, said = outcomes(marks, tokenizer)["server"]
    assert (outcome, said.partition(":")[0]) == ("fail", "several turns")


def test_bos_that_the_template_writes_twice_is_found(tokenizer: Any):
    found = outcomes("{{ bos_token + bos_token }}" + TURNS, tokenizer)
    assert found["begin"] == ("fail", "the template writes '<s>' twice")


def test_end_of_turn_that_is_not_the_eos_is_found(tokenizer: Any):
    assert tokenizer.eos_token != "<|im_end|>"
    outcome, said = outcomes(TURNS, tokenizer)["end of turn"]
    assert outcome == "warning"
    assert "needs eos_token_id in generation_config" in said


def test_thoughts_that_are_left_out_of_history_are_found(tokenizer: Any):
    thinks = TURNS.replace(
        "m.content + ",
        "('<think>' + m.reasoning_content + '</think>' "
        "if m.reasoning_content and loop.last else '')"
        " + m.content + ",
    )
    assert outcomes(thinks, tokenizer)["history"] == (
        "warning",
        "the template leaves out earlier thoughts; rows of several turns become several "
        "(several thoughts)",
    )


def test_example_that_is_refused_leaves_the_others_to_be_checked(tokenizer: Any):
    """Calls can be expressed, but not with a text beside them, as in gpt-oss with a thought."""
    calls = TURNS.replace(
        "m.content + ",
        "(raise_exception('no') if m.content and m.tool_calls else '') + m.content + "
        "(m.tool_calls | tojson if m.tool_calls else '') + ",
    )
    tokenizer.chat_template = calls
    report = check_template("model", tokenizer)
    refused = [sample.name for sample in report.samples if sample.refused]
    assert "calls" in refused
    assert next(f for f in report.findings if f.subject == "server").outcome == "pass"
    assert "calls" not in next(f for f in report.findings if f.subject == "expresses").said


def test_rows_that_are_refused_are_told(tokenizer: Any):
    tokenizer.chat_template = TURNS
    good, bad = ((user("a"), assistant("b")), (user("a"), assistant("b", thought="c")))
    rows = [("x:1", Conversation(good)), ("x:2", Conversation(bad))]
    report = check_template("model", tokenizer, rows)
    assert report.findings[-1].said == (
        "1 of 2 rows can be trained; x:2: chat template 'model' can't express: thought"
    )
    assert report.passed
    assert "<mark>b&lt;|im_end|&gt;</mark>" in page_of_report(report)


def test_command_says_by_its_exit_code_whether_a_template_can_be_used(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    from post_training.cli import build_app

    folder = tmp_path / "tokenizer"
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def run(*arguments: str) -> int:
        return build_app()(["template", "check", *arguments], standalone_mode=False) or 0

    assert run("tokenizer", "--data", "rows.jsonl", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    [text] = report["samples"][0]["texts"]
    [[start, end]] = text["trained"]
    assert text["text"][start:end] == "b<|im_end|>"
    assert run("own.jinja", "--tokenizer", "tokenizer") == 1
    assert "the model would never stop" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UsageError, match="no such folder"):
        run("own.jinja")
    with pytest.raises(UsageError, match="must be a file that ends in"):
        run("qwen", "--tokenizer", "tokenizer")
