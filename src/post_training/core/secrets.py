"""What looks like a secret: by its form, never by a name alone.

    find_secret(text)      what kind of secret stands in the text, or None
    redact(text)           the text with `[redacted: KIND]` for each, and the kinds
    variable_secret(n, v)  of an environment variable, where a name says what a value cannot

A form is known by its beginning and its length, and it does not begin in the middle of a word: a
path such as math-task-of-many-words-and-2025 holds none. What has no form of its own (a key of 40
hexadecimal digits is also a commit) is found only under a variable's name that says what it is.
"""

import re
from typing import Any

from post_training.core.credentials import CREDENTIALS

# What they are called, and how they look. README.md has the same list ("Secrets").
_FORMS = {
    "OpenAI key": r"sk-(?:(?:proj|svcacct|admin|None)-[\w-]{20,}|[A-Za-z0-9]{32,})",
    "Anthropic key": r"sk-ant-[a-z]+[0-9]{2}-[\w-]{20,}",
    "OpenRouter key": r"sk-or-v1-[0-9a-f]{32,}",
    "Hugging Face token": r"(?:hf|api_org)_[A-Za-z0-9]{24,}",
    "GitHub token": r"gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{22,}",
    "GitLab token": r"gl(?:pat|dt|rt|ptt|ft|soat|cbt|imt|agent|oas)-[\w-]{20,}",
    "AWS key": r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|aws_secret_access_key[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}",
    "Google key": r"AIza[\w-]{35}|ya29\.[\w-]{20,}",
    "Slack token": r"xox[abeoprs]-[\w-]{10,}|xapp-[0-9]-[\w-]{20,}",
    "W&B key": r"wandb_v1_\w{20,}",
    "NVIDIA key": r"nvapi-[\w-]{40,}",
    "PyPI token": r"pypi-AgEI[\w-]{20,}",
    "npm token": r"npm_[A-Za-z0-9]{36}",
    "Docker token": r"dckr_pat_[\w-]{20,}",
    "Stripe key": r"[rs]k_live_[A-Za-z0-9]{20,}",
    "JSON web token": r"eyJ[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]*",
    "bearer token": r"[Bb]earer\s+(?=\S*[0-9])[\w.~+/-]{20,}=*",
    "basic authorization": r"[Aa]uthorization[\"']?:\s*[\"']?[Bb]asic\s+[A-Za-z0-9+/]{12,}=*",
    # A variable or a placeholder in its place is none.
    "password in an address": r"[a-z][a-z0-9+.-]*://[^/\s:@\"'<>{}$*]*:[^/\s@\"'<>{}$*]+@",
    "private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?=.{0,300}?[A-Za-z0-9+/]{32}).*?"
    r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
}
_SECRET = re.compile(
    "|".join(
        rf"(?P<form{index}>(?<![A-Za-z0-9_-])(?:{form}))"
        for index, form in enumerate(_FORMS.values())
    ),
    re.DOTALL,
)
_KINDS = list(_FORMS)
_ALWAYS = {credential.value_variable for credential in CREDENTIALS}
_SECRET_WORDS = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|SECRET|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?:_|$)",
    re.IGNORECASE,
)
_TOKEN_NAME = re.compile(r"(?:^|_)TOKEN$", re.IGNORECASE)
_PLACE_NAME = re.compile(r"_(?:PATH|FILE|DIR|URL|ID|NAME)$", re.IGNORECASE)
# Numbers, switches, paths, variables, and markers such as <pad> and [PAD].
_PLAIN_VALUE = re.compile(r"[-+0-9.,:eE]*|true|false|yes|no|on|off|none|null|[/~.$<\[{].*", re.I)
# Letters and digits, as nobody writes a word.
_OPAQUE_VALUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[\w+/=.~-]{12,}")


def find_secret(text: str) -> str | None:
    """The kind of the first secret in the text."""
    found = _SECRET.search(text)
    return found and _kind(found)


def redact(text: str) -> tuple[str, list[str]]:
    """The text without its secrets, and the kinds that stood there, sorted."""
    kinds: set[str] = set()

    def replaced(found: re.Match[str]) -> str:
        kinds.add(_kind(found))
        return redacted(_kind(found))

    return _SECRET.sub(replaced, text), sorted(kinds)


def redacted(kind: str) -> str:
    """What stands in the place of a secret."""
    return f"[redacted: {kind}]"


def is_redacted(value: str) -> bool:
    return "[redacted: " in value


def variable_secret(name: str, value: str) -> str | None:
    """The kind of the secret that an environment variable holds, by its form, or by the name of a
    value that could be one."""
    if kind := find_secret(value):
        return kind
    if name in _ALWAYS and value and not value.startswith("$"):
        return f"value of {name}"
    if _PLACE_NAME.search(name) or _PLAIN_VALUE.fullmatch(value):
        return None
    if _SECRET_WORDS.search(name) or (_TOKEN_NAME.search(name) and _OPAQUE_VALUE.fullmatch(value)):
        return f"value of {name}"
    return None


def redact_all(value: Any, place: str = "") -> tuple[Any, list[str]]:
    """The same for every text in a JSON value, keys included; and `place: KIND` for each."""
    if isinstance(value, str):
        text, kinds = redact(value)
        return text, [f"{place}: {kind}" for kind in kinds]
    told: list[str] = []
    if isinstance(value, dict):
        kept = {}
        for key, below in value.items():
            name, kinds = redact(key)
            inside, found = redact_all(below, f"{place}.{name}" if place else name)
            kept[name] = inside
            told += [f"{place}.{name}: {kind}" for kind in kinds] + found
        return kept, told
    if isinstance(value, list | tuple):
        items = []
        for index, below in enumerate(value):
            inside, found = redact_all(below, f"{place}[{index}]")
            items.append(inside)
            told += found
        return items, told
    return value, told


def _kind(found: re.Match[str]) -> str:
    return _KINDS[int((found.lastgroup or "").removeprefix("form"))]
