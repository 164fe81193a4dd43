"""`post-training doctor --site NAME`: is this machine ready to send jobs? Asked on the host.

The inside of a container on a compute node is `entrypoint doctor`'s.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from post_training.core.errors import PostTrainingError
from post_training.core.process import run_tool
from post_training.core.secrets import CREDENTIALS, credentials_folder, find_credentials
from post_training.images.builder import program
from post_training.images.doctor import Finding, check_writable, examine, note, ok, wrong
from post_training.images.edf import expand, find_edf, merge_edf
from post_training.images.edf_check import Dialect, check_edf
from post_training.images.store import ImageStore
from post_training.slurm.site import Site, load_site

_ENVIRONMENT = "post-training"


def examine_host(site_name: str, store: ImageStore) -> list[Finding]:
    """Errors: UsageError for an unknown site."""
    cwd = Path.cwd()
    env = {**os.environ, "PWD": str(cwd)}
    site = load_site(site_name, {})
    return [
        *examine("site", lambda: _site(site_name, site)),
        *examine("tools", lambda: _tools(site)),
        *examine("scheduler", lambda: _scheduler(site_name, site)),
        *examine("store", lambda: _store(store)),
        *examine("EDF", lambda: _edf(site_name, site, env, cwd)),
        *examine("storage", lambda: examine_storage(site, env, _look_at_folder)),
        *examine("credentials", lambda: _credentials(env)),
    ]


def _site(name: str, site: Site) -> Iterator[Finding]:
    scheduler = site.scheduler
    asked = f"partition {scheduler.partition or 'default'}, account {scheduler.account or 'none'}"
    yield ok("site", f"{name}: {asked}, {scheduler.time} a job")
    if name != "laptop" and scheduler.account is None:
        yield note(
            "site", "no account", f"~/.config/post-training/sites.yaml: {name}: {{account: …}}"
        )


def _tools(site: Site) -> Iterator[Finding]:
    launcher = site.launcher
    if launcher.kind == "singularity" and shutil.which(launcher.command) is None:
        hint = "not on a node of this site, or a module must be loaded?"
        yield wrong("tools", f"{launcher.command} is not installed", hint)
    if launcher.kind == "sarus" and shutil.which("skopeo") is None:
        yield note("tools", "no images can be pushed to a registry here: skopeo is missing")
    missing = [name for name in (program(), "mksquashfs") if shutil.which(name) is None]
    if missing:
        yield note("tools", f"no images can be built here: {', '.join(missing)} missing")
    else:
        yield ok("tools", "images can be built here")


def _scheduler(name: str, site: Site) -> Iterator[Finding]:
    missing = [program for program in ("sbatch", "srun", "squeue") if not shutil.which(program)]
    problem = f"no Slurm here: {', '.join(missing)} missing" if missing else _silence()
    if problem and name == "laptop":
        yield note("scheduler", problem, "`edf run` needs none; installation/slurm brings one up")
        return
    if problem:
        yield wrong("scheduler", problem, "not on a login node of this site?")
        return
    partitions = run_tool(["sinfo", "--noheader", "--format=%R"]).split()
    wanted = site.scheduler.partition
    if wanted is not None and wanted not in partitions:
        yield wrong(
            "scheduler",
            f"no partition {wanted!r} (there are: {', '.join(sorted(set(partitions)))})",
        )
    else:
        yield ok("scheduler", "Slurm answers")
    if site.launcher.takes_edf:
        option = site.launcher.edf_option
        said = subprocess.run(["srun", "--help"], capture_output=True, text=True)
        if f"{option}=" in said.stdout + said.stderr:
            yield ok("scheduler", f"srun has {option}")
        else:
            yield wrong(
                "scheduler",
                f"srun has no {option} option",
                "the container engine's plugin is missing; installation/slurm has ours",
            )


def _silence() -> str | None:
    """Why Slurm does not answer, or None."""
    try:
        run_tool(["sinfo", "--noheader"])
    except PostTrainingError as error:
        return f"Slurm does not answer: {error.problem.splitlines()[-1].strip()}"
    return None


def _store(store: ImageStore) -> Iterator[Finding]:
    if not store.folder.is_dir():
        yield wrong("store", f"there is none: {store.folder}", "`make image push-sqsh` makes it")
        return
    images = store.index()
    if not images:
        yield wrong("store", f"{store.folder} has no image", "`make image push-sqsh` adds one")
        return
    for entry in images:
        if fault := store.file_fault(entry):
            yield wrong(
                "store",
                f"the file of {entry['name']} {entry['version']} is {fault}: "
                f"{store.image_path(entry['sqsh_sha256'])}",
                f"post-training image verify {entry['sqsh_sha256'][:12]}; then push it again",
            )
    yield ok("store", f"{store.folder}: {len(images)} images")
    if shutil.which("lfs") is not None:
        yield from _striping(store.folder)


def _striping(folder: Path) -> Iterator[Finding]:
    """One server for a file that every node reads at once is too few."""
    layout = run_tool(["lfs", "getstripe", "-d", str(folder)])
    counts = [int(word) for word in re.findall(r"stripe_count:\s*(-?\d+)", layout)]
    if counts and all(count == 1 for count in counts):
        yield wrong(
            "store",
            f"images are on one storage server each: {folder}",
            f"lfs setstripe -E 4M -c 1 -E 64M -c 4 -E -1 -c -1 -S 4M {folder}, then push again",
        )


def _edf(name: str, site: Site, env: Mapping[str, str], cwd: Path) -> Iterator[Finding]:
    path = find_edf(_ENVIRONMENT, env, cwd)
    is_here = site.launcher.takes_edf
    rendered_for = merge_edf(path, env, cwd).get("env", {}).get("POST_TRAINING_SITE")
    if rendered_for != name:
        yield wrong(
            "EDF",
            f"{path} is of the site {rendered_for!r}",
            f"post-training edf render --site {name} --image IMAGE",
        )
    dialect: Dialect | None = "sarus" if site.launcher.kind == "sarus" else None
    faults = check_edf(path, env, cwd, [], sources_are_here=is_here, dialect=dialect)
    for fault in faults:
        yield wrong("EDF", fault)
    if rendered_for == name and not faults:
        yield ok("EDF", f"{path}")


def examine_storage(
    site: Site, env: Mapping[str, str], look: Callable[[str, Path], Iterator[Finding]]
) -> Iterator[Finding]:
    """A note of each folder of the site whose variable is not set; of the others what `look` finds
    (their name, `scratch` or `permanent`, and their path)."""
    for name, text in (("scratch", site.storage.scratch), ("permanent", site.storage.permanent)):
        if text is None:
            continue
        try:
            folder = Path(expand(text, env))
        except ValueError as error:
            variable = str(error).removeprefix("undefined variable ")
            yield note("storage", f"{name}: {text}: {error}", f"export {variable}=… in ~/.profile")
            continue
        yield from look(name, folder)


def _look_at_folder(name: str, folder: Path) -> Iterator[Finding]:
    if folder.is_dir():
        yield from check_writable(name, folder)
    else:
        yield wrong("storage", f"{name}: no such folder: {folder}")


def _credentials(env: Mapping[str, str]) -> Iterator[Finding]:
    found = dict(find_credentials(env).variables)
    folder = credentials_folder(env)
    for credential in CREDENTIALS:
        has = credential.path_variable in found
        where = folder / credential.name
        yield ok("credentials", f"{credential.name}: {where if has else 'none'}")
        if env.get(credential.value_variable):
            yield note(
                "credentials",
                f"{credential.value_variable} is set: jobs inherit the secret itself",
                f"unset it and put it into {where} (mode 0600)",
            )


def examine_ssh() -> list[Finding]:
    """Whether this shell can use the keys of the machine that the user came from, so that none has
    to lie on the cluster. Nothing is sent to another machine."""
    return [
        *examine("SSH agent", lambda: _agent(os.environ)),
        *examine("SSH keys", lambda: _private_keys(Path.home() / ".ssh")),
        *examine("SSH config", lambda: _forwarding(os.environ)),
    ]


_START_AGENT = "on your own machine: ssh-add, then log in with `ssh -A` or `ForwardAgent yes`"


def _agent(env: Mapping[str, str]) -> Iterator[Finding]:
    socket = env.get("SSH_AUTH_SOCK")
    if not socket:
        yield wrong("SSH agent", "none is forwarded to this shell: SSH_AUTH_SOCK is not set",
                    _START_AGENT)  # fmt: skip
        return
    if not Path(socket).exists():
        yield wrong(
            "SSH agent",
            f"the one of an earlier login, which is gone: {socket}",
            "in tmux or screen, open a new window after each login; or "
            "export SSH_AUTH_SOCK=$(ls -t /tmp/ssh-*/agent.* | head -1)",
        )
        return
    listed = subprocess.run(["ssh-add", "-l"], env={**env}, capture_output=True, text=True)
    if listed.returncode == 0:
        for line in listed.stdout.splitlines():
            # Bits, fingerprint, comment, kind: no secret.
            yield ok("SSH agent", f"has a key: {line}")
    elif listed.returncode == 1:
        yield wrong("SSH agent", "is forwarded, and has no key", "on your own machine: ssh-add")
    else:
        yield wrong("SSH agent", f"does not answer: {listed.stderr.strip()}", _START_AGENT)


def _private_keys(folder: Path) -> Iterator[Finding]:
    """Private keys that lie here, and whether others can read them."""
    keys = [path for path in sorted(folder.glob("*")) if _is_private_key(path)]
    for path in keys:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            yield wrong("SSH keys", f"others can read {path} (mode {mode:o})", f"chmod 600 {path}")
        else:
            yield note("SSH keys", f"{path} lies on this machine; a forwarded agent needs none")
    if not keys:
        yield ok("SSH keys", f"no private key lies in {folder}")


def _is_private_key(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"PRIVATE KEY-----" in file.readline()


def _forwarding(env: Mapping[str, str]) -> Iterator[Finding]:
    """What ssh would do with GitHub from here, by its own settings."""
    if shutil.which("ssh") is None:
        yield wrong("SSH config", "ssh is not installed")
        return
    settings = dict(
        line.split(" ", 1)
        for line in run_tool(["ssh", "-G", "github.com"], env={**env}).splitlines()
        if " " in line
    )
    yield ok(
        "SSH config",
        f"github.com is asked as {settings.get('user')}@{settings.get('hostname')}:"
        f"{settings.get('port')}; `ssh -T git@github.com` tries it",
    )
    if settings.get("identitiesonly") == "yes":
        yield note(
            "SSH config",
            "IdentitiesOnly is yes: of the agent's keys only those of IdentityFile are offered",
            "IdentitiesOnly no, for github.com, in ~/.ssh/config",
        )
