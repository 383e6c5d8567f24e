"""Checkpoints of single layers for tests: tensors to a file, a file to a decoded weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.checkpoint.kv_scales import is_kv_scale
from qcompile.checkpoint.method import LayerTensors, LoadedLinear, method_for
from qcompile.checkpoint.store import TensorStore, open_store
from qcompile.modules import QuantizedLinear
from qcompile.reference import dequantize


def store_of(folder: Path, tensors: Mapping[str, Tensor]) -> TensorStore:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_store(folder)


def load_layer(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str = "x"
) -> LoadedLinear | Tensor | None:
    """What a method makes of a layer whose tensors have these suffixes; none of them may be left over."""
    store = store_of(folder, {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
    method = method_for(config, store)
    assert method is not None
    given = LayerTensors(store, name)
    found = method.linear(given, shape)
    if found is not None:
        assert set(store.names()) - given.taken == set()
    return found


def decoded(found: LoadedLinear | Tensor | None) -> Tensor:
    """The weight, once it is seen that a module can be made of the layer."""
    assert isinstance(found, LoadedLinear)
    QuantizedLinear(found.weight, found.scheme, None, found.input_scale, torch.float32, found.pre_quant_scale)
    assert (found.input_scale is not None) == (
        found.scheme.activation is not None and not found.scheme.activation.dynamic
    )
    return dequantize(found.weight)


def digest(weight: Tensor) -> str:
    """Of float32 numbers, where 0 and -0 are the same; as the scripts beside the fixtures compute it."""
    return hashlib.sha256((weight + 0.0).contiguous().numpy().tobytes()).hexdigest()


def linears(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, LoadedLinear]:
    """The quantized layers of a model, by name; of their tensors only scales of KV caches may be left over."""
    store = open_store(folder)
    method = method_for(config, store)
    assert method is not None
    result = {}
    for name, shape in shapes.items():
        given = LayerTensors(store, name)
        found = method.linear(given, shape)
        assert isinstance(found, LoadedLinear)
        assert all(is_kv_scale(f"{name}.{s}") for s in given.suffixes() if f"{name}.{s}" not in given.taken)
        result[name] = found
    return result
