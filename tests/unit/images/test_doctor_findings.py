from pathlib import Path

from post_training.core.errors import UsageError
from post_training.images.doctor import describe_findings, examine, note, ok, wrong


def test_findings_exit_code_is_1_only_when_something_is_wrong():
    assert describe_findings([ok("store", "3 images"), note("site", "no account")]) == (
        0,
        "ok     store         3 images\nnote   site          no account\nnothing is wrong",
    )
    code, text = describe_findings(
        [ok("store", "3 images"), wrong("devices", "no GPU", "use a compute node")]
    )
    assert code == 1
    assert text.splitlines()[1:] == [
        "WRONG  devices       no GPU",
        "                     hint: use a compute node",
        "1 wrong",
    ]


def test_examine_an_error_is_a_finding_and_the_next_check_still_runs():
    def failing():
        raise UsageError(
            "sinfo failed with exit code 1\n  first\n  no host", where="x", hint="wait"
        )

    def denied():
        Path("/proc/1/mem/x").read_text()

    assert examine("scheduler", failing) == [
        wrong("scheduler", "x: sinfo failed with exit code 1: no host", "wait")
    ]
    [finding] = examine("storage", denied)
    assert (finding.status, finding.text) == ("wrong", "/proc/1/mem/x: not a directory")
