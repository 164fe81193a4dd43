"""skopeo, which talks to registries for us; what it says of a failure, in one line.

Passwords are its own: `skopeo login REGISTRY`, or $REGISTRY_AUTH_FILE.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from post_training.core.errors import PostTrainingError, tell
from post_training.core.process import run_tool_bytes
from post_training.images.reference import Reference, is_loopback

_SAID = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
# What skopeo says: (what we say, what to do about it).
_PROBLEMS = (
    (
        r"unauthorized|authentication required|401",
        "the registry asks for a password, or refuses the one it got",
        "skopeo login {host}",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        "the registry has no TLS",
        "only one of this machine itself (localhost) may be without",
    ),
    (
        r"did not match|does not match|digest mismatch|Digest did not|unexpected EOF|gzip: invalid",
        "its content is not what its digest says",
        "the registry's copy is damaged or was changed: pull it from another, or push it again",
    ),
    (r"manifest unknown|name unknown|not found", "no such image in the registry", None),
    (
        r"connection refused|no such host|i/o timeout|deadline exceeded|unreachable",
        "the registry does not answer",
        None,
    ),
)


def run_skopeo(words: Sequence[str | Path], name: str) -> bytes:
    """Run skopeo; its stdout. name: REGISTRY/NAME, for the error.

    Errors: PostTrainingError in one line where the cause is known.
    """
    try:
        return run_tool_bytes(["skopeo", *words])
    except PostTrainingError as error:
        said = " ".join(_SAID.findall(error.problem)) or error.problem
        for pattern, problem, hint in _PROBLEMS:
            if re.search(pattern, said):
                host = name.partition("/")[0]
                raise PostTrainingError(
                    problem, where=name, hint=hint and hint.format(host=host)
                ) from None
        raise


def pull_to_builder(reference: Reference, tag: str) -> None:
    """Copy an image of a registry into the builder's storage, with this tag. Errors: as above."""
    tell(f"pulling {reference} …")
    run_skopeo(
        ["copy", "--quiet", *tls_options("src-", reference.name), f"docker://{reference}",
         f"containers-storage:{tag}"],
        reference.name,
    )  # fmt: skip


def tls_options(prefix: str, name: str) -> list[str]:
    """skopeo's option to do without TLS: for a registry on this very machine alone.

    prefix: `src-` or `dest-` of a copy.
    """
    return [f"--{prefix}tls-verify=false"] if is_loopback(name) else []
