"""A checkpoint that was opened: its tensors, the method that quantized it, and what it says its model is."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.method import Method, method_for
from qcompile.checkpoint.store import TensorInfo, TensorStore, check_exists, open_store, read_json
from qcompile.errors import CheckpointError, shown

_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Where older versions of methods keep what belongs into config.json."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        store: the tensors, by the names that the model's parameters have.
        method: None if nothing is quantized.
        config: what transformers' `AutoConfig` makes of the model's description; None for a bare safetensors file.
    """

    store: TensorStore
    method: Method | None
    config: Any


def open_checkpoint(path: str | Path) -> Source:
    """What a file or folder holds, without reading a tensor.

    Raises:
        CheckpointError: nothing readable; names the file and the way out.
    """
    path = Path(path)
    check_exists(path)
    if path.suffix == ".gguf":
        from qcompile.checkpoint.gguf import gguf_source

        return gguf_source(path)
    store = open_store(path)
    if path.is_file():
        return Source(store, method_for(None, store), None)
    described = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    config = None
    if "model_type" in described:
        config = _transformers_config(path)
        _check_extents(path, config, store)
        store = renamed(store, config.model_type)
    return Source(store, method_for(quantization_config(path, described), store), config)


def quantization_config(folder: Path, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint, wherever its method keeps it, with its `quant_method`."""
    nested = described.get("text_config")
    for given in (described, nested if isinstance(nested, Mapping) else {}):
        found = given.get("quantization_config") or given.get("compression_config")
        if isinstance(found, dict):
            if "quant_method" not in found and "compression_config" in given:
                return {"quant_method": "compressed-tensors", **found}
            return found
    for file, method in _SIDE_FILES.items():
        if (folder / file).is_file():
            return {"quant_method": method, **read_json(folder / file)}
    return None


def check_installed(path: Path) -> None:
    """transformers makes the model; accelerate keeps its parameters on the meta device until they are read.

    Raises:
        CheckpointError: one of them is not installed.
    """
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(f'{path}: making its model needs {package}: `pip install "qcompile[hf]"`')


def _transformers_config(folder: Path) -> Any:
    check_installed(folder)
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind, with a configuration of any content
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} makes no model of it ({error}); give "
            "the model yourself: qcompile.load(path, model=...)"
        ) from None


_EXTENTS = ("hidden_size", "intermediate_size", "vocab_size", "head_dim")


def _check_extents(folder: Path, config: Any, store: TensorStore) -> None:
    """A model is built before its tensors are read, so its description must not ask for more than the files hold.

    Raises:
        CheckpointError: more layers than tensors, or extents beyond all that is stored.
    """
    text = config.get_text_config()
    names = store.names()
    stored = sum(math.prod(store.info(name).shape) * store.info(name).dtype.itemsize * 8 for name in names)
    for key, most in (("num_hidden_layers", len(names)), *((key, stored) for key in _EXTENTS)):
        value = getattr(text, key, None)
        if isinstance(value, int) and not 0 <= value <= most:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {shown(value)}, but the files hold {len(names)} tensors of "
                f"{stored // 8} bytes; they are of another model, or damaged"
            )


class _RenamedStore(TensorStore):
    """A store under other names."""

    def __init__(self, store: TensorStore, names: Mapping[str, str]) -> None:
        self._store, self._names = store, dict(names)
        self.path, self.metadata = store.path, store.metadata

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def info(self, name: str) -> TensorInfo:
        return self._store.info(self._names.get(name, name))

    def read(self, name: str) -> Tensor:
        return self._store.read(self._names.get(name, name))

    def copy(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self._store.copy(self._names.get(name, name), device, dtype)


def renamed(store: TensorStore, model_type: str) -> TensorStore:
    """The store under the names that transformers' modules have now, where they changed since checkpoints were made."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    changes = [c for c in get_checkpoint_conversion_mapping(model_type) or () if type(c) is WeightRenaming]
    if not changes:
        return store
    names = {}
    for name in store.names():
        new = name
        for change in changes:
            new = change.rename_source_key(new)[0]
        names[new] = name
    return _RenamedStore(store, names)
