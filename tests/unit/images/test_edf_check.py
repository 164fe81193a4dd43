"""Every fault of an EDF at once: of its form, its secrets, its network, its image."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_text
from post_training.images.edf import merge_edf
from post_training.images.edf_check import check_edf, network_faults, secret_faults
from post_training.images.identity import seal
from post_training.images.render import render_edf, site_files
from post_training.images.store import ImageStore

REPOSITORY = Path(__file__).parents[3]
SITES = site_files(REPOSITORY)
IMAGE = "the bytes of an image"
DIGEST = sha256_text(IMAGE)
RECORD = {
    "name": "cpu", "version": "1.2.3", "platform": "linux/amd64", "input_hash": "1" * 64,
    "oci_digest": "sha256:" + "2" * 64, "sqsh_sha256": DIGEST,
}  # fmt: skip


@pytest.fixture
def rendered(tmp_path, monkeypatch) -> Path:
    """An EDF rendered from the laptop's file for an image in a store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = ImageStore(tmp_path / "store")
    store.folder.mkdir()
    store.image_path(DIGEST).write_text(IMAGE)
    store.record_path(DIGEST).write_text(json.dumps(RECORD))
    path = tmp_path / "x.toml"
    path.write_text(render_edf(REPOSITORY / "edf/laptop.toml", RECORD, store))
    return path


def check(path: Path, releases=(), **env: str) -> list[str]:
    found = check_edf(path, {"PWD": str(path.parent), **env}, path.parent, releases)
    return [line.removeprefix(f"{path}: ") for line in found]


def test_check_rendered_edf_has_no_fault(rendered):
    assert check(rendered) == []


def test_check_tells_every_fault_at_once(rendered):
    text = rendered.read_text().replace("entrypoint = false\n", 'wrkdir = "/x"\n')
    text = text.replace("mounts = [", 'mounts = ["/gone:/gone", "/usr", "${NOT_SET}:/x", "a:b:c", ')
    text += 'HF_TOKEN = "hf_planted0planted0planted"\n'
    text = text.replace(f'SQSH_SHA256 = "{DIGEST}"', f'SQSH_SHA256 = "{"0" * 64}"')
    rendered.write_text(text)
    faults = check(rendered)
    for start in (
        "wrkdir: unknown key, did you mean 'workdir'?",
        "mounts[2]: undefined variable NOT_SET",
        "mounts[0]: source does not exist: /gone",
        "mounts[3]: ",
        "env.HF_TOKEN: holds a secret",
        f"image: its sha256 is {DIGEST}, pinned is {'0' * 64}",
    ):
        assert [line for line in faults if line.startswith(start)], (start, faults)
    assert "planted" not in "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "host"),
    [("${LD_LIBRARY_PATH:-}:/x", "/y"), ("${LD_LIBRARY_PATH}:/x", ""), ("/x::/y", ""), ("/x:", "")],
)
def test_check_part_of_a_search_path_that_means_the_working_directory_is_told(rendered, text, host):
    rendered.write_text(rendered.read_text() + f"LD_LIBRARY_PATH = '{text}'\n")
    [fault] = check(rendered, LD_LIBRARY_PATH=host)
    assert fault.startswith("env.LD_LIBRARY_PATH: has an empty part, which means the working dir")


def test_check_search_path_with_a_default_has_no_fault(rendered):
    added = 'LD_LIBRARY_PATH = "${LD_LIBRARY_PATH:-/x}:/x"\nPYTHONPATH = ""\n'
    rendered.write_text(rendered.read_text() + added)
    assert not [each for each in check(rendered) if "empty part" in each]


def test_check_bare_mount_and_unwritten_entrypoint_are_told(rendered):
    text = rendered.read_text().replace("entrypoint = false\n", "")
    rendered.write_text(text.replace("mounts = [", 'mounts = ["/usr", '))
    assert check(rendered) == [
        "mounts[0]: '/usr': the engine's successor refuses a bare path: write /usr:/usr",
        "entrypoint: not written: its default differs between the engines",
    ]


def test_check_image_without_pins_or_with_another_record_is_told(rendered, tmp_path):
    text = rendered.read_text()
    rendered.write_text(text.replace("2" * 64, "9" * 64))
    assert check(rendered) == [
        f"env.POST_TRAINING_IMAGE_OCI_DIGEST: is sha256:{'9' * 64}, the image's record has "
        f"sha256:{'2' * 64}"
    ]
    lines = [line for line in text.splitlines() if "IMAGE_INPUT_HASH" not in line]
    rendered.write_text("\n".join(lines))
    assert check(rendered)[0] == "env.POST_TRAINING_IMAGE_INPUT_HASH: missing"


