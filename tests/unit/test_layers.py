"""The layers of the package, and what a command line may import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import post_training

SOURCE = Path(post_training.__file__).parent
# A layer imports from itself and from the layers before it.
LAYERS = [
    "core",
    "config",
    "records",
    "report",
    "images",
    "data",
    "models",
    "stages",
    "train",
    "annotate",
]
LAYERS += ["importers", "slurm", "reproduce", "cli"]
ALSO_FORBIDDEN = {("data", "images"), ("models", "images"), ("annotate", "train")}
STACK = {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "numpy"}


def imports_of(path: Path) -> set[str]:
    """Every absolute module name imported anywhere in the file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_layer_imports_nothing_from_above(path):
    layer = path.relative_to(SOURCE).parts[0]
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("post_training.")}
    used = {name.removesuffix(".py") for name in used if name in LAYERS}
    above = {other for other in used if LAYERS.index(other) > LAYERS.index(layer)}
    assert not above
    assert not {(layer, other) for other in used} & ALSO_FORBIDDEN


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_stack_is_imported_only_where_data_and_models_are_worked_on(path):
    layer = path.relative_to(SOURCE).parts[0]
    if layer not in {"data", "models", "stages", "train", "annotate"} and path.name != "inspect.py":
        assert not {name.split(".")[0] for name in imports_of(path)} & STACK


# Who else prints on stdout: programs of their own, whose stdout another program reads.
PROGRAMS = {
    "stages/__main__.py": "`entrypoint STAGE --help-config`, the same",
    "annotate/chat.py": "`entrypoint chat` and `generate --prompt`, inside the image, likewise",
    "stages/doctor.py": "`entrypoint doctor`, inside the image, where there is no command line",
    "slurm/outcome.py": "job.sh reads its answer",
    "stages/vet.py": "vet.sh reads its answer",
}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_the_command_line_prints_and_all_else_is_told_by_one_function(path):
    name = str(path.relative_to(SOURCE))
    if name.startswith("cli/") or name == "core/errors.py":
        return
    printed = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called, files = ast.unparse(node.func), {key.arg: key.value for key in node.keywords}
        # Into a file of its own is writing, not printing.
        is_print = called == "print" and "sys." in ast.unparse(
            files.get("file", ast.parse("sys.stdout").body[0])
        )
        if is_print or called in ("sys.stdout.write", "sys.stderr.write"):
            printed.append(f"{path}:{node.lineno}")
    assert bool(printed) == (name in PROGRAMS), printed


def modules_loaded_by(*arguments: str) -> set[str]:
    """Top-level modules that `post-training ARGUMENTS` has imported when it ends."""
    script = (
        f"import sys; sys.argv[1:] = {list(arguments)}\n"
        "from post_training.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split("MODULES")[1].split()}


@pytest.mark.parametrize(
    "group", [[], ["image"], ["edf"], ["runs"], ["data"], ["submit"], ["reproduce"]]
)
def test_help_imports_nothing_of_the_stack(group):
    assert not modules_loaded_by(*group, "--help") & (STACK | {"yaml"})


def test_edf_runner_imports_neither_typer_nor_pydantic():
    assert not modules_loaded_by("edf", "run", "--help") & (STACK | {"typer", "pydantic", "yaml"})


def test_map_of_the_code_names_files_that_are_there():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    table = text[text.index("| command | files |") :]
    named = re.findall(r"`([a-z_]+/[a-z_/]+)`", table)
    assert len(named) > 30
    assert [name for name in named if not (SOURCE / f"{name}.py").exists()] == []
