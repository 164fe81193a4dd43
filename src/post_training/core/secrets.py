"""Secrets: finding them in texts, taking them out, and the user's token files.

    find_secret(text)            the kind of secret that stands in the text, or None
    redact(text)                 the text with `[redacted: KIND]` for each secret, and the kinds
    variable_secret(name, value) the kind of secret in an environment variable, or None

A secret is known by its form: how it begins, and how long it is. It does not begin in the middle of
a word: a path such as math-task-of-many-words-and-2025 holds none. What has no form of its own (a
key of 40 hexadecimal digits looks like a commit) is found only in a variable whose name says so.

    ~/.config/post-training/credentials/hf-token       ->  HF_TOKEN_PATH
    ~/.config/post-training/credentials/wandb-api-key  ->  WANDB_API_KEY_FILE

Token files are mounted read-only into the container and found by their path. Their content is never
in an environment, on a command line or in a file of ours. A missing one is no error. One that
others can read, or in a folder that others can write to, is refused.
"""

import functools
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.files import user_config

# Where the container has them.
INSIDE = Path("/run/post-training/credentials")


@dataclass(frozen=True)
class Credential:
    """name: of the file. path_variable: names the file inside. value_variable: what other programs
    hold the secret itself in; we never set it."""

    name: str
    path_variable: str
    value_variable: str


CREDENTIALS = (
    Credential("hf-token", "HF_TOKEN_PATH", "HF_TOKEN"),
    Credential("wandb-api-key", "WANDB_API_KEY_FILE", "WANDB_API_KEY"),
)


# (kind, how it begins, a pattern of how it goes on). docs/guides/sites.md lists the same kinds.
_FORMS = (
    ("OpenAI key", ["sk-"], r"(?:(?:proj|svcacct|admin|None)-[\w-]{20,}|[A-Za-z0-9]{32,})"),
    ("Anthropic key", ["sk-ant-"], r"[a-z]+[0-9]{2}-[\w-]{20,}"),
    ("OpenRouter key", ["sk-or-v1-"], r"[0-9a-f]{32,}"),
    ("Hugging Face token", ["hf_", "api_org_"], r"[A-Za-z0-9]{24,}"),
    ("GitHub token", ["gho_", "ghp_", "ghr_", "ghs_", "ghu_"], r"[A-Za-z0-9]{20,}"),
    ("GitHub token", ["github_pat_"], r"\w{22,}"),
    ("GitLab token", ["gl"], r"(?:pat|dt|rt|ptt|ft|soat|cbt|imt|agent|oas)-[\w-]{20,}"),
    ("AWS key", ["AKIA", "ASIA"], r"[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("AWS key", ["aws_secret_access_key"], r"[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}"),
    ("Google key", ["AIza"], r"[\w-]{35}"),
    ("Google key", ["ya29."], r"[\w-]{20,}"),
    ("Slack token", ["xox"], r"[abeoprs]-[\w-]{10,}"),
    ("Slack token", ["xapp-"], r"[0-9]-[\w-]{20,}"),
    ("W&B key", ["wandb_v1_"], r"\w{20,}"),
    ("NVIDIA key", ["nvapi-"], r"[\w-]{40,}"),
    ("PyPI token", ["pypi-AgEI"], r"[\w-]{20,}"),
    ("npm token", ["npm_"], r"[A-Za-z0-9]{36}"),
    ("Docker token", ["dckr_pat_"], r"[\w-]{20,}"),
    ("Stripe key", ["rk_live_", "sk_live_"], r"[A-Za-z0-9]{20,}"),
    ("JSON web token", ["eyJ"], r"[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]*"),
    ("bearer token", ["Bearer", "bearer"], r"\s+(?=\S{0,200}[0-9])[\w.~+/-]{20,}=*"),
    ("basic authorization", ["Authorization", "authorization"],
     r"[\"']?:\s*[\"']?[Bb]asic\s+[A-Za-z0-9+/]{12,}=*"),
    # `$NAME`, `{name}` or `<name>` in the place of the password is no secret.
    ("password in an address", ["://"],
     r"(?P<secret>[^/\s:@\"'<>{}$*]{0,200}:[^/\s@\"'<>{}$*]{1,500}@)"),
    ("private key", ["-----BEGIN "],
     r"(?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?=.{0,300}?[A-Za-z0-9+/]{32}).*?"
     r"(?:-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|\Z)"),
)  # fmt: skip
_BEGINNINGS = [(kind, start, rest) for kind, starts, rest in _FORMS for start in starts]
# Variables that hold a secret whatever their value looks like.
_ALWAYS = {credential.value_variable for credential in CREDENTIALS}
_SECRET_WORDS = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|SECRET|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?:_|$)",
    re.IGNORECASE,
)
_TOKEN_NAME = re.compile(r"(?:^|_)TOKEN$", re.IGNORECASE)
_PLACE_NAME = re.compile(r"_(?:PATH|FILE|DIR|URL|ID|NAME)$", re.IGNORECASE)
# Numbers, switches, paths, variables, and markers such as <pad> and [PAD].
_PLAIN_VALUE = re.compile(r"[-+0-9.,:eE]*|true|false|yes|no|on|off|none|null|[/~.$<\[{].*", re.I)
# Letters mixed with digits, as in no word.
_OPAQUE_VALUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[\w+/=.~-]{12,}")


