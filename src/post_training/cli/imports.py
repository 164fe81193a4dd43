"""`post-training import`."""

from pathlib import Path
from typing import Annotated

import typer


def import_configuration(
    system: Annotated[
        str, typer.Argument(help="axolotl, trl, openeurollm, swissai, neox or llamafactory.")
    ],
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE…", help="Its files, and key=value as on its command line."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="CFG.YAML", help="Write there instead of on the screen.")
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Leave out this key of the file; may be repeated."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Add or replace a setting of the result; may be repeated.",
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="sft, dpo or reward-model, where the file does not show it."),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train together: nodes × GPUs of a node."),
    ] = None,
) -> None:
    """Translate another trainer's configuration, and say what became of each key."""
    import sys

    from post_training.core import yaml
    from post_training.core.errors import UsageError
    from post_training.core.files import write_atomic
    from post_training.importers.run import Request, import_settings

    if out is not None and out.exists():
        raise UsageError("is there already", where=str(out), hint="choose another name for --out")
    if stage not in (None, "sft", "dpo", "reward-model"):
        raise UsageError("must be sft, dpo or reward-model", where=f"--stage {stage}")
    request = Request(system, files, drop or [], settings or [], num_processes, stage)
    imported = import_settings(request)
    for line in imported.lines:
        print(line, file=sys.stderr)
    for hint in imported.hints:
        print(f"note: {hint}", file=sys.stderr)
    text = yaml.dump(imported.settings)
    if out is None:
        print(text, end="")
        return
    write_atomic(out, text)
    print(f"{out}: for `entrypoint {imported.stage} {out}`", file=sys.stderr)
