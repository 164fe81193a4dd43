import subprocess
from pathlib import Path

import pytest

from post_training.core.errors import ConfigError, UsageError
from post_training.images.edf import examine_edf, expand, find_edf, load_edf, merge_edf, parse_mount

ENV = {"HOME": "/home/u", "WHO": "world", "EMPTY": ""}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(path: Path, env=ENV):
    return load_edf(path, env, path.parent)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello ${WHO}", "hello world"),
        ("$${WHO}", "${WHO}"),
        ("$$WHO", "$WHO"),
        ("$5 and $$5, $", "$5 and $$5, $"),
        ("${NOT_SET:-}", ""),
        ("${NOT_SET:-a b}", "a b"),
        ("${EMPTY:-x}", "x"),
        ("${EMPTY}", ""),
        ("${WHO}${WHO}", "worldworld"),
    ],
)
def test_expand_variable_forms_as_documented(text, expected):
    assert expand(text, ENV) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${NOT_SET}", "undefined variable NOT_SET"),
        ("$(id)", r"'\$\(' is not allowed"),
        ("`id`", "'`' is not allowed"),
        ("a;b", "';' is not allowed"),
        ('a"b', "'\"' is not allowed"),
        ("${1x}", "cannot expand"),
        ("/tmp/$WHO/", r"'\$WHO' is not expanded by every engine: write \$\{WHO\}"),
        ("${NOT_SET:-${WHO}}", r"a default can't hold a variable \(got '\$\{NOT_SET:-\$\{WHO\}'\)"),
        ("a\0b", "holds a NUL character"),
    ],
)
def test_expand_what_cannot_be_expanded_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        expand(text, ENV)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a:/b", "/a:/b"),
        ("/a:/b:ro", "/a:/b:ro"),
        ("/a:/b:private+ro", "/a:/b:private+ro"),
        ("/capstor", "/capstor:/capstor"),
        ("data:/b", "/work/data:/b"),
        ("../x/:/b/", "/x:/b"),
        ("/x.sqsh:/b:sqsh", "/x.sqsh:/b:sqsh"),
    ],
)
def test_parse_mount_known_forms(text, expected):
    assert str(parse_mount(text, Path("/work"))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/a:/b:ro:x", "must be SRC:DST"),
        ("/a:b:/a:b", "a folder with a colon in its name can't be mounted"),
        (":/b", "must be SRC:DST"),
        ("/a:b", "target must be an absolute path"),
        ("/a:/", "target must be an absolute path below /"),
        ("/a:/b:readonly", "unknown flag 'readonly'"),
        ("/a:/b:sqsh+ro", "sqsh stands alone"),
    ],
)
def test_parse_mount_bad_form_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mount(text, Path("/work"))


def test_load_edf_parents_merge_in_order(tmp_path):
    write(
        tmp_path,
        "one.toml",
        'image = "/one.sqsh"\nwritable = false\nmounts = ["/tmp:/a"]\n'
        '[env]\nA = "one"\nB = "one"\n[annotations.com.hooks.cxi]\nenabled = "true"\n',
    )
    write(tmp_path, "two.toml", 'image = "/two.sqsh"\n[env]\nB = "two"\n')
    child = write(
        tmp_path,
        "child.toml",
        'base_environment = ["./one.toml", "./two.toml"]\nmounts = ["/tmp:/a", "/tmp:/b"]\n'
        'workdir = "/x/${WHO}"\n[env]\nC = "${WHO}"\n'
        '[annotations]\n"com.hooks.cxi.enabled" = "false"\n',
    )
    edf = load(child)
    assert edf.image == "/two.sqsh"
    assert edf.writable is False
    assert edf.entrypoint is False
    assert edf.workdir == "/x/world"
    assert [str(mount) for mount in edf.mounts] == ["/tmp:/a", "/tmp:/b"]
    assert edf.env == {"A": "one", "B": "two", "C": "world"}
    assert edf.annotations == {"com.hooks.cxi.enabled": "false"}


