"""`post-training site …`: a site of the user's own, without an edit of the project's files.

    ~/.config/post-training/sites/NAME/site.yaml    how jobs are asked for and started (slurm/site)
                                       edf.toml     what a container has there: mounts, variables

`new` copies both files of another site: one of the project's, one of the examples in
installation/sites, or one of the user's own. `check` reads them as a job would, and says all that
is wrong; what only the machine itself knows is `post-training doctor --site NAME`'s.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from post_training.core import yaml
from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.files import atomic_directory, user_config
from post_training.images.doctor import Finding, examine, note, ok, wrong
from post_training.images.edf import Edf, examine_edf, merge_edf
from post_training.images.edf_check import PROFILE, network_faults, secret_faults, successor_faults
from post_training.images.render import OWN_EDF, OWN_SITES, own_site_folder, site_file
from post_training.slurm.doctor import examine_storage
from post_training.slurm.environment import check_is_mounted
from post_training.slurm.script import CACHES, Container, Job, sbatch_script
from post_training.slurm.site import SITES_DIR, Launcher, Site, find_site, load_site, site_names

SITE_VARIABLE = "POST_TRAINING_SITE"
OWN_FILE = "site.yaml"
# Below a checkout.
EXAMPLES = "installation/sites"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SITE_LINE = re.compile(rf"(?m)^{SITE_VARIABLE}\s*=.*$")


@dataclass(frozen=True)
class KnownSite:
    """origin: "project", "own" or "example"; an example is no site before `new` has copied it."""

    name: str
    origin: str
    path: Path


def known_sites(repository: Path) -> list[KnownSite]:
    """The project's, the user's own, and the examples of the checkout; each by name."""
    found = [("project", path.stem, path) for path in SITES_DIR.glob("*.yaml")]
    own = (user_config() / OWN_SITES).glob(f"*/{OWN_FILE}")
    found += [("own", path.parent.name, path) for path in own]
    examples = (repository / EXAMPLES).glob(f"*/{OWN_FILE}")
    found += [("example", path.parent.name, path) for path in examples]
    order = ["project", "own", "example"]
    found.sort(key=lambda entry: (order.index(entry[0]), entry[1]))
    return [KnownSite(name, origin, path) for origin, name, path in found]


def new_site(name: str, like: str, repository: Path) -> Path:
    """Make a site of the user's own of a copy of `like`; its folder.

    Errors: UsageError for a name that is taken or cannot be one, and for an unknown `like`.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a site's name has small letters, digits and hyphens (got {name!r})",
            hint="it becomes a folder, and stands in every record of a run there",
        )
    folder = own_site_folder(name)
    if folder.exists():
        raise UsageError(
            "this site is there already", where=str(folder), hint="choose another name"
        )
    if name in site_names():
        raise UsageError(f"the project has a site {name!r}", hint=f"my-{name}, for example")
    yaml_path, edf_path = _files_of(like, repository)
    edf = edf_path.read_text()
    if len(_SITE_LINE.findall(edf)) != 1:
        raise UsageError(f"{SITE_VARIABLE} must stand in [env], once", where=str(edf_path))
    with atomic_directory(folder) as temporary:
        for path in (yaml_path, *_extended(yaml_path)):
            target = OWN_FILE if path == yaml_path else path.name
            (temporary / target).write_text(_made_like(like) + path.read_text())
        edf = _SITE_LINE.sub(f'{SITE_VARIABLE} = "{name}"', edf)
        (temporary / OWN_EDF).write_text(_made_like(like) + edf)
    return folder


def check_site_files(name: str, repository: Path, env: Mapping[str, str]) -> list[Finding]:
    """What is right and wrong with both files of a site.

    env: of the user; the variables in mounts and folders are expanded with it.
    Errors: UsageError for an unknown site.
    """
    path = find_site(name)
    try:
        site = load_site(name, {})
    except ConfigError as error:
        return [wrong("site", line) for line in error.faults]
    edf_path = site_file(name, repository)
    edf, faults = examine_edf(edf_path, env, Path.cwd(), sources_are_here=False)
    # The image is what `edf render` adds.
    faults = [fault for fault in faults if not fault.endswith("image: missing")]
    return [
        ok("site", f"{path}: {site.launcher.kind}, {_asked(site)}"),
        *(wrong("EDF", fault) for fault in faults),
        *examine("EDF", lambda: _edf(name, edf, env)),
        *examine("launcher", lambda: _launcher(site.launcher, edf)),
        *examine("caches", lambda: _caches(edf)),
        *examine("storage", lambda: examine_storage(site, env, partial(_look_for_mount, edf))),
        *examine("script", lambda: _script(site, edf)),
    ]


