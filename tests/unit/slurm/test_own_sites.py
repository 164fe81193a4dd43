"""Sites of the user's own: made like another, checked, and taken by every command as a site is."""

import json
import subprocess
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.images.render import render_edf, site_file
from post_training.images.store import ImageStore
from post_training.slurm.own_sites import EXAMPLES, check_site_files, new_site
from post_training.slurm.script import Container, Job, sbatch_script
from post_training.slurm.singularity import render_script
from post_training.slurm.site import SITES_DIR, load_site

REPOSITORY = Path(__file__).parents[3]
EVERY = sorted(path.stem for path in SITES_DIR.glob("*.yaml"))
EXAMPLE_NAMES = sorted(path.parent.name for path in (REPOSITORY / EXAMPLES).glob("*/site.yaml"))
RECORD = {
    "name": "rocm", "version": "1.2.3", "input_hash": "1" * 64, "oci_digest": "sha256:" + "2" * 64,
    "sqsh_sha256": "3" * 64, "sif_sha256": "6" * 64,
}  # fmt: skip
# A user of every site at once.
ENV = {
    "USER": "me", "PWD": "/scratch/me", "POST_TRAINING_PROJECT": "p1", "SCRATCH": "/e/scratch/p",
    "PROJECT": "/e/project1/p", "WORK": "/leonardo_work/p",
}  # fmt: skip


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "post-training/sites"


def faults(name: str, **env: str) -> list[str]:
    found = check_site_files(name, REPOSITORY, {**ENV, **env})
    return [finding.text for finding in found if finding.status == "wrong"]


@pytest.mark.parametrize("like", EVERY + EXAMPLE_NAMES)
def test_new_site_like_any_other_is_right_and_named_for_itself(like, config):
    folder = new_site("mine", like, REPOSITORY)
    assert folder == config / "mine"
    own = {"leonardo": {"SCRATCH": "/leonardo_scratch/me"}, "laptop": {"PWD": "/tmp"}}
    assert faults("mine", **own.get(like, {})) == []
    if like in EVERY:
        assert load_site("mine", {}) == load_site(like, {})
    text = render_edf(site_file("mine", REPOSITORY), RECORD, ImageStore(Path("/store")))
    assert 'POST_TRAINING_SITE = "mine"' in text
    assert text.startswith("# rocm 1.2.3 for the site 'mine'.\n")
    assert str(folder / "edf.toml") in text.splitlines()[1]


@pytest.mark.parametrize("like", EXAMPLE_NAMES)
def test_new_site_of_an_example_runs_its_program_with_the_mounts(like, tmp_path):
    new_site("mine", like, REPOSITORY)
    site = load_site("mine", {"nodes": 2, "account": "a1"})
    container = Container(Path("/image.sif"), {"A": "b"}, ("/data:/data",))
    script = sbatch_script(Job("sft", Path("/runs/one"), Path("/runs"), 3, container), site)
    command = site.launcher.command
    assert f"    {command}\n    exec\n    --nv\n    --bind=/data\n" in script
    assert f"export {command.upper()}ENV_A=b\n" in script
    assert "\nmodule purge\n" in script
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["shellcheck", tmp_path / "job.sh"], check=True)
    launcher, edf = site.launcher, site_file("mine", REPOSITORY)
    started = render_script("mine", launcher, edf, RECORD, ImageStore(Path("/store")))
    assert f"export {command.upper()}ENV_POST_TRAINING_SITE=mine\n" in started


def test_new_site_like_ones_own_and_what_it_extends(config):
    new_site("first", "clariden-extended-images", REPOSITORY)
    yaml = config / "first/clariden.yaml"
    yaml.write_text(yaml.read_text().replace("cpus_per_task: 72", "cpus_per_task: 64"))
    new_site("second", "first", REPOSITORY)
    assert load_site("second", {}).scheduler.cpus_per_task == 64
    assert load_site("second", {}).launcher.srun == ("--mpi=pmix", "--network=disable_rdzv_get")


@pytest.mark.parametrize(
    ("name", "like", "told"),
    [
        ("My site", "lumi", "small letters, digits and hyphens (got 'My site')"),
        ("../up", "lumi", "small letters"),
        ("lumi", "lumi", "the project has a site 'lumi'"),
        ("mine", "mars", "--like: no site 'mars'"),
        ("there", "lumi", "this site is there already"),
    ],
)
def test_new_site_that_cannot_be_is_refused_and_nothing_is_written(name, like, told, config):
    new_site("there", "lumi", REPOSITORY)
    before = sorted(config.rglob("*"))
    with pytest.raises(UsageError) as error:
        new_site(name, like, REPOSITORY)
    assert told in str(error.value)
    assert sorted(config.rglob("*")) == before


def test_load_site_that_the_project_has_too_is_refused(config):
    new_site("mine", "lumi", REPOSITORY)
    (config / "mine").rename(config / "clariden")
    with pytest.raises(UsageError, match="two sites are called 'clariden'"):
        load_site("clariden", {})


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("site.yaml", "cpus_per_task: 8", "cpus_per_task: 0", "cpus_per_task: must be"),
        ("site.yaml", "kind: singularity", "kind: edf", "only with kind singularity"),
        (
            "site.yaml",
            "/scratch/${USER}",
            "/lustre/${USER}",
            "/lustre/me: the scratch folder is not",
        ),
        ("edf.toml", '"mine"', '"other"', "POST_TRAINING_SITE: must be 'mine' (got 'other')"),
        ("edf.toml", "writable = false", "", "writable: must be false"),
        ("edf.toml", "entrypoint = false", "", "entrypoint: not written"),
        ("edf.toml", "workdir", "workdirs", "workdirs: unknown key, did you mean 'workdir'?"),
        ("edf.toml", '/scratch"', '/scratch:sqsh"', "no flag 'sqsh' for a bind"),
        (
            "edf.toml",
            "writable = false",
            'writable = false\ndevices = ["x=all"]',
            "would be ignored",
        ),
        ("edf.toml", "[env]", '[env]\nHF_TOKEN = "hf_' + "a" * 34 + '"', "holds a secret"),
        ("edf.toml", '_PROFILE = "none"', '_PROFILE = ""', "NETWORK_PROFILE: missing"),
    ],
)
def test_check_site_files_says_each_fault(config, file, old, new, told):
    path = new_site("mine", "apptainer", REPOSITORY) / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    found = faults("mine")
    assert any(told in text for text in found), found


def test_site_commands_print_the_folder_the_faults_and_the_list(cli, config):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([cli, "site", *words], capture_output=True, text=True, cwd=REPOSITORY)

    made = run("new", "mine", "--like", "apptainer")
    assert (made.returncode, made.stdout) == (0, f"{config}/mine\n")
    edf = config / "mine/edf.toml"
    edf.write_text(edf.read_text().replace('"mine"', '"other"'))
    checked = run("check", "mine")
    assert checked.returncode == 1
    assert "POST_TRAINING_SITE: must be 'mine'" in checked.stdout
    listed = json.loads(run("list", "--json").stdout)
    origins = {site["name"]: site["origin"] for site in listed}
    assert (origins["mine"], origins["lumi"], origins["jupiter"]) == ("own", "project", "example")
