"""A folder of torch.distributed.checkpoint, which Megatron calls `torch_dist`.

    .metadata       the tensors: name, shape, dtype, and where each of their chunks is
    __0_0.distcp …  chunks, each as torch.save writes a tensor, one behind the other

A chunk is read by its offset and length; a file is never read whole.
"""

import io
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from post_training.core.errors import PostTrainingError, first_line
from post_training.models.conversion.torch_files import read_dist_metadata, read_torch_stream
from post_training.models.lazy_tensors import LazyTensor


class DistFolder:
    """names: {name: (shape, dtype)} of its tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metadata = read_dist_metadata(folder / ".metadata")
        self.names = {
            name: (tuple(found.size), found.properties.dtype)
            for name, found in self._metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self._sizes: dict[str, int] = {}

    def tensor(self, name: str, leading: tuple[int, ...] = ()) -> LazyTensor:
        """A tensor, or that part of it where the first dimensions have the indices `leading`.

        Errors: PostTrainingError where chunks do not cover it, or a file of it is missing or short.
        """
        shape, dtype = self.names[name]
        chunks = self._chunks(name, leading)
        rest = shape[len(leading) :]
        covered = sum(prod(sizes[len(leading) :]) for _, sizes, _ in chunks)
        if covered != prod(rest):
            raise PostTrainingError(
                f"{name}: its chunks hold {covered:,} of {prod(rest):,} values",
                where=str(self.folder / ".metadata"),
            )
        for _, _, stored in chunks:
            self._check_file(name, stored)

        def read() -> Tensor:
            if len(chunks) == 1:
                return self._read(name, *chunks[0], leading).reshape(rest)
            whole = torch.empty(rest, dtype=dtype)
            for offsets, sizes, stored in chunks:
                part = self._read(name, offsets, sizes, stored, leading)
                places = tuple(
                    slice(start, start + size)
                    for start, size in zip(
                        offsets[len(leading) :], sizes[len(leading) :], strict=True
                    )
                )
                whole[places] = part
            return whole

        return LazyTensor(rest, dtype, read)

    def _chunks(self, name: str, leading: tuple[int, ...]) -> list[tuple[Any, Any, Any]]:
        """(offsets, sizes, where it is stored) of the chunks that have a part of it."""
        found = []
        for chunk in self._metadata.state_dict_metadata[name].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if all(
                start <= index < start + size
                for index, start, size in zip(leading, offsets, sizes, strict=False)
            ):
                stored = self._metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
                if stored is None:
                    raise PostTrainingError(
                        f"{name}: the chunk at {list(offsets)} is in no file",
                        where=str(self.folder / ".metadata"),
                    )
                found.append((offsets, sizes, stored))
        return found

    def _check_file(self, name: str, stored: Any) -> None:
        file = stored.relative_path
        path = self.folder / file
        if Path(file).name != file:
            raise PostTrainingError(
                f"{name} is said to be in {file!r}, which is no file of this folder",
                where=str(self.folder / ".metadata"),
            )
        if file not in self._sizes:
            if not path.exists():
                raise PostTrainingError(
                    f"the file is missing (it has a part of {name})", where=str(path)
                )
            self._sizes[file] = path.stat().st_size
        if stored.offset + stored.length > self._sizes[file]:
            raise PostTrainingError(
                f"cut off: {self._sizes[file]:,} bytes, must be ≥ "
                f"{stored.offset + stored.length:,} (for {name})",
                where=str(path),
                hint="copy it again, and compare the sizes",
            )

    def _read(
        self, name: str, offsets: Any, sizes: Any, stored: Any, leading: tuple[int, ...]
    ) -> Tensor:
        path = self.folder / stored.relative_path
        with open(path, "rb") as file:
            file.seek(stored.offset)
            data = io.BytesIO(file.read(stored.length))
        dtype = self.names[name][1]
        try:
            chunk = read_torch_stream(data)
            if chunk.dtype != dtype:
                raise ValueError(f"the chunk is {chunk.dtype}, must be {dtype}")
            # Megatron stores a layer's tensor without the dimension of the layers, or with it.
            chunk = chunk.reshape(sizes)
        except MemoryError:
            raise
        except Exception as error:  # Of bytes that are none of its, torch makes errors of any type.
            raise PostTrainingError(
                f"{name}: no chunk of a tensor of {list(sizes)} at byte {stored.offset:,}: "
                f"{first_line(error)}",
                where=str(path),
                hint="copy it again, and compare the sizes",
            ) from None
        for index, start in zip(leading, offsets, strict=False):
            chunk = chunk[index - start]
        return chunk
