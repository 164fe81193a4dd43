"""What names an image in a registry, and which registries may be without TLS."""

import pytest

from post_training.core.errors import UsageError
from post_training.images.reference import (
    is_loopback,
    known_references,
    parse_name,
    parse_reference,
)

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    "name",
    ["ghcr.io/me/post-training", "localhost/cpu", "127.0.0.1:5000/a/b/c", "node-1:5000/a__b",
     "[::1]:5000/cpu"],
)  # fmt: skip
def test_parse_name_and_reference_of_good_names(name):
    assert parse_name(name) == parse_name(f"docker://{name}") == name
    reference = parse_reference(f"{name}@{DIGEST}")
    assert reference == (name, DIGEST)
    assert str(reference) == f"{name}@{DIGEST}"
    # The tag is not what decides.
    assert parse_reference(f"{name}:moved@{DIGEST}") == reference


@pytest.mark.parametrize(
    "text",
    ["", "cpu", "me/cpu", "ghcr.io", "ghcr.io/", "ghcr.io//cpu", "ghcr.io/Me/cpu", "ghcr.io/me/",
     "ghcr.io/me/cpu:1", f"ghcr.io/me/cpu@{DIGEST}", "http://ghcr.io/me", "ghcr.io/me cpu",
     "-ghcr/me", "--help/x", "ghcr.io/../cpu", "ghcr.io/me/cpu\n"],
)  # fmt: skip
def test_parse_name_what_is_none_is_refused(text):
    with pytest.raises(UsageError, match=r"must be REGISTRY/NAME"):
        parse_name(text)


@pytest.mark.parametrize(
    "text",
    ["ghcr.io/me/cpu", "ghcr.io/me/cpu:latest", "ghcr.io/me/cpu@sha256:abc",
     f"ghcr.io/me/cpu@sha512:{'a' * 64}", f"ghcr.io/me/cpu@{DIGEST}0", f"me/cpu@{DIGEST}"],
)  # fmt: skip
def test_parse_reference_without_a_whole_digest_or_a_registry_is_refused(text):
    with pytest.raises(UsageError, match=r"must be REGISTRY/NAME"):
        parse_reference(text)


def test_a_password_in_a_name_is_refused_and_not_shown():
    for parse in (parse_name, parse_reference):
        with pytest.raises(UsageError) as caught:
            parse("me:not-a-real-one@ghcr.io/me/cpu")
        assert "not-a-real-one" not in str(caught.value)
        assert "skopeo login ghcr.io" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("localhost/a", True), ("localhost:5000/a", True), ("127.0.0.1:5000/a", True),
     ("127.8.8.8/a", True), ("[::1]:5000/a", True), ("localhost.example.org/a", False),
     ("127.0.0.1.nip.io/a", False), ("10.0.0.1:5000/a", False), ("0.0.0.0:5000/a", False),
     ("[fe80::1]/a", False), ("mylocalhost:5000/a", False)],
)  # fmt: skip
def test_tls_is_off_for_this_machine_alone(name, expected):
    assert is_loopback(name) is expected


def test_known_references_of_several_records_each_once():
    record = {"registries": {"a.org/x": DIGEST}}
    release = {"registries": {"a.org/x": DIGEST, "b.org/y": DIGEST}}
    found = known_references(record, {}, {"registries": None}, release)
    assert [str(each) for each in found] == [f"a.org/x@{DIGEST}", f"b.org/y@{DIGEST}"]
