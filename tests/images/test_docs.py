"""Pages run as they are written: docs/start/laptop.md in an empty folder, each shell block in
order, and in a long test what the guides say to do with what it left there."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from helpers.doc_blocks import AFTER_LAPTOP, LAPTOP, PAGES, blocks_of, blocks_without_mark
from post_training.images.store import default_store

# What docs/guides/preference.md and annotate.md say of these files.
PAIRS = (
    '{"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}\n'
    '{"prompt": "4 + 4?", "chosen": "8", "rejected": "44"}\n'
)
PROBLEMS = '{"question": "2 + 3?", "answer": "5"}\n{"question": "4 + 4?", "answer": "8"}\n'
# In the guides a command inside the image stands without what starts the image.
ENTRYPOINT = 'entrypoint() { post-training edf run post-training -- entrypoint "$@"; }'


@pytest.fixture(scope="module")
def shell(image_edf, cli, tmp_path_factory):
    """Run lines of a shell in a home folder that has the EDF."""
    home = tmp_path_factory.mktemp("home")
    (home / ".edf").mkdir()
    (home / ".edf/post-training.toml").symlink_to(image_edf)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB")},
        "HOME": str(home),
        "PATH": f"{cli.parent}:{os.environ['PATH']}",
        "POST_TRAINING_IMAGE_STORE": str(default_store()),
    }

    def run(*lines: str, cwd: Path = home) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run.home = home
    return run


@pytest.fixture(scope="module")
def laptop(shell) -> tuple[Path, str]:
    """(the folder in which the page works, what its commands printed)"""
    built, *blocks = (block.text for block in blocks_without_mark(LAPTOP))
    # The first block built the image; what it leaves is here.
    assert built == "make image && make push-sqsh\nsource .venv/bin/activate\n"
    printed = shell(*blocks)
    return shell.home / "try", printed


def test_laptop_page_trains_and_reproduces(laptop):
    folder, printed = laptop
    assert "training.effective_batch_size: an integer > 0, required [recipe]" in printed
    assert "identical" in printed
    record = json.loads((folder / "runs/sft/run.json").read_text())
    assert record["status"] == "finished"


@pytest.mark.long
def test_guides_go_on_from_the_laptop_page(laptop, shell):
    folder, _ = laptop
    (folder / "pairs.jsonl").write_text(PAIRS)
    (folder / "problems.jsonl").write_text(PROBLEMS)
    after = {
        page: [block.text for block in blocks_of(page, "sh") if block.mark == AFTER_LAPTOP]
        for page in PAGES
    }
    # In the order of their needs: the runs of preference training are shown elsewhere at the end.
    pages = sorted((page for page in after if after[page]), key=lambda page: page.stem == "publish")
    assert len(pages) > 5
    for page in pages:
        files: dict[str, str] = {}
        for file in [*blocks_of(page, "yaml"), *blocks_of(page, "python")]:
            if file.file_name and file.file_name != "sft.yaml":
                # The first of a name: annotate.md has another generate.yaml below, for larger runs.
                files.setdefault(file.file_name, file.text)
        for name, text in files.items():
            (folder / name).write_text(text)
        shell(ENTRYPOINT, *after[page], cwd=folder)
    for made in ("dpo/model", "select/dataset", "try"):
        assert (folder / "runs" / made).is_dir()
