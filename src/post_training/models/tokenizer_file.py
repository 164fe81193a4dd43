"""Whether a tokenizer gives the ids of its tokenizer.json.

transformers builds a tokenizer anew by the class that config.json or tokenizer_config.json names,
from no more than the vocabulary of tokenizer.json: by a class that is not the file's, spaces vanish
or words are cut elsewhere, and nothing is said. The model was trained on the file's ids.
"""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError

_FILE = "tokenizer.json"
_TEXTS = (
    "Hello world",
    " a leading space, and two at the end  ",
    "It's we're THEY'LL I'd don’t can't've",
    "one\ntwo\n\nthree\r\n\tfour\n   five\n",
    "0 12 345 6789 31415926 3.14e-10 1,000,000 ½ ² ٣",
    "def f(x):\n    return {'a': [x**2, -1]}  # (ok) <b>&amp;</b> //path/to_file.txt",
    "Zürich naïve café cafe\u0301 Straße ŁÓDŹ ﬁn Ａ１",
    "你好，世界。日本語のテキスト。한국어 텍스트",
    "Привет мир Γειά σου שלום עולם مرحبا بالعالم नमस्ते दुनिया ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 ✓ → ∑ \u00a0\u2003\u200b\ufeff|",
)
# Where a text begins anew, classes differ in what they put before it.
_BEHIND_A_TOKEN = ("Hello", " Hello", "\nHello", "\n\n  x", "1 and 2", "é")
_MOST_TOKENS = 4
_OF_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take it as it is
_NAME_IT = (
    f'set "tokenizer_class": "{_OF_THE_FILE[0]}" in the tokenizer_config.json of a copy, and the '
    "file is taken as it is"
)
_INSISTS = (
    "for models of this type transformers takes its own class, whatever the folder says; this "
    "tokenizer can't be used with them"
)


def check_ids_of_file(folder: Path, tokenizer: Any) -> None:
    """Errors: PostTrainingError where the two give other ids of a text."""
    path = folder / _FILE
    if not path.exists():
        return  # It was made from another file, and there is nothing to compare.
    state = json.loads(path.read_text(encoding="utf-8"))
    state["truncation"] = state["padding"] = state["post_processor"] = None
    if state["model"].get("dropout"):
        return
    original = Tokenizer.from_str(json.dumps(state))
    tokens = [token["content"] for token in state["added_tokens"] if token["special"]]
    chosen = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token in tokens}
    texts = [
        *_TEXTS,
        *(f"{token}{text}" for token in sorted(chosen or tokens[:1]) for text in _BEHIND_A_TOKEN),
    ]
    own = tokenizer(texts, add_special_tokens=False)["input_ids"]
    encodings = original.encode_batch(texts, add_special_tokens=False)
    for text, found, expected in zip(texts, own, (each.ids for each in encodings), strict=True):
        if found != expected:
            name = type(tokenizer).__name__
            pairs = zip(found, expected, strict=False)
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise PostTrainingError(
                f"{_FILE} and the class that transformers takes, {name}, disagree on the ids of "
                f"{text!r}: {_shown(expected[alike:])} by the file, {_shown(found[alike:])} by the "
                f"class, after {alike} that are equal",
                where=str(folder),
                hint=_INSISTS if _named_class(folder) in _OF_THE_FILE else _NAME_IT,
            )


def _named_class(folder: Path) -> str | None:
    try:
        return json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError):
        return None


def _shown(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:_MOST_TOKENS]))}{', …' if len(ids) > _MOST_TOKENS else ''}]"
