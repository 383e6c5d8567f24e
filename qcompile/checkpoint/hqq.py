"""HQQ: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/), as safetensors.

Layout: `HQQLinear.state_dict`, `Quantizer` and `BitPack` of https://github.com/mobiusml/hqq.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.flat_blocks import block_count, group_granularity, spread_blocks
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import Scheme, WeightScheme

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_PACKINGS = {
    "8bit_u8": (torch.uint8, (0,), 8),
    "4bit_u8": (torch.uint8, (4, 0), 4),
    "3bit_32": (torch.int32, (27, 24, 21, 18, 15, 12, 9, 6, 3, 0), 3),
    "2bit_u8": (torch.uint8, (6, 4, 2, 0), 2),
    "1bit_u8": (torch.uint8, (7, 6, 5, 4, 3, 2, 1, 0), 1),
}
"""Words, the bit at which each slab of rows lies in them, and bits of a code."""

_FORMATS = {8: "uint8", 6: "uint6", 5: "uint5", 4: "uint4", 3: "uint3", 2: "uint2", 1: "uint2"}
_HISTORY = (
    "compute_dtype",
    "encoded_state_dict",
    "offload_meta",
    "optimize",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "stores_quant_config",
    "unpack_view_dtype",
    "view_as_float",
    "channel_wise",
    "group_size",
)
"""What a layer also states, and what follows from the rest."""

_LARGEST_GROUP = 1 << 24
_STRING_BYTES = 64


@register
class HQQ(Method):
    """Linears that `HQQLinear` saved: each layer states all about itself in small tensors."""

    name = "hqq"

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        if not isinstance(config.get("quant_config", {}), Mapping):
            raise CheckpointError(f"{store.path}: quant_config is {shown(config['quant_config'])}, not an object")

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | Tensor | None:
        """W = (q - zero) * scale, reshaped from groups, as q * scale - scale * zero in float32.

        Both have one rounding, and the same, where scale and zero are 16-bit: q * scale and scale * zero take 22 bits
        at most, so they are exact in float32. Groups along axis 0 are strided over the rows, so that neighbours never
        share a scale; such a weight is decoded.
        """
        if "W_q" not in tensors:
            return None
        for kind in ("scale", "zero"):
            if kind not in tensors:
                raise tensors.error(
                    f"it has no {kind}: quantized {kind}s, which old versions of hqq wrote, are not supported; "
                    "quantize the original model again with quant_zero=False, quant_scale=False"
                )
        if (stated := _integers(tensors, "shape")) != list(shape):
            raise tensors.error(f"it says shape {shown(stated)}, but the model's layer is {list(shape)}")
        if (axis := _integer(tensors, "axis")) not in (0, 1):
            raise tensors.error(f"it says axis {axis}; it is 0 or 1")
        group = _group_size(tensors, shape)
        count = block_count(group, shape)
        if count * group != shape[0] * shape[1]:
            raise tensors.error(f"group_size {group} does not divide its {shape[0]} x {shape[1]} weights")
        codes, bits = _codes(tensors, (count, group) if axis == 1 else (group, count))
        tensors.ignore(*_HISTORY)
        scale, zero = (_per_group(tensors, kind, count) for kind in ("scale", "zero"))
        if axis == 0:
            return ((codes - zero) * scale).view(shape)
        scheme = WeightScheme(
            format=get_format(_FORMATS[bits]),
            granularity=group_granularity(group, shape),
            symmetric=False,
            offset=True,
        )
        packed = PackedWeight.from_codes(
            codes.view(shape),
            spread_blocks(scale, group, shape),
            None,
            scheme,
            layer=tensors.name,
            offset=spread_blocks(-(scale * zero), group, shape),
        )
        return PackedLinear(weight=packed, scheme=Scheme(weight=scheme, method=CHECKPOINT))


def _group_size(tensors: LayerTensors, shape: tuple[int, int]) -> int:
    """Codes that share a scale; all of them where one scale serves the whole weight."""
    if "channel_wise" in tensors and _integer(tensors, "channel_wise") == 0:
        return shape[0] * shape[1]
    size = _integer(tensors, "group_size")
    if not 1 <= size <= _LARGEST_GROUP:
        raise tensors.error(f"it says group_size {size}; it is from 1 to {_LARGEST_GROUP}")
    return size


def _codes(tensors: LayerTensors, grouped: tuple[int, int]) -> tuple[Tensor, int]:
    """uint8 codes [groups, group size] and their bits: slabs of rows, one above the other in each word."""
    packing = _string(tensors, "packing")
    if packing not in _PACKINGS:
        raise tensors.error(f"it says packing {shown(packing)}; known are {', '.join(_PACKINGS)}")
    word, shifts, bits = _PACKINGS[packing]
    rows, columns = -(-grouped[0] // len(shifts)), grouped[1]
    info = tensors.info("W_q")
    if math.prod(info.shape) * info.dtype.itemsize != rows * columns * word.itemsize:
        raise tensors.error(
            f"W_q is {info.dtype} {tuple(info.shape)}; {grouped[0]} x {columns} codes in packing {packing} are "
            f"{rows * columns * word.itemsize} bytes"
        )
    stored = tensors.take("W_q", torch.uint8, torch.int32, *_FLOATS, shape=tuple(info.shape))  # view_as_float
    words = stored.contiguous().flatten().view(word).view(rows, columns)
    slabs = [((words >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in shifts]
    codes = torch.cat(slabs)[: grouped[0]]
    number = float(tensors.take("nbits", torch.int32, torch.int64, torch.float32, shape=()))
    stated = math.ceil(number) if math.isfinite(number) else 0  # 1.58 bits are stored in 2
    if stated != bits and (packing, stated) not in (("8bit_u8", 5), ("8bit_u8", 6)):
        raise tensors.error(f"it says nbits {stated}, but packing {packing}")
    if int(codes.amax()) >> stated:
        raise tensors.error(f"W_q holds codes of more than {stated} bits; get the file again")
    return codes.contiguous(), stated


def _per_group(tensors: LayerTensors, kind: str, count: int) -> Tensor:
    """float32 [groups] of `scale` or `zero`."""
    info = tensors.info(kind)
    if math.prod(info.shape) != count:
        raise tensors.error(f"{kind} has shape {tuple(info.shape)} for {count} groups")
    values = tensors.take(kind, *_FLOATS, shape=tuple(info.shape)).float().flatten()
    if not torch.isfinite(values).all():
        raise tensors.error(f"{kind} holds NaN or infinity; get the file again, or quantize the model again")
    return values


def _integer(tensors: LayerTensors, suffix: str) -> int:
    return int(tensors.take(suffix, torch.uint8, torch.int32, torch.int64, shape=()))


def _integers(tensors: LayerTensors, suffix: str) -> list[int]:
    return [int(value) for value in tensors.take(suffix, torch.int32, torch.int64, shape=(2,))]


def _string(tensors: LayerTensors, suffix: str) -> str:
    length = tensors.info(suffix).shape
    if len(length) != 1 or length[0] > _STRING_BYTES:
        raise tensors.error(f"{suffix} has shape {tuple(length)}; it is a short string, one byte a letter")
    return bytes(tensors.take(suffix, torch.uint8, shape=tuple(length)).tolist()).decode("ascii", "replace")
