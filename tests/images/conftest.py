from collections.abc import Iterator

import pytest

from post_training.core.process import run_tool


@pytest.fixture
def entrypoint(inside, job):
    """Run `entrypoint ARGUMENTS` in the job's folder."""
    return lambda *arguments, **keywords: inside("entrypoint", *arguments, cwd=job, **keywords)


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Iterator[None]:
    """An empty storage for the builder; this machine's own has other people's images."""
    settings, folder = tmp_path / "storage.conf", tmp_path / "storage"
    settings.write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/root"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(settings))
    yield
    run_tool(["buildah", "rmi", "--all", "--force"])
