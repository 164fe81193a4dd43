"""`entrypoint chat MODEL` and `entrypoint generate MODEL --prompt TEXT`: a look at a model.

MODEL is a run folder, a checkpoint or an inference checkpoint of one, a LoRA adapter, or any folder
that transformers loads. It is asked in the template that it was trained with, as its run's record
says; else in its tokenizer's own. Nothing is recorded: for rows to keep, `entrypoint generate
cfg.yaml` makes them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from post_training.annotate.config import GenerateConfig, SamplingConfig
from post_training.annotate.samplers import Endings, draw, prompt_seed, random_numbers
from post_training.config.load import load_config
from post_training.core.errors import ArgumentParser, UsageError, shown, tell
from post_training.core.files import read_json_object
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.data.chat.templates import choose_template
from post_training.data.config import PUBLISHED_TEMPLATES, TEMPLATES
from post_training.data.rows import BadRow, Conversation, Message
from post_training.data.tokenize import Encoder
from post_training.models.adapter import merge_adapter
from post_training.models.adapter_weights import CONFIG as ADAPTER_CONFIG
from post_training.models.attention import most_positions
from post_training.models.device import move_to_device
from post_training.models.load import check_vocabulary, load_model, load_tokenizer
from post_training.records.artifact import read_artifact
from post_training.records.run_record import RECORD_NAME, read_record

_OWN_TEMPLATE = "model"
_HELP = "/new begins a new conversation, /tokens shows the tokens or hides them, /quit ends"


class Token(NamedTuple):
    """One that was drawn. logprob: in nats, of the model's logits as they are."""

    id: int
    logprob: float


@dataclass(frozen=True)
class Found:
    """What a path leads to. base: of an adapter, else the model itself. adapter: its folder.
    tokenizer: the folder that has it. template: that it was trained with; `model`: the tokenizer's
    own."""

    base: Path
    adapter: Path | None
    tokenizer: Path
    template: str | Path


def main(arguments: Sequence[str]) -> int:
    """`chat MODEL …` or `generate MODEL --prompt …`; the exit code."""
    options = _parse(arguments)
    speaker = _open(options)
    if options.verb == "chat":
        return _chat(speaker, options)
    for number, prompt in enumerate(options.prompt):
        _answer_prompt(speaker, prompt, number, options)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="entrypoint", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    chat = verbs.add_parser("chat", allow_abbrev=False, help="talk to a model")
    generate = verbs.add_parser("generate", allow_abbrev=False, help="answers to a few prompts")
    for each in (chat, generate):
        each.add_argument("model", type=Path, metavar="MODEL", help="folder of a model, adapter, "
                          "checkpoint or run")  # fmt: skip
        each.add_argument("--base", type=Path, help="the model that an adapter belongs to, where "
                          "nothing says it")  # fmt: skip
        each.add_argument("--template", help="one of ours, or a file; by default that of training")
        each.add_argument("--system", help="the system message")
        each.add_argument("--temperature", type=float, help="0, the default: the likeliest token")
        each.add_argument("--top-p", type=float)
        each.add_argument("--max-tokens", type=int, help="of an answer (512)")
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--dtype", choices=("float32", "bfloat16"),
                          help="bfloat16 on a GPU, else float32")  # fmt: skip
        each.add_argument("--tokens", action="store_true",
                          help="also each token's id, log-probability (nats) and text")  # fmt: skip
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("-n", type=int, help="answers to each prompt (1)")
    generate.add_argument("--raw", action="store_true", help="go on from the prompt as it is, in "
                          "no template: for base models")  # fmt: skip
    generate.add_argument("--json", action="store_true", help="a JSON line for each answer")
    return parser.parse_args(list(arguments))


def find_model(path: Path, base: Path | None = None) -> Found:
    """What `path` leads to. base: the model of an adapter, where nothing says it.

    Errors: UsageError where there is no model, and for an adapter of an unknown one.
    """
    if not path.exists():
        raise UsageError("no such folder", where=str(path))
    record = _record_above(path)
    folder = path
    if (path / RECORD_NAME).exists():
        folder = path / "model"
        if not folder.exists():
            raise UsageError(
                "this run has left no model yet",
                where=str(path),
                hint="name one of its checkpoints or inference_checkpoints",
            )
    template = record.get("recipe", {}).get("data.chat_template", _OWN_TEMPLATE)
    template = record.get("inputs", {}).get("data.chat_template", {}).get("path", template)
    if not (folder / ADAPTER_CONFIG).exists():
        if base is not None:
            raise UsageError("--base: only for an adapter, and this is not one", where=str(path))
        own = (folder / "tokenizer_config.json").exists() or not record
        return Found(folder, None, folder if own else _trained(record, folder), template)
    base = base or _base_of(folder, record)
    own = (folder / "tokenizer_config.json").exists()
    return Found(base, folder, folder if own else base, template)


