"""`post-training watch`: the pages of runs for whoever has the key, and for nobody else."""

import html
import http.client
import threading
from contextlib import contextmanager

import pytest

from helpers.finished_runs import finish_run
from post_training.core.errors import UsageError
from post_training.slurm.watch import make_server, serve


@contextmanager
def watching(folder):
    server = make_server(folder, 0, 7)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(server, path, *, cookie=None, host=None):
    """(status, headers, text)"""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Host": host or f"127.0.0.1:{port}"}
    connection.request("GET", path, headers=headers | ({"Cookie": cookie} if cookie else {}))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    for name in ("one", "deep/two"):
        (folder / name).parent.mkdir(exist_ok=True)
        finish_run(folder, name)
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture(autouse=True)
def index_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_watch_shows_runs_and_their_pages_to_who_has_the_key(runs):
    with watching(runs) as server:
        status, headers, _ = get(server, f"/?key={server.key}")
        assert (status, headers["Location"]) == (303, "/")
        _, named, _ = get(server, f"/run/a%20b?key={server.key}")
        assert named["Location"] == "/run/a%20b"
        cookie = headers["Set-Cookie"].split(";")[0]
        assert "HttpOnly" in headers["Set-Cookie"]
        status, headers, listed = get(server, "/", cookie=cookie)
        assert (status, headers["Cache-Control"]) == (200, "no-store")
        assert f"<title>Runs below {runs}</title>" in listed
        assert 'href="/run/one"' in listed
        assert 'href="/run/deep/two"' in listed
        status, _, page = get(server, "/run/deep/two", cookie=cookie)
        assert status == 200
        assert 'data-refresh="7"' in page
        assert "connect-src 'self'" in html.unescape(page)
        status, _, both = get(server, "/compare?run=one&run=deep/two", cookie=cookie)
        assert status == 200
        assert "<h1>2 runs</h1>" in both


@pytest.mark.parametrize("path", ["/", "/run/one", "/?key=wrong", "/compare?run=one"])
def test_watch_shows_nothing_without_the_key(runs, path):
    with watching(runs) as server:
        port = server.server_address[1]
        for cookie in (None, f"watch-{port}=", f"watch-{port}=wrong", 'a="\\'):
            status, _, text = get(server, path, cookie=cookie)
            assert status == 403
            assert "one" not in text.replace("open the address", "")


def test_watch_refuses_another_host_name_even_with_the_key(runs):
    with watching(runs) as server:
        status, headers, _ = get(server, f"/?key={server.key}", host="evil.example")
        assert status == 403
        assert "Set-Cookie" not in headers


@pytest.mark.parametrize(
    "path",
    ["/run/../secret.txt", "/run/%2e%2e/x", "/secret.txt", "/run/", "/compare", "/compare?run=no"],
)
def test_watch_shows_nothing_but_listed_runs(runs, path):
    with watching(runs) as server:
        cookie = f"watch-{server.server_address[1]}={server.key}"
        status, _, text = get(server, path, cookie=cookie)
        assert (status, "secret" in text) == (404, False)


def test_watch_of_one_run_shows_its_page(runs):
    with watching(runs / "one") as server:
        cookie = f"watch-{server.server_address[1]}={server.key}"
        status, _, page = get(server, "/", cookie=cookie)
        assert status == 200
        assert 'id="curves"' in page


def test_watch_goes_on_when_a_record_is_damaged(runs, tmp_path):
    run_dir = finish_run(tmp_path, "broken")
    with watching(tmp_path) as server:
        cookie = f"watch-{server.server_address[1]}={server.key}"
        assert get(server, "/run/broken", cookie=cookie)[0] == 200
        (run_dir / "run.json").write_text("{")
        assert get(server, "/run/broken", cookie=cookie)[0] in (404, 500)
        assert get(server, "/", cookie=cookie)[0] == 200


def test_watch_of_a_port_that_is_taken_is_told(runs):
    with watching(runs) as server, pytest.raises(UsageError, match="cannot listen on port"):
        serve(runs, port=server.server_address[1], refresh_s=1)
