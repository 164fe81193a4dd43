"""From an EDF's settings to Singularity's command line, for sites that have no engine for EDFs.

    mounts  ->  --bind        [env]  ->  SINGULARITYENV_NAME        workdir  ->  --pwd
                              an empty value  ->  env -u NAME, before the command

Apptainer is the same program under another name, with APPTAINERENV_NAME.

SINGULARITYENV_ variables are over the image's own, as [env] is; `--env` cannot say a value with a
comma, and NCCL_SOCKET_IFNAME has three. What stays of the EDF: annotations and devices, which name
hooks of the other engine. An image is always read-only there.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.secrets import FoundCredentials
from post_training.images.edf import IMAGE_SOURCE, fill_in_variables, merge_edf
from post_training.images.layer import layer_mounts
from post_training.images.render import NO_CREDENTIALS, image_environment
from post_training.images.store import ImageStore
from post_training.slurm.site import Launcher


def bind(mount: str) -> str:
    """`--bind=…` of an EDF's mount. Errors: UsageError for a flag that has no counterpart."""
    source, target, flags = (*mount.split(":"), "", "")[:3]
    target = target or source
    words = [word for word in flags.split("+") if word]
    if len(words) == 1 and words[0].startswith(IMAGE_SOURCE):
        return f"--bind={source}:{target}:{words[0]}"
    if unknown := sorted({*words} - {"ro", "rw"}):
        raise UsageError(f"Singularity has no flag {unknown[0]!r} for a bind", where=mount)
    if not words:
        return f"--bind={source}" if source == target else f"--bind={source}:{target}"
    return f"--bind={source}:{target}:{words[-1]}"


def singularity_words(
    launcher: Launcher,
    mounts: Iterable[str],
    working_dir: str,
    image: str,
    variables: Mapping[str, str],
) -> list[str]:
    """Everything before the command to run. variables: [env]; those without a value are unset,
    inside, since the image may set them too."""
    unset = [word for name, value in variables.items() if not value for word in ("-u", name)]
    return [
        *(launcher.command, "exec", *launcher.options),
        *(bind(mount) for mount in mounts),
        f"--pwd={working_dir}",
        image,
        *(["env", *unset] if unset else []),
    ]


def render_script(
    site_name: str,
    launcher: Launcher,
    site_file: Path,
    record: Mapping[str, Any],
    store: ImageStore,
    credentials: FoundCredentials = NO_CREDENTIALS,
) -> str:
    """A script that runs its arguments in the image: `./run.sh entrypoint sft cfg.yaml`.

    Variables of the site file stay, and the shell expands them where it runs.
    Errors: UsageError when the image has no SIF.
    """
    image = sif_of(record, store)
    edf = merge_edf(site_file, os.environ, Path.cwd())
    variables = {
        **dict(credentials.variables),
        **edf.get("env", {}),
        **image_environment(record, image),
    }
    mounts = [
        *edf.get("mounts", []),
        f"{store.folder}:{store.folder}:ro",
        *layer_mounts(record, store),
        *credentials.mounts,
    ]
    variables = {
        name: fill_in_variables(value, record.get("environment", {}))
        for name, value in variables.items()
    }
    workdir = edf.get("workdir", "${PWD}")
    words = singularity_words(launcher, mounts, workdir, str(image), variables)
    lines = [
        "#!/bin/bash",
        f"# {record['name']} {record['version']} for the site {site_name!r}: give it a command.",
        "# Rendered: edit the site's file in edf/ and render it again instead.",
        "set -euo pipefail",
        *(
            f"export {launcher.variable_prefix}{name}={shell_word(value)}"
            for name, value in variables.items()
            if value
        ),
    ]
    if launcher.gpu_variable:
        # One of several tasks on its node sees the device of its number. Outside of Slurm, and
        # alone on its node, a task sees all.
        lines += [
            "case ${SLURM_STEP_TASKS_PER_NODE:-1} in",
            '    1 | "1("*) ;;',
            f'    *) export {launcher.gpu_variable}="$SLURM_LOCALID" ;;',
            "esac",
        ]
    lines += ["exec \\", *(f"    {shell_word(word)} \\" for word in words), '    "$@"']
    return "\n".join(lines) + "\n"


def sif_of(record: Mapping[str, Any], store: ImageStore) -> Path:
    """Errors: UsageError when the image has no SIF."""
    if not record.get("sif_sha256"):
        raise UsageError(
            f"{record['name']} {record['version']} has no SIF in the store",
            where=str(store.folder),
            hint=f"`post-training image push-sif {record['name']}` makes one",
        )
    return store.sif_path(record["sif_sha256"])


def script_exports(launcher: Launcher, variables: Mapping[str, str]) -> list[str]:
    """Lines that set `variables` in a container; their values are as they are, and expanded."""
    prefix = launcher.variable_prefix
    return [f"export {prefix}{name}={shlex.quote(v)}" for name, v in variables.items() if v]


def shell_word(text: str) -> str:
    """A word of bash in which an EDF's `${NAME}` and `${NAME:-default}` are expanded, and nothing
    else; `$${NAME}` and `$$NAME` stand for `${NAME}` and `$NAME`."""
    text = re.sub(r"\$\$(?=[A-Za-z_])", "$", text)
    if "${" not in text:
        return shlex.quote(text)
    kept = text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")
    parts = kept.replace("$${", "\0").split("${")
    escaped = [part.replace("$", "\\$").replace("\0", "\\${") for part in parts]
    return '"' + "${".join(escaped) + '"'
