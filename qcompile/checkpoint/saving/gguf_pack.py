"""Blocks of GGML's quantized types, put together from codes and scales: what `gguf_blocks` takes apart.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES, BlockType, Parts
from qcompile.checkpoint.saving.base import Rounding, Unsavable, common_objection
from qcompile.checkpoint.saving.layers import Layer
from qcompile.formats import IntegerFormat
from qcompile.packed import PackedWeight
from qcompile.reference import expand_blocks
from qcompile.scheme import FLOAT_SCALES, WHOLE

_SYMMETRIC = {4: 2, 5: 6, 8: 8}
"""Bits of the types that multiply blocks of 32 by a float16 scale, and the types' numbers."""
_SHIFTED = {4: 3, 5: 7}
"""Of those that also add a float16 offset."""
_CODEBOOK = 20
_BLOCK = 32


def block_type(layer: Layer) -> int:
    """The number of the smallest type that holds a layer's codes.

    Raises:
        Unsavable: none does.
    """
    scheme, columns = replace(layer.scheme.weight, flexible_group=False), layer.shape[1]
    if layer.scheme.weight.act_order:
        raise Unsavable("its columns are sorted by group (act_order)")
    if layer.scheme.weight.rotated or layer.pre_quant_scale is not None or layer.scheme.activation is not None:
        raise Unsavable(common_objection(layer, activations=False) or "")
    for number, kind in BLOCK_TYPES.items():
        if kind.scheme == scheme and columns % kind.columns == 0:
            return number
    shared = columns if scheme.granularity.columns == WHOLE else scheme.granularity.columns
    if scheme.super_scale is None and scheme.scale_dtype in FLOAT_SCALES and shared % _BLOCK == columns % _BLOCK == 0:
        if scheme.format.name == "iq4_nl":
            return _CODEBOOK
        if isinstance(scheme.format, IntegerFormat):
            types = _SYMMETRIC if scheme.symmetric else _SHIFTED
            fitting = [number for bits, number in types.items() if bits >= scheme.format.bits]
            if fitting:
                return fitting[0]
    raise Unsavable(
        f"no type of GGUF has its codes: {scheme} with {scheme.scale_dtype} scales, {columns} columns, "
        f"{'no ' if scheme.symmetric else ''}zero points or offsets"
    )


def pack_layer(layer: Layer, rounding: Rounding) -> tuple[int, Tensor]:
    """The type's number, and rows of blocks: uint8 [N, K / columns * nbytes].

    Raises:
        Unsavable: no type holds the layer's codes and scales.
    """
    number = block_type(layer)
    kind, weight = BLOCK_TYPES[number], layer.weight()
    if replace(weight.scheme, flexible_group=False) == kind.scheme:
        parts = Parts(weight.unpack_codes(), weight.scale, weight.offset, weight.super_scale, weight.super_offset)
    else:
        parts = _regrouped(layer.name, weight, kind, rounding)
    blocks = _PACK[number](_by_block(parts, kind))
    again = kind.take_apart(blocks)
    for name in ("codes", "scale", "offset", "super_scale", "super_offset"):
        made, wanted = getattr(again, name), getattr(parts, name)
        if wanted is not None and not torch.equal(_comparable(made), _comparable(wanted)):
            raise Unsavable(f"its {name.replace('_', ' ')}s leave the range of {kind.name}")
    return number, blocks.flatten(1)


