"""Samples as one HTML page (page.html.jinja, page.css)."""

from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from post_training.data.inspection.samples import Sample
from post_training.data.inspection.visible import stretches_of_run, stretches_of_token


def page(samples: Iterable[Sample], title: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        samples=list(samples),
        text_of=lambda run: stretches_of_run(run.tokens),
        parts_of=stretches_of_token,
        ends_line=lambda token: token.content.endswith(b"\n"),
    )
