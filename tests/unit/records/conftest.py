import pytest

from helpers.finished_runs import FACTS, finish_run
from helpers.finished_runs import write_tensors as write


@pytest.fixture
def write_tensors():
    return write


@pytest.fixture
def finished_run(tmp_path):
    """finished_run("one", seed=1): a run as training leaves it, of an input beside it."""
    return lambda name, **changes: finish_run(tmp_path, name, **changes)


@pytest.fixture
def facts():
    return dict(FACTS)
