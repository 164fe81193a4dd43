"""steps.jsonl: what a line says, and that a resumed run writes the lines of one that was not."""

import json

from post_training.train.metrics import StepLog, rows_checksum


def write(folder, first, last):
    log = StepLog(folder)
    log.resume(first - 1)
    for step in range(first, last + 1):
        log.add(step, rows_checksum(0, [step]), 1 / step, 0.1)
    log.sync()
    return folder / "steps.jsonl"


def test_step_log_killed_and_resumed_is_the_same_file(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = write(whole, 1, 9).read_bytes()
    with open(write(killed, 1, 7), "a") as file:
        file.write('{"step": 8, "ro')
    assert write(killed, 6, 9).read_bytes() == expected
    assert [json.loads(line)["step"] for line in expected.splitlines()] == list(range(1, 10))


def test_step_log_keeps_every_digit(tmp_path):
    third = json.loads(write(tmp_path, 1, 3).read_text().splitlines()[2])
    assert third == {"step": 3, "rows": "00415383ed", "loss": 1 / 3, "grad_norm": 0.1}


def test_step_log_of_other_ranks_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = StepLog(None)
    log.resume(0)
    log.add(1, 0, 1.0, 1.0)
    log.sync()
    assert list(tmp_path.iterdir()) == []


def test_rows_checksum_knows_rank_rows_and_order():
    checksums = {rows_checksum(rank, rows) for rank in (0, 1) for rows in ([1, 2], [2, 1], [12])}
    assert len(checksums) == 6
    assert sum([2**32 - 1] * 2**20) < 2**53
