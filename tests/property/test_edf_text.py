"""What is rendered is read back: quoting and `$${…}` survive."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from post_training.images.edf import escape, expand, load_edf, parse_mount
from post_training.images.render import edf_text

# What no EDF may hold is left out: control characters aside, the four that raster refuses.
values = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters='`;"')
).filter(lambda text: "$(" not in text)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@given(st.dictionaries(names, values), values)
def test_edf_text_is_read_back_equal(environment, workdir):
    escaped = {name: escape(value) for name, value in environment.items()}
    keys = {"image": "/i", "workdir": escape(workdir), "writable": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        path.write_text(edf_text(keys, {"env": escaped}), encoding="utf-8")
        edf = load_edf(path, {}, Path("/"))
    assert (edf.env, edf.workdir, edf.writable) == (environment, workdir, False)


@given(st.dictionaries(names, values))
def test_expand_replaces_every_variable_by_its_value(environment):
    text = "|".join(f"${{{name}}}" for name in environment)
    assert expand(text, environment) == "|".join(environment.values())


paths = st.from_regex(r"(/[a-z0-9_-][a-z0-9._-]{0,5}){1,4}", fullmatch=True)
flags = st.sets(st.sampled_from(["ro", "rw", "private", "nosuid", "nodev"]))


@given(paths, paths, flags)
def test_parse_mount_round_trips(source, target, words):
    mount = parse_mount(":".join([source, target, "+".join(words)]), Path("/"))
    assert parse_mount(str(mount), Path("/")) == mount
