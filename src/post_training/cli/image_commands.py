"""What `post-training image …` and `edf check` do and print: data to stdout, all else to stderr.

Each takes the folder of the image store, or None for the user's, and the checkout to work in.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.hashing import sha256_file, sha256_value
from post_training.core.secrets import find_credentials
from post_training.images import builder, compiled, retention
from post_training.images.base import ensure_base
from post_training.images.build import (
    BuiltImage,
    build_image,
    find_built,
    image_identity,
    write_context,
)
from post_training.images.checkout import not_a_checkout
from post_training.images.edf import edf_folders, find_edf
from post_training.images.edf_check import DIALECTS, check_edf
from post_training.images.layer import push_layer as write_layer
from post_training.images.layer import refuse_layer
from post_training.images.lock import lock_recipe
from post_training.images.passport import Passport, make_passport
from post_training.images.push import push_sif as write_stored_sif
from post_training.images.push import push_sqsh
from post_training.images.rebuild import rebuild as rebuild_image
from post_training.images.recipe import (
    BASE_LOCK,
    COMPILED_LOCK,
    SYSTEM_LOCK,
    Recipe,
    load_recipe,
    locked_bases,
)
from post_training.images.reference import parse_name, parse_reference
from post_training.images.release import TESTS, images_lock, read_releases
from post_training.images.release import release as release_image
from post_training.images.render import install_edf, render_edf, rendered_name, site_file
from post_training.images.share import pull_image, push_image
from post_training.images.site_sif import locked_site_sif
from post_training.images.store import ImageStore, open_store


def build(name: str, store_folder: Path | None, repository: Path, *, force: bool) -> None:
    store, recipe = open_store(store_folder), load_recipe(name, repository.resolve())
    _refuse_site_sif(recipe)
    if not force:
        identity = image_identity(recipe, ensure_base(recipe, store))
        if record := store.find_built(identity["input_hash"]):
            _say(f"{name} {record['version']}: already in the store")
            print(record["oci_digest"])
            return
    image, is_new = build_image(recipe, store)
    _say(f"{name} {recipe.version}: {'built' if is_new else 'already built'} as {image.tag}")
    print(image.oci_digest)


def compile_package(
    package: str, name: str, num_jobs: int | None, store_folder: Path | None, repository: Path
) -> None:
    store, recipe = open_store(store_folder), load_recipe(name, repository.resolve())
    compiled.check_compilable(package, recipe)
    wheel = compiled.compile_package(
        package,
        recipe,
        _built(recipe, image_identity(recipe, ensure_base(recipe, store))),
        store,
        num_jobs,
    )
    _say(f"named in {recipe.folder / COMPILED_LOCK}")
    _say(f"`post-training image build {name}` makes the image with it")
    print(wheel)


def push(name: str, site: str, store_folder: Path | None, repository: Path) -> None:
    repository = repository.resolve()
    store, site_path = open_store(store_folder), site_file(site, repository)
    record = _ensure_pushed(name, store, repository)
    rendered = install_edf(
        render_edf(site_path, record, store, credentials=find_credentials(os.environ)),
        rendered_name(record),
        repository,
        edf_folders(os.environ)[0],
    )
    _say(f"EDF: {rendered}")
    print(store.image_path(record["sqsh_sha256"]))


def push_layer(
    name: str, singularity: list[str], store_folder: Path | None, repository: Path
) -> None:
    """singularity: the program that runs the site's SIF, and its options."""
    store = open_store(store_folder)
    record = write_layer(load_recipe(name, repository.resolve()), store, singularity)
    _say(
        f"{name} {record['version']}: {record['size_bytes'] / 1e6:.0f} MB over {record['base_sif']}"
    )
    print(record["oci_digest"])


def push_sif(name: str, store_folder: Path | None, repository: Path) -> None:
    store = open_store(store_folder)
    record = _ensure_pushed(name, store, repository.resolve())
    sif = record.get("sif_sha256")
    if sif is None or not store.sif_path(sif).exists():
        record = write_stored_sif(record, store)
        _say(f"wrote a SIF of {record['sif_size_bytes'] / 1e6:.0f} MB to {store.folder}")
    else:
        _say("the SIF is already in the store")
    print(store.sif_path(record["sif_sha256"]))


def _refuse_site_sif(recipe: Recipe) -> None:
    """Errors: UsageError for a recipe whose base is a site's SIF: no builder starts from one."""
    if locked_site_sif(recipe.folder):
        raise UsageError(
            "the base is a site's SIF",
            where=str(recipe.folder / BASE_LOCK),
            hint=f"`post-training image push-layer {recipe.name}` makes the image over it",
        )


