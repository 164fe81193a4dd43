"""A model that is saved with its template is asked, by transformers and by vLLM's chat, with just
the prompts that were trained: for the same messages, with tools and thoughts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from post_training.data.chat.layout import lay_out
from post_training.data.chat.rendering import message_dicts
from post_training.data.chat.templates import ChatTemplate, choose_template
from post_training.data.rows import COMPLETION, BadRow, Conversation, Message, ToolCall
from post_training.models.load import load_tokenizer

# Ours for models that call tools, and published ones.
NAMES = ["mistral", "mistral-v3-tekken", "mistral-v7-tekken", "llama-3", "apertus", "chatml"]
NAMES += ["qwen2.5", "qwen3", "llama-3.1", "gemma3", "phi-3"]
TOOL = json.dumps(
    {"type": "function", "function": {"name": "now", "description": "time", "parameters": {}}}
)
CALL = ToolCall("now", '{"city": "Rome"}', "call00001")


def said(content: str, **more: Any) -> Message:
    return Message("assistant", content, COMPLETION, **more)


ROWS = {
    "bare": Conversation((Message("user", "Hi"), said("Hello"), Message("user", "Bye"), said("B"))),
    "talk": Conversation(
        (
            Message("system", "Be kind."),
            Message("user", "Hi\n"),
            said("Hello"),
            Message("user", "Bye"),
            said("B"),
        )
    ),
    "tools": Conversation(
        (
            Message("user", "Time?"),
            said("", tool_calls=(CALL,)),
            Message("tool", '{"it": "noon"}', tool_call_id="call00001", name="now"),
            said("It is noon."),
        ),
        (TOOL,),
    ),
    "thoughts": Conversation(
        (
            Message("user", "2 + 2?"),
            said("4", thought="two twos"),
            Message("user", "3 + 3?"),
            said("6", thought="two threes"),
        )
    ),
}
_SERVE = """
import json, sys
from vllm.config import ModelConfig, VllmConfig
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers import get_tokenizer

answers = []
for folder, messages, settings in json.load(sys.stdin):
    config = VllmConfig(model_config=ModelConfig(model=folder, dtype="float32", max_model_len=128))
    renderer = HfRenderer(config, get_tokenizer(folder))
    params = ChatParams(chat_template_kwargs={**settings, "add_generation_prompt": True})
    _, prompt = renderer.render_messages(messages, params)
    answers.append(dict(prompt).get("prompt") or renderer.get_tokenizer().decode(
        prompt["prompt_token_ids"]
    ))
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def saved(model: Path, tokenizers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name: the template, the folder it is saved in, and the tokenizer that is read there."""
    made = {}
    for name in NAMES:
        own = tokenizers["byte-level"]
        template = choose_template(name, own)
        folder = tmp_path_factory.mktemp("saved") / "model"
        folder.mkdir()
        own.chat_template = template.text
        own.save_pretrained(folder)
        own.chat_template = None
        settings = json.loads((model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": len(own)}))
        made[name] = (template, folder, load_tokenizer(folder))
    return made


def trained_prompts(
    template: ChatTemplate, row: Conversation, special: Any
) -> list[tuple[int, str]]:
    """For each turn that is trained: how many messages stand before it, and the text before it."""
    dicts = message_dicts(row)
    turns = [n for n, each in enumerate(dicts.messages) if each["role"] == "assistant"]
    found = []
    for written in lay_out(row, template, special, None):
        for start, _ in written.spans:
            found.append(written.text[:start])
    # Ours mark the parts of a turn, each a span: the turn begins with the first of them.
    if template.marks == "parts":
        firsts, number = [], 0
        for own in dicts.parts:
            firsts.append(found[number])
            number += len(own)
        found = firsts
    assert len(found) == len(turns)
    return list(zip(turns, found, strict=True))


def cases(saved: Any) -> list[tuple[str, str, int, str]]:
    """(template, row, messages before a turn, the text trained before it)"""
    found = []
    for name, (template, _, tokenizer) in saved.items():
        for called, row in ROWS.items():
            try:
                prompts = trained_prompts(template, row, dict(tokenizer.special_tokens_map))
            except BadRow as bad:
                if "can't express" not in bad.problem:
                    raise
                continue
            found += [(name, called, number, text) for number, text in prompts]
    return found


def sent(row: Conversation, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a request, and the settings of the template."""
    dicts = message_dicts(row)
    settings: dict[str, Any] = {"tools": dicts.tools or None}
    if dicts.enable_thinking is not None:
        settings["enable_thinking"] = dicts.enable_thinking
    return dicts.messages[:number], settings


def test_saved_template_asks_in_transformers_as_it_was_trained(saved: Any):
    found = cases(saved)
    # Nothing is left out by accident: eight of them have tools.
    assert {name for name, *_ in found} == set(NAMES)
    assert len({name for name, row, *_ in found if row == "tools"}) == 8
    assert {"qwen3", "apertus"} <= {name for name, row, *_ in found if row == "thoughts"}
    for name, row, number, text in found:
        messages, settings = sent(ROWS[row], number)
        tokenizer = saved[name][2]
        asked = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **settings
        )
        assert asked == text, (name, row, number)


@pytest.mark.long
def test_saved_template_asks_in_vllm_as_it_was_trained(saved: Any):
    found = cases(saved)
    requests = []
    for name, row, number, _ in found:
        messages, settings = sent(ROWS[row], number)
        as_sent = [_as_sent(message) for message in messages]
        requests.append((str(saved[name][1]), as_sent, settings))
    done = subprocess.run(
        [sys.executable, "-c", _SERVE],
        input=json.dumps(requests),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    for (name, row, number, text), asked in zip(found, answers, strict=True):
        assert asked == text, (name, row, number)


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """As a client sends it: a call's arguments as JSON text, a thought by vLLM's name for it."""
    changed = dict(message)
    if "reasoning_content" in changed:
        changed["reasoning"] = changed.pop("reasoning_content")
    if "tool_calls" in changed:
        changed["tool_calls"] = [
            {**call, "function": {**f, "arguments": json.dumps(f["arguments"])}}
            for call in changed["tool_calls"]
            for f in [call["function"]]
        ]
    return changed
