"""Secrets are known by their forms. All of these are made up, and put together here so that nothing
takes this file for one."""

import pytest

from post_training.core.secrets import find_secret, redact, redact_all, variable_secret

SECRETS = {
    "OpenAI key": ["sk-" + "proj-" + 28 * "0", "sk-" + 24 * "a1"],
    "Anthropic key": ["sk-" + "ant-api03-" + 30 * "a"],
    "Hugging Face token": ["hf_" + 34 * "a"],
    "GitHub token": ["ghp_" + 36 * "a", "github_pat_" + 20 * "0" + "_" + 28 * "0"],
    "GitLab token": ["glpat-" + 20 * "a"],
    "AWS key": ["AKIA" + 16 * "A", "aws_secret_access_key = " + 40 * "a"],
    "Slack token": ["xoxb-" + 12 * "1"],
    "W&B key": ["wandb_v1_" + 36 * "0"],
    "JSON web token": ["eyJ" + "hbGciOiJub25lIn0.eyJ" + "zdWIiOiJ0b3kifQ.aaaaaaaaaaaa"],
    "bearer token": ["Bearer " + 12 * "a1"],
    "basic authorization": ["Authorization: Basic " + 16 * "a"],
    "private key": [
        f"-----BEGIN {kind}PRIVATE KEY-----\n{64 * 'a'}\n-----END {kind}PRIVATE KEY-----"
        for kind in ("", "RSA ", "OPENSSH ")
    ],
}
NONE = [
    "/scratch/runs/math-task-apertus-8b-instruct-v2-final",
    "disk-image-of-the-second-filesystem",
    "/scratch/sk-learn-experiments-of-the-spring",
    "http://proxy.example.org:3128",
    "https://github.com/someone/project@main",
    "ssh://git@example.org/project:branch",
    "https://${USER}:${PASSWORD}@example.org",
    'f"https://{user}:{password}@{host}"',
    "hf_datasets_of_instructions",
    "the bearer of this long message, and of others",
    40 * "0",
    "sha256:" + 64 * "a",
    "-----BEGIN " + "PRIVATE KEY-----",
    "AKIA" + 24 * "A",
]


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in SECRETS.items() for text in texts]
)
def test_secret_is_found_and_redacted_wherever_it_stands(kind, text):
    for before, after in (("", ""), ("a=", " b"), ('+KEY = "', '"\n'), ("/data/", " of it")):
        whole = f"{before}{text}{after}"
        assert find_secret(whole) == kind
        assert redact(whole) == (f"{before}[redacted: {kind}]{after}", [kind])


@pytest.mark.parametrize("scheme", ["http", "postgresql", "https"])
def test_secret_in_an_address_is_the_name_and_the_password(scheme):
    address = f"{scheme}://someone:" + "not-a-real-one@proxy.example.org:3128"
    assert find_secret(address) == "password in an address"
    told = f"{scheme}://[redacted: password in an address]proxy.example.org:3128"
    assert redact(address) == (told, ["password in an address"])


def test_secret_two_in_one_text_are_both_redacted():
    tokens = ["hf_" + 34 * "a", "ghp_" + 36 * "a"]
    told = "a [redacted: Hugging Face token] b [redacted: GitHub token]"
    assert redact(f"a {tokens[0]} b {tokens[1]}") == (told, ["GitHub token", "Hugging Face token"])


@pytest.mark.parametrize("text", NONE)
def test_secret_words_paths_digests_and_code_are_none(text):
    assert find_secret(text) is None
    assert redact(text) == (text, [])


@pytest.mark.parametrize(
    ("name", "value", "is_secret"),
    [
        ("HF_TOKEN", "anything", True),
        ("HF_TOKEN", "", False),
        ("HF_TOKEN", "${HF_TOKEN}", False),
        ("MY_SECRET_KEY", "opensesame", True),
        ("OMP_TOKEN", "abc123def456", True),
        ("PAD_TOKEN", "<pad>", False),
        ("EOS_TOKEN", "endoftext", False),
        ("MAX_TOKEN", "512", False),
        ("NUM_TOKENS", "abc123def456", False),
        ("SECRET_PATH", "here", False),
    ],
)
def test_variable_secret_needs_a_value_that_could_be_one(name, value, is_secret):
    assert bool(variable_secret(name, value)) is is_secret


def test_redact_all_names_the_places_and_leaves_the_rest():
    token = "ghp_" + 36 * "a"
    value = {"a": [1, None, f"x {token}"], token: True, "b": "as it is"}
    assert redact_all(value) == (
        {
            "a": [1, None, "x [redacted: GitHub token]"],
            "[redacted: GitHub token]": True,
            "b": "as it is",
        },
        ["a[2]: GitHub token", ".[redacted: GitHub token]: GitHub token"],
    )
