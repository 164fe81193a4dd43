"""A Slurm cluster for tests, and a stand-in for the `post-training` command line.

The stand-in implements the two commands that the SPANK plugin calls, writes down every call, and
runs a task's command with INSIDE=<the EDF's path> in its environment instead of inside an image.
"""

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "installation" / "slurm" / "cluster"
# Against hanging alone: on a machine with other work all takes many times as long.
TIMEOUT_S = 600

STAND_IN = """\
#!/bin/bash
record=$(mktemp -p CALLS "$2.XXXXXX")
printf '%s\\0' "$@" >"$record"
case "$1 $2" in
    'edf resolve')
        case $3 in
            /*) path=$3 ;;
            *) path=$PWD/$3 ;;
        esac
        [[ $path != */not-a-path.toml ]] || { echo "not a path" && exit; }
        [[ -f $path ]] || { echo "error: no environment '$3'" >&2 && exit 2; }
        printf '%s\\n' "$path"
        ;;
    'edf run')
        [[ $4 == -- ]] || exit 99
        export INSIDE=$3
        shift 4
        exec "$@"
        ;;
esac
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster: `work` is a folder that every user may write, with `image.toml` in it."""

    slurm_conf: Path
    work: Path
    calls_dir: Path

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**kept, "SLURM_CONF": str(self.slurm_conf), **variables}

    @contextmanager
    def start(
        self, *argv: str, cwd: Path | None = None, **variables: str
    ) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.work,
            env=self.environment(**variables),
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def run(
        self, *argv: str, stdin: str = "", cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        with self.start(*argv, cwd=cwd, **variables) as process:
            stdout, stderr = process.communicate(stdin, timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)

    def calls(self, subcommand: str) -> list[list[str]]:
        """The arguments of each call of the stand-in's `edf <subcommand>` in this test."""
        records = sorted(self.calls_dir.glob(f"{subcommand}.*"))
        return [record.read_text().split("\0")[:-1] for record in records]


def run_script(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=TIMEOUT_S,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        select.select([], [], [], 0.01)