def _ensure_pushed(name: str, store: ImageStore, repository: Path) -> dict[str, Any]:
    """The record of the squashfs of these sources; packed now, unless the store has it.

    Errors: UsageError when the image is not built.
    """
    recipe = load_recipe(name, repository)
    _refuse_site_sif(recipe)
    identity = image_identity(recipe, ensure_base(recipe, store))
    if record := store.find_built(identity["input_hash"]):
        _say("already in the store")
        return record
    record = push_sqsh(_built(recipe, identity), recipe, store)
    _say(f"pushed {record['size_bytes'] / 1e6:.0f} MB to {store.folder}")
    return record


def _built(recipe: Recipe, identity: dict[str, Any]) -> BuiltImage:
    """The image in the builder's storage. Errors: UsageError when it is not built."""
    image = find_built(identity)
    if image is None:
        raise UsageError(
            f"{recipe.name} is not built for these sources "
            f"(input hash {identity['input_hash'][:16]})",
            hint=f"run `post-training image build {recipe.name}` first",
        )
    return image


def push_to_registry(reference: str, name: str, store_folder: Path | None) -> None:
    store, name = open_store(store_folder), parse_name(name)
    record = store.find(reference)
    refuse_layer(record, "cannot be pushed: a registry takes whole images")
    print(push_image(record, name, store))


def pull_from_registry(reference: str, store_folder: Path | None) -> dict[str, Any]:
    """Pull the image; its record in the store."""
    store = open_store(store_folder)
    record = pull_image(parse_reference(reference), store)
    path = store.image_path(record["sqsh_sha256"])
    _say(f"{record['name']} {record['version']}, {record['oci_digest']}")
    print(path)
    return record


def lock(name: str, base: str | None, store_folder: Path | None, repository: Path) -> int:
    """Write the recipe's locks; exit code 1 when something stays unresolved.

    base: as base_source of `lock_recipe`.
    """
    recipe = load_recipe(name, repository.resolve())
    unresolved = lock_recipe(recipe, open_store(store_folder), base)
    for path in sorted(recipe.folder.glob("*.lock")):
        print(path)
    for line in unresolved:
        _say(f"unresolved: {line}")
    return 1 if unresolved else 0


def show_list(store_folder: Path | None, *, as_json: bool) -> None:
    store = open_store(store_folder)
    index = [{**entry, "file": store.file_fault(entry) or "present"} for entry in store.index()]
    if as_json:
        print(json.dumps(index, indent=2))
        return
    width = max([8, *(len(entry["name"]) for entry in index)])
    print(f"{'NAME':{width}} {'VERSION':9} {'OCI DIGEST':20} {'SQSH SHA256':13} {'MB':>7}  PUSHED")
    for entry in index:
        size = f"{entry['size_bytes'] / 1e6:.0f}" if entry["file"] == "present" else entry["file"]
        print(
            f"{entry['name']:{width}} {entry['version']:9} {entry['oci_digest'][:19]:20} "
            f"{entry['sqsh_sha256'][:12]:13} {size:>7}  {entry['pushed']}"
        )


def gc(
    runs: list[Path],
    forget: Path | None,
    store_folder: Path | None,
    repository: Path,
    *,
    delete: bool,
    as_json: bool,
) -> None:
    """Print what may be removed; with `delete`, remove it.

    runs: folders in which runs are kept, to be remembered. forget: one to be forgotten.
    """
    store, repository = open_store(store_folder), repository.resolve()
    if not (repository / "containers").is_dir():
        # Without one it is unknown which images are released.
        raise not_a_checkout(repository)
    with store.lock():
        folders = retention.RunFolders(store)
        if forget is not None:
            folders.forget(forget)
        if missing := [str(folder) for folder in runs if not folder.is_dir()]:
            raise UsageError(f"no such folder: {', '.join(missing)}")
        folders.remember(runs)
        if not folders.folders:
            raise UsageError(
                "no folder is known in which runs are kept; their records name images",
                hint="`post-training image gc RUNS …`; they are remembered",
            )
        decided = retention.plan(
            store,
            folders.folders,
            read_releases(repository),
            # The checkout's own is what `make push-sqsh` wrote there.
            [*edf_folders(os.environ), repository / "edf"],
            [*locked_bases(repository), *_system_locks(repository)],
            _built_images(),
        )
        if delete:
            retention.remove(store, decided)
    if as_json:
        print(json.dumps({**decided.as_json(), "is_removed": delete}, indent=2))
    else:
        _print_plan(decided, store, delete=delete)


def _system_locks(repository: Path) -> list[str]:
    """The sha256 of every lock of a distribution's packages."""
    return [sha256_file(path) for path in repository.glob(f"containers/*/{SYSTEM_LOCK}")]


def _built_images() -> dict[str, str]:
    """{tag: OCI digest} in the builder's storage; empty where there is no builder, as on LUMI."""
    if shutil.which(builder.program()) is None:
        return {}
    try:
        return builder.stored_tags()
    except PostTrainingError as error:
        _say(f"warning: the builder's own storage is left as it is: {error.problem}")
        return {}


