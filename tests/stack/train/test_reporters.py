"""What TensorBoard and W&B are shown, read back from what they wrote."""

import http.server
import json
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch

from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import run_sft_on_ranks
from helpers.wandb_files import offline_folders, wandb_records, wandb_rows
from post_training.core.errors import Interrupted
from post_training.core.files import write_json
from post_training.records.run_record import SCHEMA
from post_training.stages.context import Ranks, StageContext
from post_training.train.reporters import Reporters, open_reporters, scalars
from post_training.train.tensorboard import TensorBoard
from post_training.train.training_config import LoggingConfig

RUN_ID = "sft-20261121-100000-abcdef"
SETTINGS = {"seed": 7, "training": {"learning_rate": 0.001}}
KEY = "0123456789" * 4


def training_line(step, loss=None):
    return {
        "step": step,
        "loss": 1 / step if loss is None else loss,
        "num_tokens": 100 * step,
        "timing": {"time": f"2026-11-21T10:00:{step:02d}Z", "tokens_per_s": 50.5},
    }


def evaluation_line(step):
    timing = {"time": f"2026-11-21T10:00:{step:02d}Z"}
    return {"step": step, "eval": {"loss": 2 / step}, "timing": timing}


LINES = [training_line(3), evaluation_line(3), training_line(6), training_line(9)]


