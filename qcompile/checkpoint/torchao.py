"""torchao checkpoints: its tensor subclasses in safetensors.

A parameter `M.weight` is stored as `M._weight_<attribute>`; the file's metadata maps `M.weight` to JSON that names the
class and the attributes that are no tensors. Layout: `torchao.prototype.safetensors` of https://github.com/pytorch/ao.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError, shown
from qcompile.packed import PackedLinear
from qcompile.torchao_tensors import Parts, read

_PREFIX = "_weight_"
_DESCRIPTION_CHARACTERS = 1 << 16


class _Stored(Parts):
    """A tensor in a file."""

    def __init__(self, tensors: LayerTensors, kind: str, data: Mapping[str, Any]) -> None:
        self.tensors, self.name, self.kind, self.data = tensors, tensors.name, kind, data

    def __contains__(self, part: str) -> bool:
        return _PREFIX + part in self.tensors

    def info(self, part: str) -> tuple[torch.dtype, tuple[int, ...]]:
        info = self.tensors.info(_PREFIX + part)
        return info.dtype, info.shape

    def take(self, part: str, *dtypes: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return self.tensors.take(_PREFIX + part, *dtypes, shape=shape)

    def error(self, reason: str) -> CheckpointError:
        return self.tensors.error(f"torchao's {shown(self.kind)}: {reason}")


@register
class TorchAO(Method):
    """Linears whose weight is one of torchao's tensor subclasses."""

    name = "torchao"

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        self.metadata = store.metadata

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        parts = [suffix for suffix in tensors.suffixes() if suffix.startswith(_PREFIX)]
        if not parts:
            return None
        described = self.metadata.get(f"{tensors.name}.weight")
        if described is None or len(described) > _DESCRIPTION_CHARACTERS:
            raise tensors.error(
                "the file's metadata does not say which class its weight is of; save the model again with torchao 0.15 "
                "or later and transformers 5"
            )
        try:
            description = json.loads(described)
        except (ValueError, RecursionError) as error:
            raise tensors.error(f"the file's metadata describes its weight in no JSON ({error})") from None
        if not isinstance(description, dict) or not isinstance(description.get("_data", {}), dict):
            raise tensors.error(f"the file's metadata describes its weight as {shown(description)}")
        stored = _Stored(tensors, str(description.get("_type")), description.get("_data", {}))
        found = read(stored, shape)
        tensors.ignore(*parts)
        return found
