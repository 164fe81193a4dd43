import json

import pytest

from post_training.cli.show import show_artifact, show_lineage, verify_artifact
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import fingerprint, sha256_file
from post_training.records.artifact import origin_of, read_artifact, seal_artifact
from post_training.records.check import check_artifact
from post_training.records.run import RunDescription, RunFolder

FACTS = {"machine": {}, "scheduler_job": None, "recipe_hash": "r"}


def record(stage="sft", inputs=None, **recipe):
    return {
        "run_id": f"{stage}-1",
        "stage": stage,
        "recipe": recipe,
        "recipe_hash": "r",
        "image": {"oci_digest": "sha256:" + "d" * 64},
        "inputs": inputs or {},
    }


def make(folder, made_by, text="weights"):
    folder.mkdir()
    (folder / "weights").write_text(text)
    seal_artifact(folder, "model", made_by)
    return folder


def faults_of(folder):
    return check_artifact(folder).faults


def an_input(path):
    found = fingerprint(path)
    origin = origin_of(path, found)
    return {"path": str(path), "fingerprint": found, **({"made_by": origin} if origin else {})}


@pytest.fixture
def chain(tmp_path):
    """rows -> a model -> another."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    first = make(
        tmp_path / "first", record("init-model", {"corpus[0]": an_input(tmp_path / "rows.jsonl")})
    )
    return make(tmp_path / "second", record("sft", {"model.path": an_input(first)}, lr=0.1))


def test_artifact_knows_its_ancestors_when_they_are_gone(chain):
    (chain.parent / "first/weights").unlink()
    (chain.parent / "first/artifact.json").unlink()
    [(key, parent)] = read_artifact(chain)["made_by"]["inputs"].items()
    assert (key, parent["made_by"]["run_id"]) == ("model.path", "init-model-1")
    assert list(parent["made_by"]["inputs"]) == ["corpus[0]"]
    assert "made_by" not in parent["made_by"]["inputs"]["corpus[0]"]


def test_lineage_hash_follows_every_ancestor_s_recipe_and_no_place(tmp_path):
    def lineage_hash(name, first_lr, second_lr, text):
        first = make(tmp_path / f"{name}-1", record(lr=first_lr), text)
        second = make(
            tmp_path / f"{name}-2", record("dpo", {"model": an_input(first)}, lr=second_lr)
        )
        return read_artifact(second)["lineage_hash"]

    same = lineage_hash("a", 1, 2, "weights")
    # Other bits of the same recipe: on another machine, say.
    assert lineage_hash("b", 1, 2, "other weights") == same
    assert lineage_hash("c", 3, 2, "weights") != same
    assert lineage_hash("d", 1, 3, "weights") != same


def test_lineage_hash_of_an_artifact_without_one_is_the_same(chain):
    path = chain / "artifact.json"
    written = json.loads(path.read_text())
    lineage_hash = written.pop("lineage_hash")
    path.write_text(json.dumps(written))
    assert read_artifact(chain)["lineage_hash"] == lineage_hash


def test_origin_of_a_file_in_an_artifact_is_the_artifact_s(chain):
    path = chain / "weights"
    assert origin_of(path, sha256_file(path)) == origin_of(chain, fingerprint(chain))


def test_origin_of_files_of_one_s_own_is_unknown(tmp_path):
    (tmp_path / "rows").write_text("x")
    assert origin_of(tmp_path / "rows", "f") is None
    assert origin_of(tmp_path, "f") is None


def test_origin_of_a_changed_artifact_is_refused(chain):
    (chain / "weights").write_text("changed")
    with pytest.raises(UsageError, match="was changed after run sft-1 made it"):
        origin_of(chain, fingerprint(chain))


def test_verify_names_changed_missing_and_foreign_files(chain, capsys):
    verify_artifact(chain)
    assert capsys.readouterr().out == f"ok: {fingerprint(chain)}\n"
    (chain / "weights").rename(chain / "weight")
    assert faults_of(chain) == ["weight: not part of the artifact", "weights: gone"]
    (chain / "weights").write_text("changed")
    with pytest.raises(PostTrainingError, match="weights: changed"):
        verify_artifact(chain)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint is not that of its list of files"),
        ({"lineage_hash": "0" * 64}, "lineage_hash is not that of what made it"),
    ],
)
def test_verify_names_what_was_edited_in_the_record(chain, change, fault):
    path = chain / "artifact.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert faults_of(chain) == [fault]


def test_artifact_whose_run_record_was_edited_is_noticed_and_no_input(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.start(RunDescription("sft", {"lr": 1}, {}, {}, None, FACTS))
    made = make(tmp_path / "made", folder.record)
    assert faults_of(made) == []
    origin_of(made, fingerprint(made))
    written = json.loads((made / "artifact.json").read_text())
    written["made_by"]["image"] = {"oci_digest": "sha256:of another"}
    (made / "artifact.json").write_text(json.dumps(written))
    assert faults_of(made) == [
        "made_by: was changed by hand (its seal is of something else)",
        "made_by: identity is not that of its recipe, topology, inputs and image",
    ]
    with pytest.raises(UsageError, match="in it: was changed by hand"):
        origin_of(made, fingerprint(made))


@pytest.mark.parametrize("key", ["kind", "fingerprint", "files", "made_by"])
def test_artifact_without_a_key_is_one_clear_line(chain, key):
    path = chain / "artifact.json"
    written = json.loads(path.read_text())
    del written[key]
    path.write_text(json.dumps(written))
    with pytest.raises(UsageError, match=rf"artifact\.json: no record any more: {key} is gone"):
        read_artifact(chain)


def test_show_artifact_and_lineage_tell_a_person(chain, capsys):
    show_artifact(chain, as_json=False)
    assert "made by      sft, run sft-1" in capsys.readouterr().out.splitlines()
    show_lineage(chain, as_json=False)
    lines = capsys.readouterr().out.replace(str(chain.parent), "").splitlines()
    rows = sha256_file(chain.parent / "rows.jsonl")
    assert [line.split(", lineage")[0] for line in lines] == [
        f"/second (model of sft-1, image sha256:{'d' * 12}",
        f"└─ model.path: /first (model of init-model-1, image sha256:{'d' * 12}",
        f"   └─ corpus[0]: /rows.jsonl (fingerprint {rows[:12]})",
    ]


def test_no_artifact_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"no artifact: there is no artifact\.json"):
        read_artifact(tmp_path)
