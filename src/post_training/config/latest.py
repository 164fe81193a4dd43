"""A folder that names the newest of the folders in it, in a file: `latest` as DeepSpeed, GPT-NeoX
and runs of this project write it, latest_checkpointed_iteration.txt as Megatron does.

The setting becomes the folder that is meant, so what is fingerprinted and recorded is that one: the
folder above may hold many, and its `latest` may change. A setting that takes a model refuses a
checkpoint of GPT-NeoX or Megatron.
"""

from pathlib import Path

_MEGATRON = "latest_checkpointed_iteration.txt"
_LATEST = "latest"
# A folder with one of these is a model or a checkpoint itself.
_OWN = ("config.json", "adapter_config.json", "common.pt", ".metadata")


def newest_checkpoint(folder: Path) -> Path:
    """The folder that `folder` says is the newest; `folder` itself where it says nothing, or is not
    there (on the machine that only submits).

    Errors: ValueError where it names what is not there.
    """
    if any((folder / name).exists() for name in _OWN):
        return folder
    if (tracker := folder / _MEGATRON).is_file():
        name = tracker.read_text().strip()
        return _within(folder, f"iter_{int(name):07d}" if name.isdecimal() else name, tracker)
    if (tracker := folder / _LATEST).is_file():
        return _within(folder, tracker.read_text().strip(), tracker)
    return folder


def _within(folder: Path, name: str, tracker: Path) -> Path:
    if not name or Path(name).name != name or name in (".", ".."):
        raise ValueError(f"{tracker} must name a folder beside it (it says {name!r})")
    if not (folder / name).is_dir():
        raise ValueError(f"{tracker} names {name}, and there is no such folder beside it")
    return folder / name


def newest_model(folder: Path | None) -> Path | None:
    """As newest_checkpoint, of a setting that takes a model of Hugging Face and may be left out.

    Errors: as of newest_checkpoint; ValueError for a checkpoint of another system.
    """
    if folder is None:
        return None
    chosen = newest_checkpoint(folder)
    if not (chosen / "config.json").exists() and (system := _other_system(chosen)):
        raise ValueError(
            f"{chosen} is a checkpoint of {system}, not a model of Hugging Face: "
            "`entrypoint convert` makes one of it"
        )
    return chosen


def _other_system(folder: Path) -> str | None:
    # DeepSpeed keeps states of a training in files; Megatron in folders of its ranks, or in one.
    if any(folder.glob("*model_states.pt")):
        return "GPT-NeoX"
    if (folder / "common.pt").exists() or any(folder.glob("mp_rank_*/*.pt")):
        return "Megatron-LM"
    return None
