"""Licences: what a card of the hub states, and who carries it."""

import json
from pathlib import Path

import pytest

from post_training.core.files import write_json
from post_training.core.hashing import WatchedInputs, fingerprint
from post_training.data.sources.hub import RECORD, RECORD_SCHEMA, fetched_dir, licences_of_fetched
from post_training.records.artifact import origin_of, read_artifact, seal_artifact, seal_fetched
from post_training.records.licences import hub_name_of, licence_in_card, licences_of_models
from post_training.records.run_record import seal
from post_training.stages.describe import fingerprint_inputs

COMMIT = 40 * "a"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: |\n  two\n  lines\n---\n", "two lines"),
        ("# license: mit\n", None),
        ("text\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense: []\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("", None),
    ],
)
def test_licence_is_what_the_card_states(tmp_path, card, licence):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_in_card(tmp_path) == licence


def test_folder_without_a_card_or_with_one_of_bytes_states_none(tmp_path):
    assert licence_in_card(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert licence_in_card(tmp_path) is None


def fetched_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    seal_fetched(folder, "model", {"hub": "org/base", "revision": COMMIT})
    return folder


def test_licence_of_a_fetched_model_alone_is_known_to_the_run_that_reads_it(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    settings = {"model.path": str(fetched_model(tmp_path / "base")), "reference.path": str(own)}
    inputs = fingerprint_inputs(settings, WatchedInputs())
    assert licences_of_models(inputs) == {"model.path": "apache-2.0"}
    assert hub_name_of(inputs["model.path"]["made_by"]) == "org/base"
    assert hub_name_of(inputs["reference.path"].get("made_by")) is None


def test_licences_of_a_run_go_along_with_what_it_made_and_change_no_hash(tmp_path):
    base = fetched_model(tmp_path / "base")
    record = {**read_artifact(base)["made_by"], "stage": "sft", "run_id": "sft-1"}
    found = []
    for name, added in (("one", {}), ("two", {"licences": {"model.path": "apache-2.0"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        seal_artifact(tmp_path / name, "model", {**record, **added})
        artifact = json.loads((tmp_path / name / "artifact.json").read_text())
        made_by = artifact["made_by"]
        found.append((artifact["fingerprint"], artifact["lineage_hash"]))
        assert made_by.get("licences") == added.get("licences")
    assert found[0] == found[1]


def test_licence_of_a_fetched_split_is_known_where_it_was_recorded(tmp_path):
    folder = fetched_dir(tmp_path, "org/rows", COMMIT, None, "train")
    folder.mkdir(parents=True)
    key = "data.datasets[0]"
    named = {"hub": "org/rows", "revision": COMMIT, "subset": None, "split": "train"}
    settings = {f"{key}.{name}": value for name, value in named.items()}
    settings |= {
        "data.hub_dir": str(tmp_path),
        "model.hub": "org/base",
        "data.datasets[1].hub": None,
    }
    assert licences_of_fetched(settings) == {}
    write_json(folder / RECORD, {"schema": RECORD_SCHEMA, "sha256": 64 * "0"})
    assert licences_of_fetched(settings) == {}
    write_json(folder / RECORD, {"schema": RECORD_SCHEMA, "licence": "cc-by-4.0"})
    assert licences_of_fetched(settings) == {key: "cc-by-4.0"}


def test_origin_has_the_licences_of_the_run_that_made_it(tmp_path):
    base = fetched_model(tmp_path / "base")
    record = {**read_artifact(base)["made_by"], "licences": {"model.path": "mit"}}
    record["seal"] = seal(record)
    (base / "artifact.json").unlink()
    seal_artifact(base, "model", record)
    assert origin_of(base, fingerprint(base))["licences"] == {"model.path": "mit"}
