"""No code of a model's folder is run, and nobody is asked whether to."""

import ast
from pathlib import Path

import post_training

SOURCES = Path(post_training.__file__).parent
# They take no code: settings of sampling; an adapter that was written by ourselves.
WITHOUT_CODE = {"GenerationConfig", "PeftModel"}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_every_loading_of_a_folder_refuses_code_of_its_own():
    """transformers asks on the terminal where it isn't told."""
    found = 0
    for path in SOURCES.rglob("*.py"):
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func)
            owner, _, method = name.rpartition(".")
            loads = method == "from_pretrained" and owner not in WITHOUT_CODE
            if not (loads or name == "LLM"):
                continue
            told = {each.arg: ast.unparse(each.value) for each in call.keywords}
            assert told.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
            found += 1
    assert found >= 5
