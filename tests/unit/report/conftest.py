import pytest

from helpers.finished_runs import finish_run


@pytest.fixture
def finished_run(tmp_path):
    """finished_run("one", seed=1): a run as training leaves it, of an input beside it."""
    return lambda name, **changes: finish_run(tmp_path, name, **changes)
