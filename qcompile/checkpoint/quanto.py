"""optimum-quanto: int2, int4, int8 and float8 weights with the names of its tensor subclasses.

Layout: `WeightQBitsTensor`, `WeightQBytesTensor` and `PackedTensor` of https://github.com/huggingface/optimum-quanto.
Activations are quantized where the sidecar `quantization_map.json` (or `quanto_qmap.json`) says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.flat_blocks import group_granularity, spread_blocks
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore, read_json
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import ActivationScheme, Granularity, Scheme, WeightScheme

_FLOATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_BYTES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
_ACTIVATIONS = {"qint8": "int8", "qfloat8": "fp8_e4m3", "qfloat8_e4m3fn": "fp8_e4m3", "qfloat8_e5m2": "fp8_e5m2"}
_QINTS = {"qint2": 2, "qint4": 4}
_PACKED = "weight._data._data"
_MAPS = ("quantization_map.json", "quanto_qmap.json")


@register
class Quanto(Method):
    """Linears that `optimum.quanto.QLinear` saved, frozen."""

    name = "quanto"

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        self.layers = _quantization_map(store)

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        names = self.layers.get(tensors.name, {})
        if _PACKED in tensors:
            packed = _few_bits(tensors, shape, names.get("weights"))
        elif "weight._data" in tensors:
            packed = _eight_bits(tensors, shape)
        else:
            tensors.ignore("input_scale", "output_scale")
            return None
        activation, input_scale = _activation(tensors, names.get("activations", "none"))
        tensors.ignore("input_scale", "output_scale")
        return PackedLinear(
            weight=packed,
            scheme=Scheme(weight=packed.scheme, activation=activation, method=CHECKPOINT),
            input_scale=input_scale,
        )


def _eight_bits(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
    """W = q * scale, a scale for each row or one for all."""
    dtype = tensors.info("weight._data").dtype
    if dtype not in _BYTES:
        raise tensors.error(
            f"weight._data is {dtype}; readable are {', '.join(map(str, _BYTES))}; quantize the original model again "
            "with one of qint8, qfloat8_e4m3fn, qfloat8_e5m2"
        )
    codes = tensors.take("weight._data", dtype, shape=shape).view(torch.uint8)
    fmt = get_format(_BYTES[dtype])
    if dtype == torch.int8:
        codes = codes ^ 0x80
    scale = _floats(tensors, "weight._scale")
    if scale.numel() not in (1, shape[0]):
        raise tensors.error(f"weight._scale has {scale.numel()} values for {shape[0]} rows; get the file again")
    per_row = scale.numel() == shape[0]
    scheme = WeightScheme(
        format=fmt,
        granularity=Granularity.channel() if per_row else Granularity.tensor(),
        scale_dtype=_FLOATS[scale.dtype],
    )
    return PackedWeight.from_codes(codes, scale.view(-1, 1), None, scheme, layer=tensors.name)


def _few_bits(tensors: LayerTensors, shape: tuple[int, int], qtype: str | None) -> PackedWeight:
    """W = q * scale - shift with a shift in floating point, else (q - shift) * scale; [groups, group size] reshaped."""
    scale = _floats(tensors, "weight._scale")
    count = scale.numel()
    group = shape[0] * shape[1] // max(count, 1)
    if group == 0 or count * group != shape[0] * shape[1]:
        raise tensors.error(f"weight._scale has {count} values, which do not divide {shape[0]} x {shape[1]} weights")
    stored = tuple(tensors.info(_PACKED).shape)
    fitting = [bits for bits in _QINTS.values() if stored == (-(-count * bits // 8), group)]
    if qtype is not None:
        fitting = [bits for bits in fitting if bits == _QINTS.get(qtype)]
    if len(fitting) != 1:
        wanted = f"{qtype}, as the quantization map says" if qtype is not None else "either of qint2 and qint4"
        raise tensors.error(f"{_PACKED} has shape {stored}; {count} groups of {group} in {wanted} do not look so")
    bits = fitting[0]
    slabs = tensors.take(_PACKED, torch.uint8, shape=stored)
    mask = (1 << bits) - 1
    codes = torch.cat([(slabs >> shift) & mask for shift in range(0, 8, bits)])[:count].reshape(shape)
    integer = not tensors.info("weight._shift").dtype.is_floating_point
    zero_point = offset = None
    if integer:
        shift = tensors.take("weight._shift", torch.uint8, torch.int8, shape=tuple(tensors.info("weight._shift").shape))
        if shift.numel() != count or int(shift.amin()) < 0:
            raise tensors.error(f"weight._shift is no {count} integers from 0 to 255")
        zero_point = spread_blocks(shift.to(torch.uint8), group, shape)
    else:
        shift = _floats(tensors, "weight._shift")
        if shift.numel() != count or shift.dtype != scale.dtype:
            raise tensors.error(
                f"weight._shift is {shift.dtype} with {shift.numel()} values, weight._scale {scale.dtype} with {count}"
            )
        offset = spread_blocks(-shift, group, shape)
    scheme = WeightScheme(
        format=get_format(f"uint{bits}"),
        granularity=group_granularity(group, shape),
        symmetric=False,
        offset=not integer,
        scale_dtype=_FLOATS[scale.dtype],
    )
    return PackedWeight.from_codes(
        codes, spread_blocks(scale, group, shape), zero_point, scheme, layer=tensors.name, offset=offset
    )


def _activation(tensors: LayerTensors, name: str) -> tuple[ActivationScheme | None, Tensor | None]:
    """One scale for every input, found by calibration; what quanto then does to outputs is left out."""
    if name == "none":
        return None, None
    scale = tensors.take("input_scale", *_FLOATS, shape=()).float()
    if not 0 < float(scale) < math.inf:
        raise tensors.error(f"input_scale is {float(scale)}; it is a positive number; calibrate the model again")
    fmt = get_format(_ACTIVATIONS[name])
    return ActivationScheme(format=fmt, granularity=Granularity.tensor(), dynamic=False), scale


def _floats(tensors: LayerTensors, suffix: str) -> Tensor:
    """A flat tensor of finite floats."""
    values = tensors.take(suffix, *_FLOATS, shape=tuple(tensors.info(suffix).shape)).flatten()
    if not torch.isfinite(values).all():
        raise tensors.error(f"{suffix} holds NaN or infinity; get the file again, or quantize the model again")
    return values


def _quantization_map(store: TensorStore) -> dict[str, dict[str, str]]:
    """The sidecar: for each module's name the qtypes of `weights` and `activations`; empty without one.

    Raises:
        CheckpointError: a file that is no such JSON.
    """
    folder = store.path if store.path.is_dir() else store.path.parent
    path = next((path for name in _MAPS if (path := folder / name).is_file()), None)
    if path is None:
        return {}
    layers = read_json(path)
    for name, entry in layers.items():
        known = isinstance(entry, dict) and entry.keys() == {"weights", "activations"}
        if not known or entry["activations"] not in ("none", *_ACTIVATIONS) or not isinstance(entry["weights"], str):
            raise CheckpointError(
                f'{path}: {name} is {shown(entry)}; it is {{"weights": a qtype, "activations": "none" or one of '
                f"{', '.join(_ACTIVATIONS)}}}"
            )
    return layers
