"""Records of real runs: their published schemas, and what is exported for other people's tools."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from jsonschema import Draft202012Validator

from post_training.core.hashing import sha256_file
from post_training.records import run_record

pytestmark = pytest.mark.image

SCHEMAS = Path(run_record.__file__).with_name("schemas")


@pytest.mark.parametrize(
    ("name", "schema"), [("run.json", "run-record-1"), ("artifact.json", "artifact-1")]
)
def test_records_of_real_runs_are_as_their_schema_says(job, name, schema):
    validator = Draft202012Validator(json.loads((SCHEMAS / f"{schema}.schema.json").read_text()))
    validator.check_schema(validator.schema)
    paths = [path for folder in ("init", "run") for path in (job / folder).rglob(name)]
    assert len(paths) == 2
    for path in paths:
        record = json.loads(path.read_text())
        assert [error.message for error in validator.iter_errors(record)] == []
        record.pop("files", record.pop("inputs", None))
        assert not validator.is_valid(record)


@pytest.fixture
def exported(job, post_training, tmp_path):
    """{name in the archive: content}."""
    done = post_training("runs", "export", job / "run", "--output", "run.zip")
    assert (done.returncode, done.stdout) == (0, "run.zip\n"), done.stderr
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_export_holds_records_and_figures_and_is_the_same_bytes_again(
    exported, job, post_training, tmp_path
):
    figures = {"metrics.jsonl", "steps.jsonl"}
    made = {"ro-crate-metadata.json", "provenance.intoto.json"}
    records = {"run.json", "config.yaml", "model/artifact.json"}
    assert exported.keys() == figures | made | records
    for name in figures:
        assert exported[name] == (job / "run" / name).read_bytes()
    whole = b"\n".join(exported.values()).decode()
    assert str(job) not in whole
    assert str(Path.home()) not in whole
    assert json.loads(exported["run.json"])["machine"]["host"] == "[host]"
    assert post_training("runs", "export", job / "run", "-o", "again.zip").returncode == 0
    assert sha256_file(tmp_path / "again.zip") == sha256_file(tmp_path / "run.zip")
    refused = post_training("runs", "export", job / "run", "-o", "again.zip")
    assert (refused.returncode, refused.stderr.splitlines()[0]) == (
        2, "error: again.zip: there already",
    )  # fmt: skip


def test_export_provenance_is_valid_and_names_the_bytes_of_what_was_made(exported, job):
    written = json.loads(exported["provenance.intoto.json"])
    statement = json_format.ParseDict(written, statement_pb2.Statement())
    Statement.copy_from_pb(statement).validate()
    provenance = json_format.ParseDict(written["predicate"], provenance_pb2.Provenance())
    record = json.loads(exported["run.json"])
    assert provenance.run_details.metadata.invocation_id == record["run_id"]
    digests = [each.digest for each in provenance.build_definition.resolved_dependencies]
    assert {"sha256": record["image"]["oci_digest"].removeprefix("sha256:")} in digests
    for subject in written["subject"]:
        content = (job / "run" / subject["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == subject["digest"]["sha256"]


def test_export_crate_describes_every_file_and_everything_it_names(exported):
    graph = json.loads(exported["ro-crate-metadata.json"])["@graph"]
    described = {entity["@id"]: entity for entity in graph}
    assert len(described) == len(graph)
    made = {"ro-crate-metadata.json", "provenance.intoto.json"}
    assert {part["@id"] for part in described["./"]["hasPart"]} == exported.keys() - made
    named = json.dumps(graph).split('{"@id": "')[1:]
    outside = {text.split('"')[0] for text in named} - described.keys()
    assert all(name.startswith("https://w3id.org/ro/") for name in outside)
    [action] = [entity for entity in graph if entity["@type"] == "CreateAction"]
    assert action["actionStatus"] == "http://schema.org/CompletedActionStatus"
