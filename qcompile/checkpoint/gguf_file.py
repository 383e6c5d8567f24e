"""The container of GGUF: its directory, read within bounds that the file's size sets, and the bytes of its tensors.

Nothing a file states is believed: every count, length, dimension and offset is compared with what the file holds before
anything is allocated for it.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES, OTHER_TYPES, PLAIN_TYPES
from qcompile.errors import CheckpointError, shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# What a directory may hold at most, far beyond any model's. Without them a large file could fill memory with its names.
_MOST_VALUES = 1 << 16
_MOST_TENSORS = 1 << 18
_MOST_TEXT = 1 << 26
_MOST_ELEMENTS = 1 << 22
"""Of all arrays together. What builds the tokenizer later takes some hundred bytes and microseconds for each."""

_KEPT_ELEMENTS = 1 << 12
"""Arrays of numbers up to this length are kept: those that hold a value a layer."""

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: in the file.
        kind: number of its type, one of `BLOCK_TYPES` or `PLAIN_TYPES`.
        shape: outermost first, as torch has it; the file lists it the other way round.
        file, offset: of its first byte.
        row_bytes: of a row, the last dimension.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    row_bytes: int

    def rows(self, start: int, stop: int) -> Tensor:
        """The bytes of rows, all but the last dimension flattened: uint8 [stop - start, row_bytes].

        Raises:
            CheckpointError: the file has become shorter since its directory was read.
        """
        buffer = torch.empty(stop - start, self.row_bytes, dtype=torch.uint8)
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset + start * self.row_bytes)
                count = file.readinto(memoryview(buffer.numpy()).cast("B"))  # type: ignore[arg-type]
        except OSError as error:
            raise CheckpointError(f"cannot read {self.name} from {self.file}: {error.strerror}") from None
        if count != buffer.numel():
            raise CheckpointError(f"{self.file}: truncated: {self.name} is cut short; get the file again")
        return buffer


@dataclass(frozen=True)
class GgufFile:
    """A directory.

    Attributes:
        path: of the file, or of the first of a split model's.
        metadata: numbers, strings, and short arrays of numbers; a longer array, or one of strings, is left to who needs
            it and is here as None.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    """Takes values off a file's front, never more than it has."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0
        self.elements = self.text_bytes = 0

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def truncated(self, what: str) -> NoReturn:
        self.fail(f"truncated: {self.size} bytes end within {what}; get the file again")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            self.truncated(what)
        content = self.file.read(count)
        if len(content) != count:
            self.truncated(what)
        self.position += count
        return content

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            self.truncated(what)
        self.file.seek(count, 1)
        self.position += count

    def number(self, code: str, what: str) -> Any:
        content = self.take(struct.calcsize(f"<{code}"), what)
        return content[0] != 0 if code == "?" else struct.unpack(f"<{code}", content)[0]

    def count(self, most: int, what: str) -> int:
        count = int(self.number("Q", "its header"))
        if count > most:
            self.fail(f"damaged: the header states {count} {what}; at most {most} are read")
        return count

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        self.text_bytes += length
        if self.text_bytes > _MOST_TEXT:
            self.fail(f"damaged: {what} states a length of {length} bytes; texts may have {_MOST_TEXT} in all")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"damaged: {what} is not UTF-8")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        self.fail(f"{what} has the unknown value type {kind}; the file is damaged, or newer than this reader")

    def array(self, what: str) -> list[Any] | None:
        kind, count = self.number("I", what), self.number("Q", what)
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            self.fail(f"{what} states {count} elements; the arrays of a file may have {_MOST_ELEMENTS} in all")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q", what), what)
            return None
        if kind not in _SCALARS:
            self.fail(f"{what} is an array of value type {kind}; only numbers and strings can be read")
        code = _SCALARS[kind]
        if count > _KEPT_ELEMENTS:
            self.skip(count * struct.calcsize(f"<{code}"), what)
            return None
        return [self.number(code, what) for _ in range(count)]

    def name(self, what: str) -> str:
        name = self.text(what)
        if not name or not name.isprintable():
            self.fail(f"damaged: {what} is {shown(name)}")
        return name


def _row_bytes(reader: _Reader, name: str, kind: int, columns: int) -> int:
    if kind in PLAIN_TYPES:
        return columns * PLAIN_TYPES[kind].itemsize
    if kind not in BLOCK_TYPES:
        known = [str(dtype).removeprefix("torch.") for dtype in PLAIN_TYPES.values()]
        known += [block.name for block in BLOCK_TYPES.values()]
        reader.fail(
            f"{name} is of type {OTHER_TYPES.get(kind, f'number {kind}')}, which cannot be read; take a file of other "
            f"types, or convert it with llama.cpp: `llama-quantize --allow-requantize in.gguf out.gguf Q4_K_M` "
            f"(readable: {', '.join(known)})"
        )
    block = BLOCK_TYPES[kind]
    if columns % block.columns:
        reader.fail(f"{name}: rows of {columns} weights cannot be {block.name}, whose blocks hold {block.columns}")
    return columns // block.columns * block.nbytes


def _read_directory(path: Path) -> GgufFile:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot read {path}: not a file")
    try:
        with path.open("rb") as file:
            return _walk(_Reader(path, file, path.stat().st_size))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _walk(reader: _Reader) -> GgufFile:
    path, size = reader.path, reader.size
    magic = reader.file.read(4)
    if magic != _MAGIC:
        reader.fail(f"not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
    reader.position = 4
    version = reader.number("I", "its header")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS
        kind = "a big-endian file" if swapped else f"GGUF version {version}"
        reader.fail(f"{kind}; readable are little-endian files of versions {' and '.join(map(str, _VERSIONS))}")
    tensor_count, value_count = reader.count(_MOST_TENSORS, "tensors"), reader.count(_MOST_VALUES, "metadata values")

    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.name("the name of a metadata value")
        if key in metadata:
            reader.fail(f"damaged: the metadata names {key} twice")
        metadata[key] = reader.value(reader.number("I", key), key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        reader.fail(f"damaged: general.alignment is {shown(alignment)}, not a power of two")

    found: list[tuple[str, int, tuple[int, ...], int, int, int]] = []
    names: set[str] = set()
    for _ in range(tensor_count):
        name = reader.name("the name of a tensor")
        if name in names:
            reader.fail(f"damaged: two tensors are named {name}")
        names.add(name)
        dimensions = reader.number("I", name)
        if not 1 <= dimensions <= 4:
            reader.fail(f"damaged: {name} has {dimensions} dimensions")
        shape = tuple(reversed([reader.number("Q", name) for _ in range(dimensions)]))
        kind, offset = reader.number("I", name), reader.number("Q", name)
        if 0 in shape:
            reader.fail(f"{name} is empty, {shape}")
        row_bytes = _row_bytes(reader, name, kind, shape[-1])
        nbytes = math.prod(shape[:-1]) * row_bytes
        if offset % alignment:
            reader.fail(f"damaged: {name} begins at {offset}, no multiple of the alignment {alignment}")
        if nbytes > size or offset > size - nbytes:
            reader.truncated(f"{name} ({nbytes} bytes from {offset} on, behind the directory)")
        found.append((name, kind, shape, offset, row_bytes, nbytes))

    data = -(-reader.position // alignment) * alignment
    end = 0
    for name, _, _, offset, _, nbytes in sorted(found, key=lambda entry: entry[3]):
        if offset < end:
            reader.fail(f"damaged: {name} overlaps the tensor before it")
        end = offset + nbytes
        if data + end > size:
            reader.truncated(name)
    tensors = {
        name: GgufTensor(name, kind, shape, path, data + offset, row_bytes)
        for name, kind, shape, offset, row_bytes, _ in found
    }
    return GgufFile(path, metadata, tensors)


def open_gguf(path: Path) -> GgufFile:
    """Read the directory of a GGUF file, and those of its sequels where a model is split.

    Args:
        path: a file, or the first of `name-00001-of-0000N.gguf`.

    Raises:
        CheckpointError: missing, not GGUF, of an unknown version, truncated, damaged, with a tensor of a type that
            cannot be read, or with a part missing.
    """
    first = _read_directory(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return first
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count or first.metadata.get("split.no") != 0:
        raise CheckpointError(
            f"{path}: one of the {count} parts of a split model; give the first, named NAME-00001-of-{count:05}.gguf, "
            f"with the others beside it"
        )
    tensors = dict(first.tensors)
    for number in range(1, count):
        part = _read_directory(path.with_name(f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf"))
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise CheckpointError(f"{part.path}: not part {number + 1} of {count}; get the file again")
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.path}: {sorted(twice)[0]} is in an earlier part already")
        tensors |= part.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(f"{path}: states {stated} tensors in all parts; they hold {len(tensors)}")
    return GgufFile(path, first.metadata, tensors)
