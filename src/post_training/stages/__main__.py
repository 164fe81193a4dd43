"""`entrypoint STAGE cfg.yaml [key=value …]` and `entrypoint doctor`, inside the image."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from post_training.config.load import write_override
from post_training.core.errors import (
    ArgumentParser,
    Interrupted,
    PostTrainingError,
    UsageError,
    report,
)
from post_training.core.files import user_cache
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import PeerFailed
from post_training.stages.execute import Request, execute
from post_training.stages.processes import DONE_VARIABLE
from post_training.stages.registry import STAGES, describe_settings, find_stage


def main(arguments: Sequence[str]) -> int:
    """Run what `arguments` ask for; the exit code. An error is told in one line."""
    try:
        return _run(arguments)
    except UsageError as error:
        return report(error)


def _run(arguments: Sequence[str]) -> int:
    """Errors: UsageError for a command line that is none."""
    if list(arguments) == ["doctor"]:
        from post_training.stages import doctor

        return doctor.main()
    if list(arguments[:1]) == ["chat"] or (
        list(arguments[:1]) == ["generate"] and any(w.startswith("--prompt") for w in arguments)
    ):
        return _look_at_a_model(arguments)
    if "--help-config" in arguments:
        return _explain_settings([word for word in arguments if word != "--help-config"])
    parser = ArgumentParser(
        prog="entrypoint",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run one stage of post-training.",
        epilog="stages:\n"
        + "\n".join(f"  {s.name:18} {s.summary}" for s in STAGES.values())
        + "\n\n`entrypoint STAGE --help-config` lists a stage's settings, and `--help-config KEY` "
        "explains one and those below it."
        "\n`entrypoint exec --input NAME=PATH --output PATH -- COMMAND …` needs no file."
        "\n`entrypoint chat MODEL` talks to a model, and `entrypoint generate MODEL --prompt TEXT` "
        "asks it once."
        "\n`entrypoint doctor` says whether this container has what a run needs.",
    )
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("config", type=Path, metavar="cfg.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted keys, with list indices: data.datasets[0].path=x",
    )
    parser.add_argument(
        "--unpinned",
        action="store_true",
        help="run although no image digest is pinned; the record says so",
    )
    parser.add_argument(
        "--allow-topology-change",
        action="store_true",
        help="continue a run with another world size or micro-batch; its bits will "
        "differ, and the record says so",
    )
    parser.add_argument(
        "--skip-finished",
        action="store_true",
        help="succeed when the same run is finished already, and change nothing",
    )
    if arguments[:1] == ["exec"] and "--" in arguments:
        return _run_command(parser, arguments)
    if arguments[:1] == ["exec"] and any(w.startswith(("--input", "--output")) for w in arguments):
        hint = "entrypoint exec --input NAME=PATH --output PATH -- COMMAND …"
        raise UsageError("--input and --output want a command after --", hint=hint)
    if not {"-h", "--help"} & set(arguments):
        _check_words([word for word in arguments if not word.startswith("-")])
    return _execute(parser.parse_intermixed_args(arguments), arguments)


def _check_words(words: Sequence[str]) -> None:
    """Errors: UsageError where the first is no stage, or no file follows it."""
    if not words:
        return  # the parser says what is wanted
    stage, *others = words
    find_stage(stage)
    if not others or ("=" in others[0] and not Path(others[0]).exists()):
        raise UsageError(
            f"entrypoint {stage}: the configuration file is missing",
            hint=f"entrypoint {stage} cfg.yaml; `entrypoint {stage} --help-config` lists settings",
        )


def _run_command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """`entrypoint exec [key=value …] --input NAME=PATH … --output PATH … -- COMMAND …`: the
    configuration is on the command line, and no file is read."""
    end = list(arguments).index("--")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--output", action="append", default=[], metavar="[NAME=]PATH")
    # The parser asks for a file, which is none here.
    options = parser.parse_intermixed_args(["exec", os.devnull, *arguments[1:end]])
    inputs = [dict(zip(("name", "path"), _named(text), strict=True)) for text in options.input]
    outputs = [
        dict(zip(("name", "path"), _named(text, "output"), strict=True)) for text in options.output
    ]
    settings = {"command": list(arguments[end + 1 :]), "inputs": inputs, "outputs": outputs}
    options.config = None
    options.overrides += [write_override(key, value) for key, value in settings.items()]
    return _execute(options, arguments)


def _named(text: str, name: str | None = None) -> tuple[str, str]:
    """(name, path) of NAME=PATH, or of a PATH; its own name, unless another is given."""
    before, equals, after = text.partition("=")
    return (before, after) if equals else (name or Path(text).name, text)


def _execute(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    request = Request(
        stage=options.stage,
        config_path=options.config,
        overrides=options.overrides,
        unpinned=options.unpinned,
        allow_topology_change=options.allow_topology_change,
        skip_finished=options.skip_finished,
        command=tuple(arguments),
    )
    try:
        return execute(request)
    except PeerFailed:
        return 1  # Rank 0 says why.
    except Interrupted as error:
        # One line, not one of each rank.
        return report(error) if os.environ.get("RANK", "0") == "0" else error.exit_code
    except SystemExit as error:  # Of a library: to a script its code 0 would be success.
        return report(PostTrainingError(f"the stage was ended by SystemExit: {error.code}"))
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def _look_at_a_model(arguments: Sequence[str]) -> int:
    """`chat`, and `generate --prompt`: they have no configuration and no record."""
    quiet_libraries(user_cache())
    try:
        # A layer above: as a stage, it is found by its name.
        return import_module("post_training.annotate.chat").main(arguments)
    except BrokenPipeError:  # Of `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def _explain_settings(words: Sequence[str]) -> int:
    print("\n".join(describe_settings(words)))
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if "RANK" in os.environ:
        # gloo's threads outlive the process group, and at a normal exit they abort the process now
        # and then ("terminate called without an active exception"): the exit code would be theirs.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or int(os.environ.get(DONE_VARIABLE, 0)))
    sys.exit(code)
