"""What lets other code than the image's run: mounts and variables, as our runner and others make
them."""

from pathlib import Path

import pytest

from post_training.images.inside import (
    code_variables,
    host_variables,
    is_over_code,
    is_over_files,
    mounts_over_code,
    without_lost_places,
)

LINE = "36 35 98:0 / {} rw,noatime - ext4 /dev/root rw"


@pytest.mark.parametrize(
    ("place", "is_over"),
    [
        ("/usr/lib/python3.11/random.py", True),
        ("/opt/post-training/venv/lib/python3.11/site-packages/new", True),
        ("/opt", True),
        ("/usr", True),
        ("/lib/x86_64-linux-gnu/libm.so.6", True),
        ("/etc/ld.so.preload", True),
        ("/etc", True),
        ("/etc/hosts", False),
        ("/etc/passwd", False),
        ("/opt/cray", False),
        ("/data", False),
        ("/root/work", False),
        ("/", False),
    ],
)
def test_is_over_code_by_place(place, is_over):
    assert is_over_code(Path(place)) is is_over


def test_is_over_files_counts_what_exists_and_not_what_is_empty_or_mounted_already(tmp_path):
    """The files are this machine's: /var/lib has some, whatever it is."""
    assert is_over_files(Path("/var/lib"), [])
    assert not is_over_files(Path("/var/lib/x"), [Path("/var/lib")])
    assert not is_over_files(Path("/no/such/place"), [])
    assert not is_over_files(Path("/mnt"), [])
    assert not is_over_files(tmp_path, [])  # Below /tmp, where data is.


def test_mounts_over_code_leaves_out_the_nodes_drivers():
    places = [
        "/", "/proc", "/etc/hosts", "/usr/lib64/libcxi.so.1", "/opt/cray", "/usr/bin/nvidia-smi",
        "/usr/lib/aarch64-linux-gnu/libcuda.so.570.1", "/usr/lib/firmware/nvidia/570/gsp.bin",
        "/usr/lib/aarch64-linux-gnu/libnvidia-ml.so.1", "/.singularity.d/libs", "/capstor",
    ]  # fmt: skip
    over = ["/usr/lib/python3.11/a\\040name.py", "/lib/x86_64-linux-gnu/libm.so.6", "/usr/bin/env"]
    table = "\n".join(LINE.format(place) for place in [*places, *over])
    assert mounts_over_code(table) == [
        "/lib/x86_64-linux-gnu/libm.so.6", "/usr/bin/env", "/usr/lib/python3.11/a name.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD", "LD_AUDIT", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "BASH_ENV",
        "GLIBC_TUNABLES",
    ],
)  # fmt: skip
def test_code_variables_are_named_with_their_values(name):
    assert code_variables({name: "/x", "HOME": "/root"}, {}) == {name: "/x"}
    assert code_variables({name: ""}, {}) == {}
    assert code_variables({name: "/x"}, {name: "/x"}) == {}  # The image's own.


@pytest.mark.parametrize("name", ["LD_LIBRARY_PATH", "PYTHONPATH"])
def test_code_variables_search_paths_count_for_what_they_add(name, tmp_path):
    own = {name: "/opt/lib"}
    assert code_variables({name: f"/opt/lib:{tmp_path}"}, own) == {name: f"/opt/lib:{tmp_path}"}
    assert code_variables({name: "/opt/lib:/no/such"}, own) == {}
    assert code_variables({name: "/.singularity.d/libs:/opt/lib"}, own) == {}
    assert code_variables({name: str(tmp_path)}, {}, [str(tmp_path)]) == {}
    # An empty word is the working folder.
    assert code_variables({name: "/opt/lib:"}, own) == {name: "/opt/lib:"}


def test_host_variables_do_not_choose_code_or_language_inside():
    variables = {
        "LD_PRELOAD": "/x.so", "PYTHONHOME": "/opt/host", "LC_ALL": "de_CH.UTF-8",
        "LANGUAGE": "de", "USER": "me", "BASH_ENV": "",
    }  # fmt: skip
    assert host_variables(variables) == ({"USER": "me"}, ["LD_PRELOAD", "PYTHONHOME"])


def test_without_lost_places_drops_the_hosts_and_keeps_the_edfs(tmp_path):
    host = {"TMPDIR": "/no/such", "XDG_RUNTIME_DIR": str(tmp_path), "SSL_CERT_FILE": "/no/such"}
    own = {"SSL_CERT_FILE": "/no/such"}
    assert without_lost_places(host, own) == {
        "XDG_RUNTIME_DIR": str(tmp_path), "SSL_CERT_FILE": "/no/such",
    }  # fmt: skip