def test_load_edf_env_cannot_use_other_env_entries(tmp_path):
    path = write(tmp_path, "x.toml", 'image = "/i"\n[env]\nA = "a"\nB = "${A}"\n')
    with pytest.raises(ConfigError, match=r"env.B: undefined variable A"):
        load(path)


def test_examine_edf_dollar_without_braces_is_told_at_every_place(tmp_path):
    """The engine makes ${WHO} of it, others a folder of the name `$WHO`."""
    path = write(
        tmp_path,
        "x.toml",
        'image = "/$WHO/some.sqsh"\nworkdir = "/tmp/$WHO/"\nmounts = ["/tmp:/tmp/$WHO"]\n'
        '[env]\nHF_HOME = "/dev/shm/$WHO/huggingface"\nPRICE = "$$5"\n',
    )
    _, faults = examine_edf(path, ENV, tmp_path)
    said = "'$WHO' is not expanded by every engine: write ${WHO}"
    keys = ["image", "workdir", "mounts[0]", "env.HF_HOME"]
    assert faults == [f"{path}: {key}: {said}" for key in keys]
    with pytest.raises(ConfigError) as raised:  # What is rendered and frozen is made by this.
        merge_edf(path, {}, tmp_path)
    assert sorted(raised.value.faults) == sorted(faults)


def test_load_edf_env_goes_on_from_the_images_own_variables(tmp_path):
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/environment").write_text("# of the image\nPATH=/opt/bin\nONLY_IMAGE=i\n")
    command = ["mksquashfs", tmp_path / "tree", tmp_path / "x.sqsh", "-quiet", "-no-progress"]
    subprocess.run(command, check=True)
    path = write(
        tmp_path,
        "x.toml",
        'image = "x.sqsh"\n[env]\nPATH = "${PATH}:/custom/bin"\nA = "${ONLY_IMAGE}"\n'
        'LD_LIBRARY_PATH = "${LD_LIBRARY_PATH:-}:/custom/lib"\nB = "${WHO}"\n',
    )
    env = {**ENV, "PATH": "/host/bin", "LD_LIBRARY_PATH": "/host/lib"}
    assert load(path, env).env == {
        "PATH": "/opt/bin:/custom/bin", "A": "i", "LD_LIBRARY_PATH": "/host/lib:/custom/lib",
        "B": "world",
    }  # fmt: skip


def test_load_edf_env_of_a_sif_goes_on_from_its_record(tmp_path):
    digest = "3" * 64
    (tmp_path / f"sha256-{digest}.json").write_text('{"environment": {"PATH": "/opt/bin"}}')
    (tmp_path / "x.sif").write_text("")
    text = f'image = "x.sif"\n[env]\nPOST_TRAINING_IMAGE_SQSH_SHA256 = "{digest}"\n'
    path = write(tmp_path, "x.toml", text + 'PATH = "${PATH}:/custom/bin"\n')
    assert load(path, {"PATH": "/host/bin"}).env["PATH"] == "/opt/bin:/custom/bin"
    (tmp_path / f"sha256-{digest}.json").write_text("[]")
    message = "env: PATH: what the image has there cannot be read: no record of the SIF's variables"
    with pytest.raises(ConfigError, match=message):
        load(path, {"PATH": "/host/bin"})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[env]\nN = true\n", "env.N: must be a string (got True)"),
        ("[env.T]\nx = 'y'\n", "env.T: must be a string (got {'x': 'y'})"),
        ('[env]\n"" = "x"\n', "env: '' cannot be the name of a variable"),
        ('[env]\n"A=B" = "x"\n', "env: 'A=B' cannot be the name of a variable"),
        ('[env]\n"A\\u0000" = "x"\n', "env: 'A\\x00' cannot be the name of a variable"),
        ('[env]\nA = "x\\u0000"\n', "env.A: holds a NUL character (got 'x\\x00')"),
        ('workdir = "/x\\u0000"\n', "workdir: holds a NUL character (got '/x\\x00')"),
        ('mounts = ["/tmp:/x\\u0000"]\n', "mounts[0]: holds a NUL character"),
        ('base_environment = "${NO}"\n', "base_environment: undefined variable NO"),
        ('base_environment = "$(id)"\n', "base_environment: '$(' is not allowed in an EDF"),
    ],
)
def test_examine_edf_value_that_cannot_be_is_one_fault(tmp_path, text, fault):
    path = write(tmp_path, "x.toml", f'image = "/i"\n{text}')
    edf, [found] = examine_edf(path, ENV, tmp_path)
    assert found.startswith(f"{path}: {fault}")
    assert all(isinstance(value, str) for value in edf.env.values())