def _files_of(like: str, repository: Path) -> tuple[Path, Path]:
    """Both files of the site `like`."""
    for site in known_sites(repository):
        if site.name == like:
            is_project = site.origin == "project"
            edf = site_file(like, repository) if is_project else site.path.with_name(OWN_EDF)
            if not edf.is_file():
                raise UsageError("this site lacks its edf.toml", where=str(site.path.parent))
            return site.path, edf
    known = ", ".join(site.name for site in known_sites(repository))
    raise UsageError(f"--like: no site {like!r}", hint=f"there are: {known}")


def _extended(path: Path) -> list[Path]:
    """The files that a site's file extends, and theirs; they lie beside it."""
    names = yaml.load(path.read_bytes(), str(path)).data.get("extends", [])
    parents = [path.parent / name for name in ([names] if isinstance(names, str) else names)]
    return [*parents, *(above for parent in parents for above in _extended(parent))]


def _made_like(like: str) -> str:
    return f"# Made by `post-training site new`, like {like!r}. It is yours to edit.\n"


def _asked(site: Site) -> str:
    scheduler = site.scheduler
    return (
        f"{scheduler.gpus_per_node} GPUs and {scheduler.tasks_per_node} tasks a node, "
        f"partition {scheduler.partition or 'default'}, account {scheduler.account or 'none'}"
    )


def _edf(name: str, edf: Edf, env: Mapping[str, str]) -> Iterator[Finding]:
    found = edf.env.get(SITE_VARIABLE)
    if found != name:
        yield wrong("EDF", f"env.{SITE_VARIABLE}: must be {name!r} (got {found!r})")
    if not edf.env.get(PROFILE):
        yield wrong(
            "EDF",
            f"env.{PROFILE}: missing",
            "a name of your choice for the network's settings, or none; records keep it",
        )
    merged = merge_edf(edf.path, env, Path.cwd())
    faults = [*secret_faults(edf.env), *network_faults(edf.env)]
    for fault in (*faults, *successor_faults(edf.path, env, Path.cwd())):
        yield wrong("EDF", fault)
    if merged.get("writable", True):
        yield wrong("EDF", "writable: must be false", "a run could change the image's own files")
    yield ok("EDF", f"{edf.path} read: {len(edf.mounts)} mounts, {len(edf.env)} variables")


def _launcher(launcher: Launcher, edf: Edf) -> Iterator[Finding]:
    if launcher.takes_edf:
        yield ok("launcher", f"srun {launcher.edf_option}: an engine for EDFs must be there")
        return
    if ignored := [*edf.annotations, *edf.devices]:
        yield wrong(
            "launcher",
            f"{launcher.command} has no hooks or devices: {', '.join(ignored)} would be ignored",
            "remove them from edf.toml, or give the launcher `kind: edf`",
        )
    yield ok("launcher", " ".join([launcher.command, "exec", *launcher.options]))


def _caches(edf: Edf) -> Iterator[Finding]:
    missing = [name for name in ("HF_HOME", "XDG_CACHE_HOME", *CACHES) if name not in edf.env]
    # `submit` sets these two for each job, and only ROCm has them.
    missing = [name for name in missing if not name.startswith("MIOPEN_")]
    if missing:
        yield note(
            "caches",
            f"not in [env]: {', '.join(missing)}",
            "a folder of the node, such as /dev/shm/${USER}/NAME: a shared one breaks compilers",
        )
    else:
        yield ok("caches", "each has a folder of the node")


def _look_for_mount(edf: Edf, name: str, folder: Path) -> Iterator[Finding]:
    try:
        check_is_mounted(folder, f"{name} folder", edf)
    except UsageError as error:
        yield wrong("storage", f"{error.where}: {error.problem}", "add it to edf.toml's mounts")
    else:
        yield ok("storage", f"{name}: {folder}")


def _script(site: Site, edf: Edf) -> Iterator[Finding]:
    """A job's script of two nodes, as far as it can be written without an image."""
    nodes = 2 if site.scheduler.tasks_per_node >= site.scheduler.gpus_per_node else 1
    scheduler = site.scheduler.model_copy(update={"nodes": nodes})
    container = None
    if site.launcher.kind == "singularity":
        container = Container(Path("/image.sif"), edf.env, tuple(map(str, edf.mounts)))
    job = Job("sft", Path("/runs/one"), Path("/runs"), 3, container)
    try:
        sbatch_script(job, site.model_copy(update={"scheduler": scheduler}))
    except PostTrainingError as error:
        yield wrong("script", f"{error.where}: {error.problem}" if error.where else error.problem)
    else:
        yield ok("script", "a job's script can be written; `submit --dry-run` prints it")
