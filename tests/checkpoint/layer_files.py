"""Checkpoints of single layers for tests: tensors to a file, a file to a decoded weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.checkpoint.kv_scales import is_kv_scale
from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import TensorStore, open_store
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.reference import dequantize
from tests.checkpoint.integer_files import LLAMA_FLOOR
from tests.tolerance import float_sqnr_floor, sqnr, uniform_sqnr_floor

INT8_FLOOR = uniform_sqnr_floor(8, 128)
"""Of inputs in int8; a row has 128 numbers at most."""


def store_of(folder: Path, tensors: Mapping[str, Tensor]) -> TensorStore:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_store(folder)


def load_layer(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str = "x"
) -> PackedLinear | Tensor | None:
    """What a method makes of a layer whose tensors have these suffixes; none of them may be left over."""
    store = store_of(folder, {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
    method = method_for(config, store)
    assert method is not None
    given = LayerTensors(store, name)
    found = method.linear(given, shape)
    if found is not None:
        assert set(store.names()) - given.taken == set()
    return found


def decoded(found: PackedLinear | Tensor | None) -> Tensor:
    """The weight, once it is seen that a module can be made of the layer."""
    assert isinstance(found, PackedLinear)
    QuantizedLinear(found.weight, found.scheme, None, found.input_scale, torch.float32, found.pre_quant_scale)
    assert (found.input_scale is not None) == (
        found.scheme.activation is not None and not found.scheme.activation.dynamic
    )
    return dequantize(found.weight)


def digest(weight: Tensor) -> str:
    """Of float32 numbers, where 0 and -0 are the same; as the scripts beside the fixtures compute it."""
    return hashlib.sha256((weight + 0.0).contiguous().numpy().tobytes()).hexdigest()


def fp8_tensors(
    shape: tuple[int, int],
    tile: tuple[int, int] | None,
    suffix: str = "weight_scale_inv",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], Tensor]:
    """A random layer in FP8, and its weight.

    Args:
        tile: rows and columns that share a scale, the last ones fewer; by default there is one scale, [].
        scale_dtype: float32, or float8_e8m0fnu for powers of two.
    """
    codes = torch.randn(shape).to(dtype)
    rows, columns = tile or shape
    scale = torch.rand(-(-shape[0] // rows), -(-shape[1] // columns)) / 8
    if scale_dtype != torch.float32:
        scale = torch.randint(-7, -2, scale.shape).float().exp2()
    whole = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    scale = (scale if tile else scale.reshape(())).to(scale_dtype)
    return {"weight": codes, suffix: scale}, codes.float() * whole[: shape[0], : shape[1]]


def linears(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, PackedLinear]:
    """The quantized layers of a model, by name; of their tensors only scales of KV caches may be left over."""
    store = open_store(folder)
    method = method_for(config, store)
    assert method is not None
    result = {}
    for name, shape in shapes.items():
        given = LayerTensors(store, name)
        found = method.linear(given, shape)
        assert isinstance(found, PackedLinear)
        assert all(is_kv_scale(f"{name}.{s}") for s in given.suffixes() if f"{name}.{s}" not in given.taken)
        result[name] = found
    return result


def check_model(folder: Path, expected: nn.Module) -> nn.Module:
    """`qcompile.load` makes a model with the weights of `expected`, bit for bit, and nearly its logits."""
    model = qcompile.load(folder, dtype=torch.float32, progress=False)
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(model.get_submodule(name).weight, module.weight), name
    check_logits(model, expected)
    return model


def check_logits(model: nn.Module, expected: nn.Module, rounding_floor: float = LLAMA_FLOOR) -> None:
    """A model with quantized linears computes nearly the logits of one without.

    Two evaluations in float32 differ by rounding; where inputs are quantized, each linear adds their noise, and noises
    are independent.

    Args:
        rounding_floor: the least SQNR in dB where no inputs are quantized.
    """
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) >= 7
    activations = {module.scheme.activation for module in quantized} - {None}
    worst = min(
        (float_sqnr_floor(3) if a.format.name.startswith("fp8") else INT8_FLOOR for a in activations), default=0
    )
    floor = worst - 10 * math.log10(len(quantized)) if activations else rounding_floor
    with torch.no_grad():
        tokens = torch.arange(12, device=next(expected.parameters()).device).view(1, 12)
        assert sqnr(expected(tokens).logits, model(tokens).logits) >= floor


def check_fixture(folder: Path, **overridden: Any) -> list[PackedLinear]:
    """A model that its producer saved: all layers of expected.json decode to those weights, and the model runs.

    Args:
        overridden: a `quantization_config` in place of the one in config.json.

    Returns:
        the layers.
    """
    described = json.loads((folder / "config.json").read_text())
    config = overridden.get("quantization_config", described.pop("quantization_config"))
    expected = json.loads((folder / "expected.json").read_text())
    plain = LlamaForCausalLM(LlamaConfig.from_dict(described)).to(torch.float32).eval()
    shapes = {name: (m.out_features, m.in_features) for name, m in plain.named_modules() if name in expected}
    layers = linears(folder, config, shapes)
    assert len(layers) == len(expected) >= 7
    store = open_store(folder)
    kept = [name for name in plain.state_dict() if name.removesuffix(".weight") not in expected]
    plain.load_state_dict({name: store.read(name) for name in kept}, strict=False)
    for name, layer in layers.items():
        weight = decoded(layer)
        assert digest(weight) == expected[name], name
        scale = 1.0 if layer.pre_quant_scale is None else layer.pre_quant_scale
        plain.get_submodule(name).weight.data = weight * scale
    check_logits(qcompile.load(folder, dtype=torch.float32, progress=False), plain)
    return list(layers.values())