def test_check_image_that_is_not_the_released_one_is_told(rendered):
    assert check(rendered, [RECORD]) == []
    other = {**RECORD, "oci_digest": "sha256:" + "7" * 64}
    [fault] = check(rendered, [{**other, "version": "1.2.2"}, other])
    assert f"cpu 1.2.3 is released as sha256:{'7' * 64}" in fault


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": "x"}'])
def test_check_damaged_record_of_the_image_is_one_line(rendered, tmp_path, text):
    record = tmp_path / f"store/sha256-{DIGEST}.json"
    record.write_text(text)
    [fault] = check(rendered)
    assert fault.startswith(f"image: {record}: no")


def test_check_record_that_was_edited_is_told(rendered, tmp_path):
    sealed = {**RECORD, "seal": seal(RECORD)}
    (tmp_path / f"store/sha256-{DIGEST}.json").write_text(json.dumps(sealed))
    assert check(rendered) == []
    edited = {**sealed, "checkout": {"commit": "deadbeef"}}
    (tmp_path / f"store/sha256-{DIGEST}.json").write_text(json.dumps(edited))
    assert check(rendered) == ["image: its record in the store was changed after the push"]


def test_check_image_that_is_a_pipe_is_told_at_once(rendered, tmp_path):
    image = tmp_path / f"store/sha256-{DIGEST}.sqsh"
    image.unlink()
    os.mkfifo(image)
    assert check(rendered) == [f"image: an image must be a file, and this is a pipe: {image}"]


def test_check_missing_image_and_broken_toml_are_one_line_each(rendered, tmp_path):
    (tmp_path / f"store/sha256-{DIGEST}.sqsh").unlink()
    assert [line for line in check(rendered) if line.startswith("image: no such image")]
    rendered.write_text("image = [")
    [fault] = check(rendered)
    assert "not valid TOML" in fault


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "anything"),
        ("WANDB_API_KEY", "0" * 40),
        ("MY_PASSWORD", "opensesame"),
        ("HARMLESS", "hf_" + "abcdefghijklm" * 2),
        ("PIP_INDEX_URL", "https://me:" + "word@index.example/simple"),
    ],
)
def test_secrets_in_env_are_named_and_not_shown(name, value):
    [line] = secret_faults({name: value, "LANG": "C"})
    assert line.startswith(f"env.{name}: holds a secret")
    assert value not in line.replace(name, "")


def test_secrets_paths_words_and_settings_are_none():
    harmless = {
        "EXPERIMENT": "/scratch/runs/math-task-apertus-8b-instruct-v2-final",
        "DATA": "disk-image-of-the-second-filesystem", "PROXY": "http://proxy.example.org:3128",
        "VLLM_MAX_NUM_BATCHED_TOKENS": "8192", "MAX_NEW_TOKENS": "512", "PAD_TOKEN": "<pad>",
        "EOS_TOKEN": "endoftext", "SECRET_FILE": "here",
        "HF_TOKEN_PATH": "/run/x", "WANDB_API_KEY_FILE": "/run/y", "HF_TOKEN": "",
        "TOKENIZERS_PARALLELISM": "false", "POST_TRAINING_IMAGE_SQSH_SHA256": "3" * 64,
    }  # fmt: skip
    assert secret_faults(harmless) == []


@pytest.mark.parametrize(
    ("variables", "is_fault"),
    [
        ({"NCCL_PROTO": "^LL128"}, False),
        ({"NCCL_PROTO": "Simple"}, False),
        ({}, True),
        ({"NCCL_PROTO": ""}, True),
        ({"NCCL_PROTO": "LL,LL128,Simple"}, True),
        ({"NCCL_PROTO": "^LL"}, True),
        ({"POST_TRAINING_ALLOW_LL128": "1"}, False),
    ],
)
def test_network_ll128_on_alps_is_a_fault_unless_lifted(variables, is_fault):
    alps = {"POST_TRAINING_NETWORK_PROFILE": "alps-cscs", **variables}
    assert bool(network_faults(alps)) is is_fault
    assert network_faults({"POST_TRAINING_NETWORK_PROFILE": "lumi-shs-ccl", **variables}) == []


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_site_file_has_no_fault_of_its_own(path):
    merged = merge_edf(path, {}, path.parent)
    assert network_faults(merged["env"]) == []
    assert secret_faults(merged["env"]) == []
    assert merged["env"]["POST_TRAINING_SITE"] == path.stem
    assert "entrypoint" in merged
    assert merged["writable"] is False
    assert all(":" in mount for mount in merged["mounts"])


def test_check_command_tells_faults_and_exits_2(rendered, cli, tmp_path):
    done = subprocess.run([cli, "edf", "check", rendered], cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"ok: {rendered}\n"), done.stderr
    rendered.write_text(rendered.read_text() + 'HF_TOKEN = "x"\nWANDB_API_KEY = "y"\n')
    done = subprocess.run([cli, "edf", "check", rendered], cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 2
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "error"]


