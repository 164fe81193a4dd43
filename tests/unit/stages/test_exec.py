"""A command of somebody else's under a record: what it sees, what is kept, how it ends."""

import json
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from helpers.slurm_cluster import wait_until
from post_training.config.model import Role, recipe_hash, settings_by_role
from post_training.core.errors import PostTrainingError, UsageError
from post_training.records.compare import compare_runs
from post_training.records.run_record import read_record, read_whole_record
from post_training.stages.config import ExecConfig
from post_training.stages.context import Ranks, Result, StageContext
from post_training.stages.exec import run


def config(*command: str, **settings: Any) -> ExecConfig:
    given = {"command": command, "outputs": [{"name": "model", "path": "out"}], **settings}
    return ExecConfig.model_validate_json(json.dumps(given), strict=True)


def shell(script: str, **settings: Any) -> ExecConfig:
    return config("sh", "-euc", script, **settings)


def execute(given: ExecConfig, run_dir: Path, ranks: Ranks | None = None) -> Result:
    run_dir.mkdir(exist_ok=True)
    return run(given, StageContext(run_dir, ranks or Ranks()))


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "post_training.stages", "exec", "--unpinned", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=600)
    return process.returncode, said


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "somewhere/rows.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "a"}\n')
    return path


def test_command_sees_its_inputs_by_name_and_its_output_becomes_the_artifact(rows, tmp_path):
    given = shell(
        "mkdir out; cp data out/kept; ls > out/seen; echo told; echo failed >&2",
        inputs=[{"name": "data", "path": str(rows)}],
    )
    result = execute(given, tmp_path / "run")
    assert result.artifacts == {"model": "model"}
    assert (tmp_path / "run/model/kept").read_text() == '{"text": "a"}\n'
    assert (tmp_path / "run/model/seen").read_text().split() == ["data", "out"]
    assert (tmp_path / "run/logs/rank-0.attempt-1.log").read_text() == "told\nfailed\n"
    assert result.unstable_files == ["logs/rank-0.attempt-1.log"]


def test_single_file_is_kept_in_a_folder_of_its_own(tmp_path):
    execute(shell("echo 3 > out"), tmp_path / "run")
    assert (tmp_path / "run/model/out").read_text() == "3\n"


def test_unstable_files_are_listed_and_not_in_the_artifact(tmp_path):
    given = shell(
        "mkdir -p out/sub; date > out/sub/a.log; echo 1 > out/weights", unstable=["*.log"]
    )
    result = execute(given, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/model").rglob("*") if path.is_file()] == [
        "weights"
    ]
    assert "work/.unstable/model/sub/a.log" in result.unstable_files
    assert (tmp_path / "run/work/.unstable/model/sub/a.log").exists()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 3", "the command failed with exit code 3"),
        ("kill -9 $$", "the command was killed by signal 9"),
        ("echo 1 > other", "the command ended with exit code 0 and left no out"),
    ],
)
def test_command_that_fails_is_an_error_that_says_how(script, problem, tmp_path):
    with pytest.raises(PostTrainingError) as raised:
        execute(shell(script), tmp_path / "run")
    assert raised.value.problem == problem
    assert not (tmp_path / "run/model").exists()


class RanksOfWhichOneFailed(Ranks):
    """As rank 0 finds them when the process of another one has ended."""

    def gather(self, value: Any) -> list[Any]:
        raise RuntimeError("Connection closed by peer")


def test_command_that_failed_on_another_rank_is_run_again(tmp_path):
    given = shell("echo 1 >> ../count; echo 1 > out")
    with pytest.raises(PostTrainingError, match="the command failed on another rank"):
        execute(given, tmp_path / "run", RanksOfWhichOneFailed())
    assert not (tmp_path / "run/model").exists()
    execute(given, tmp_path / "run")
    assert (tmp_path / "run/count").read_text() == "1\n1\n"
    assert (tmp_path / "run/model/out").exists()


def test_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="no program 'no-such-program' in this image"):
        execute(config("no-such-program"), tmp_path / "run")


