import pytest


@pytest.fixture
def entrypoint(inside, job):
    """Run `entrypoint ARGUMENTS` in the job's folder."""
    return lambda *arguments, **keywords: inside("entrypoint", *arguments, cwd=job, **keywords)
