"""`post-training edf resolve|run`, and host commands that run themselves again inside an image.

Kept apart from the command line's other code: every process of a job starts here, and importing
typer would take longer than starting the container.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from post_training.core.errors import ArgumentParser, UsageError, report, tell
from post_training.images.checkout import describe_changes
from post_training.images.edf import Edf, Mount, find_edf, load_edf, parse_mount
from post_training.images.identity import can_run_here
from post_training.images.inside import FINDINGS
from post_training.images.runner import run


def make_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """(of both commands, of `run`); cli/images.py describes the same for the reference."""
    parser = ArgumentParser(prog="post-training edf", allow_abbrev=False)
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
    return parser, running


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit code. What `edf run` starts replaces this process."""
    parser, _ = make_parsers()
    # Split by hand: argparse would remove a later `--` from the command.
    words = list(arguments)
    split = words.index("--") if "--" in words else len(words)
    command = words[split + 1 :]
    try:
        if words[:1] == ["run"] and not command and not {"-h", "--help"} & set(words):
            raise UsageError(
                "post-training edf run: the command is missing, which comes after `--`",
                hint="post-training edf run [OPTIONS] ENVIRONMENT -- COMMAND …",
            )
        options = parser.parse_args(words[:split])
        cwd = Path.cwd()
        # `${PWD}` in an EDF is where we are, whatever an inherited variable says.
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
        _warn_of_ignored_keys(edf, env)
        run(edf, command, env, findings)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def _warn_of_ignored_keys(edf: Edf, env: Mapping[str, str]) -> None:
    """Hooks and devices are for a site's own engine. Only the first rank of a job warns."""
    hooks = [key for key, value in edf.annotations.items() if value not in ("false", "")]
    ignored = [*hooks, *(f"device {name}" for name in edf.devices)]
    if ignored and env.get("SLURM_PROCID", "0") == "0":
        tell(f"warning: {edf.path}: ignored here: {', '.join(ignored)}")


def _extra_mount(text: str, cwd: Path) -> Mount:
    try:
        mount = parse_mount(text, cwd)
    except ValueError as error:
        raise UsageError(f"--mount: {error}") from None
    if not mount.source.exists():
        raise UsageError(f"--mount: source does not exist: {mount.source}")
    return mount


def _with_checkout(edf: Edf, checkout: Path) -> tuple[Edf, dict]:
    """Mount the checkout where the image's `entrypoint` looks; (the EDF, what git says of it)."""
    if not (checkout / "src/post_training").is_dir():
        raise UsageError("--dev: not a checkout of this project", where=str(checkout))
    target = Mount(checkout, FINDINGS / "dev", frozenset({"ro"}))
    return replace(edf, mounts=(*edf.mounts, target)), describe_changes(checkout)


def enter_image(
    environment: str | None,
    written: Mapping[str, Path | None],
    words: Sequence[str] | None = None,
) -> None:
    """Run this very command line inside an image, in place of this process; return where it can run
    here already.

    environment: the EDF; post-training's unless given.
    written: {option: file or folder that the command writes}.
    words: another command line for `post-training`.
    Errors: UsageError for a path outside the working directory, lost with the container.
    """
    if can_run_here(environment):
        return
    for option, path in written.items():
        if path is not None and not path.resolve().is_relative_to(Path.cwd().resolve()):
            raise UsageError(
                f"{option}: must be below the working directory, which the image sees (got {path})"
            )
    command = ["run", environment or "post-training", "--", "post-training"]
    command += sys.argv[1:] if words is None else words
    sys.exit(main(command))
