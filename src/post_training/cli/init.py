"""`post-training init`: a first configuration, with comments, checked before it is written.

Three things are asked for, or given as options: the model, the rows and the folder of the run.
"""

import json
import re
import sys
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

KINDS = ("sft", "dpo", "generate", "pipeline")
_TEMPLATES = Path(__file__).parent / "first_configs"
# What is a string in YAML without quotes, in a {…} too.
_PLAIN = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./~-]*")
_WORDS_OF_YAML = {"true", "false", "null", "~"}


def init_config(
    kind: Annotated[str, typer.Argument(metavar="sft|dpo|generate|pipeline")],
    model: Annotated[
        Path | None, typer.Option(help="The model's folder.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The rows: a file or a folder.", show_default=False)
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="The run's new folder.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="By default KIND.yaml.", show_default=False),
    ] = None,
) -> None:
    """Write a first configuration with comments. What is not given as an option is asked for."""
    from post_training.config.faults import nearest
    from post_training.core.errors import UsageError
    from post_training.data.sources.open import check_kind

    if kind not in KINDS:
        raise UsageError(
            f"no first configuration {kind!r}{nearest(kind, KINDS)}",
            hint=f"there are: {', '.join(KINDS)}",
        )
    target = output or Path(f"{kind}.yaml")
    if target.exists():
        raise UsageError("is there already", where=str(target), hint="choose another --output")
    if not target.absolute().parent.is_dir():
        raise UsageError("no such folder", where=str(target.parent))
    rows = "pairs" if kind == "dpo" else "prompts" if kind == "generate" else "rows"
    model = model or _ask("the model's folder", "--model")
    data = data or _ask(f"the {rows} (a file)", "--data")
    if data.is_file():
        check_kind(data)
    written = write_first_config(
        kind,
        target,
        model=model,
        data=data,
        run_dir=run_dir or _ask("the folder of the run", "--run-dir", f"runs/{kind}"),
    )
    for missing in written:
        print(f"note: not there yet: {missing}", file=sys.stderr)
    print(target)


def write_first_config(
    kind: str, target: Path, *, model: Path, data: Path, run_dir: Path
) -> list[str]:
    """Write it, once it is found right; the paths in it that are not there (yet).

    Errors: ConfigError with its faults.
    """
    from post_training.core.files import write_atomic

    text = Template((_TEMPLATES / f"{kind}.yaml").read_text(encoding="utf-8")).substitute(
        file=target,
        model=_yaml(model),
        data=_yaml(data),
        run_dir=_yaml(run_dir),
        template=_chat_template(model),
    )
    with TemporaryDirectory() as folder:
        tried = Path(folder) / target.name
        tried.write_text(text, encoding="utf-8")
        _check(kind, tried)
    write_atomic(target, text)
    return [str(path) for path in (model, data) if not path.exists()]


def _check(kind: str, path: Path) -> None:
    from post_training.config.load import check_layer, load_config
    from post_training.slurm.pipeline import load_pipeline
    from post_training.stages.registry import find_stage

    if kind == "pipeline":
        for pipeline in load_pipeline(path):
            for name in pipeline.order:
                layer = pipeline.stage_layer(name, lambda stage, artifact: Path(stage, artifact))
                stage = find_stage(pipeline.config.stages[name].stage)
                check_layer(stage.load_config_class(), layer)
    else:
        load_config(find_stage(kind).load_config_class(), path)


def _ask(what: str, option: str, default: str | None = None) -> Path:
    """Errors: UsageError where nobody is there to answer."""
    from post_training.core.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError(
            f"not given: {what}", where=option, hint="it is asked for only on a terminal"
        )
    told = f"{what} [{default}]: " if default else f"{what}: "
    while True:
        # Not input(): it would ask on stdout, where the answer of the command goes.
        print(told, end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            raise KeyboardInterrupt
        if answer := answer.strip() or default or "":
            return Path(answer).expanduser()


def _chat_template(model: Path) -> str:
    """`model` where the model's folder has a template, or is not there yet; else chatml."""
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    is_there = (model / "chat_template.jinja").exists() or "chat_template" in settings
    return "model" if is_there or not model.exists() else "chatml"


def _yaml(path: Path) -> str:
    text = str(path)
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS_OF_YAML
    return text if is_plain else json.dumps(text, ensure_ascii=False)
