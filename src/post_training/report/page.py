"""One file of HTML from what is known of runs.

The curves are drawn by uPlot (leeoniya/uPlot, MIT licence, 52 KB), which the package `youplot`
carries. Of that package nothing is imported: the file is read, and only the very bytes of uPlot's
own release get into a page. The page's policy (CSP) lets in its own scripts, by their sha256, and
nothing from elsewhere.
"""

import base64
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import write_atomic
from post_training.core.hashing import sha256_bytes
from post_training.report.annotations import QUANTILES, format_number
from post_training.report.curves import Chart, make_charts
from post_training.report.view import (
    GLANCE_BYTES,
    PAGE,
    FindModel,
    RunView,
    differing_settings,
    read_view,
    with_own_labels,
)

_FOLDER = Path(__file__).parent
_CARRIER = "youplot"
# Of uPlot 1.6.31, as its authors published it on npm.
_UPLOT = {
    "uplot.iife.min.js": "2d27e8ad3d228164525ce213f9dc716f39b4e3aee0cc773fb3491c96cf4921a2",
    "uplot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
# In every page, so that another file is not taken for one.
_GENERATOR = b'content="post-training report"'
# Where a page links to another run's.
Link = Callable[[Path], str]


def write_page(views: Sequence[RunView], target: Path) -> None:
    """Write the page of these runs; an earlier page is replaced.

    Errors: UsageError where another file is in its place; PostTrainingError where uPlot is not
    installed.
    """
    folder = target.absolute().parent
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder))
    if target.is_dir() or (target.exists() and _GENERATOR not in target.read_bytes()[:4096]):
        raise UsageError(
            "there already, and no report", where=str(target), hint="choose another --output"
        )

    def link(page: Path) -> str:
        return Path(os.path.relpath(page.absolute(), folder)).as_posix()

    write_atomic(target, render(views, link))


def leave_page(run_dir: Path, find_model: FindModel) -> Path | None:
    """RUN/report.html of a run that has just finished; None with a warning where there can be none.

    Never an error: the run is finished, whatever becomes of its picture.
    """
    try:
        view = read_view(run_dir, find_model, most_bytes=GLANCE_BYTES)
        write_page([view], run_dir / PAGE)
    except Exception as error:
        tell(f"warning: no {PAGE}: {str(error).splitlines()[0] if str(error) else repr(error)}")
        return None
    return run_dir / PAGE


def render(views: Sequence[RunView], link: Link, *, refresh_s: int | None = None) -> str:
    """The page as text. refresh_s: of a page that is served, how often it asks for news."""
    runs = with_own_labels(list(views))
    charts = make_charts([run.curves for run in runs])
    script = _own("page.js")
    return _template("page.html.jinja").render(
        runs=runs,
        charts=charts,
        chart_data=_embedded(_chart_data(runs, charts)),
        differing=differing_settings(runs) if len(runs) > 1 else [],
        quantiles=list(QUANTILES),
        uplot_js=_uplot("uplot.iife.min.js"),
        uplot_css=_uplot("uplot.min.css"),
        css=_own("page.css"),
        script=script,
        policy=_policy(_uplot("uplot.iife.min.js"), script, is_served=refresh_s is not None),
        refresh_s=refresh_s,
        link=link,
    )


def render_list(states: Sequence[Any], root: str, refresh_s: int) -> str:
    """The table of runs that `watch` shows. states: of slurm/runs.py, with `name` and `href`."""
    script = _own("page.js")
    return _template("list.html.jinja").render(
        states=states,
        root=root,
        css=_own("page.css"),
        script=script,
        policy=_policy(script, is_served=True),
        refresh_s=refresh_s,
    )


@cache
def _template(name: str):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "duration": duration,
        "figure": _figure,
        "moment": _moment,
    }
    return environment.get_template(name)


def duration(seconds: float) -> str:
    """`3 h 20 min`, `45 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min" if whole >= 60 else f"{whole} s"


def _figure(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value / (1 << 30):.2f} GiB" if name.endswith("_bytes") else format_number(value)


def _moment(text: str | None) -> str:
    """`2026-11-28 10:00:00 UTC` of a time in a record."""
    return "?" if text is None else text.replace("T", " ").replace("+00:00", " UTC")


@cache
def _own(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def _uplot(name: str) -> str:
    """Errors: PostTrainingError where it is not installed, or not what its authors published."""
    try:
        path = importlib.metadata.distribution(_CARRIER).locate_file(f"{_CARRIER}/vendor/{name}")
        content = Path(str(path)).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        raise PostTrainingError(
            f"the package {_CARRIER}, which carries uPlot, is not installed here",
            hint="`make setup`, or run it from an image built since",
        ) from None
    if sha256_bytes(content) != _UPLOT[name]:
        raise PostTrainingError("not the bytes of uPlot 1.6.31", where=str(path))
    return content.decode()


def _policy(*scripts: str, is_served: bool) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    connect = " connect-src 'self';" if is_served else ""
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes};{connect}"


def _chart_data(runs: Sequence[RunView], charts: Sequence[Chart]) -> dict[str, Any]:
    """What page.js draws: the axes of each run, and the series of each chart by their axis."""
    return {
        "runs": [run.label for run in runs],
        "axes": [
            {
                name: {"step": axis.steps, "tokens": axis.tokens}
                for name, axis in run.curves.axes.items()
            }
            if run.curves
            else {}
            for run in runs
        ],
        "charts": [
            {
                "series": [
                    {"run": each.run, "axis": each.axis, "name": each.name, "values": each.values}
                    for each in chart.series
                ]
            }
            for chart in charts
        ],
    }


def _embedded(value: Any) -> str:
    """JSON that may stand within <script>: nothing in it ends the element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
