"""The tensors of a checkpoint on disk, by name, read one at a time: safetensors files, alone or in shards.

Format: https://huggingface.co/docs/safetensors. The safetensors library checks each file's header (its size, offsets,
dtypes) when it opens it; what it does not know of, the index of shards, is checked here.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompile.errors import CheckpointError, nearest, shown

INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 64 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FILE_NAME = re.compile(r"[^/\\]{1,200}")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class TensorStore(ABC):
    """Named tensors on disk.

    Attributes:
        path: the file or folder.
        metadata: what the files say beside their tensors, strings by name.
    """

    path: Path
    metadata: Mapping[str, str]

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All names, in the files' order."""

    @functools.cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.names())

    def under(self, prefix: str) -> list[str]:
        """The names that begin with a prefix, sorted."""
        first = bisect.bisect_left(self._sorted, prefix)
        after = bisect.bisect_left(self._sorted, prefix + chr(sys.maxunicode), lo=first)
        return self._sorted[first:after]

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Dtype and shape, without reading the tensor.

        Raises:
            CheckpointError: no tensor has this name.
        """

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            CheckpointError: no tensor has this name, or its file changed.
        """

    def copy(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype, in memory of its own on a device; else as `read`."""
        return self.read(name).to(device, dtype, copy=True)


class SafetensorsStore(TensorStore):
    """Files that are opened once, and tensors that are read when they are asked for."""

    def __init__(self, path: Path, files: list[Path], where: Mapping[str, Path] | None = None) -> None:
        self.path = path
        self._files: dict[Path, Any] = {}
        self._infos: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            self._open(file, metadata)
        self.metadata = metadata
        for name, file in (where or {}).items():
            if name not in self._infos or self._infos[name].file != file:
                raise CheckpointError(f"{path / INDEX}: says that {name} is in {file.name}; it is not. Get it again")

    def _open(self, file: Path, metadata: dict[str, str]) -> None:
        try:
            opened = self._files[file] = safe_open(file, framework="pt")
            entries = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: no safetensors file, or a damaged one ({error}); get it again") from None
        for name, part in entries:
            if name in self._infos:
                other = self._infos[name].file.name
                raise CheckpointError(f"{file}: {name} is also in {other}; remove one of the files")
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{file}: {name} has dtype {part.get_dtype()}, which qcompile does not read")
            self._infos[name] = TensorInfo(dtype, tuple(part.get_shape()), file)
        metadata.update(opened.metadata() or {})

    def names(self) -> tuple[str, ...]:
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(f"{self.path}: has no tensor named {name}")
        return self._infos[name]

    def read(self, name: str) -> Tensor:
        info = self.info(name)
        try:
            tensor: Tensor = self._files[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read ({error}); get the file again") from None
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: missing, larger than 64 MB, or something else.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for a description of a model")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); get it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {shown(content)}, not an object")
    return content


def check_exists(path: Path) -> None:
    """
    Raises:
        CheckpointError: nothing is there; names what is there and is called alike.
    """
    if path.exists():
        return
    around = sorted(entry.name for entry in path.absolute().parent.glob("*"))
    near = ", ".join(nearest(path.name, around))
    hint = f"did you mean {near}?" if near else "a model of the Hub is downloaded first: `hf download OWNER/NAME`"
    raise CheckpointError(f"{path}: there is no such file or folder; {hint}")


def open_store(path: Path) -> TensorStore:
    """A safetensors file, or a folder with one, or with shards and their index.

    Raises:
        CheckpointError: nothing to read, pickles (with the way out), a damaged file, a shard that is missing or that
            the index does not name, or a name of a shard that leads elsewhere.
    """
    if path.is_file():
        return SafetensorsStore(path, [path])
    check_exists(path)
    index = path / INDEX
    if index.is_file():
        return _sharded(path, index)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return SafetensorsStore(path, files)
    pickles = [file.name for pattern in _PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{path}: holds {pickles[0]}, a pickle, which can run any code when it is read; convert it to safetensors "
            "with the library that wrote it: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{path}: holds no *.safetensors file; name a model's folder, or a .gguf file")


def _sharded(folder: Path, index: Path) -> TensorStore:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    where: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or not file.isprintable() or file in (".", ".."):
            raise CheckpointError(f"{index}: {shown(name)} is in {shown(file)}; shards are files of the same folder")
        where[name] = folder / file
    files = sorted(set(where.values()))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this shard is missing; get it from where the others came from")
    return SafetensorsStore(folder, files, where)
