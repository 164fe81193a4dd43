"""`entrypoint doctor` in the built image, and a planted secret that a run must leave nowhere."""

import os
import secrets
import subprocess
from pathlib import Path

import pytest

from post_training.images.edf import load_edf

pytestmark = pytest.mark.image
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def tokens(tmp_path) -> dict[str, str]:
    """The user's token files below a home of the test's own, and what is in them."""
    folder = tmp_path / "home/.config/post-training/credentials"
    folder.mkdir(parents=True)
    planted = {"hf-token": f"hf_{secrets.token_hex(17)}", "wandb-api-key": secrets.token_hex(20)}
    for name, secret in planted.items():
        (folder / name).write_text(secret)
        (folder / name).chmod(0o600)
    return planted


@pytest.fixture
def personal_edf(tokens, image_edf, post_training, tmp_path) -> Path:
    digest = load_edf(image_edf, os.environ, Path("/")).env["POST_TRAINING_IMAGE_OCI_DIGEST"]
    done = post_training(
        "edf", "render", "--image", digest, "--repository", REPOSITORY,
        XDG_CONFIG_HOME=str(tmp_path / "home/.config"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / "personal.toml"
    path.write_text(done.stdout)
    return path


def processes() -> str:
    """Command lines and environments of all processes, as `ps` and tools like it show them."""
    shown = []
    for path in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
        try:
            shown.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # It has ended.
    return "\n".join(shown)


def test_planted_secrets_are_mounted_and_appear_nowhere(
    personal_edf, tokens, cli, job, post_training, tmp_path
):
    done = post_training(
        "edf", "run", personal_edf, "--", "sh", "-c", 'cat "$HF_TOKEN_PATH" "$WANDB_API_KEY_FILE"'
    )
    assert done.stdout == tokens["hf-token"] + tokens["wandb-api-key"], done.stderr
    done = post_training("edf", "run", personal_edf, "--", "sh", "-c", 'echo x > "$HF_TOKEN_PATH"')
    assert "Read-only file system" in done.stderr
    command = ["entrypoint", "sft", "sft.yaml", f"run_dir={tmp_path.name}",
               "logging.report_to=[wandb, tensorboard]"]  # fmt: skip
    run = subprocess.Popen(
        [cli, "edf", "run", "--mount", f"{tmp_path}:{tmp_path}", personal_edf, "--", *command],
        cwd=job, env={**os.environ, "WANDB_MODE": "offline"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seen = []
    while run.poll() is None:
        seen.append(processes())
        try:
            run.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    said = run.stdout.read()
    assert run.returncode == 0, said
    assert any("post_training.stages" in text for text in seen)
    places = {"processes": "\n".join(seen), "log": said, "EDF": personal_edf.read_text()}
    for path in (job / tmp_path.name).rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes().decode(errors="replace")
    assert [name for name in places if name.endswith("run.json")]
    assert [name for name in places if "wandb" in name]
    for name, text in places.items():
        for secret in tokens.values():
            assert secret not in text, name


def test_token_that_became_readable_is_refused_inside(personal_edf, post_training, job, tmp_path):
    (tmp_path / "home/.config/post-training/credentials/hf-token").chmod(0o644)
    done = post_training(
        "edf", "run", personal_edf, "--", "entrypoint", "init-model", "init.yaml", "run_dir=open",
        cwd=job,
    )  # fmt: skip
    assert done.returncode == 2
    assert "/run/post-training/credentials/hf-token: others can read this token" in done.stderr
    assert not (job / "open").exists()


def test_doctor_in_the_image_finds_nothing_wrong(personal_edf, tokens, post_training):
    done = post_training("edf", "run", personal_edf, "--", "entrypoint", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "verified by runner",
        "every package is the locked one (linux/amd64)",
        "profile none of the site laptop",
        "hf-token: /run/post-training/credentials/hf-token, readable by its owner alone",
        "torch 2.13.0+cpu, CPU",
        "nothing is wrong",
    ):
        assert text in done.stdout
    assert not [secret for secret in tokens.values() if secret in done.stdout + done.stderr]


def test_doctor_in_the_image_names_what_is_wrong(inside):
    done = inside(
        "env", "NCCL_SOCKET_IFNAME=hsn", "POST_TRAINING_NETWORK_PROFILE=alps-cscs",
        f"POST_TRAINING_IMAGE_INPUT_HASH={'0' * 64}", "entrypoint", "doctor",
    )  # fmt: skip
    assert done.returncode == 1
    for text in ("WRONG  image", "must be ^LL128 on Alps", "NCCL_SOCKET_IFNAME names hsn"):
        assert text in done.stdout
    assert "Traceback" not in done.stderr