@pytest.fixture(autouse=True)
def _own_wandb(monkeypatch):
    """W&B keeps its process and reads its environment once; each test has its own."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield
    import wandb

    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "run.json", {"schema": SCHEMA, "run_id": RUN_ID})
    return folder


def opened(run_dir, *names, rank=0, **settings):
    config = LoggingConfig(report_to=list(names), **settings)
    return open_reporters(config, StageContext(run_dir, Ranks(rank, rank, 2, 2)), SETTINGS)


def report(run_dir, *names, history=(), lines=LINES, **settings):
    with opened(run_dir, *names, **settings) as reporters:
        reporters.start(history)
        for line in lines:
            reporters.write(line)


def accumulator(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def events(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_scalars_are_every_number_by_its_group():
    assert scalars(training_line(5)) == {
        "train/loss": 0.2,
        "train/num_tokens": 500,
        "timing/tokens_per_s": 50.5,
    }
    assert scalars(evaluation_line(5)) == {"eval/loss": 0.4}


def test_tensorboard_shows_the_lines(run_dir):
    report(run_dir, "tensorboard")
    found = accumulator(run_dir)
    losses = [(step, pytest.approx(1 / step)) for step in (3, 6, 9)]
    assert events(found, "train/loss") == losses
    assert events(found, "eval/loss") == [(3, pytest.approx(2 / 3))]
    assert [event.wall_time for event in found.Scalars("train/loss")] == [
        1795255203.0,
        1795255206.0,
        1795255209.0,
    ]


def test_tensorboard_of_a_killed_and_resumed_run_has_no_step_twice(run_dir):
    killed = TensorBoard(run_dir / "tensorboard")
    killed.start([])
    for line in (*LINES, training_line(12, loss=99.0)):
        killed.write(line)  # on disk at once: nobody closes it
    watched = accumulator(run_dir)
    assert [step for step, _ in events(watched, "train/loss")] == [3, 6, 9, 12]

    report(run_dir, "tensorboard", history=LINES[:3], lines=[training_line(9), training_line(12)])
    expected = [(step, pytest.approx(1 / step)) for step in (3, 6, 9, 12)]
    assert events(accumulator(run_dir), "train/loss") == expected
    # Of a TensorBoard that was open all the time, too.
    assert events(watched.Reload(), "train/loss") == expected
    assert events(watched, "eval/loss") == [(3, pytest.approx(2 / 3))]


def test_wandb_offline_keeps_the_lines_and_what_they_are_of(run_dir):
    report(
        run_dir,
        "wandb",
        wandb_project="project",
        wandb_run_name="name",
        wandb_group="group",
        wandb_tags=["one", "two"],
    )
    (folder,) = offline_folders(run_dir)
    assert wandb_rows(folder, RUN_ID) == {
        3: {**scalars(LINES[0]), **scalars(LINES[1])},
        6: scalars(LINES[2]),
        9: scalars(LINES[3]),
    }
    run = next(record.run for record in wandb_records(folder, RUN_ID) if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == (RUN_ID, "project", "name")
    assert (run.run_group, sorted(run.tags)) == ("group", ["one", "two"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: config[name] for name in SETTINGS} == SETTINGS


def test_wandb_dir_that_is_not_there_is_made_and_a_resumed_run_is_in_it_once(run_dir, tmp_path):
    chosen = tmp_path / "not/there"
    report(run_dir, "wandb", lines=LINES[:3], wandb_dir=chosen)
    report(run_dir, "wandb", history=LINES[:3], lines=LINES[3:], wandb_dir=chosen)
    (folder,) = offline_folders(chosen)
    assert sorted(wandb_rows(folder, RUN_ID)) == [3, 6, 9]
    assert offline_folders(run_dir) == []


def test_wandb_offline_of_a_resumed_run_has_no_step_twice_and_none_missing(run_dir):
    report(run_dir, "wandb", lines=[*LINES, training_line(12, loss=99.0)])
    report(run_dir, "wandb", history=LINES[:3], lines=[training_line(9), training_line(12)])
    (folder,) = offline_folders(run_dir)
    rows = wandb_rows(folder, RUN_ID)
    assert {step: row["train/loss"] for step, row in rows.items()} == {
        step: 1 / step for step in (3, 6, 9, 12)
    }
    assert rows[3]["eval/loss"] == 2 / 3


def test_wandb_that_is_disabled_leaves_what_is_there(run_dir, tmp_path, monkeypatch, capfd):
    report(run_dir, "wandb", lines=LINES[:3])
    elsewhere = tmp_path / "temporary" / "wandb" / "offline-run-of-another"
    elsewhere.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    report(run_dir, "wandb", history=LINES[:3], lines=LINES[3:])
    assert sorted(wandb_rows(*offline_folders(run_dir), RUN_ID)) == [3, 6]
    assert elsewhere.exists()
    assert capfd.readouterr() == ("", "")


class _Counting(http.server.BaseHTTPRequestHandler):
    """Counts what it is asked, and knows nothing."""

    def _refuse(self):
        self.server.asked += 1
        self.send_error(404)

    do_GET = do_POST = do_HEAD = do_CONNECT = _refuse  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture
def network(monkeypatch):
    """A server that stands for W&B's, and for all others as their proxy."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Counting) as server:
        server.asked = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("WANDB_BASE_URL", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("environment", [{}, {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}])
def test_wandb_offline_asks_nobody(run_dir, network, monkeypatch, capfd, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report(run_dir, "wandb")
    assert network.asked == 0
    assert sorted(wandb_rows(*offline_folders(run_dir), RUN_ID)) == [3, 6, 9]
    assert capfd.readouterr() == ("", "")


def test_wandb_that_is_not_reached_is_told_once_and_kept_offline(
    run_dir, network, monkeypatch, capfd, tmp_path
):
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(key_file))
    report(run_dir, "wandb")
    assert network.asked > 0
    (folder,) = offline_folders(run_dir)
    assert sorted(wandb_rows(folder, RUN_ID)) == [3, 6, 9]
    told = capfd.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith("warning: W&B is not reached (")
    assert told.err.endswith(f"; the run is kept offline, for `wandb sync {folder}`\n")


def test_wandb_writes_its_key_nowhere(run_dir, network, monkeypatch, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(key_file))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    report(run_dir, "wandb")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != key_file]
    assert any("wandb" in path.parts for path in written)
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert KEY not in os.environ.values()


def test_wandb_without_its_key_file_is_told_and_the_run_goes_on(run_dir, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY_FILE", "/no/such/key")
    report(run_dir, "wandb", "tensorboard")
    assert capfd.readouterr().err == (
        "warning: W&B is left out from now on: "
        "/no/such/key: no such file or directory (WANDB_API_KEY_FILE)\n"
    )
    assert len(events(accumulator(run_dir), "train/loss")) == 3


def test_reporters_leave_random_states_and_threads_of_torch_alone(run_dir):
    def states():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
        )

    before = states()
    report(run_dir, "tensorboard", "wandb")
    assert states() == before


