"""`post-training edf resolve|run`: kept apart from the CLI, since every process of a job starts
through it, and importing typer would cost more than starting the container.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from post_training.core.errors import UsageError, report
from post_training.images.checkout import describe_changes
from post_training.images.edf import Edf, Mount, find_edf, load_edf, parse_mount
from post_training.images.identity import IMAGE_FILE
from post_training.images.inside import FINDINGS
from post_training.images.runner import run


def main(arguments: Sequence[str]) -> int:
    """The exit code; `run` does not come back when the command could be started."""
    parser = argparse.ArgumentParser(prog="post-training edf", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    resolving = verbs.add_parser("resolve", help="check an EDF and print its path")
    resolving.add_argument("environment", help="NAME, NAME.toml or a path, as for srun")
    running = verbs.add_parser(
        "run",
        help="run a command in an EDF's image",
        usage="post-training edf run [options] ENVIRONMENT -- COMMAND …",
    )
    running.add_argument("environment", help="NAME, NAME.toml or a path, as for srun")
    running.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:DST[:FLAGS]",
        help="one more mount; may be repeated",
    )
    running.add_argument(
        "--dev",
        type=Path,
        metavar="CHECKOUT",
        help="use the sources of this checkout instead of the image's; the record "
        "keeps the commit and the changes",
    )
    # Split by hand: argparse takes a later `--` out of the command.
    words = list(arguments)
    split = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:split]), words[split + 1 :]
    if options.verb == "run" and not command:
        running.error("give the command after `--`")
    try:
        cwd = Path.cwd()
        # `${PWD}` is where we are, whatever the variable inherited from elsewhere says.
        env = {**os.environ, "PWD": str(cwd)}
        path = find_edf(options.environment, env, cwd)
        edf = load_edf(path, env, cwd)
        if options.verb == "resolve":
            print(path.absolute())
            return 0
        edf = replace(edf, mounts=(*edf.mounts, *(_extra_mount(m, cwd) for m in options.mount)))
        findings = {}
        if options.dev:
            edf, findings["dev"] = _with_checkout(edf, options.dev.absolute())
        _tell_what_is_ignored(edf, env)
        run(edf, command, env, findings)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def _tell_what_is_ignored(edf: Edf, env: Mapping[str, str]) -> None:
    """Hooks and devices are for a site's own engine; said once a job, not once a rank."""
    hooks = [key for key, value in edf.annotations.items() if value not in ("false", "")]
    ignored = [*hooks, *(f"device {name}" for name in edf.devices)]
    if ignored and env.get("SLURM_PROCID", "0") == "0":
        print(f"warning: {edf.path}: ignored here: {', '.join(ignored)}", file=sys.stderr)


def _extra_mount(text: str, cwd: Path) -> Mount:
    try:
        mount = parse_mount(text, cwd)
    except ValueError as error:
        raise UsageError(f"--mount: {error}") from None
    if not mount.source.exists():
        raise UsageError(f"--mount: source does not exist: {mount.source}")
    return mount


def _with_checkout(edf: Edf, checkout: Path) -> tuple[Edf, dict]:
    """The EDF with the checkout mounted where the image's `entrypoint` looks, and what it is."""
    if not (checkout / "src/post_training").is_dir():
        raise UsageError("--dev: not a checkout of this project", where=str(checkout))
    target = Mount(checkout, FINDINGS / "dev", frozenset({"ro"}))
    return replace(edf, mounts=(*edf.mounts, target)), describe_changes(checkout)


# Host commands that need the training stack run themselves again inside the image.


def can_run_here(environment: str | None) -> bool:
    """Whether this is an image, or the stack is installed and no EDF is named."""
    return IMAGE_FILE.exists() or (environment is None and find_spec("transformers") is not None)


def enter_image(environment: str | None, written: Mapping[str, Path | None]) -> None:
    """Replace this process by the same command in an EDF's image, by default post-training's. Come
    back where it can run already: in an image, or where the stack is installed and no EDF is named.

    written: by option, what the command writes.
    Errors: UsageError for what would be lost with the container.
    """
    if can_run_here(environment):
        return
    for option, path in written.items():
        if path is not None and not path.resolve().is_relative_to(Path.cwd().resolve()):
            raise UsageError(
                f"{option}: must be below the working directory, which the image sees (got {path})"
            )
    command = ["run", environment or "post-training", "--", "post-training", *sys.argv[1:]]
    sys.exit(main(command))
