"""Files that appear whole or not at all: written under a temporary name and renamed when all are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qcompile.checkpoint.store import INDEX
from qcompile.errors import ConfigError, shown

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(given: int | str) -> int:
    """Bytes, from a number or such as "5GB" or "500MB" (powers of 1000).

    Raises:
        ConfigError: neither, or not positive.
    """
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)B?", given.strip(), re.IGNORECASE) if isinstance(given, str) else None
    size = int(match[1]) * _UNITS[match[2].upper()] if match else given
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigError(f'max_shard_size is a number of bytes, or such as "5GB", not {shown(given)}')
    return size


class Staging:
    """New files of a folder, under temporary names until `publish`; what was not published is removed on leaving."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex[:8]
        self._staged: dict[str, Path] = {}

    def __enter__(self) -> Staging:
        self._new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self._staged.values():
            path.unlink(missing_ok=True)
        if error is not None and self._new and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def path(self, name: str) -> Path:
        """Where to write what will be called `name`."""
        return self._staged.setdefault(name, self.folder / f".{name}.{self._mark}.tmp")

    def rename(self, old: str, new: str) -> None:
        """Change what a staged file will be called."""
        self._staged[new] = self._staged.pop(old)

    def json(self, name: str, content: dict[str, Any]) -> None:
        """Stage a JSON file."""
        self.path(name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def copy(self, source: Path) -> None:
        """Stage a copy under the same name."""
        shutil.copyfile(source, self.path(source.name))

    def publish(self) -> tuple[Path, ...]:
        """Rename all, in the order in which they were staged: whoever reads a folder looks for config.json first."""
        published = []
        for name, path in list(self._staged.items()):
            os.replace(path, self.folder / name)
            published.append(self.folder / name)
            del self._staged[name]
        return tuple(published)


class Shards:
    """Tensors that go to safetensors files of limited size, as they come: one file's are in memory at a time."""

    def __init__(self, staging: Staging, limit: int) -> None:
        self.staging, self.limit = staging, limit
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor under its final name."""
        tensor = tensor.detach().to("cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self.limit:
            self._flush()
        self._waiting[name] = tensor
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._waiting, self.staging.path(str(len(self._written))), metadata={"format": "pt"})
        self._written.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0

    def finish(self) -> None:
        """Stage what is left, and the index if there are several files."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self.staging.rename("0", "model.safetensors")
            return
        where: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self.staging.rename(str(number), file)
            where |= dict.fromkeys(names, file)
        self.staging.json(INDEX, {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))})