def test_reporters_of_another_rank_than_the_first_do_nothing(run_dir):
    report(run_dir, "tensorboard", "wandb", rank=1)
    assert [path.name for path in run_dir.iterdir()] == ["run.json"]


class _FullDisk:
    """Takes two lines."""

    name = "scribe"

    def __init__(self):
        self.lines = []

    def start(self, lines):
        self.lines += lines

    def write(self, line):
        if len(self.lines) == 2:
            raise OSError(28, "No space left on device")
        self.lines.append(line)

    def close(self, *, failed):
        raise AssertionError("it was left out before")


def test_reporter_that_fails_is_told_of_once_and_the_others_go_on(run_dir):
    told = []
    failing, other = _FullDisk(), TensorBoard(run_dir / "tensorboard")
    with Reporters([failing, other], told.append) as reporters:
        reporters.start([])
        for line in LINES:
            reporters.write(line)
    assert told == ["warning: scribe is left out from now on: [Errno 28] No space left on device"]
    assert failing.lines == LINES[:2]
    assert [step for step, _ in events(accumulator(run_dir), "train/loss")] == [3, 6, 9]


def test_tensorboard_that_cannot_begin_is_told_of(run_dir, capfd):
    (run_dir / "tensorboard").write_text("in the way")
    report(run_dir, "tensorboard")
    told = capfd.readouterr().err
    assert told.startswith("warning: TensorBoard is left out from now on: [Errno 17] File exists")
    assert told.count("\n") == 1


def test_reporters_let_a_signal_through():
    class Stopped(_FullDisk):
        def write(self, line):
            raise Interrupted("SIGTERM", 15)

    with pytest.raises(Interrupted):
        Reporters([Stopped()], print).write(LINES[0])


def test_reporters_of_a_run_that_fails_before_they_start_are_silent(run_dir, capfd):
    with pytest.raises(ZeroDivisionError), opened(run_dir, "tensorboard", "wandb"):
        raise ZeroDivisionError
    assert capfd.readouterr() == ("", "")


def test_run_with_reporters_has_the_bytes_and_lines_of_one_without(config, run_dir, tmp_path):
    def outcome(folder):
        shown = ("tensorboard/", "wandb/", "run.json")
        files = stable_files(folder)
        return {name: files[name] for name in files if not name.startswith(shown)}

    config = changed(config, **{"training.max_steps": 6})
    sft(config, tmp_path / "plain")
    result = sft(changed(config, **{"logging.report_to": ["tensorboard", "wandb"]}), run_dir)
    assert outcome(run_dir) == outcome(tmp_path / "plain")
    assert metrics(run_dir) == metrics(tmp_path / "plain")

    losses = [(line["step"], line["loss"]) for line in metrics(run_dir)]
    assert events(accumulator(run_dir), "train/loss") == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    rows = wandb_rows(*offline_folders(run_dir), RUN_ID)
    assert [(step, row["train/loss"]) for step, row in rows.items()] == losses
    listed = {name.split("/")[0] for name in result.unstable_files}
    assert {"tensorboard", "wandb"} <= listed


def test_reporters_of_a_killed_and_resumed_run_show_each_line_once(config, run_dir):
    config = changed(config, **{"logging.report_to": ["tensorboard", "wandb"]})
    # After step 10: the last line is of step 9, the checkpoint of step 5.
    killed = run_sft_on_ranks(config, run_dir, kill_at="before a checkpoint is published")
    assert killed == [-signal.SIGKILL]
    assert [step for step, _ in events(accumulator(run_dir), "train/loss")] == [3, 6, 9]
    assert run_sft_on_ranks(config, run_dir, resuming=True) == [0]

    losses = [(line["step"], line["loss"]) for line in metrics(run_dir)]
    assert [step for step, _ in losses] == [3, 6, 9, 12]
    assert events(accumulator(run_dir), "train/loss") == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    rows = wandb_rows(*offline_folders(run_dir), RUN_ID)
    assert [(step, row["train/loss"]) for step, row in rows.items()] == losses
