"""What `reproduce` says before it runs anything."""

import json
from pathlib import Path

import pytest

from post_training.core.files import write_json
from post_training.core.hashing import fingerprint
from post_training.images.release import images_lock
from post_training.images.store import RECORD_SCHEMA, ImageStore
from post_training.records.promote import SCHEMA
from post_training.reproduce.plan import Options, image_references, make_plans, num_ranks

RECORD = Path(__file__).parents[1] / "records/record_of_the_first_version.json"


@pytest.fixture
def planned(post_training, tmp_path):
    """The answer to `reproduce --dry-run` of a run with this topology; its image is in no store."""

    def answer(topology: dict[str, int], *words: str) -> str:
        record = json.loads(RECORD.read_text())
        record["topology"] = {"num_threads": 1, **topology}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/run.json").write_text(json.dumps(record))
        options = ["--dry-run", "--store", "store", *words]
        done = post_training("reproduce", "run", *options, XDG_CONFIG_HOME=str(tmp_path))
        assert done.returncode == 2
        return done.stderr

    return answer


def test_num_ranks_is_how_many_processes_the_run_needs():
    assert num_ranks({"topology": {"world_size": 8}}) == 8
    assert num_ranks({"topology": {"tensor_parallel_size": 4}}) == 4
    assert num_ranks({"topology": {"tensor_parallel_size": 1}}) == 1
    assert num_ranks({"topology": {}}) == 1


@pytest.mark.parametrize(
    ("topology", "nodes", "is_refused"),
    [
        ({"world_size": 1}, 1, False),
        ({"world_size": 8}, 3, True),
        ({"world_size": 8}, 2, False),
        ({"tensor_parallel_size": 4}, 1, False),
        ({"tensor_parallel_size": 4}, 2, True),
        ({"tensor_parallel_size": 1}, 2, False),  # In chunks: any number of workers.
    ],
)
def test_reproduce_at_a_site_whose_nodes_the_ranks_do_not_fill_is_refused_before_it_runs(
    planned, topology, nodes, is_refused
):
    told = planned(topology, "--site", "clariden", "--nodes", str(nodes))
    assert (f"ranks do not fill {nodes} nodes of 4 tasks (choose" in told) == is_refused
    assert "the machine is known when the job starts; the run's was " in told


def test_reproduce_job_settings_without_a_site_are_refused(planned):
    assert "--nodes and --time: of a job, so only with --site" in planned({}, "--nodes", "2")


def test_reproduce_missing_image_is_one_line_with_both_ways_to_it(planned):
    [line] = [line for line in planned({}).splitlines() if "in the store" in line]
    assert "in the store, and " in line
    assert line.startswith("error: ")


@pytest.fixture
def promoted(tmp_path, monkeypatch):
    """A run whose two inputs, a model and a file in a dataset, are gone but for promoted copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    record = json.loads(RECORD.read_text())
    record["inputs"] = {}
    for key, name, file in (("model.path", "model", ""), ("data.path", "dataset", "rows.jsonl")):
        copy = tmp_path / "kept" / name
        copy.mkdir(parents=True)
        (copy / "rows.jsonl").write_text(name)
        pointer = {"schema": SCHEMA, "path": str(copy), "fingerprint": fingerprint(copy)}
        write_json(tmp_path / f"earlier/{name}.promoted.json", pointer)
        path = str(tmp_path / "earlier" / name / file)
        record["inputs"][key] = {"path": path, "fingerprint": fingerprint(copy / file)}
    write_json(tmp_path / "run/run.json", record)
    return tmp_path


def input_faults(plan) -> list[str]:
    return [line for line in plan.missing if line.startswith(("model.path", "data.path"))]


def test_reproduce_input_that_is_gone_is_taken_from_its_promoted_copy_and_told(promoted):
    [plan] = make_plans(promoted / "run", Options(store=promoted / "store"))
    assert plan.inputs == {
        "model.path": promoted / "kept/model",
        "data.path": promoted / "kept/dataset/rows.jsonl",
    }
    assert input_faults(plan) == []
    told = f"model.path: from its promoted copy {promoted}/kept/model, instead of {promoted}/"
    assert f"{told}earlier/model" in plan.notes


def test_reproduce_promoted_copy_of_another_content_is_a_fault(promoted):
    (promoted / "kept/model/rows.jsonl").write_text("other")
    [plan] = make_plans(promoted / "run", Options(store=promoted / "store"))
    [fault] = input_faults(plan)
    gone = f"model.path: gone: {promoted}/earlier/model; its promoted copy: changed: "
    assert fault.startswith(f"{gone}{promoted}/kept/model (fingerprint is ")
    assert plan.inputs["model.path"] == promoted / "earlier/model"


def test_reproduce_input_that_is_there_needs_no_promoted_copy(promoted):
    (promoted / "kept/model").rename(promoted / "earlier/model")
    [plan] = make_plans(promoted / "run", Options(store=promoted / "store"))
    assert plan.inputs["model.path"] == promoted / "earlier/model"
    assert not [line for line in [*plan.notes, *plan.missing] if line.startswith("model.path")]


def test_reproduce_input_file_that_was_changed_is_a_fault(promoted):
    (promoted / "earlier/dataset.promoted.json").unlink()
    (promoted / "earlier/dataset").mkdir()
    (promoted / "earlier/dataset/rows.jsonl").write_text("other")
    [plan] = make_plans(promoted / "run", Options(store=promoted / "store"))
    [fault] = input_faults(plan)
    assert fault.startswith(f"data.path: changed: {promoted}/earlier/dataset/rows.jsonl (fing")


def test_reproduce_damaged_image_in_the_store_is_a_fault(promoted):
    image = json.loads(RECORD.read_text())["image"]
    store = ImageStore(promoted / "store")
    with store.lock():
        store.image_path(image["sqsh_sha256"]).write_bytes(b"hsqs, and other bytes")
        store.add({"schema": RECORD_SCHEMA, **image, "size_bytes": 21, "pushed": "2026-01-01"})
    [plan] = make_plans(promoted / "run", Options(store=store.folder))
    assert plan.image is None
    [fault] = [line for line in plan.missing if image["sqsh_sha256"] in line]
    assert "sha256 is " in fault


def test_image_that_is_in_no_store_is_pulled_from_where_records_say(tmp_path, post_training):
    """By the run's own record, and by the checkout's images.lock."""
    record = json.loads(RECORD.read_text())
    digest = record["image"]["oci_digest"]
    entry = {"oci_digest": digest, "registries": {"b.example.org/cpu": "sha256:" + "8" * 64}}
    other = {"oci_digest": "sha256:" + "0" * 64, "registries": {"c.example.org/cpu": digest}}
    write_json(
        images_lock(tmp_path), {"schema": "post-training/images-lock/1", "images": [other, entry]}
    )
    record["image"]["registries"] = {"a.example.org/cpu": "sha256:" + "7" * 64}
    assert [str(each) for each in image_references(record["image"], tmp_path)] == [
        f"a.example.org/cpu@sha256:{'7' * 64}",
        f"b.example.org/cpu@sha256:{'8' * 64}",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    done = post_training("reproduce", "run", "--dry-run", "--store", "store")
    assert (
        f"image {digest[:19]} is in no store; it is pulled from a.example.org/cpu@sha256:777"
        in done.stderr
    )
    assert "no image" not in done.stderr
