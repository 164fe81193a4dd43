import subprocess

from post_training.images.checkout import describe_changes


def git(folder, *words):
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True)


def test_describe_changes_keeps_the_diff_without_the_secrets_in_it(tmp_path):
    token, path = "ghp_" + 36 * "a", tmp_path / "x.py"
    git(tmp_path, "init", "-q")
    path.write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    path.write_text("x = 2\n")
    told = describe_changes(tmp_path)
    assert told.keys() == {"commit", "diff", "untracked"}
    assert "+x = 2" in told["diff"]
    path.write_text(f"x = 2\nKEY = '{token}'\n")
    told = describe_changes(tmp_path)
    assert told["redacted"] == ["GitHub token"]
    assert told["diff"].endswith("+x = 2\n+KEY = '[redacted: GitHub token]'")


def test_describe_changes_outside_git_is_nothing_known(tmp_path):
    assert describe_changes(tmp_path) == {"commit": None, "diff": None, "untracked": []}
