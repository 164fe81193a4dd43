"""What may be tried again, and what is final."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from post_training.core.files import write_json
from post_training.records.run import RunFolder
from post_training.records.run_record import SCHEMA
from post_training.slurm.outcome import (
    MARK,
    Step,
    Tally,
    advise_on_timeout,
    current_tally,
    judge,
    read_tally,
    write_tally,
)

USR1 = 138


def failed(reason: str) -> dict:
    return {"status": "failed", "reason": reason}


INTERRUPTED = {"status": "interrupted", "reason": "stopped by SIGUSR1"}
KILLED = {"status": "running", "reason": None}


def test_judge_stopped_at_a_new_checkpoint_goes_on_uncounted():
    verdict = judge(Step(USR1, [INTERRUPTED], "checkpoint-9"), Tally(), 0)
    assert verdict.again
    assert verdict.tally == Tally(0, 1, "checkpoint-9")


def test_judge_stopped_again_and_again_without_a_checkpoint_ends():
    tally, attempts, answers = Tally(), [], []
    for _ in range(4):
        attempts.append(INTERRUPTED)
        verdict = judge(Step(USR1, attempts, None), tally, 3)
        answers.append(verdict.again)
        tally = verdict.tally
    assert answers == [True, True, True, False]
    assert verdict.reason.startswith("stopped before the wall time, without a new checkpoint")


@pytest.mark.parametrize(
    ("exit_code", "attempt"),
    [
        (2, None),
        (2, failed("training.lr: must be > 0 (got -1)")),
        (126, None),
        (127, None),
        (1, failed("/data/x.jsonl: no such file or folder")),
        (1, failed("AssertionError: ")),
        (143, failed("AssertionError: ")),
        (1, failed("loss is not finite at step 3 (got nan) with rank 0: row 7")),
        (1, failed("[Errno 2] No such file or directory: '/data'")),
        (1, failed("[Errno 28] No space left on device: '/run'")),
        (1, failed("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")),
    ],
)
def test_judge_what_would_fail_the_same_way_is_final(exit_code, attempt):
    attempts = [attempt] if attempt else []
    verdict = judge(Step(exit_code, attempts, None), Tally(), 3)
    assert not verdict.again
    assert verdict.tally.num_failures == 0


@pytest.mark.parametrize(
    ("exit_code", "attempt", "reason"),
    [
        (137, KILLED, "killed by signal 9"),
        (134, KILLED, "killed by signal 6"),
        (143, INTERRUPTED, "killed by signal 15"),
        (138, INTERRUPTED, "stopped before the wall time, without a new checkpoint"),
        (1, None, "ended with exit code 1 before the run was opened"),
        (1, KILLED, "a rank other than the first ended with exit code 1"),
        (1, failed("DistBackendError: NCCL error in: x.cpp:1\nunhandled"), "DistBackendError"),
        (1, failed("x.log: the model or its engine failed at row a1: EngineDeadError: x"), "x.log"),
        (1, failed("RuntimeError: [/gloo/transport/tcp/pair.cc:1] closed by peer"), "RuntimeError"),
        (143, failed("RuntimeError: Connection reset by peer"), "RuntimeError"),
        (1, failed("[Errno 5] Input/output error: '/scratch/x'"), "[Errno 5]"),
        (1, failed("[Errno 116] Stale file handle"), "[Errno 116]"),
    ],
)
def test_judge_what_may_pass_is_tried_again_and_counted(exit_code, attempt, reason):
    attempts = [attempt] if attempt else []
    verdict = judge(Step(exit_code, attempts, None), Tally(), 3)
    assert verdict.again
    assert verdict.tally.num_failures == 1
    assert verdict.reason.startswith(reason)
    assert "\n" not in verdict.reason


def test_judge_the_failure_of_an_earlier_attempt_is_not_this_steps():
    earlier = [failed("AssertionError: ")]
    assert judge(Step(1, earlier, None), Tally(0, 1, None), 3).again
    assert not judge(Step(1, [*earlier, *earlier], None), Tally(0, 1, None), 3).again


def test_judge_failures_over_the_limit_end_it():
    tally = Tally(2, 2, "checkpoint-4")
    third = judge(Step(137, [KILLED] * 3, "checkpoint-4"), tally, 3)
    assert (third.again, third.tally.num_failures) == (True, 3)
    fourth = judge(Step(137, [KILLED] * 4, "checkpoint-4"), third.tally, 3)
    assert (fourth.again, fourth.tally.num_failures) == (False, 4)


def test_judge_a_new_checkpoint_resets_the_count():
    verdict = judge(Step(137, [KILLED] * 3, "checkpoint-8"), Tally(3, 2, "checkpoint-4"), 3)
    assert verdict.again
    assert verdict.tally == Tally(1, 3, "checkpoint-8")


def test_judge_none_to_be_tried_again_is_final_at_once():
    assert not judge(Step(137, [KILLED], None), Tally(), 0).again


def test_tally_written_is_read_and_a_missing_one_is_new(tmp_path):
    assert read_tally(tmp_path / "failures.json") == Tally()
    write_tally(tmp_path / "failures.json", Tally(2, 3, "checkpoint-4"))
    assert read_tally(tmp_path / "failures.json") == Tally(2, 3, "checkpoint-4")


def write_run(run_dir, *attempts: dict) -> None:
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / "checkpoints/latest").write_text("checkpoint-4\n")
    (run_dir / "slurm").mkdir(exist_ok=True)
    write_json(run_dir / "run.json", {"schema": SCHEMA, "attempts": attempts})


def test_current_tally_is_of_the_run_as_it_is(tmp_path):
    assert current_tally(tmp_path / "none") == Tally()
    write_run(tmp_path, KILLED, KILLED)
    assert current_tally(tmp_path) == Tally(0, 2, "checkpoint-4")


def ask(run_dir, moment: int | str, *words: str, nodes: str = "nid[1-2]") -> tuple[str, str]:
    """moment: the step's exit code, or the option that asks something else."""
    moment = ["--exit-code", str(moment)] if isinstance(moment, int) else moment.split()
    done = subprocess.run(
        [sys.executable, "-m", "post_training.slurm.outcome", run_dir, "1",
         *moment, "--log", run_dir / "log", *words],
        env={**os.environ, "SLURM_JOB_NODELIST": nodes}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    prefix, said = done.stdout[: len(MARK)], done.stdout[len(MARK) :]
    assert prefix == MARK
    return said, done.stderr


def test_outcome_asked_twice_counts_and_says_why(tmp_path):
    write_run(tmp_path, KILLED)
    write_tally(tmp_path / "slurm/failures.json", Tally(0, 0, "checkpoint-4"))
    assert ask(tmp_path, 137) == (
        "again\n",
        "trying again: killed by signal 9: failure 1 of 1 that may be tried again\n",
    )
    assert ask(tmp_path, 137)[0] == "stop\n"
    assert read_tally(tmp_path / "slurm/failures.json") == Tally(2, 1, "checkpoint-4")


def test_outcome_asked_twice_about_one_attempt_says_the_same(tmp_path):
    write_run(tmp_path, failed("ValueError: it is wrong"))
    assert [ask(tmp_path, 1, "--attempt", "77.0")[0] for _ in range(2)] == ["stop\n"] * 2
    write_run(tmp_path, KILLED, KILLED)
    assert [ask(tmp_path, 137, "--attempt", "77.1")[0] for _ in range(3)] == ["again\n"] * 3
    assert read_tally(tmp_path / "slurm/failures.json").num_failures == 1


def test_outcome_of_a_worker_reads_its_record_and_keeps_its_count(tmp_path):
    write_run(tmp_path, {"status": "finished", "reason": None})
    (tmp_path / "workers/2").mkdir(parents=True)
    attempt = failed("[Errno 5] Input/output error: '/scratch/x'")
    write_json(tmp_path / "workers/2/run.json", {"schema": SCHEMA, "attempts": [attempt]})
    assert ask(tmp_path, 1, "--worker", "2")[0] == "again\n"
    assert read_tally(tmp_path / "slurm/failures-2.json").num_failures == 1
    assert not (tmp_path / "slurm/failures.json").exists()


def test_outcome_attempt_is_over_when_begun_since_and_held_by_no_process(tmp_path):
    begun = 1_780_000_000
    assert ask(tmp_path, f"--over-since {begun}")[0] == "on\n"
    started = datetime.fromtimestamp(begun, UTC).isoformat()
    write_run(tmp_path, KILLED, {"status": "running", "reason": None, "started": started})
    assert ask(tmp_path, f"--over-since {begun}")[0] == "over\n"
    assert ask(tmp_path, f"--over-since {begun + 1}")[0] == "on\n"
    folder = RunFolder(tmp_path)
    folder.claim()
    assert ask(tmp_path, f"--over-since {begun}")[0] == "on\n"


def test_current_tally_of_a_chunked_stage_counts_its_chunks(tmp_path):
    (tmp_path / "chunks").mkdir()
    assert current_tally(tmp_path).checkpoint is None
    for name in ("000000.json", "000001.json", "000001.jsonl", "000002.jsonl", "manifest.json"):
        (tmp_path / "chunks" / name).touch()
    assert current_tally(tmp_path).checkpoint == "chunk 2"


LOG = """\
attempt 1 of job 7, on nid[1,7]
slurmstepd: error: *** STEP 7.0 ON nid7 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE ***
srun: error: nid7: task 0: Killed
attempt 2 of job 7, on nid[1-2]
training
srun: error: nid2: task 3: Killed
srun: error: nid1: tasks 0-1: Terminated
"""


@pytest.mark.parametrize(
    ("log", "nodes", "suspect"),
    [
        (LOG, "nid[1-2]", "nid2"),
        (LOG + "srun: error: Node failure on nid5\n", "nid[1-5]", "nid5"),
        ("words\n", "nid1", "nid1"),
        ("words\n", "nid[1-2]", None),
        ("words\n", "nid1,nid2", None),
    ],
)
def test_outcome_names_the_node_of_this_attempts_first_failure(tmp_path, log, nodes, suspect):
    write_run(tmp_path, KILLED)
    (tmp_path / "log").write_text(log)
    answer, told = ask(tmp_path, 137, nodes=nodes)
    assert answer.split() == ["again", *([suspect] if suspect else [])]
    assert f"killed by signal 9{f' (suspected: {suspect})' if suspect else ''}: " in told


CANCELLED = "slurmstepd: error: *** STEP 7.0 ON nid1 CANCELLED AT 2026-01-01T00:00:00 ***\n"
TERMINATED = "srun: error: nid1: task 0: Exited with exit code 143\n"
DEAD = "srun: error: nid2: task 1: Killed\n"


@pytest.mark.parametrize(("exit_code", "log"), [(138, ""), (143, CANCELLED + TERMINATED)])
def test_outcome_step_that_slurm_ended_suspects_no_node(tmp_path, exit_code, log):
    write_run(tmp_path, INTERRUPTED)
    (tmp_path / "log").write_text(log)
    write_tally(tmp_path / "slurm/failures.json", Tally(0, 0, "checkpoint-4"))
    answer, told = ask(tmp_path, exit_code, nodes="nid1")
    assert answer == "again\n"
    assert ", without a new checkpoint: failure 1 of 1" in told


def test_outcome_preempted_with_a_new_checkpoint_is_not_counted(tmp_path):
    write_run(tmp_path, {"status": "interrupted", "reason": "stopped by SIGTERM"})
    (tmp_path / "log").write_text(CANCELLED + TERMINATED)
    write_tally(tmp_path / "slurm/failures.json", Tally(1, 0, "checkpoint-2"))
    assert ask(tmp_path, 143) == ("again\n", "trying again: stopped by Slurm, at checkpoint-4\n")
    assert read_tally(tmp_path / "slurm/failures.json") == Tally(0, 1, "checkpoint-4")


def test_outcome_ranks_ended_after_a_dead_one_are_not_ended_by_slurm_alone(tmp_path):
    write_run(tmp_path, {"status": "interrupted", "reason": "stopped by SIGTERM"})
    (tmp_path / "log").write_text(DEAD + CANCELLED + TERMINATED)
    write_tally(tmp_path / "slurm/failures.json", Tally(0, 0, "checkpoint-2"))
    answer, told = ask(tmp_path, 143)
    assert answer == "again nid2\n"
    assert "failure 1 of 1" in told


@pytest.mark.parametrize(
    ("attempt", "log"),
    [
        (
            KILLED,
            "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks"
            " have been OOM Killed.\nsrun: error: nid2: task 0: Out Of Memory\n",
        ),
        (KILLED, "srun: error: nid2: task 0: Out Of Memory\n"),
        (
            failed("BrokenProcessPool: a worker of the data has died"),
            "slurmstepd-nid2: error: Detected 1 oom-kill event(s) in StepId=7.0.\n"
            "srun: error: nid2: task 0: Exited with exit code 1\n",
        ),
        (
            KILLED,
            "slurmstepd: error: StepId=7.0 exceeded memory limit (9 > 8), being killed\n"
            "srun: error: nid2: task 0: Killed\n",
        ),
    ],
)
def test_outcome_out_of_memory_on_the_node_is_told_and_tried_again(tmp_path, attempt, log):
    write_run(tmp_path, attempt)
    (tmp_path / "log").write_text(log)
    answer, told = ask(tmp_path, 1)
    assert answer == "again nid2\n"
    assert "trying again: killed for its memory by the node (suspected: nid2): failure 1" in told


@pytest.mark.parametrize(
    ("attempt", "answer"),
    [
        ({"status": "interrupted", "reason": "stopped by SIGTERM"}, "stop\n"),
        (INTERRUPTED, "go\n"),
        (KILLED, "go\n"),
    ],
)
def test_outcome_next_of_a_chain_begins_unless_the_last_was_cancelled(tmp_path, attempt, answer):
    write_run(tmp_path, attempt)
    assert ask(tmp_path, "--start")[0] == answer
    assert not (tmp_path / "slurm/failures.json").exists()


_TIMEOUT = (
    "[rank3]:[E1129 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600001 milliseconds before timing out.\n"
)
_CXI = {"FI_CXI_RX_MATCH_MODE": "software"}
_NONE_LEFT = {f"FI_CXI_RDZV_{name}": "0" for name in ("GET_MIN", "THRESHOLD", "EAGER_SIZE")}


@pytest.mark.parametrize(
    ("printed", "environment", "advice"),
    [
        (_TIMEOUT, _CXI, 'FI_CXI_RDZV_GET_MIN = "0", FI_CXI_RDZV_THRESHOLD = "0", FI_CXI_RDZV_EAG'),
        (_TIMEOUT, {**_NONE_LEFT, "FI_CXI_RDZV_THRESHOLD": "16384"}, "try FI_CXI_RDZV_THRESHOLD ="),
        (_TIMEOUT, _NONE_LEFT, "`submit --vet` looks for a bad node"),
        (_TIMEOUT, {"NCCL_NET": "IB"}, None),
        ("srun: error: nid002: task 5: Killed\n", _CXI, None),
    ],
)
def test_advise_on_a_timeout_names_the_settings_that_are_missing(printed, environment, advice):
    found = advise_on_timeout(printed, environment)
    assert advice in found if advice else found is None


def test_outcome_of_a_timed_out_collective_gives_the_advice(tmp_path):
    (tmp_path / "slurm.out").write_text("attempt 1 of job 7, on n[1-2]\n" + _TIMEOUT)
    command = [
        sys.executable, "-m", "post_training.slurm.outcome", str(tmp_path), "3",
        "--exit-code", "134", "--log", str(tmp_path / "slurm.out"),
    ]  # fmt: skip
    (tmp_path / "slurm").mkdir()
    done = subprocess.run(command, env={**os.environ, **_CXI}, capture_output=True, text=True)
    assert done.stdout == "post-training-outcome: again\n"
    assert 'hint: a collective timed out: try FI_CXI_RDZV_GET_MIN = "0"' in done.stderr
