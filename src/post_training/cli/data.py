"""`post-training data …`."""

from pathlib import Path
from typing import Annotated

import typer

from post_training.cli.options import GROUP, Environment, Json, Overrides

data_app = typer.Typer(help="Look at data as training reads it, and fetch it.", **GROUP)

Config = Annotated[
    Path | None,
    typer.Argument(
        help="Of sft, dpo, reward-model or prepare.", metavar="CFG.YAML", show_default=False
    ),
]

Indexed = Annotated[
    Path | None,
    typer.Option(metavar="PREFIX", help="Instead: of PREFIX_text_document.bin and .idx."),
]


@data_app.command("inspect")
def data_inspect(
    config: Config = None,
    overrides: Overrides = None,
    indexed: Indexed = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="With --indexed: a SentencePiece model, or a tokenizer's folder."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="How many rows.")] = 5,
    row: Annotated[
        int | None, typer.Option(min=1, help="This row alone, of all the data; from 1.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.HTML", help="Write a page instead.")
    ] = None,
    environment: Environment = None,
) -> None:
    """Show rows as text, tokens and ids, and what of them is trained."""
    from post_training.cli.edf import enter_image
    from post_training.core.errors import UsageError

    _check_source(config, indexed)
    if (indexed is None) != (tokenizer is None):
        raise UsageError("give --tokenizer with --indexed, and only with it")
    enter_image(environment, {"--html": html})
    from post_training.cli import inspect

    if indexed is not None:
        inspect.inspect_indexed(indexed, tokenizer, num_samples, row, html)
    else:
        inspect.inspect_config(config, overrides or [], num_samples, row, html)


@data_app.command("count")
def data_count(
    config: Config = None,
    overrides: Overrides = None,
    indexed: Indexed = None,
    as_json: Json = False,
    per_sample: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the tokens of each sample (TSV)."),
    ] = None,
    environment: Environment = None,
) -> None:
    """Tokens per source, what training will read of each, and how long the sequences are."""
    from post_training.cli.edf import enter_image

    _check_source(config, indexed)
    enter_image(environment, {"--per-sample": per_sample})
    from post_training.cli import inspect

    if indexed is not None:
        inspect.count_indexed(indexed, as_json=as_json, per_sample=per_sample)
    else:
        inspect.count_config(config, overrides or [], as_json=as_json, per_sample=per_sample)


@data_app.command("fetch")
def data_fetch(
    hub: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset.")],
    hub_dir: Annotated[Path, typer.Option(help="data.hub_dir of the configurations.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit; else the main branch.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="One of the dataset's subsets.")] = None,
    split: Annotated[str, typer.Option(help="One of its splits.")] = "train",
    environment: Environment = None,
) -> None:
    """Download a dataset of the Hugging Face hub, and print how to name it."""
    from post_training.cli.edf import enter_image

    enter_image(environment, {"--hub-dir": hub_dir})
    from post_training.cli import inspect

    inspect.fetch_dataset(hub, revision, subset, split, hub_dir)


@data_app.command("kinds")
def data_kinds(as_json: Json = False) -> None:
    """Public datasets by their kind: what to write in a dataset's settings, and what becomes."""
    from post_training.data.public.kinds import KINDS

    if as_json:
        import json

        names = ("datasets", "settings", "becomes")
        print(
            json.dumps({k: {n: getattr(v, n) for n in names} for k, v in KINDS.items()}, indent=2)
        )
        return
    for name, kind in KINDS.items():
        print(f"{name} ({kind.datasets})")
        print(f"    settings: {kind.settings or 'none needed'}")
        print(f"    trained: {kind.becomes}")


def _check_source(config: Path | None, indexed: Path | None) -> None:
    from post_training.core.errors import UsageError

    if (config is None) == (indexed is None):
        raise UsageError("give either a configuration or --indexed PREFIX")
