"""docs/start/laptop.md, run as it is written: each shell block, in order, in an empty folder."""

import json
import os
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/start/laptop.md"


def test_laptop_page_trains_and_reproduces(image_edf, cli, tmp_path):
    built, *blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    # The first block built the image; what it leaves is here.
    assert built == "make image && make push-sqsh\nsource .venv/bin/activate\n"
    (tmp_path / ".edf").mkdir()
    (tmp_path / ".edf/post-training.toml").symlink_to(image_edf)
    store = os.environ.get(
        "POST_TRAINING_IMAGE_STORE", str(Path.home() / ".local/share/post-training/images")
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        env={
            **os.environ,
            "HOME": str(tmp_path),
            "PATH": f"{cli.parent}:{os.environ['PATH']}",
            "POST_TRAINING_IMAGE_STORE": store,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "training.effective_batch_size: an integer > 0, required [recipe]" in done.stdout
    assert "identical" in done.stdout
    record = json.loads((tmp_path / "try/runs/sft/run.json").read_text())
    assert record["status"] == "finished"