def test_load_edf_base_environment_that_doubles_and_doubles_is_refused(tmp_path):
    write(tmp_path, "0.toml", 'image = "/i"\n')
    for level in range(1, 9):
        parents = ", ".join([f'"./{level - 1}.toml"'] * 8)
        write(tmp_path, f"{level}.toml", f"base_environment = [{parents}]\n")
    with pytest.raises(UsageError, match="base_environment: more than 100 files"):
        load(tmp_path / "8.toml")


def test_load_edf_all_faults_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        "x.toml",
        'imagee = "/i"\nwritable = "no"\nmounts = ["/no/such:/a", "${NOT_SET}:/b", "/tmp:c"]\n'
        "[env]\nN = 3\n",
    )
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert raised.value.faults == [
        f"{path}: imagee: unknown key, did you mean 'image'?",
        f"{path}: writable: must be a boolean (got 'no')",
        f"{path}: env.N: must be a string (got 3)",
        f"{path}: mounts[1]: undefined variable NOT_SET",
        f"{path}: mounts[0]: source does not exist: /no/such",
        f"{path}: mounts[1]: source does not exist: {tmp_path}/${{NOT_SET}}",
        f"{path}: mounts[2]: target must be an absolute path below / (got 'c')",
        f"{path}: image: missing",
    ]


def test_load_edf_circle_is_refused(tmp_path):
    write(tmp_path, "a.toml", 'base_environment = "./b.toml"\n')
    path = write(tmp_path, "b.toml", 'base_environment = "./a.toml"\n')
    with pytest.raises(UsageError, match=r"goes in a circle: b.toml -> a.toml -> b.toml"):
        load(path)


def test_load_edf_eleven_levels_are_refused_and_ten_are_not(tmp_path):
    write(tmp_path, "0.toml", 'image = "/i"\n')
    for level in range(1, 12):
        write(tmp_path, f"{level}.toml", f'base_environment = "./{level - 1}.toml"\n')
    assert load(tmp_path / "10.toml").image == "/i"
    with pytest.raises(UsageError, match="more than 10 levels"):
        load(tmp_path / "11.toml")


def test_load_edf_broken_toml_names_the_line(tmp_path):
    with pytest.raises(UsageError, match=r"not valid TOML: .*line 2"):
        load(write(tmp_path, "x.toml", 'image = "/i"\nworkdir = \n'))


def test_find_edf_name_is_searched_in_edf_path(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    expected = write(tmp_path / "second", "env.toml", "")
    env = {"EDF_PATH": f"{tmp_path}/first:{tmp_path}/second"}
    assert find_edf("env", env, tmp_path) == expected
    assert find_edf("env.toml", env, tmp_path) == expected
    here = write(tmp_path, "env.toml", "")
    assert find_edf("env.toml", env, tmp_path) == here
    assert find_edf("env", env, tmp_path) == expected
    assert find_edf("./env.toml", env, tmp_path) == here
    assert find_edf(str(here), env, Path("/")) == here


def test_find_edf_default_folder_is_dot_edf_of_home(tmp_path):
    (tmp_path / ".edf").mkdir()
    expected = write(tmp_path / ".edf", "env.toml", "")
    assert find_edf("env", {"HOME": str(tmp_path)}, Path("/")) == expected


def test_find_edf_missing_says_where_it_looked(tmp_path):
    with pytest.raises(UsageError, match=f"no EDF 'nope' in {tmp_path}"):
        find_edf("nope", {"EDF_PATH": str(tmp_path)}, Path("/"))
    with pytest.raises(UsageError, match="must hold absolute folders"):
        find_edf("nope", {"EDF_PATH": "relative"}, Path("/"))