def _comparable(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype == torch.float8_e8m0fnu else values


def _regrouped(name: str, weight: PackedWeight, kind: BlockType, rounding: Rounding) -> Parts:
    """Codes of as many bits as the type has, and float16 scales for each 32 columns."""
    codes, scheme = weight.unpack_codes(), weight.scheme
    if isinstance(scheme.format, IntegerFormat) and scheme.symmetric:
        codes = codes + ((1 << (kind.scheme.format.bits - 1)) - (1 << (scheme.format.bits - 1)))

    def every_block(values: Tensor) -> Tensor:
        return expand_blocks(values, scheme.granularity, weight.shape)[:, ::_BLOCK].contiguous()

    scale = every_block(rounding.cast(name, "scales", weight.scale, torch.float16))
    offset = weight.offset
    if weight.zero_point is not None:
        offset = -weight.zero_point.to(torch.float64) * weight.scale.to(torch.float64)
    if offset is None:
        return Parts(codes, scale)
    what = "offsets" if weight.offset is not None else "products of scale and zero point"
    return Parts(codes, scale, every_block(rounding.cast(name, what, offset, torch.float16)))


def _by_block(parts: Parts, kind: BlockType) -> Parts:
    """Everything [N, blocks, ...], what is there once a block without the last dimension."""

    def split(values: Tensor | None, columns: int) -> Tensor | None:
        return None if values is None else values.unflatten(1, (-1, columns))

    codes = parts.codes.unflatten(1, (-1, kind.columns))
    small = kind.columns // kind.scheme.granularity.columns
    scale = split(parts.scale, small)
    assert scale is not None
    return Parts(codes, scale, split(parts.offset, small), split(parts.super_scale, 1), split(parts.super_offset, 1))


def _fields(values: Tensor, bits: int, run: int) -> Tensor:
    """Fields of 1, 2 or 4 bits in bytes, where each `run` bytes hold 8 / bits runs of values, lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (values.unflatten(-1, (-1, 8 // bits, run)) << shifts).sum(-2, dtype=torch.uint8).flatten(-2)


def _raw(values: Tensor | None) -> Tensor:
    """The bytes of numbers [..., count]."""
    assert values is not None
    return values.contiguous().view(torch.uint8)


def _negative(values: Tensor | None) -> Tensor:
    assert values is not None
    return -values


def _offset(parts: Parts) -> Tensor:
    assert parts.offset is not None
    return parts.offset


def _q4_0(parts: Parts) -> Tensor:
    return torch.cat([_raw(parts.scale), _fields(parts.codes, 4, 16)], -1)


def _q4_1(parts: Parts) -> Tensor:
    return torch.cat([_raw(parts.scale), _raw(parts.offset), _fields(parts.codes, 4, 16)], -1)


def _q5_0(parts: Parts) -> Tensor:
    high, low = _fields(parts.codes >> 4, 1, 1), _fields(parts.codes & 15, 4, 16)
    return torch.cat([_raw(parts.scale), high, low], -1)


def _q5_1(parts: Parts) -> Tensor:
    high, low = _fields(parts.codes >> 4, 1, 1), _fields(parts.codes & 15, 4, 16)
    return torch.cat([_raw(parts.scale), _raw(parts.offset), high, low], -1)


def _q8_0(parts: Parts) -> Tensor:
    return torch.cat([_raw(parts.scale), parts.codes ^ 0x80], -1)


def _q2_k(parts: Parts) -> Tensor:
    scales = parts.scale | _offset(parts) << 4
    codes = _fields(parts.codes, 2, 32)
    return torch.cat([scales, codes, _raw(parts.super_scale), _raw(_negative(parts.super_offset))], -1)


def _q3_k(parts: Parts) -> Tensor:
    scales = (parts.scale + 32).view(torch.uint8)
    high, low = _fields(parts.codes >> 2, 1, 32), _fields(parts.codes & 3, 2, 32)
    packed = [_fields(scales & 15, 4, 8), _fields(scales >> 4 & 3, 2, 4)]
    return torch.cat([high, low, *packed, _raw(parts.super_scale)], -1)


def _scales_of_6_bits(parts: Parts) -> Tensor:
    scale, minimum = parts.scale, _offset(parts)
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = minimum[..., :4] | minimum[..., 4:] >> 4 << 6
    return torch.cat([first, second, (scale[..., 4:] & 15) | minimum[..., 4:] << 4], -1)


def _q4_k(parts: Parts) -> Tensor:
    above = [_raw(parts.super_scale), _raw(_negative(parts.super_offset))]
    return torch.cat([*above, _scales_of_6_bits(parts), _fields(parts.codes, 4, 32)], -1)


def _q5_k(parts: Parts) -> Tensor:
    above = [_raw(parts.super_scale), _raw(_negative(parts.super_offset))]
    codes = [_fields(parts.codes >> 4, 1, 32), _fields(parts.codes & 15, 4, 32)]
    return torch.cat([*above, _scales_of_6_bits(parts), *codes], -1)


def _q6_k(parts: Parts) -> Tensor:
    codes = [_fields(parts.codes & 15, 4, 64), _fields(parts.codes >> 4, 2, 32)]
    return torch.cat([*codes, _raw(parts.scale), _raw(parts.super_scale)], -1)


def _iq4_xs(parts: Parts) -> Tensor:
    scales = (parts.scale + 32).view(torch.uint8)
    packed = [_fields(scales >> 4 & 3, 2, 1), _fields(scales & 15, 4, 1)]
    return torch.cat([_raw(parts.super_scale), *packed, _fields(parts.codes, 4, 16)], -1)


_PACK: dict[int, Callable[[Parts], Tensor]] = {
    2: _q4_0,
    3: _q4_1,
    6: _q5_0,
    7: _q5_1,
    8: _q8_0,
    10: _q2_k,
    11: _q3_k,
    12: _q4_k,
    13: _q5_k,
    14: _q6_k,
    20: _q4_0,
    23: _iq4_xs,
    39: _q4_0,
}