def _record_above(path: Path) -> dict[str, Any]:
    """The record of the run that made it: in its artifact.json, or in a folder above it."""
    if (path / ARTIFACT_RECORD).exists():
        return read_artifact(path)["made_by"]
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / RECORD_NAME).exists():
            return read_record(folder)
    return {}


def _base_of(folder: Path, record: dict[str, Any]) -> Path:
    named = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if record.get("inputs", {}).get("model.path"):
        named = record["inputs"]["model.path"]["path"]
    if not named or not Path(str(named)).is_dir():
        said = f"it names {named}, which is no folder here" if named else "nothing names it"
        raise UsageError(
            f"an adapter, and its model is not known: {said}",
            where=str(folder),
            hint="--base FOLDER",
        )
    return Path(named)


def _trained(record: dict[str, Any], folder: Path) -> Path:
    trained = record.get("inputs", {}).get("model.path")
    return Path(trained["path"]) if trained else folder


class Speaker:
    """A model with a tokenizer and a template, which answers token by token."""

    def __init__(
        self, found: Found, template: str | Path | None, settings: SamplingConfig, dtype: str | None
    ):
        self.settings = settings
        dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        model = load_model(found.base, dtype=dtype, attn_implementation="sdpa")
        self.tokenizer = load_tokenizer(found.tokenizer)
        check_vocabulary(model, self.tokenizer)
        if found.adapter is not None:
            model = merge_adapter(model, found.adapter)
        self.model = move_to_device(model, 0)
        name = template or found.template
        self.template = choose_template(name, self.tokenizer)
        self.encoder = Encoder.create(self.tokenizer, self.template, control_tokens="refuse")
        self.endings = Endings.read(found.base, self.encoder, settings.stop)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the answer goes on from. Errors: UsageError, as for a control token."""
        [ids] = self.encoder.encode_prompts([Conversation(tuple(messages))])
        if isinstance(ids, BadRow):
            raise UsageError(ids.problem)
        return ids.tolist()

    @torch.inference_mode()
    def answer(self, ids: list[int], seed: int) -> Iterator[Token]:
        """The tokens of an answer as they are drawn, the one that ends it too.

        The same numbers as `entrypoint generate` with backend transformers draws.
        Errors: UsageError for a prompt that is as long as the model reads.
        """
        limit = most_positions(self.model.config)
        if limit is not None and len(ids) >= limit:
            raise UsageError(f"a prompt of {len(ids)} tokens (the model reads {limit})")
        most = self.settings.max_tokens if limit is None else min(
            self.settings.max_tokens, limit - len(ids))  # fmt: skip
        generator = random_numbers(seed)
        step, cache, drawn = torch.tensor([ids]), None, []
        for _ in range(most):
            output = self.model(
                input_ids=step.to(self.model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits_1V = output.logits[:, -1].float().cpu()
            token = int(draw(logits_1V, self.settings, [generator])[0])
            drawn.append(token)
            yield Token(token, float(logits_1V.log_softmax(-1)[0, token]))
            if token in self.endings.ids or self.endings.cut(drawn) is not None:
                return
            step = torch.tensor([[token]])


def _open(options: argparse.Namespace) -> Speaker:
    """Errors: UsageError, ConfigError, PostTrainingError."""
    given = {
        "n": getattr(options, "n", None),
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_tokens,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.model.is_file():
        config = load_config(GenerateConfig, options.model)
        found = find_model(config.model.path, options.base)
        template = options.template or config.data.chat_template
        sampling, dtype = config.sampling.model_dump(), options.dtype or config.model.dtype
    else:
        found, template = find_model(options.model, options.base), options.template
        sampling, dtype = {"n": 1, "temperature": 0.0, "max_tokens": 512}, options.dtype
    try:
        settings = SamplingConfig.model_validate({**sampling, **given})
    except ValueError as error:
        fault = error.errors()[0]
        key = "-".join(map(str, fault["loc"])).replace("_", "-")
        raise UsageError(f"--{key}: {fault['msg']} (got {fault['input']})" if key
                         else fault["msg"]) from None  # fmt: skip
    if template is not None and Path(template).suffix == ".jinja":
        template = Path(template)
    named = (*TEMPLATES, *PUBLISHED_TEMPLATES, _OWN_TEMPLATE)
    if template is not None and not isinstance(template, Path) and template not in named:
        raise UsageError(
            f"no such template: {template} (there are {', '.join(named)})",
            where="--template",
            hint="or a file, NAME.jinja",
        )
    speaker = Speaker(found, template, settings, dtype)
    adapter = f" with the adapter {found.adapter}" if found.adapter else ""
    tell(f"{found.base}{adapter}, chat template {str(template or found.template)!r}")
    return speaker


def _chat(speaker: Speaker, options: argparse.Namespace) -> int:
    """Lines of stdin are the user's turns: typed, or from a pipe."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        tell(_HELP)
    opening = [Message("system", options.system)] if options.system else []
    messages, shows_tokens = list(opening), options.tokens
    while True:
        if is_terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"must be text in UTF-8: {error.reason}", where="stdin") from None
        if not line:
            return 0
        text = line.strip()
        if text == "/quit":
            return 0
        if text == "/new":
            messages = list(opening)
        elif text == "/tokens":
            shows_tokens = not shows_tokens
        elif text.startswith("/") and " " not in text:
            tell(f"no command {text}: {_HELP}")
        elif text:
            messages.append(Message("user", text))
            try:
                said = _say(speaker, messages, len(messages), options.seed, shows_tokens)
            except UsageError as error:
                # One turn is refused, and the conversation goes on without it.
                messages.pop()
                if not is_terminal:
                    raise
                tell(f"error: {error}")
                continue
            messages.append(Message("assistant", said))


