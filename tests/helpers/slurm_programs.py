"""A folder with an EDF, and stand-ins for Slurm's programs that write down their use."""

from pathlib import Path

EDF = """
image = "image.sqsh"
writable = false
mounts = ["${PWD}:${PWD}"]
[env]
POST_TRAINING_SITE = "laptop"
POST_TRAINING_IMAGE_SQSH_SHA256 = "33"
POST_TRAINING_IMAGE_INPUT_HASH = "44"
"""
CHILD = 'base_environment = "./base.toml"\n[env]\nEXTRA = "1"\n'
# Ids are 77, 78, …; a file `refuse` beside the configuration holds the id that is refused.
SBATCH = """\
here=$(dirname "$0")
env >"$here/sbatch-env"
printf '%s\\0' "$@" >"$here/sbatch-words"
printf 'x' >>"$here/sbatch-calls"
id=$((76 + $(wc -c <"$here/sbatch-calls")))
[[ ! -e refuse || ($(<refuse) && $(<refuse) != "$id") ]] || { echo no account >&2; exit 1; }
echo "${*:2}" >"$here/sbatch-$id"
echo "$id;cluster"
"""
SQUEUE = """\
env >"$(dirname "$0")/squeue-env"
case $* in
    *--states=all*) cat "$(dirname "$0")/ended" ;;
    *) cat "$(dirname "$0")/queue" ;;
esac
"""
SACCT = """\
cat "$(dirname "$0")/accounting" || { echo Slurm accounting storage is disabled >&2; exit 1; }
"""
PROGRAMS = {
    "sbatch": SBATCH,
    "scontrol": 'echo "$@" >>"$(dirname "$0")/scontrol-words"\n',
    # Without a file `accounting` there is none; then `ended` is what the controller remembers.
    "sacct": SACCT,
    "squeue": SQUEUE,
    "scancel": 'echo "$@" >>"$(dirname "$0")/cancelled"\n',
}


def write_programs(folder: Path) -> Path:
    """The folder of the programs, in `folder`, which gets the EDFs."""
    (folder / "base.toml").write_text(EDF)
    (folder / "post-training.toml").write_text(CHILD)
    (folder / "image.sqsh").touch()
    programs = folder / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        (programs / name).write_text("#!/bin/bash\n" + body)
        (programs / name).chmod(0o755)
    return programs