def _print_plan(decided: retention.Plan, store: ImageStore, *, delete: bool) -> None:
    for path in decided.dangling:
        _say(f"warning: {path}: a link to nothing; no image is kept for it")
    for image, kept_for in decided.images:
        what = f"kept: {kept_for}" if kept_for else "removed" if delete else "can go"
        print(f"{image['name']}:{image['version']} {image['sqsh_sha256'][:12]}  {what}")
    for path in [*(path.relative_to(store.folder) for path in decided.files), *decided.built]:
        print(f"{path}  {'removed' if delete else 'can go'}")
    if not delete:
        layers = ", and layers of the builder's" if decided.built else ""
        _say(f"{decided.size_bytes / 1e9:.1f} GB{layers} can go; --delete removes them")


def rebuild(reference: str, store_folder: Path | None, repository: Path, *, cached: bool) -> int:
    """Build the image again and compare; exit code 4 when it comes out different."""
    store = open_store(store_folder)
    record = store.find_recorded(reference)
    refuse_layer(record, "is made again by `image push-layer` in a checkout of its commit")
    differences = rebuild_image(record, store, repository.resolve(), cached=cached)
    if not differences:
        print(f"identical: {record['oci_digest']}, squashfs {record['sqsh_sha256']}")
        return 0
    print("differs:", *differences, sep="\n  ")
    return 4


def release(reference: str, tests: list[str], store_folder: Path | None, repository: Path) -> None:
    store, repository = open_store(store_folder), repository.resolve()
    record = store.find(reference)
    refuse_layer(record, "is no image of the project's own, and cannot be released")
    entry = release_image(record, store, repository, tests or TESTS)
    _say(f"{entry['name']} {entry['version']}: {entry['tested']}")
    _say(f"written to {images_lock(repository)}; commit it")
    print(entry["oci_digest"])


def verify(reference: str, store_folder: Path | None, *, as_json: bool) -> int:
    """Hash the image's files again; exit code 1 when one is missing or corrupt."""
    store = open_store(store_folder)
    verified = store.verify(store.find(reference))
    if as_json:
        files = [{**each._asdict(), "path": str(each.path)} for each in verified]
        print(json.dumps(files, indent=2))
    else:
        for status, path, expected, found in verified:
            print(f"{status}: {path}")
            if status == "corrupt":
                _say(f"error: {path}: sha256 is {found}, expected {expected}")
    return 0 if all(each.status == "ok" for each in verified) else 1


def passport(reference: str, store_folder: Path | None, *, as_json: bool) -> int:
    """Compare an image's forms; exit code 4 when they are not one image."""
    store = open_store(store_folder)
    record = store.find(reference)
    refuse_layer(record, "has one form only, so there is nothing to compare")
    made = make_passport(record, store)
    if as_json:
        print(made.as_json())
    else:
        _print_passport(made)
    for line in made.differences:
        _say(f"error: {line}")
    return 4 if made.differences else 0


def _print_passport(made: Passport) -> None:
    width = max(len(form.name) for form in made.forms)
    columns = f"{{:{width}}} {{:14}} {{:14}} {{:14}} {{:14}} {{}}"
    print(columns.format("FORM", "DIGEST", "TREE", "ENVIRONMENT", "ENTRYPOINT", "STARTED"))
    for form in made.forms:
        shown = [
            form.name,
            form.digest.removeprefix("sha256:")[:12],
            (form.tree or "-")[:12],
            "-" if form.environment is None else sha256_value(form.environment)[:12],
            (form.entrypoint or "-")[:12],
            {None: "-", True: "yes", False: "differs"}[form.started],
        ]
        print(columns.format(*shown))
        for line in form.notes:
            _say(f"note: {form.name}: {line}")
    print("differs" if made.differences else "one image, as far as its forms are here")


def context(name: str, folder: Path, store_folder: Path | None, repository: Path) -> None:
    if folder.exists():
        raise UsageError("it exists already", where=str(folder), hint="give a new folder")
    write_context(load_recipe(name, repository.resolve()), open_store(store_folder), folder)
    print(folder)


def check(environment: str, dialect: str | None, repository: Path, *, as_json: bool) -> int:
    """Check an EDF; the exit code. dialect: the engine's; None: as of `check_edf`.

    Errors: ConfigError with every fault, unless they are printed as JSON.
    """
    known = next((name for name in DIALECTS if name == dialect), None)
    if dialect is not None and known is None:
        raise UsageError(f"--dialect: must be one of {', '.join(DIALECTS)} (got {dialect!r})")
    cwd = Path.cwd()
    env = {**os.environ, "PWD": str(cwd)}
    path = find_edf(environment, env, cwd)
    releases = read_releases(repository.resolve())
    faults = check_edf(path, env, cwd, releases, dialect=known)
    if as_json:
        print(json.dumps({"path": str(path), "faults": faults}, indent=2))
        return ConfigError.exit_code if faults else 0
    if faults:
        raise ConfigError(faults)
    print(f"ok: {path}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
