"""Job accounting for a test cluster: a MariaDB and a slurmdbd of its own, in the cluster's folder.

`make test-tools` installs what it needs.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helpers.slurm_cluster import TIMEOUT_S, wait_until

PROGRAMS = ("mariadbd", "slurmdbd", "sacctmgr", "sacct")
TABLES = [
    Path("/usr/share/mysql") / name
    for name in ("mysql_system_tables.sql", "mysql_system_tables_data.sql")
]
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
SLURMCTLD = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
"""


def missing() -> list[str]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


@contextmanager
def accounting(slurm_conf: Path) -> Iterator[None]:
    """Within, the running cluster keeps accounts. Afterwards it is without a controller."""
    folder = slurm_conf.parent
    port = _free_port()
    environment = {
        **os.environ,
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
        "SLURM_CONF": str(slurm_conf),
        "MYSQL_UNIX_PORT": f"{folder}/mariadb.socket",
    }

    def run(*words: str, check: bool = True) -> int:
        # Daemons keep what they are given open: no pipes.
        with open(folder / "log/accounting.log", "a") as log:
            done = subprocess.run(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        assert not check or done.returncode == 0, f"{words}: see {log.name}"
        return done.returncode

    with ExitStack() as daemons:

        def start(*words: str) -> None:
            """A daemon in the foreground, until the end."""
            with open(folder / "log/accounting.log", "a") as log:
                daemon = subprocess.Popen(
                    words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            daemons.callback(daemon.wait, TIMEOUT_S)
            daemons.callback(daemon.terminate)

        database = _create_database(folder, environment)
        socket_path = f"{folder}/mariadb.socket"
        start(*database, f"--socket={socket_path}", "--skip-networking")
        wait_until(Path(socket_path).exists)
        (folder / "slurmdbd.conf").write_text(SLURMDBD.format(folder=folder, port=port))
        (folder / "slurmdbd.conf").chmod(0o600)
        start("slurmdbd", "-D")
        with open(slurm_conf, "a") as file:
            file.write(SLURMCTLD.format(folder=folder, port=port))
        add = ("sacctmgr", "--immediate", "add", "cluster", "post-training")
        wait_until(lambda: run(*add, check=False) == 0)
        run("scontrol", "shutdown", "slurmctld")
        wait_until(lambda: not (folder / "slurmctld.pid").exists())
        run("slurmctld")
        wait_until(lambda: run("scontrol", "ping", check=False) == 0)
        yield


def _create_database(folder: Path, environment: dict[str, str]) -> list[str]:
    """The command of a server with an empty database, in which root needs no password."""
    (folder / "mariadb/mysql").mkdir(parents=True)
    server = [
        *("mariadbd", "--no-defaults", f"--datadir={folder}/mariadb", "--user=root"),
        *("--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0"),
    ]
    tables = "use mysql;\n" + "".join(path.read_text() for path in TABLES)
    subprocess.run(
        [*server, "--bootstrap", "--skip-grant-tables"],
        env=environment, input=tables, text=True, check=True, capture_output=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    return server


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