def test_input_with_a_link_into_the_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("post_training.images.inside.IMAGE_FILE", tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "own").touch()
    (tools / "link").symlink_to("own")
    inputs = [{"name": "tools", "path": str(tools)}]
    execute(shell("touch out", inputs=inputs), tmp_path / "run")
    (tools / "env").symlink_to("/usr/bin/env")
    with pytest.raises(
        UsageError, match=r"tools/env is a link to /usr/bin/\w+ of the image"
    ) as told:
        execute(shell("touch out", inputs=inputs), tmp_path / "again")
    assert "python -m venv --copies" in told.value.hint


def test_file_that_is_no_input_is_named_when_the_command_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text("")
    with pytest.raises(PostTrainingError) as raised:
        execute(config("cat", "--file=train.yaml"), tmp_path / "run")
    assert "--input train.yaml=train.yaml" in raised.value.hint


def test_script_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/main.py").write_text("import beside\nopen('out', 'w').write(beside.TEXT)\n")
    (tmp_path / "tools/beside.py").write_text("TEXT = 'found'\n")
    inputs = [{"name": "tools", "path": str(tmp_path / "tools")}]
    given = config("python", "tools/main.py", inputs=inputs, environment={"HF_HOME": "there"})
    execute(given, tmp_path / "run")
    assert (tmp_path / "run/model/out").read_text() == "found"


def test_script_may_not_import_what_is_no_input(tmp_path):
    (tmp_path / "main.py").write_text("import beside_and_no_input\n")
    (tmp_path / "beside_and_no_input.py").write_text("")
    inputs = [{"name": "main.py", "path": str(tmp_path / "main.py")}]
    with pytest.raises(PostTrainingError, match="failed with exit code 1"):
        execute(config("python", "main.py", inputs=inputs), tmp_path / "run")
    [log] = (tmp_path / "run/logs").iterdir()
    assert "No module named 'beside_and_no_input'" in log.read_text()


@pytest.mark.parametrize(("local_world_size", "nodes"), [(1, "2 1 c10d"), (2, "none none none")])
def test_ranks_of_a_job_are_told_to_the_command_as_torchrun_reads_them(
    local_world_size, nodes, tmp_path, monkeypatch
):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    from post_training.stages.exec import _environment

    found = _environment(config("true"), Ranks(1, 0, 2, local_world_size), 1234)
    names = ("PET_NNODES", "PET_NODE_RANK", "PET_RDZV_BACKEND")
    assert " ".join(found.get(name, "none") for name in names) == nodes
    assert (found["RANK"], found["WORLD_SIZE"]) == ("1", "2")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node1", "1234")


@pytest.mark.parametrize(("on_restart", "steps"), [("begin", "1\n"), ("continue", "1\n1\n")])
def test_stopped_command_begins_again_or_finds_what_it_left(on_restart, steps, tmp_path):
    script = "echo 1 >> steps; test -e ../again; cp steps out"
    given = shell(script, on_restart=on_restart)
    with pytest.raises(PostTrainingError):
        execute(given, tmp_path / "run")
    (tmp_path / "run/again").write_text("")
    execute(given, tmp_path / "run")
    assert (tmp_path / "run/model/out").read_text() == steps
    assert len(list((tmp_path / "run/logs").iterdir())) == 2


def test_command_that_had_succeeded_is_not_run_again(tmp_path):
    given = shell("echo 1 >> ../count; echo 1 > out")
    execute(given, tmp_path / "run")
    # As if the run had been killed before its record was closed.
    execute(given, tmp_path / "run")
    assert (tmp_path / "run/count").read_text() == "1\n"
    assert (tmp_path / "run/model/out").exists()


