"""Write docs/reference: the commands from the command line itself, the settings from their models.

    make docs-reference

`write_pages(folder)` is all of it; a test compares its pages with those of the repository.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from post_training.cli import build_app
from post_training.config.model import Config
from post_training.config.reference import Setting, list_settings
from post_training.slurm.pipeline import PipelineConfig
from post_training.slurm.site import Site
from post_training.stages.registry import STAGES
from post_training.train.optim import OPTIMIZERS, SCHEDULES

_MADE = "<!-- Made by `make docs-reference`. Edit the source that it names, not this page. -->\n\n"


def write_pages(folder: Path) -> None:
    """Write every page below `folder`."""
    (folder / "settings").mkdir(parents=True, exist_ok=True)
    for name, text in _pages():
        (folder / name).write_text(_MADE + text.rstrip("\n") + "\n", encoding="utf-8")


def _pages() -> Iterator[tuple[str, str]]:
    yield "commands.md", _commands()
    stages = list(STAGES.values())
    lines = [
        "# Settings",
        "",
        "A page for each stage. `entrypoint STAGE --help-config [KEY]` and",
        "`post-training settings STAGE [KEY]` show the same texts in a terminal.",
        "",
        "A setting is one of four kinds (*counts as*, see [identity](../../concepts/identity.md)).",
        "**recipe**: what is computed. **topology**: how; it may change bits. **input**: a path",
        "that counts by its content. **placement**: where things go; it changes no result.",
        "`[]` stands for any item of a list.",
        "",
        "| stage | what it does |",
        "|---|---|",
        *(f"| [{stage.name}]({stage.name}.md) | {stage.summary} |" for stage in stages),
        "",
        "Beside the stages: [optimizers and schedules](optimizers.md), [sites](site.md),",
        "[pipelines](pipeline.md).",
        "",
    ]
    yield "settings/index.md", "\n".join(lines)
    for stage in stages:
        model = stage.load_config_class()
        title = f"# Settings of `{stage.name}`\n\n{_summary(model)}\n\n"
        yield f"settings/{stage.name}.md", title + _tables(model)
    yield "settings/optimizers.md", _optimizers()
    yield "settings/site.md", f"# Settings of a site\n\n{_summary(Site)}\n\n{_tables(Site)}"
    title = f"# Settings of a pipeline\n\n{_summary(PipelineConfig)}\n\n"
    yield "settings/pipeline.md", title + _tables(PipelineConfig)


def _commands() -> str:
    command = typer.main.get_command(build_app())
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="post-training", title="Commands"
    )
    inside = (
        "\n## Inside the image\n\n"
        "`entrypoint STAGE cfg.yaml [key=value …]` runs a stage: [the stages and their settings]"
        "(settings/index.md).\n"
        "`entrypoint chat MODEL` and `entrypoint generate MODEL --prompt TEXT` show "
        "[what a model says](../guides/chat.md).\n"
        "`entrypoint exec … -- COMMAND` runs [any command](../guides/exec.md) with a record.\n"
        "`entrypoint doctor` says whether the container has what a run needs.\n"
    )
    # Typer names a bullet list by stars and leaves blanks at line ends.
    return re.sub(r"(?m)[ \t]+$", "", text).rstrip("\n") + "\n" + inside


def _optimizers() -> str:
    text = "# Optimizers and schedules\n\n"
    for title, key, models in (
        ("Optimizers", "training.optimizer", OPTIMIZERS),
        ("Schedules", "training.lr_scheduler_type", SCHEDULES),
    ):
        arguments = "optimizer_args" if key.endswith("optimizer") else "lr_scheduler_kwargs"
        text += f"## {title}\n\n`{key}` names one; its settings go into `training.{arguments}`.\n\n"
        for name, model in models.items():
            text += f"### `{name}`\n\n{_summary(model)}\n\n"
            text += _table(list_settings(model)) if model.model_fields else "No settings.\n\n"
    return text


def _summary(model: type[Config]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _tables(model: type[Config]) -> str:
    """The settings that stand at the top, then a table for each block at the top."""
    settings = list(list_settings(model))
    blocks = {s.path.partition(".")[0].partition("[")[0] for s in settings if "." in s.path}
    alone = [s for s in settings if s.path not in blocks and "." not in s.path]
    text = "## At the top level\n\n" + _table(alone) if alone else ""
    for setting in settings:
        if setting.path in blocks:
            inside = (f"{setting.path}.", f"{setting.path}[")
            below = [s for s in settings if s.path.startswith(inside)]
            needed = " Required." if setting.default == "required" else ""
            text += f"## `{setting.path}`\n\n{setting.description}{needed}\n\n{_table(below)}"
    return text


def _table(settings: Iterable[Setting]) -> str:
    rows = [
        f"| `{setting.path}` | {_cell(setting.kind)} | {_default(setting)} "
        f"| {setting.role.value} | {_cell(setting.description)} |"
        for setting in settings
    ]
    head = ["| setting | type | default | counts as | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n\n"


def _default(setting: Setting) -> str:
    if setting.is_block:
        return ""
    return "**required**" if setting.default == "required" else f"`{setting.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    write_pages(Path(__file__).parent / "reference")
    sys.exit()
