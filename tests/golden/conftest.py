"""Golden files are compared whole; a missing one fails. `make golden` writes them anew."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="write the golden files anew")


@pytest.fixture
def golden(request):
    def check(name: str, text: str) -> None:
        path = FOLDER / name
        if request.config.getoption("--write-golden", default=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing; `make golden` writes it"
        assert text == path.read_text()

    return check
