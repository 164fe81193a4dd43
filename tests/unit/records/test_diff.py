import json

import pytest

from post_training.cli.show import show_diffs
from post_training.core.hashing import fingerprint
from post_training.records.run_record import identity_of

RECORD = {
    "schema": "post-training/run-record/1",
    "run_id": "sft-1",
    "status": "finished",
    "reason": None,
    "stage": "sft",
    "recipe": {"training.learning_rate": 0.001, "seed": 1},
    "topology": {"world_size": 1},
    "inputs": {"model.path": {"path": "here", "fingerprint": "a" * 64}},
    "image": {"oci_digest": "sha256:1"},
    "code": {"from": "image", "commit": "c1"},
    "packages": {"torch": "2.13.0"},
    "environment": {"OMP_NUM_THREADS": "2", "SLURM_JOB_ID": "1"},
    "machine": {"host": "one"},
    "placement": {"run_dir": "one"},
    "outputs": {"artifacts": {}, "files": {"model/model.safetensors": "1"}},
    "metrics": {},
    "command": [],
    "working_dir": "/",
    "recipe_hash": "r",
    "reproducible_by_digest": True,
    "mounts": [],
    "scheduler_job": None,
    "attempts": [
        {"status": "finished", "reason": None, "started": "", "ended": "", "scheduler_job": None}
    ],
}


def write_record(run_dir, record):
    record = {**record, "identity": identity_of(record)}
    (run_dir / "run.json").write_text(json.dumps(record))


@pytest.fixture
def diff(tmp_path, capsys):
    def find(**changes):
        for name, record in (("one", RECORD), ("two", {**RECORD, **changes})):
            (tmp_path / name).mkdir()
            write_record(tmp_path / name, record)
        code = show_diffs([tmp_path / "one", tmp_path / "two"])
        lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
        return code, [(label, text.replace(f"{tmp_path}/", "")) for label, text in lines]

    return find


def test_diff_of_a_run_elsewhere_is_identical(diff):
    elsewhere = {"placement": {"run_dir": "two"}, "environment": {"OMP_NUM_THREADS": "2"}}
    assert diff(**elsewhere) == (
        0,
        [("placement", "run_dir: 'one' -> 'two'"), ("outcome", "identical: 1 files")],
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"recipe": {"training.learning_rate": 0.002, "seed": 1}},
         ("recipe", "training.learning_rate: 0.001 -> 0.002")),
        ({"topology": {"world_size": 2}}, ("topology", "world_size: 1 -> 2")),
        ({"inputs": {"model.path": {"path": "here", "fingerprint": "b" * 64}}},
         ("input", "model.path: 'aaaa")),
        ({"image": {"oci_digest": "sha256:2"}}, ("image", "oci_digest: 'sha256:1' -> 'sha256:2'")),
        ({"image": None}, ("image", "oci_digest: 'sha256:1' -> 'unpinned'")),
        ({"code": {"from": "image", "commit": "c2"}}, ("code", "commit: 'c1' -> 'c2'")),
        ({"packages": {}}, ("packages", "torch: '2.13.0' -> (absent)")),
        ({"environment": {"OMP_NUM_THREADS": "4"}},
         ("environment", "OMP_NUM_THREADS: '2' -> '4'")),
    ],
)  # fmt: skip
def test_diff_names_what_changed_and_where_the_outcome_parts(diff, changes, line):
    outputs = {"artifacts": {}, "files": {"model/model.safetensors": "2"}}
    code, lines = diff(**changes, outputs=outputs)
    assert code == 4
    assert [label for label, _ in lines] == [line[0], "outcome"]
    assert lines[0][1].startswith(line[1])
    difference = "model/model.safetensors: sha256 is 1, then 2"
    if line[0] in ("recipe", "input"):
        assert lines[1][1] == f"differs as it must: {lines[0][1]}; first: {difference}"
    else:
        assert lines[1][1] == f"differs: {difference}"


def test_diff_names_the_files_of_changed_folders_while_they_are_what_the_runs_had(tmp_path, capsys):
    inputs = []
    for number in (1, 2):
        folder, run_dir = tmp_path / f"model-{number}", tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "template").write_text(" " * number)
        inputs.append({"path": str(folder), "fingerprint": fingerprint(folder)})
        run_dir.mkdir()
        record = {**RECORD, "inputs": {"model.path": inputs[-1]}}
        write_record(run_dir, record)

    def lines() -> list[str]:
        show_diffs([tmp_path / "run-1", tmp_path / "run-2"])
        return capsys.readouterr().out.splitlines()

    assert lines()[1] == "input        model.path: template"
    (tmp_path / "model-1/config.json").write_text("{} ")
    assert lines()[1].startswith("outcome ")


def test_diff_of_a_run_that_did_not_end_says_so(diff):
    code, lines = diff(status="failed", outputs=None)
    assert code == 4
    assert ("outcome", "two is not finished: failed") in lines
    assert not any("absent" in text for _, text in lines)


def test_diff_as_json_is_a_list_with_an_entry_for_each_other_run(finished_run, capsys):
    runs = [finished_run("one"), finished_run("two"), finished_run("three", seed=3, loss=1.0)]
    assert show_diffs(runs, as_json=True) == 4
    printed = capsys.readouterr()
    same, other = json.loads(printed.out)
    assert printed.err == ""
    assert (same["run"], same["other"], same["is_same"]) == (str(runs[0]), str(runs[1]), True)
    assert (other["other"], other["is_same"]) == (str(runs[2]), False)
    assert {"of": "recipe", "text": "seed: 1 -> 3"} in other["differences"]
    assert other["differences"][-1]["of"] == "outcome"


def test_diff_of_several_runs_is_each_beside_the_first(finished_run, capsys):
    runs = [finished_run("one"), finished_run("two"), finished_run("three", seed=3, loss=1.0)]
    assert show_diffs(runs[:2]) == 0
    capsys.readouterr()
    assert show_diffs(runs) == 4
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("==")] == [
        f"== {runs[0]} and {runs[1]}",
        f"== {runs[0]} and {runs[2]}",
    ]
    assert out[-1] == (
        "outcome      differs as it must: seed: 1 -> 3; first: "
        "step 1: the same rows, loss is 2.0, then 1.0"
    )
