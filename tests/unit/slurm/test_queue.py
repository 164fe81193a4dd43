"""What is asked of Slurm again, and for how long, with a stand-in for squeue."""

import pytest

from post_training.core.errors import PostTrainingError
from post_training.slurm import queue

# The next line of `answers` is what it answers, or `silent`; without any more the queue is empty.
SQUEUE = """\
#!/bin/bash
answers="${0%/*}/answers"
read -r line <"$answers" || exit 0
sed -i 1d "$answers"
[[ $line != silent ]] || { echo Socket timed out >&2; exit 1; }
echo "$line"
"""
HERE = "77 RUNNING None"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """The file of squeue's answers. It is asked once a poll; two silent polls are too many."""
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"_PAUSES_S": (), "_POLL_S": 0, "_MOST_SILENT_POLLS": 2}.items():
        monkeypatch.setattr(queue, name, value)
    return tmp_path / "answers"


def test_wait_for_returns_when_the_job_has_left_the_queue(answers):
    answers.write_text(f"{HERE}\n77 PENDING None\n78 RUNNING None\n{HERE}\n")
    queue.wait_for("77")
    assert answers.read_text() == f"{HERE}\n"


def test_wait_for_gives_up_only_when_slurm_is_silent_again_and_again(answers):
    answers.write_text(f"silent\n{HERE}\nsilent\n")
    queue.wait_for("77")
    answers.write_text(f"silent\nsilent\n{HERE}\n")
    with pytest.raises(PostTrainingError, match="Socket timed out"):
        queue.wait_for("77")
    assert answers.read_text() == f"{HERE}\n"


# Each job that it is asked for has completed.
SACCT = """\
#!/bin/bash
jobs=${!#}
sed 's/,/|COMPLETED\\n/g; s/$/|COMPLETED/' <<<"${jobs#--jobs=}"
"""


def test_read_ended_jobs_asks_for_each_of_very_many(tmp_path, monkeypatch):
    (tmp_path / "sacct").write_text(SACCT)
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    wanted = {str(number) for number in range(10_001)}
    assert queue.read_ended_jobs(wanted) == dict.fromkeys(wanted, "completed")