@dataclass(frozen=True)
class FoundCredentials:
    """mounts: lines for an EDF. variables: (name, path inside) of each."""

    mounts: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def find_secret(text: str) -> str | None:
    """The kind of a secret in the text, or None."""
    return next((kind for kind, _, _ in _find_all(text)), None)


def redact(text: str) -> tuple[str, list[str]]:
    """The text without its secrets, and the kinds that stood there, sorted."""
    kinds, parts, done = set(), [], 0
    for kind, begin, end in sorted(_find_all(text), key=lambda each: (each[1], -each[2])):
        if begin >= done:  # Else it lies within the one before.
            parts += [text[done:begin], redacted(kind)]
            done = end
            kinds.add(kind)
    return "".join([*parts, text[done:]]), sorted(kinds)


def redact_all(value: Any, place: str = "") -> tuple[Any, list[str]]:
    """As `redact`, for every text in a JSON value, keys included; and `place: KIND` for each.

    place: where the value stands, as `data.datasets[0]`.
    """
    if isinstance(value, str):
        text, kinds = redact(value)
        return text, [f"{place}: {kind}" for kind in kinds]
    found_at: list[str] = []
    if isinstance(value, dict):
        kept = {}
        for key, below in value.items():
            name, kinds = redact(key)
            inside, found = redact_all(below, f"{place}.{name}" if place else name)
            kept[name] = inside
            found_at += [f"{place}.{name}: {kind}" for kind in kinds] + found
        return kept, found_at
    if isinstance(value, list | tuple):
        items = []
        for index, below in enumerate(value):
            inside, found = redact_all(below, f"{place}[{index}]")
            items.append(inside)
            found_at += found
        return items, found_at
    return value, found_at


def variable_secret(name: str, value: str) -> str | None:
    """The kind of secret in an environment variable, or None.

    By the value's form; else by the variable's name, unless the value can be no secret.
    """
    if kind := find_secret(value):
        return kind
    if name in _ALWAYS and value and not value.startswith("$"):
        return f"value of {name}"
    if _PLACE_NAME.search(name) or _PLAIN_VALUE.fullmatch(value):
        return None
    if _SECRET_WORDS.search(name) or (_TOKEN_NAME.search(name) and _OPAQUE_VALUE.fullmatch(value)):
        return f"value of {name}"
    return None


def is_redacted(value: str) -> bool:
    return "[redacted: " in value


def redacted(kind: str) -> str:
    """The text that replaces a secret."""
    return f"[redacted: {kind}]"


def _find_all(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, begin, end) of each secret in the text; they may overlap.

    Patterns run only where a beginning was found by a plain search, which is fast.
    """
    for kind, start, rest in _BEGINNINGS:
        place = text.find(start)
        while place >= 0:
            found = _pattern(start, rest).match(text, place)
            if found:
                group = "secret" if "secret" in found.re.groupindex else 0
                yield kind, found.start(group), found.end(group)
            place = text.find(start, max(place + 1, found.end() if found else 0))


@functools.cache
def _pattern(start: str, rest: str) -> re.Pattern[str]:
    """Compiled when it is first needed: compiling all would slow the start of every command."""
    before = "" if start == "://" else "(?<![A-Za-z0-9_-])"
    return re.compile(f"{before}{re.escape(start)}{rest}", re.DOTALL)


def find_credentials(environment: Mapping[str, str]) -> FoundCredentials:
    """The user's token files on this host. Errors: UsageError as of `check_token_file`."""
    folder = credentials_folder(environment)
    mounts, variables = [], []
    for credential in CREDENTIALS:
        path = folder / credential.name
        if path.exists():
            check_token_file(path)
            mounts.append(f"{path}:{INSIDE / credential.name}:ro")
            variables.append((credential.path_variable, str(INSIDE / credential.name)))
    return FoundCredentials(tuple(mounts), tuple(variables))


def check_named_files(environment: Mapping[str, str]) -> None:
    """Check the token files that the environment names; one that is not here is left out.

    Errors: UsageError as of `check_token_file`.
    """
    for credential in CREDENTIALS:
        path = environment.get(credential.path_variable)
        if path and Path(path).exists():
            check_token_file(Path(path))


def check_token_file(path: Path) -> None:
    """Errors: UsageError unless it is a regular file that only its owner can read or replace."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UsageError("not a regular file", where=str(path))
    if mode & 0o077:
        raise UsageError(
            f"others can read this token (mode {stat.S_IMODE(mode):04o})",
            where=str(path),
            hint=f"chmod 600 {path}; if others may have read it, make a new one",
        )
    for folder in {path.parent, path.resolve().parent}:
        folder_mode = folder.stat().st_mode
        if folder_mode & 0o022 and not folder_mode & stat.S_ISVTX:
            raise UsageError(
                f"others can replace the tokens in it (mode {stat.S_IMODE(folder_mode):04o})",
                where=str(folder),
                hint=f"chmod 700 {folder}",
            )


def credentials_folder(environment: Mapping[str, str]) -> Path:
    return user_config(environment) / "credentials"
