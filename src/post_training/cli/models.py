"""`post-training model …`."""

from pathlib import Path
from typing import Annotated

import typer

from post_training.cli.options import GROUP, Environment

model_app = typer.Typer(help="Fetch models of the Hugging Face hub.", **GROUP)


@model_app.callback()
def _group() -> None:
    """Keeps `fetch` a command of its own while there is no other."""


@model_app.command("fetch")
def model_fetch(
    hub: Annotated[str, typer.Argument(help="OWNER/NAME of a model.")],
    hub_dir: Annotated[
        Path, typer.Option(help="The folder to fill; model.hub_dir in configurations.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit; else the main branch.")
    ] = None,
    from_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="HF_HOME",
            help="Take it from this cache of the hub's client, without the network.",
        ),
    ] = None,
    environment: Environment = None,
) -> None:
    """Fetch a model of the Hugging Face hub, and print how to name it."""
    import sys

    from post_training.cli.edf import enter_image
    from post_training.models.hub import fetch_model
    from post_training.records.licences import licence_in_card

    if from_folder is None:  # else nothing of the hub's client is needed
        enter_image(environment, {"--hub-dir": hub_dir})
    fetched = fetch_model(hub, revision, hub_dir, from_folder)
    licence = licence_in_card(fetched.folder) or "not stated"
    print(f"licence, as its card states it: {licence}", file=sys.stderr)
    print(f"in {fetched.folder}; for a configuration:", file=sys.stderr)
    print(fetched.settings())
