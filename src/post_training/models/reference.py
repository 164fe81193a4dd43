"""Whose log-probabilities a dataset holds: `reference.json` beside its rows.

They are of one model, one tokenizer, one template and one dtype of the weights. A stage that goes
on from the rows carries the file on; a trainer compares it with the model it is given. The backend
that computed them is told where it is not transformers, and makes no other model: it moves the last
bits alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json, write_json
from post_training.core.hashing import (
    fingerprint_files,
    hash_named,
    sha256_of_any,
    sha256_text,
    sha256_value,
)
from post_training.data.config import DatasetConfig

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

REFERENCE = "reference.json"
SCHEMA = "post-training/reference/1"
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Reference:
    """weights: `weights_fingerprint` of the model's folder.
    tokenizer: `tokenizer_fingerprint`.
    chat_template: sha256 of its text.
    dtype: of the weights as they were loaded.
    backend: who computed the log-probabilities.
    """

    weights: str
    tokenizer: str
    chat_template: str
    dtype: str
    backend: str = "transformers"

    def as_record(self) -> dict[str, str]:
        """What `Reference(**record)` is made of."""
        record = asdict(self)
        if self.backend == "transformers":
            del record["backend"]
        return record

    def write(self, folder: Path) -> None:
        write_json(folder / REFERENCE, {"schema": SCHEMA, **self.as_record()})

    @classmethod
    def read(cls, folder: Path) -> "Reference | None":
        """None where the rows in `folder` have no reference. Errors: UsageError for a file that is
        not one of these."""
        path = folder / REFERENCE
        if not path.exists():
            return None
        record = read_json(path, SCHEMA)
        del record["schema"]
        try:
            return cls(**record)
        except TypeError as error:
            raise UsageError(f"not a reference: {error}", where=str(path)) from None

    def check(self, other: "Reference", where: str) -> None:
        """Compare all but the backend.

        where: whose `self` is, for the error.
        Errors: PostTrainingError that names what differs.
        """
        own, others = asdict(self), asdict(replace(other, backend=self.backend))
        different = [name for name in own if own[name] != others[name]]
        if different:
            first = different[0]
            raise PostTrainingError(
                f"the reference log-probabilities are of another model: {', '.join(different)} "
                f"({first} is {own[first][:12]}, must be {others[first][:12]})",
                where=where,
                hint="run `entrypoint logprobs` with the model that is trained",
            )


def weights_fingerprint(folder: Path) -> str:
    """Of the weights and the architecture of a model folder; its tokenizer doesn't count."""
    files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    names = [path.name for path in files]
    return fingerprint_files(hash_named(folder, names, sha256_of_any))


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Of what decides the ids of a text: the tokenizer itself and its special tokens' names; not
    of its chat template or its folder."""
    return sha256_value([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])


def reference_of(
    model_path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    dtype: str,
    backend: str = "transformers",
) -> Reference:
    """Reads the whole weights of the folder. template: text of the chat template."""
    return Reference(
        weights_fingerprint(model_path),
        tokenizer_fingerprint(tokenizer),
        sha256_text(template),
        dtype,
        backend,
    )


def common_reference(datasets: Sequence[DatasetConfig]) -> Reference | None:
    """None where no dataset has one. Errors: UsageError where they have different ones."""
    folders = [_folder(dataset.path) for dataset in datasets if dataset.path is not None]
    references = {folder: Reference.read(folder) for folder in folders}
    if len(folders) < len(datasets) and any(references.values()):
        references[Path("the hub")] = None
    first, *others = references or {Path(): None}
    for other in others:
        if references[other] != references[first]:
            raise UsageError(
                f"the reference log-probabilities of {first} and {other} are of different models "
                f"or backends, or one has no {REFERENCE}",
                where="data.datasets",
                hint="run `entrypoint logprobs` once for all of them",
            )
    return references[first] if references else None


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
