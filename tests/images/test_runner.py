"""`post-training edf run` on the built image, as root and as an ordinary user."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from post_training.images.edf import load_edf
from post_training.images.render import edf_text

pytestmark = pytest.mark.image
ORDINARY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=-all"]


@pytest.fixture
def edf(image_edf, tmp_path):
    """Write an EDF with the image and other keys: edf(env={...}, mounts=[...])."""
    image = load_edf(image_edf, os.environ, tmp_path).image

    def write(env=None, name="test.toml", **keys) -> Path:
        path = tmp_path / name
        path.write_text(edf_text({"image": image, **keys}, {"env": env or {}}))
        return path

    return write


def test_run_keeps_exit_code_and_arguments(edf, post_training):
    script = 'printf "[%s]" "$@"; exit 7'
    done = post_training(
        "edf", "run", edf(), "--", "sh", "-c", script, "x", "a b", "$HOME", "--", "-x"
    )
    assert (done.returncode, done.stdout) == (7, "[a b][$HOME][--][-x]")


def test_run_signals_reach_the_command_itself(edf, cli, tmp_path):
    script = 'trap "echo got; exit 3" TERM; echo $$; while :; do sleep 0.01; done'
    command = [cli, "edf", "run", edf(), "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert int(process.stdout.readline()) == process.pid
        process.terminate()
        assert process.stdout.read() == "got\n"
    assert process.returncode == 3


def test_run_command_is_ended_by_a_closed_pipe_as_without_a_container(edf, post_training):
    done = post_training("edf", "run", edf(), "--", "sh", "-c", "grep SigIgn /proc/self/status")
    ignored = int(done.stdout.split()[1], 16)  # of a job in the background, SIGINT too
    assert not ignored & 1 << (signal.SIGPIPE - 1)


def test_run_environment_precedence_is_edf_image_host(edf, post_training):
    path = edf(env={"LANG": "edf", "GREETING": "hello ${WHO}"})
    script = 'echo "$LANG|$VIRTUAL_ENV|$GREETING|$ONLY_HOST"'
    done = post_training(
        "edf", "run", path, "--", "sh", "-c", script,
        LANG="host", VIRTUAL_ENV="host", WHO="you", ONLY_HOST="host",
    )  # fmt: skip
    assert done.stdout == "edf|/opt/post-training/venv|hello you|host\n"


def test_run_writable_is_thrown_away(edf, post_training):
    path = edf(writable=True)
    assert post_training("edf", "run", path, "--", "touch", "/etc/here").returncode == 0
    assert post_training("edf", "run", path, "--", "test", "-e", "/etc/here").returncode == 1


def test_run_mounts_have_their_flags_and_order(edf, post_training, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("content")
    path = edf(
        writable=False,
        workdir="/new/place",
        mounts=["data:/new/place:ro", "data/file:/var/run/other", "${HOST}:/rw"],
    )
    script = "cat file /run/other; touch file; touch /rw/made; pwd"
    done = post_training("edf", "run", path, "--", "sh", "-c", script, HOST=str(tmp_path / "data"))
    assert done.stdout == "contentcontent/new/place\n"
    assert "Read-only" in done.stderr
    assert (tmp_path / "data/made").exists()


def test_run_squashfs_mount_shows_its_content(edf, post_training, tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/inside.txt").write_text("packed")
    subprocess.run(
        ["mksquashfs", "tree", "tree.sqsh", "-quiet", "-no-progress"], cwd=tmp_path, check=True
    )
    path = edf(mounts=["tree.sqsh:/packed:sqsh"])
    assert post_training("edf", "run", path, "--", "cat", "/packed/inside.txt").stdout == "packed"


def test_run_leaves_no_mount_or_loop_device_behind(edf, image_edf, cli, tmp_path):
    # By a name of its own: other tests run the image at the same time.
    image, own = load_edf(image_edf, os.environ, tmp_path).image, tmp_path / "own.sqsh"
    os.link(image, own)
    path = edf()
    path.write_text(path.read_text().replace(image, str(own)))

    def loops() -> str:
        return subprocess.run(["losetup", "--list"], capture_output=True, text=True).stdout

    before = Path("/proc/self/mountinfo").read_text()
    command = [cli, "edf", "run", path, "--", "sh", "-c", "echo up; read end"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == "up\n"
        assert str(own) in loops()
        process.communicate("\n")
    assert process.returncode == 0
    assert str(own) not in loops()
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.parametrize("writable", [True, False])
def test_run_as_ordinary_user_has_name_tmp_and_read_only_root(
    edf, image_edf, cli, tmp_path, writable
):
    # The store is below root's home here; an ordinary user is given the image by a descriptor's
    # path no more than by name, so it is linked to a place that everybody can read.
    image = Path(load_edf(image_edf, os.environ, tmp_path).image)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.link(image, tmp_path / "image.sqsh")
    path = edf(writable=writable, workdir="/tmp")
    path.write_text(path.read_text().replace(str(image), str(tmp_path / "image.sqsh")))
    script = (
        "id -u; touch /tmp/x && echo tmp; touch /etc/x 2>/dev/null && echo root; "
        "python -c 'import getpass, torch; print(getpass.getuser(), torch.ones(2).sum().item())'"
    )
    done = subprocess.run(
        [*ORDINARY, cli, "edf", "run", path, "--", "sh", "-c", script],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )
    assert done.stderr == ""
    expected = ["12345", "tmp", *(["root"] if writable else []), "user 2.0"]
    assert done.stdout.splitlines() == expected


def test_run_other_bytes_than_pinned_are_refused(edf, post_training):
    path = edf(env={"POST_TRAINING_IMAGE_SQSH_SHA256": "0" * 64})
    done = post_training("edf", "run", path, "--", "echo", "ran")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"the EDF pins {'0' * 64}" in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('image = "/x.sqsh"\nimgae = 1\n', "imgae: unknown key, did you mean 'image'?"),
        ('image = "/x.sqsh"\nworkdir = "${NO_SUCH}"\n', "workdir: undefined variable NO_SUCH"),
        ('image = "/x.sqsh"\nmounts = ["/no:/a"]\n', "mounts[0]: source does not exist: /no"),
        ('image = "/x.sqsh"\n', "/x.sqsh: no such"),
        ('image = "nvcr.io#nvidia/x:1"\n', "image: must be a squashfs file here"),
        ("image = 1\n", "image: must be a string (got 1)"),
    ],
)
def test_run_bad_edf_is_one_clear_line(post_training, tmp_path, text, line):
    (tmp_path / "bad.toml").write_text(text)
    done = post_training("edf", "run", "bad.toml", "--", "echo", "ran")
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_run_file_that_is_no_squashfs_is_refused(post_training, tmp_path):
    (tmp_path / "x.sqsh").write_bytes(b"not a squashfs" * 1000)
    (tmp_path / "bad.toml").write_text(f'image = "{tmp_path}/x.sqsh"\n')
    done = post_training("edf", "run", "bad.toml", "--", "true")
    assert done.returncode == 1
    assert f"error: {tmp_path}/x.sqsh: cannot mount it" in done.stderr
    assert (
        subprocess.run(["losetup", "-j", f"{tmp_path}/x.sqsh"], capture_output=True).stdout == b""
    )


def test_run_entrypoint_of_an_image_without_one_is_refused(edf, post_training):
    done = post_training("edf", "run", edf(entrypoint=True), "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert "entrypoint: the image has none" in done.stderr


def test_run_entrypoint_of_the_image_runs_first(edf, post_training, tmp_path):
    """An image as enroot imports it: /etc/rc, here mounted into ours."""
    (tmp_path / "rc").write_text('echo "first $1"; exec "$@"\n')
    path = edf(entrypoint=True, mounts=["rc:/etc/rc:ro"])
    done = post_training("edf", "run", path, "--", "echo", "then")
    assert done.stdout == "first echo\nthen\n"


def test_run_hooks_and_devices_are_said_to_be_ignored(edf, post_training):
    path = edf(devices=["nvidia.com/gpu=all"])
    path.write_text(
        path.read_text() + '[annotations.com.hooks]\ncxi.enabled = "true"\nssh.enabled = "false"\n'
    )
    done = post_training("edf", "run", path, "--", "true")
    assert done.stderr == (
        f"warning: {path}: ignored here: com.hooks.cxi.enabled, device nvidia.com/gpu=all\n"
    )
    assert post_training("edf", "run", path, "--", "true", SLURM_PROCID="1").stderr == ""


def test_run_missing_command_and_workdir_are_named(edf, post_training):
    done = post_training("edf", "run", edf(), "--", "no-such-command")
    assert (done.returncode, done.stderr) == (
        127, "error: no-such-command: cannot run it: no such file or directory\n",
    )  # fmt: skip
    done = post_training("edf", "run", edf(workdir="/no/where"), "--", "true")
    assert "workdir: no such file or directory inside the image (got '/no/where')" in done.stderr


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        ("empty:/run", "/run/post-training is the runner's own"),
        ("empty:/run/post-training", "/run/post-training is the runner's own"),
        ("empty:/dev/new", "/dev/new does not exist in what is mounted at /dev"),
        ("empty:/data/new", "/data/new does not exist in what is mounted at /data"),
    ],
)
def test_run_mount_that_would_write_to_the_host_is_refused(
    edf, post_training, tmp_path, mount, message
):
    (tmp_path / "empty").mkdir()
    done = post_training("edf", "run", edf(mounts=["empty:/data", mount]), "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not list((tmp_path / "empty").iterdir())


def test_run_folder_mounted_on_etc_stays_as_it_was(edf, post_training, tmp_path):
    (tmp_path / "empty").mkdir()
    done = post_training("edf", "run", edf(mounts=["empty:/etc"]), "--", "ls", "-A", "/etc")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not list((tmp_path / "empty").iterdir())


def test_run_localhost_and_the_hosts_resolver_are_there(edf, post_training):
    script = "getent hosts localhost >/dev/null && cat /etc/resolv.conf"
    done = post_training("edf", "run", edf(writable=False), "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == Path("/etc/resolv.conf").read_text()


def test_run_empty_value_unsets_the_hosts_and_the_images_variable(edf, post_training):
    path = edf(env={"HOST_LEFTOVER": "", "VIRTUAL_ENV": "", "KEPT": "x"})
    done = post_training("edf", "run", path, "--", "env", HOST_LEFTOVER="1", ALSO_KEPT="")
    names = {line.split("=")[0] for line in done.stdout.splitlines()}
    assert not names & {"HOST_LEFTOVER", "VIRTUAL_ENV"}
    assert {"KEPT", "ALSO_KEPT"} <= names


def test_run_path_goes_on_from_the_images(edf, post_training):
    path = edf(env={"PATH": "${PATH}:/custom/bin"})
    done = post_training("edf", "run", path, "--", "sh", "-c", "echo $PATH; command -v entrypoint")
    found, entrypoint = done.stdout.splitlines()
    assert found.startswith("/opt/post-training/bin:")
    assert found.endswith(":/custom/bin")
    assert entrypoint == "/opt/post-training/bin/entrypoint"


def test_run_what_the_host_leaves_behind_breaks_nothing(edf, post_training):
    script = (
        'mktemp; echo "<$XDG_RUNTIME_DIR$LC_ALL$PYTHONUSERBASE>"; python3 -c "import tempfile, ssl;'
        ' print(tempfile.gettempdir()); ssl.create_default_context()"'
    )
    done = post_training(
        "edf", "run", edf(), "--", "sh", "-c", script,
        TMPDIR="host-only", XDG_RUNTIME_DIR="/run/user/4711", SSL_CERT_FILE="/etc/host-only.pem",
        LC_ALL="de_CH.UTF-8", PYTHONUSERBASE="/opt/host", LD_LIBRARY_PATH="/opt/host/lib",
    )  # fmt: skip
    made, empty, temporary = done.stdout.splitlines()
    assert made.startswith("/tmp/")
    assert (empty, temporary) == ("<>", "/tmp")
    assert done.stderr == (
        "warning: variables of the shell that do not reach the image: LD_LIBRARY_PATH, "
        "PYTHONUSERBASE (an EDF's [env] can set them)\n"
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [("pipe", "this is a pipe"), (".", "this is a folder"), ("zero", "this is a device")],
)
def test_run_image_that_is_no_file_is_refused_at_once(post_training, tmp_path, image, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "x.toml").write_text(f'image = "{tmp_path}/{image}"\n')
    done = post_training("edf", "run", "x.toml", "--", "true")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {Path(tmp_path, image)}: an image must be a file")
    assert message in done.stderr


def test_run_digest_that_is_not_the_images_own_is_refused(image_edf, post_training, tmp_path):
    claim = f'[env]\nPOST_TRAINING_IMAGE_OCI_DIGEST = "sha256:{"a" * 64}"\n'
    (tmp_path / "x.toml").write_text(f'base_environment = "{image_edf}"\n{claim}')
    done = post_training("edf", "run", "./x.toml", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"POST_TRAINING_IMAGE_OCI_DIGEST claims sha256:{'a' * 64}" in done.stderr


@pytest.mark.parametrize(
    ("changes", "altered"),
    [
        ({"oci_digest": "sha256:" + "0" * 64}, "oci_digest, seal"),
        ({"input_hash": "1" * 64}, "input_hash, seal"),
        ({"checkout": {"commit": "deadbeef", "dirty": False}}, "seal"),
    ],
)
def test_run_altered_record_of_the_store_is_refused(
    image_edf, post_training, tmp_path, changes, altered
):
    image = Path(load_edf(image_edf, os.environ, tmp_path).image)
    (tmp_path / image.name).symlink_to(image)
    record = {**json.loads(image.with_suffix(".json").read_text()), **changes}
    (tmp_path / image.with_suffix(".json").name).write_text(json.dumps(record))
    path = tmp_path / "x.toml"
    path.write_text(image_edf.read_text().replace(f"{image.parent}/", f"{tmp_path}/"))
    done = post_training("edf", "run", path, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"is not that of this image: {altered}\n" in done.stderr
