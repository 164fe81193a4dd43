"""`post-training watch`: the pages of runs, served on loopback and made anew for each request.

    /                     the runs below the folder, a line each; of a single run, its page
    /run/NAME             the page of one
    /compare?run=A&run=B  several laid over each other

A login node has many users, and loopback is theirs too. So the address holds a key, which the
browser then keeps as a cookie; without it nothing is shown. A page of another site cannot read what
is served: it has no key, and a request under another host name is refused.
"""

import secrets
import socket
from dataclasses import dataclass
from hmac import compare_digest
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.report.curves import sparkline
from post_training.report.page import render, render_list
from post_training.report.view import GLANCE_BYTES, PAGE, read_view
from post_training.slurm.run_index import Filters, list_states
from post_training.slurm.runs import RunState
from post_training.stages.registry import find_config_class

_ADDRESS = "127.0.0.1"
_MOST_COMPARED = 8


@dataclass(frozen=True)
class ListedRun:
    """name: the path below the folder that is watched."""

    state: RunState
    name: str

    @property
    def href(self) -> str:
        return f"/run/{quote(self.name)}"

    @property
    def spark(self) -> str:
        return sparkline(self.state.losses)


def serve(folder: Path, *, port: int, refresh_s: int) -> None:
    """Serve until Ctrl-C. port: 0 is any that is free.

    Errors: UsageError for a folder without runs to come, or a port that is taken.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder))
    try:
        server = make_server(folder, port, refresh_s)
    except OSError as error:
        raise UsageError(
            f"cannot listen on port {port}: {error.strerror}",
            where="--port",
            hint="--port 0 takes any that is free",
        ) from None
    number = server.server_address[1]
    tell(f"watching {folder} at {server.url}")
    tell(f"from elsewhere: ssh -L {number}:{_ADDRESS}:{number} {socket.gethostname()}; Ctrl-C ends")
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            tell("stopped")


class WatchServer(ThreadingHTTPServer):
    """key: without which nothing is shown. url: with it."""

    daemon_threads = True
    folder: Path
    refresh_s: int
    key: str

    @property
    def url(self) -> str:
        return f"http://{_ADDRESS}:{self.server_address[1]}/?key={self.key}"


def make_server(folder: Path, port: int, refresh_s: int) -> WatchServer:
    """Errors: OSError where the port is taken."""
    server = WatchServer((_ADDRESS, port), _Handler)
    server.folder, server.refresh_s, server.key = folder, refresh_s, secrets.token_urlsafe(24)
    return server


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        query = parse_qs(place.query)
        number = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{_ADDRESS}:{number}", f"localhost:{number}"):
            self._answer(HTTPStatus.FORBIDDEN, "asked for under another host name")
            return
        if "key" in query and self._is_key(query["key"][0]):
            self._welcome(place.path)
            return
        if not self._is_key(self._cookie()):
            self._answer(HTTPStatus.FORBIDDEN, "open the address that `post-training watch` said")
            return
        try:
            page = self._page(unquote(place.path), query.get("run", []))
        except (PostTrainingError, OSError) as error:
            # A record that is being replaced, or one that is damaged: the server goes on.
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            return
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND, "no such run below the folder that is watched")
        else:
            self._answer(HTTPStatus.OK, page, kind="text/html")

    def log_message(self, *_: object) -> None:
        """Silent: a page asks every few seconds."""

    def _page(self, path: str, chosen: list[str]) -> str | None:
        root, refresh_s = self.server.folder, self.server.refresh_s
        # Only what is listed is shown: no name leads out of the folder.
        runs = {
            run.name: run
            for state in list_states(root, Filters())
            for run in [ListedRun(state, _name(state.run_dir, root))]
        }
        if path == "/" and list(runs) == ["."]:
            return self._render([runs["."]])
        if path == "/":
            return render_list(list(runs.values()), str(root.absolute()), refresh_s)
        if path == "/compare":
            wanted = list(dict.fromkeys(chosen))[:_MOST_COMPARED]
            found = [runs[name] for name in wanted if name in runs]
            return self._render(found) if found else None
        run = runs.get(path.removeprefix("/run/"))
        return self._render([run]) if run and path.startswith("/run/") else None

    def _render(self, runs: list[ListedRun]) -> str:
        views = [
            read_view(
                run.state.run_dir, find_config_class, state=run.state.state, most_bytes=GLANCE_BYTES
            )
            for run in runs
        ]
        return render(views, self._link, refresh_s=self.server.refresh_s)

    def _link(self, page: Path) -> str:
        """To the page of a run in the lineage: served where it is below the folder."""
        run_dir, root = page.parent.resolve(), self.server.folder.resolve()
        if run_dir.is_relative_to(root) and page.name == PAGE:
            return f"/run/{quote(_name(run_dir, root))}"
        return page.absolute().as_uri()

    def _is_key(self, text: str) -> bool:
        return compare_digest(text.encode(), self.server.key.encode())

    @property
    def _cookie_name(self) -> str:
        """Cookies are one host's, whatever the port."""
        return f"watch-{self.server.server_address[1]}"

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return ""
        return found[self._cookie_name].value if self._cookie_name in found else ""

    def _welcome(self, path: str) -> None:
        """Keep the key as a cookie, and take it out of the address."""
        self.send_response(HTTPStatus.SEE_OTHER)
        flags = "Path=/; HttpOnly; SameSite=Strict"
        self.send_header("Set-Cookie", f"{self._cookie_name}={self.server.key}; {flags}")
        self.send_header("Location", quote(path, safe="/%") or "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)


def _name(run_dir: Path, root: Path) -> str:
    return run_dir.relative_to(root).as_posix()
