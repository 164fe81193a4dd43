"""Site files, and what of them may be changed on the command line."""

from pathlib import Path

import pytest

from post_training.core.errors import ConfigError, UsageError
from post_training.images.render import site_files
from post_training.slurm.site import SITES_DIR, load_site, seconds_of

SITE = """
scheduler: {time: "01:00:00", gpus_per_node: 4, cpus_per_task: 8, signal_s: 600}
launcher: {kind: edf}
cache_dir: /tmp
storage: {scratch: /tmp}
"""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("01:30", 90),
        ("12:00:00", 43200),
        ("1-0", 86400),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
    ],
)
def test_seconds_of_slurms_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3", "-1", "01:00:00:00", "1-"])
def test_seconds_of_another_text_is_refused(text):
    with pytest.raises(ValueError, match="must be MINUTES"):
        seconds_of(text)


def test_load_site_changes_are_over_the_file():
    site = load_site("clariden", {"nodes": 8, "time": "90", "account": "a1", "partition": None})
    scheduler = site.scheduler
    assert (scheduler.nodes, scheduler.time, scheduler.account) == (8, "90", "a1")
    assert scheduler.partition == "normal"
    assert scheduler.num_tasks == 32


def test_load_site_unknown_name_tells_the_known_ones():
    with pytest.raises(UsageError, match="no site 'mars'") as error:
        load_site("mars", {})
    known = ", ".join(sorted(path.stem for path in SITES_DIR.glob("*.yaml")))
    assert error.value.hint.startswith(f"there are: {known}; ")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"time": "10:30"}, "time: must be over 660 s"),
        ({"time": "soon"}, "must be MINUTES"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": 2}, "tasks_per_node: must be 4, a task per GPU, on more than one node (got 1)"),
    ],
)
def test_load_site_impossible_change_is_refused(tmp_path, changes, fault):
    (tmp_path / "here.yaml").write_text(SITE)
    with pytest.raises(ConfigError) as error:
        load_site("here", changes, tmp_path)
    assert fault in str(error.value)


def test_load_site_edf_with_singularitys_options_is_refused(tmp_path):
    (tmp_path / "here.yaml").write_text(SITE.replace("kind: edf", "kind: edf, options: [--rocm]"))
    with pytest.raises(ConfigError, match="options: only with kind singularity"):
        load_site("here", {}, tmp_path)


def own(tmp_path, monkeypatch, text: str) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "post-training").mkdir()
    (tmp_path / "post-training/sites.yaml").write_text(text)


def test_load_site_own_settings_are_over_the_file_and_below_the_command_line(tmp_path, monkeypatch):
    own(tmp_path, monkeypatch, "clariden: {account: a1, partition: debug}\nlumi: {account: p2}\n")
    scheduler = load_site("clariden", {"partition": "large512"}).scheduler
    assert (scheduler.account, scheduler.partition) == ("a1", "large512")
    assert load_site("lumi", {}).scheduler.account == "p2"
    assert load_site("laptop", {}).scheduler.account is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("clariden: {acount: a1}", "acount"),
        ("clariden: a1", "must be SITE: {setting: value"),
        ("- clariden", "must be SITE: {setting: value"),
    ],
)
def test_load_site_own_settings_that_are_wrong_are_refused(tmp_path, monkeypatch, text, fault):
    own(tmp_path, monkeypatch, text)
    with pytest.raises(UsageError) as error:
        load_site("clariden", {})
    assert fault in str(error.value)


def test_stage_of_one_process_a_node_has_the_cores_of_all_its_tasks():
    site = load_site("clariden", {"nodes": 2, "tasks_per_node": 4})
    scheduler = site.for_stage(is_one_a_node=True).scheduler
    assert (scheduler.nodes, scheduler.tasks_per_node, scheduler.gpus_per_node) == (2, 1, 4)
    assert scheduler.cpus_per_task == 4 * site.scheduler.cpus_per_task
    assert site.for_stage(is_one_a_node=False) == site


@pytest.mark.parametrize(
    ("site", "num_ranks", "nodes", "shape"),
    [
        ("clariden", 32, None, (8, 4, 72)),
        ("clariden", 4, None, (1, 4, 72)),
        ("clariden", 32, 8, (8, 4, 72)),
        ("clariden", 2, None, (1, 1, 144)),
        ("clariden", 1, 8, (1, 1, 72)),
        ("lumi", 3, None, (1, 1, 21)),
        ("laptop", 2, None, (1, 1, 1)),
        ("laptop", 2, 2, (2, 1, 1)),
    ],
)
def test_for_ranks_nodes_are_full_or_one_task_starts_them(site, num_ranks, nodes, shape):
    scheduler = load_site(site, {}).scheduler.for_ranks(num_ranks, nodes)
    assert (scheduler.nodes, scheduler.tasks_per_node, scheduler.cpus_per_task) == shape


@pytest.mark.parametrize(
    ("num_ranks", "nodes", "told"),
    [(6, None, "6 ranks do not fill 1 nodes of 4 tasks"), (32, 4, "32 ranks do not fill 4 nodes")],
)
def test_for_ranks_that_do_not_fill_the_nodes_are_refused(num_ranks, nodes, told):
    with pytest.raises(UsageError, match=told):
        load_site("clariden", {}).scheduler.for_ranks(num_ranks, nodes)


def test_site_files_name_nobodys_account_user_or_nodes():
    for path in (*SITES_DIR.glob("*.yaml"), *site_files(Path(__file__).parents[3])):
        words = path.read_text()
        for word in ("account:", "reservation:", "nodelist", "/users/", "/home/"):
            assert word not in words, path


def test_every_site_has_both_its_files():
    sites = {path.stem for path in site_files(Path(__file__).parents[3])}
    assert {path.stem for path in SITES_DIR.glob("*.yaml")} == sites
