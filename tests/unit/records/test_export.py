"""What an archive of a run holds, and what it doesn't: rows, folders, hosts, people, secrets."""

import json
import zipfile

import pytest

from post_training.core.errors import UsageError
from post_training.core.hashing import sha256_file
from post_training.records.check import check_run
from post_training.records.export import Redaction, export_run
from post_training.records.run_record import read_record, seal

MADE = {"ro-crate-metadata.json", "provenance.intoto.json"}
RECORDS = {"run.json", "config.yaml", "metrics.jsonl", "steps.jsonl", "model/artifact.json"}

MODEL = ["model/config.json", "model/model.safetensors"]


@pytest.fixture
def export(tmp_path):
    """{name: content} of the archive of a run, which is unpacked to tmp_path / "unpacked"."""

    def make(run, **options) -> dict[str, bytes]:
        target = tmp_path / f"{len(list(tmp_path.glob('*.zip')))}.zip"
        with zipfile.ZipFile(export_run(run, target, **options)) as archive:
            archive.extractall(tmp_path / "unpacked")
            return {name: archive.read(name) for name in archive.namelist()}

    return make


def test_export_packs_records_and_figures_and_no_rows_unless_asked(finished_run, export):
    run = finished_run("one")
    for name in ("dataset/rows.jsonl", "chunks/000001.jsonl", "slurm/slurm-7.out", "notes.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("a row of somebody")
    assert export(run).keys() == RECORDS | MADE
    assert export(run, with_data=True).keys() == RECORDS | MADE | set(MODEL)


def test_export_names_no_folder_host_or_person_and_still_holds_together(
    finished_run, export, tmp_path
):
    run = finished_run("one")
    files = export(run)
    whole = b"\n".join(files.values()).decode()
    for private in ("someone", "nid001234", str(tmp_path), "/home", "/users", "/capstor"):
        assert private not in whole, private
    record = json.loads(files["run.json"])
    assert record["command"] == ["entrypoint", "sft", "sft.yaml"]
    assert record["working_dir"] == "."
    assert record["mounts"] == [".:.", "[path]/[user]:[path]/scratch"]
    assert record["identity"] == read_record(run)["identity"]
    assert record["redaction"]["files"]["run.json"] == sha256_file(run / "run.json")
    assert record["redaction"]["files"]["config.yaml"] == sha256_file(run / "config.yaml")
    assert "machine.host" in record["redaction"]["places"]
    found = check_run(tmp_path / "unpacked")
    assert (found.faults, found.gone) == ([], MODEL)
    # Its seal is over what it says now.
    (tmp_path / "unpacked/config.yaml").write_text("seed: 2\n")
    assert "config.yaml: changed" in check_run(tmp_path / "unpacked").faults[0]


def test_export_statement_is_of_what_was_read_and_of_what_goes_with_it(finished_run, export):
    run = finished_run("one")
    files = export(run)
    statement = json.loads(files["provenance.intoto.json"])
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert subjects == read_record(run)["outputs"]["files"]
    packed = {each["name"] for each in statement["predicate"]["runDetails"]["byproducts"]}
    assert packed == RECORDS - {"steps.jsonl"}
    (run / "steps.jsonl").unlink()
    statement = json.loads(export(run)["provenance.intoto.json"])
    assert [each["name"] for each in statement["subject"]] == MODEL


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_export_of_a_link_out_of_the_run_is_refused(finished_run, export, tmp_path, name):
    run = finished_run("one")
    (tmp_path / "private").write_text("root:*:1")
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "private")
    with pytest.raises(UsageError, match="a link out of the run's folder, and not exported"):
        export(run)
    assert not list(tmp_path.glob("*.zip"))


def test_export_of_an_old_record_with_a_secret_does_not_hold_it(finished_run, export):
    run, token = finished_run("one"), "ghp_" + 36 * "a"
    record = read_record(run)
    record["code"]["diff"] = f"+KEY = {token}"
    record["environment"]["NCCL_X"] = token
    record["seal"] = seal(record)
    (run / "run.json").write_text(json.dumps(record))
    files = export(run)
    assert token not in b"\n".join(files.values()).decode()
    assert json.loads(files["run.json"])["code"]["diff"] == "+KEY = [redacted: GitHub token]"


def test_export_of_an_edited_record_is_not_sealed_for_it(finished_run, export, tmp_path):
    run = finished_run("one")
    record = read_record(run) | {"metrics": {"loss": 0.1}}
    (run / "run.json").write_text(json.dumps(record))
    export(run)
    assert "run.json: was changed by hand" in check_run(tmp_path / "unpacked").faults[0]


def test_export_is_the_same_bytes_again(finished_run, tmp_path):
    run = finished_run("one")
    paths = [export_run(run, tmp_path / f"{name}.zip") for name in ("a", "b")]
    assert sha256_file(paths[0]) == sha256_file(paths[1])
    with pytest.raises(UsageError, match="there already"):
        export_run(run, paths[0])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/users/someone/work/runs/one/model", "runs/one/model"),
        ("no such folder: /users/someone/work", "no such folder: ."),
        ("/users/someone", "[path]"),
        ("/root/.local/x.sqsh", "[path]/x.sqsh"),
        ("data.path=/capstor/store/someone/rows.jsonl", "data.path=[path]/rows.jsonl"),
        ("/opt/post-training/venv", "/opt/post-training/venv"),
        ("https://example.org/a/b and 1/2 and a/b", "https://example.org/a/b and 1/2 and a/b"),
        ("on nid001234: killed", "on [host]: killed"),
        ("vllm and nid0012345", "vllm and nid0012345"),
        ("asked by someone", "asked by [user]"),
    ],
)
def test_redaction_of_a_text(finished_run, text, shown):
    run = finished_run("one")
    assert Redaction(read_record(run), run).text(text) == shown


def test_redaction_knows_who_exports(finished_run, monkeypatch):
    run = finished_run("one")
    monkeypatch.setenv("USER", "exporting")
    assert Redaction(read_record(run), run).text("of exporting") == "of [user]"