def test_links_that_lead_out_of_an_output_become_copies(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given/rows").write_text("a\n")
    given = shell(
        "mkdir out; echo 1 > out/one; ln -s one out/within; ln -s data/rows beside; "
        "ln -s ../data out/folder; ln -s $PWD/out/one out/absolute; ln -s /nowhere out/x.tmp; "
        "ln -s data linked",
        inputs=[{"name": "data", "path": str(tmp_path / "given")}],
        outputs=[{"name": "model", "path": "out"}, {"name": "rows", "path": "beside"},
                 {"name": "all", "path": "linked"}],
        unstable=["*.tmp"],
    )  # fmt: skip
    execute(given, tmp_path / "run")
    kept = tmp_path / "run/model"
    assert (kept / "within").readlink() == Path("one")
    assert sorted(path.name for path in kept.rglob("*") if path.is_symlink()) == ["within"]
    assert (kept / "absolute").read_text() == "1\n"
    assert (kept / "folder/rows").read_text() == "a\n"
    assert (tmp_path / "run/rows/beside").read_text() == "a\n"
    assert not (tmp_path / "run/all").is_symlink()
    assert (tmp_path / "run/all/rows").read_text() == "a\n"


@pytest.mark.parametrize(
    ("target", "problem"), [("/nowhere", "which is not there"), ("..", "a folder that it is in")]
)
def test_link_of_an_output_that_cannot_be_kept_is_named(target, problem, tmp_path):
    given = shell(f"mkdir out; ln -s {target} out/link")
    with pytest.raises(PostTrainingError, match=f"out/link: .*{problem}"):
        execute(given, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


def test_command_whose_log_finds_no_room_goes_on_and_it_is_told(tmp_path, capfd):
    logs = tmp_path / "run/logs"
    logs.mkdir(parents=True)
    (logs / "rank-0.attempt-2.log").symlink_to("/dev/full")
    execute(shell("head -c 300000 /dev/zero | tr '\\0' x; echo 1 > out"), tmp_path / "run")
    told = capfd.readouterr().err
    assert "rank-0.attempt-2.log: no space left on device; the rest of the output is not" in told
    assert told.count("x") >= 300000
    assert (tmp_path / "run/model/out").exists()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"outputs": [{"name": "model", "path": "../out"}]}, "must be below the working folder"),
        ({"outputs": [{"name": "model", "path": "/out"}]}, "must be below the working folder"),
        ({"outputs": [{"name": "logs", "path": "out"}]}, "a run folder has its own logs"),
        ({"inputs": [{"name": "out", "path": "x"}]}, "out is an input, which is never written"),
        (
            {"outputs": [{"name": "a", "path": "out"}, {"name": "b", "path": "out/b"}]},
            "another output is in out",
        ),
        (
            {"inputs": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]},
            "inputs: two are called a",
        ),
        ({"environment": {"A=B": "1"}}, "environment: 'A=B' can be no variable"),
        ({"environment": {"WANDB_API_KEY": "0123456789abcdef" * 3}}, "holds a secret"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        config("true", **settings)


def test_what_is_computed_is_recipe_and_how_it_is_started_is_not(rows):
    one = shell("true", inputs=[{"name": "data", "path": str(rows)}])
    other = shell(
        "true", inputs=[{"name": "data", "path": "elsewhere"}], on_restart="continue", ranks="gpu"
    )
    assert recipe_hash("exec", one) == recipe_hash("exec", other)
    assert recipe_hash("exec", one) != recipe_hash("exec", shell("false"))
    assert settings_by_role(one)[Role.INPUT] == {"inputs[0].path": str(rows)}


def test_runs_of_a_command_line_are_recorded_and_compared_by_their_outputs(rows, tmp_path):
    words = ["--input", f"data={rows}", "--output", "model=out", "--"]
    for name, command in {
        "one": "cp data out",
        "two": "cp data out",
        "random": "date +%N > out",
    }.items():
        process = start([f"run_dir={name}", *words, "sh", "-c", command], tmp_path)
        code, said = finish(process)
        assert code == 0, said
    record = read_whole_record(tmp_path / "one")
    assert record["status"] == "finished"
    assert record["inputs"]["inputs[0].path"]["path"] == str(rows)
    assert record["outputs"]["artifacts"]["model"]["path"] == "model"
    assert record["recipe"]["command"] == ["sh", "-c", "cp data out"]

    def verdict(name: str) -> str:
        other = read_whole_record(tmp_path / name)
        return compare_runs(record, tmp_path / "one", other, tmp_path / name).verdict

    assert verdict("two") == "identical: 1 files"
    assert verdict("random").startswith("differs: model/out")


def test_python_environment_of_another_trainer_is_an_input_by_its_content(tmp_path, monkeypatch):
    """Which Python would write bytecode into."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    venv.create(tmp_path / "trainer", symlinks=True)
    [packages] = (tmp_path / "trainer/lib").glob("python*/site-packages")
    (packages / "other_trainer.py").write_text(
        "import sys\nopen('out', 'w').write(open(sys.argv[1]).read() * 2)\n"
    )
    (tmp_path / "rows").write_text("a\n")
    words = ["--input", "trainer=trainer", "--input", "rows=rows", "--output", "model=out"]
    words += ["--", "trainer/bin/python", "-m", "other_trainer", "rows"]
    fingerprints = []
    for name in ("one", "two"):
        code, said = finish(start([f"run_dir={name}", *words], tmp_path))
        assert code == 0, said
        assert (tmp_path / name / "model/out").read_text() == "a\na\n"
        fingerprints.append(read_record(tmp_path / name)["inputs"]["inputs[0].path"]["fingerprint"])
        (packages / "another.py").write_text("")
    assert fingerprints[0] != fingerprints[1]


def test_command_line_is_what_the_command_gets_whatever_it_is_written_in(tmp_path):
    word = "é 😀 'a' \"b\" ${x} 1e-5: # \\"
    script = 'printf %s "$1" > out'
    words = ["run_dir=run", "--output", "out", "--", "sh", "-c", script, "sh", word]
    code, said = finish(start(words, tmp_path))
    assert code == 0, said
    assert (tmp_path / "run/output/out").read_text() == word


def test_signal_reaches_the_command_and_its_last_words_are_kept(tmp_path):
    script = "trap 'echo saved > saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    process = start(["run_dir=run", "--output", "out", "--", "sh", "-c", script], tmp_path)
    assert process.stderr is not None
    while process.stderr.readline().strip() != "ready":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 128 + signal.SIGTERM, said
    assert (tmp_path / "run/work/saved").read_text() == "saved\n"
    record = read_record(tmp_path / "run")
    assert (record["status"], record["reason"]) == ("interrupted", "stopped by SIGTERM")


def test_command_that_does_not_end_is_killed_with_all_it_started(tmp_path):
    script = "trap '' TERM; sh -c 'echo $$ > child; exec sleep 1000' & echo ready; wait"
    words = ["run_dir=run", "grace_s=1", "--output", "out", "--", "sh", "-c", script]
    process = start(words, tmp_path)
    assert process.stderr is not None
    while process.stderr.readline().strip() != "ready":
        assert process.poll() is None
    child = tmp_path / "run/work/child"
    wait_until(lambda: process.poll() is not None or (child.exists() and child.read_text().strip()))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 128 + signal.SIGTERM, said
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    # Z: ended, and waiting for this machine's init.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_input_that_changes_meanwhile_leaves_no_output(rows, tmp_path):
    words = ["run_dir=run", "--input", f"data={rows}", "--output", "out", "--"]
    code, said = finish(start([*words, "sh", "-c", f"cp data out; echo >> {rows}"], tmp_path))
    assert code == 1
    assert "had taken its fingerprint" in said
    assert read_record(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run/output").exists()


def test_run_folder_in_an_input_is_refused_before_anything_is_done(tmp_path):
    words = ["--input", "data=.", "--output", "out", "--", "sh", "-c", "echo 1 > out"]
    code, said = finish(start(["run_dir=run", *words], tmp_path))
    assert code == 2
    assert "error: inputs[0].path: the run folder run is in this input" in said
    assert not (tmp_path / "run").exists()


def test_options_without_a_command_say_what_is_missing(tmp_path):
    code, said = finish(start(["--output", "out"], tmp_path))
    assert code == 2
    assert "--input and --output want a command after --" in said


def test_run_that_is_to_be_promoted_is_copied_once_it_has_finished(tmp_path):
    words = ["run_dir=run", "promote=store", "--output", "model=out", "--", "sh", "-c"]
    code, said = finish(start([*words, "echo 1 > out"], tmp_path))
    assert code == 2
    assert "artifacts/store: no such folder" in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "artifacts/store").mkdir(parents=True)
    code, said = finish(start([*words, "echo 1 > out"], tmp_path))
    assert code == 0, said
    [copy] = (tmp_path / "artifacts/store").iterdir()
    assert (copy / "out").read_text() == "1\n"
    pointer = json.loads((tmp_path / "run/model.promoted.json").read_text())
    assert pointer["path"] == str(copy)
    # A copy that is gone is made again where the finished run is asked for once more.
    (copy / "out").unlink()
    (copy / "artifact.json").unlink()
    copy.rmdir()
    code, said = finish(start([*words[:-3], "--skip-finished", *words[-3:], "echo 1 > out"],
                              tmp_path))  # fmt: skip
    assert code == 0, said
    assert (copy / "out").exists()
