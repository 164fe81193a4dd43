import json

import pytest

from post_training.core.hashing import fingerprint
from post_training.records.diff import print_diff

RECORD = {
    "schema": "post-training/run-record/1",
    "status": "finished",
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
    "outputs": {"files": {"model/model.safetensors": "1"}},
    "metrics": {},
}


@pytest.fixture
def diff(tmp_path, capsys):
    def find(**changes):
        for name, record in (("one", RECORD), ("two", {**RECORD, **changes})):
            (tmp_path / name).mkdir()
            (tmp_path / name / "run.json").write_text(json.dumps(record))
        code = print_diff(tmp_path / "one", tmp_path / "two")
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
    outputs = {"files": {"model/model.safetensors": "2"}}
    code, lines = diff(**changes, outputs=outputs)
    assert code == 4
    assert [label for label, _ in lines] == [line[0], "outcome"]
    assert lines[0][1].startswith(line[1])
    assert lines[1][1] == "differs: model/model.safetensors: sha256 is 1, then 2"


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
        (run_dir / "run.json").write_text(json.dumps(record))

    def lines() -> list[str]:
        print_diff(tmp_path / "run-1", tmp_path / "run-2")
        return capsys.readouterr().out.splitlines()

    assert lines()[1] == "input        model.path: template"
    (tmp_path / "model-1/config.json").write_text("{} ")
    assert lines()[1].startswith("outcome ")


def test_diff_of_a_run_that_did_not_end_says_so(diff):
    code, lines = diff(status="failed", outputs=None)
    assert code == 4
    assert ("outcome", "two is not finished: failed") in lines
