"""uv asks the index that pip is configured for: one place to set it, for locks and for builds.

pip config list  ->  UV_DEFAULT_INDEX, UV_FIND_LINKS, SSL_CERT_FILE, --no-index
"""

import http.client
import os
import re
import shutil
import sys
import tomllib
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_file
from post_training.core.hashing import sha256_file
from post_training.core.process import run_tool

_TIMEOUT_S = 60.0
_SETTING = re.compile(r"\S+\.(index-url|find-links|no-index|cert)='(.*)'")
# pip's name: (uv's, how uv separates several).
_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def run_uv(arguments: Sequence[str | Path], **keywords) -> str:
    """`uv pip compile ARGUMENTS` with pip's index settings; its stdout."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else (shutil.which("uv") or "uv")
    return run_tool(
        # pip trusts what the system trusts; so does uv, if it is told to.
        [uv, "pip", "compile", "--quiet", "--system-certs", *_no_index(), *arguments],
        env={**os.environ, **index_settings()},
        hint="`make setup` installs uv" if uv == "uv" else None,
        **keywords,
    )


def download_sources(lock: Path, folder: Path) -> None:
    """Fetch the source archives that `lock` names into `folder`, each checked by its hash.

    Not by pip: it runs every archive's setup.py for its metadata, and some import torch there.
    """
    resolved = run_uv(["--no-deps", "--no-binary", ":all:", "--format", "pylock.toml", lock])
    allowed = set(re.findall(r"sha256:([0-9a-f]{64})", lock.read_text()))
    for package in tomllib.loads(resolved)["packages"]:
        archive = package.get("sdist") or package["archive"]
        address = archive.get("url") or Path(archive["path"]).absolute().as_uri()
        # A local version's `+` is `%2B` in an address.
        download(address, folder / Path(unquote(urlsplit(address).path)).name, allowed)


def download(
    address: str, target: Path, allowed: set[str], *, timeout_s: float = _TIMEOUT_S
) -> None:
    """allowed: the sha256 it may have. timeout_s: how long the other side may say nothing.

    Errors: PostTrainingError when it cannot be had, or is another.
    """
    with atomic_file(target) as temporary:
        try:
            with (
                urllib.request.urlopen(address, timeout=timeout_s) as answer,
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(answer, file)
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise PostTrainingError(f"cannot be downloaded: {reason}", where=address) from None
        if (found := sha256_file(temporary)) not in allowed:
            raise PostTrainingError(f"sha256 is {found}, which is not locked", where=address)


def index_settings() -> Mapping[str, str]:
    """pip's settings as variables of uv."""
    return {
        variable: separator.join(text.split())
        for name, (variable, separator) in _VARIABLES.items()
        if (text := _pip_settings().get(name))
    }


def _no_index() -> list[str]:
    # uv has no variable for it.
    return ["--no-index"] if _pip_settings().get("no-index") in ("1", "true", "yes", "on") else []


def _pip_settings() -> dict[str, str]:
    listed = run_tool([sys.executable, "-m", "pip", "config", "list"])
    # Sorted, so that a variable (`:env:`) is read first; the first one counts, as for pip.
    settings: dict[str, str] = {}
    for name, text in _SETTING.findall(listed):
        settings.setdefault(name, text.replace("\\n", " "))
    return settings