def test_check_as_json_has_every_fault_and_the_same_exit_code(rendered, post_training):
    done = post_training("edf", "check", rendered, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"path": str(rendered), "faults": []}
    rendered.write_text(rendered.read_text() + 'HF_TOKEN = "x"\n')
    done = post_training("edf", "check", rendered, "--json")
    assert (done.returncode, done.stderr) == (2, "")
    [fault] = json.loads(done.stdout)["faults"]
    assert fault.startswith(f"{rendered}: env.HF_TOKEN: holds a secret")


REFERENCE = "ghcr.io/me/post-training@sha256:" + "7" * 64
SARUS = {**RECORD, "registries": {REFERENCE.partition("@")[0]: "sha256:" + "7" * 64}}


@pytest.fixture
def in_registry(tmp_path, monkeypatch) -> Path:
    """An EDF rendered from clariden-sarus' file for an image in a registry; mounts are of here."""
    store = ImageStore(tmp_path / "store")
    store.folder.mkdir()
    record = {**SARUS, "seal": seal(SARUS)}
    store.record_path(DIGEST).write_text(json.dumps(record))
    path = tmp_path / "x.toml"
    text = render_edf(REPOSITORY / "edf/clariden-sarus.toml", record, store, REFERENCE)
    path.write_text(text.replace("/capstor", "/usr").replace("/iopsstor", "/etc"))
    monkeypatch.setenv("USER", "me")
    return path


def check_in(path: Path, dialect: str | None) -> list[str]:
    env = {"PWD": str(path.parent), "USER": "me"}
    found = check_edf(path, env, path.parent, [], dialect=dialect)
    return [line.removeprefix(f"{path}: ") for line in found]


def test_check_edf_of_an_image_in_a_registry_suits_sarus_and_not_ce(in_registry):
    assert check_in(in_registry, None) == check_in(in_registry, "sarus") == []
    assert check_in(in_registry, "ce") == [
        "devices: the Container Engine has no such key; its hooks bring devices"
    ]


def test_check_edf_of_a_file_is_refused_for_sarus(rendered):
    [fault] = check_in(rendered, "sarus")
    assert fault.startswith("image: Sarus takes REGISTRY/NAME@sha256:… alone, no file and no vari")


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("@sha256:" + "7" * 64, ":latest", "image: Sarus takes REGISTRY/NAME@sha256:… alone"),
        ("ghcr.io/me", "localhost:5000/me", "image: localhost:5000 is another machine on each"),
        ('"/usr:/usr"', '"/usr:/usr:ro+private"', "mounts[0]: '/usr:/usr:ro+private': flags are j"),
        ('"/usr:/usr"', '"/etc/hosts:/usr:sqsh"', "mounts[0]: '/etc/hosts:/usr:sqsh': Sarus mount"),
        ('"/usr:/usr"', '"/usr"', "mounts[0]: '/usr': the engine's successor refuses a bare path"),
        ('"/usr:/usr"', '"usr:/usr:ro"', "mounts[0]: 'usr:/usr:ro': its source must begin with /"),
        ('"com.hooks.cxi.enabled" = "true"\n', "", "annotations: com.hooks.aws_ofi_nccl.enabled d"),
        ("[annotations]\n", '[annotations]\n"com.hooks.ssh.enabled" = "true"\n',
         "annotations: com.hooks.ssh.enabled: Sarus has no such hook"),
        ("[annotations]\n", '[annotations]\n"com.hooks.aws_ofi_nccl.variant" = "cuda13"\n',
         "annotations: com.hooks.aws_ofi_nccl.variant: Sarus ignores it"),
        ("[env]\n", '[env]\nPATH = "${PATH}:/more"\n', "env: PATH: what the image has there"),
        ('RECORD = "', 'RECORD = "/gone', None),
        ("7" * 64, "8" * 64, "image: is sha256:" + "8" * 64 + ", the image's record has sha256:77"),
        ("INPUT_HASH = \"1", "INPUT_HASH = \"2", "env.POST_TRAINING_IMAGE_INPUT_HASH: is 21"),
    ],
)  # fmt: skip
def test_check_what_sarus_refuses_ignores_or_takes_otherwise(in_registry, before, after, fault):
    text = in_registry.read_text()
    assert before in text
    in_registry.write_text(text.replace(before, after))
    faults = check_in(in_registry, "sarus")
    if fault is None:
        assert faults == []
    else:
        assert [line for line in faults if line.startswith(fault)], faults


def test_check_flags_joined_by_commas_are_told_for_ce(rendered):
    text = rendered.read_text().replace("mounts = [", 'mounts = ["/usr:/x:ro,private", ')
    rendered.write_text(text)
    assert check_in(rendered, "ce") == [
        "mounts[0]: '/usr:/x:ro,private': flags are joined by + in the Container Engine"
    ]
    assert check_in(rendered, None) == []


def test_edf_check_unknown_dialect_is_one_clear_line(rendered, post_training):
    done = post_training("edf", "check", rendered, "--dialect", "docker")
    assert done.returncode == 2
    assert done.stderr == "error: --dialect: must be one of ce, sarus (got 'docker')\n"