def _say(
    speaker: Speaker, messages: list[Message], number: int, seed: int, shows_tokens: bool
) -> str:
    """Print the answer while it is drawn, and its tokens where they are shown; its text."""
    ids = speaker.encode(messages)
    drawn: list[Token] = []
    printed = ""
    for token in speaker.answer(ids, prompt_seed(seed, str(number), 1)):
        drawn.append(token)
        text = speaker.endings.text([each.id for each in drawn])
        # The last bytes of a character may still be missing.
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(printed):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    text = speaker.endings.text([each.id for each in drawn])
    print(text[len(printed) :] if text.startswith(printed) else "")
    if shows_tokens:
        _print_tokens(speaker, ids, drawn)
    return text


def _answer_prompt(speaker: Speaker, prompt: str, number: int, options: argparse.Namespace) -> None:
    if options.raw:
        ids = speaker.tokenizer.encode(prompt)
        if not ids:
            raise UsageError("--raw: the prompt has no tokens", where="--prompt")
    else:
        opening = [Message("system", options.system)] if options.system else []
        ids = speaker.encode([*opening, Message("user", prompt)])
    n = speaker.settings.n
    first = prompt_seed(options.seed, str(number), n)
    for sample in range(n):
        drawn = list(speaker.answer(ids, first + sample))
        text = speaker.endings.text([token.id for token in drawn])
        ended = drawn[-1].id in speaker.endings.ids
        if options.json:
            answer = {
                "prompt": prompt,
                "completion": text,
                "prompt_token_ids": ids,
                "completion_token_ids": [token.id for token in drawn],
                "completion_token_logprobs": [token.logprob for token in drawn],
                "finish_reason": "stop" if ended else "length",
            }
            print(json.dumps(answer, ensure_ascii=False), flush=True)
            continue
        if len(options.prompt) * n > 1:
            print(f"--- {shown(prompt)}{f' ({sample + 1} of {n})' if n > 1 else ''}")
        print(text, flush=True)
        if options.tokens:
            _print_tokens(speaker, ids, drawn)


def _print_tokens(speaker: Speaker, ids: list[int], drawn: list[Token]) -> None:
    print(f"prompt: {len(ids)} tokens: {' '.join(map(str, ids))}")
    for token in drawn:
        text = speaker.tokenizer.convert_ids_to_tokens(token.id)
        print(f"{token.id:>8}  {token.logprob:9.4f}  {text!r}")
    print(f"{len(drawn)} tokens, {sum(token.logprob for token in drawn):.4f} nats", flush=True)
