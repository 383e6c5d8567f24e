"""What everything means, in plain torch: quantizing weights and activations, and the dequantized product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.errors import LayerError
from qcompile.packed import PackedWeight
from qcompile.scheme import SCALE_DTYPES, WHOLE, ActivationScheme, Granularity, WeightScheme


def _blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """View [rows, columns] as [row blocks, R, column blocks, C]; ragged edges are padded with zeros."""
    rows, columns = matrix.shape
    r, c = block
    padded = F.pad(matrix, (0, -columns % c, 0, -rows % r))
    return padded.unflatten(0, (-1, r)).unflatten(-1, (-1, c))


def expand_blocks(per_block: Tensor, granularity: Granularity, shape: tuple[int, int]) -> Tensor:
    """Repeat a value per block to every element: [row blocks, column blocks] to `shape`."""
    r, c = granularity.block_of(shape)
    if r != 1:
        per_block = per_block.repeat_interleave(r, 0)[: shape[0]]
    return per_block.repeat_interleave(c, 1)[:, : shape[1]]


def quantize_weight(weight: Tensor, scheme: WeightScheme, layer: str = "weight") -> PackedWeight:
    """Round a weight to the nearest codes.

    Symmetric: scale = max|w| / `format.absmax` of each block; a power of two where scales are E8M0, by the rule of the
    OCP microscaling specification (version 1.0, section 6.3: the exponent of max|w| less that of the format's largest
    number, so that the largest weights may saturate). Asymmetric: the range between the least and the greatest weight,
    both taken to include 0, is spread over all codes, and the zero point is the code of 0; with offsets, the range is
    that of the weights and the offset is the least. A super scale maps the largest scale of the tensor to the largest
    that `scale_dtype` holds. Codes are chosen for the scale as it is stored, after its rounding to `scale_dtype`. A
    block of zeros gets scale 1, or 0 if no code of the format is 0.

    Args:
        weight: floating point [N, K].
        scheme: its group must divide K (`WeightScheme.fit`).
        layer: named in errors.

    Raises:
        LayerError: a weight that is no matrix, or holds NaN or infinity, or whose scale overflows its dtype.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise LayerError(
            f"{layer}: a weight to quantize is a floating-point matrix, not {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise LayerError(f"{layer}: the weight is empty, {tuple(weight.shape)}")
    block_rows = scheme.granularity.block_of((weight.shape[0], weight.shape[1]))[0]
    step = max(1, _CHUNK // (weight.shape[1] * block_rows)) * block_rows
    rows = weight.detach().split(step)
    above = _super_scale(rows, scheme, layer)
    chunks = [_quantize_rows(part, scheme, above, layer) for part in rows]
    tensors = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    packed = PackedWeight.from_tensors(tensors, (weight.shape[0], weight.shape[1]), scheme)
    packed.check(layer)
    return packed


_CHUNK = 1 << 22
"""Weights that are quantized or decoded at a time, so that the float32 copies of a large layer stay small."""


def _super_scale(rows: tuple[Tensor, ...], scheme: WeightScheme, layer: str) -> Tensor | None:
    """One number for the whole weight, float32 []."""
    if scheme.super_scale is None:
        return None
    if scheme.scale_dtype != "float8_e4m3fn" or not scheme.symmetric or scheme.super_scale.columns != WHOLE:
        raise LayerError(f"{layer}: {scheme.scale_dtype} scales of scales are read from checkpoints, not chosen here")
    top = torch.stack([part.abs().amax() for part in rows]).amax().to(torch.float32)
    scale = top / (scheme.format.absmax * torch.finfo(torch.float8_e4m3fn).max)
    return 1 / (1 / scale.masked_fill(scale == 0, 1.0))  # an inverse itself, for formats that store its divisor


def _quantize_rows(weight: Tensor, scheme: WeightScheme, above: Tensor | None, layer: str) -> tuple[Tensor, ...]:
    """The tensors of some packed rows, a multiple of a block's."""
    w = weight.to(torch.float32)
    if not torch.isfinite(w).all():
        raise LayerError(
            f"{layer}: the weight holds NaN or infinity, so it has no scale; keep the layer with scheme null"
        )
    shape = (w.shape[0], w.shape[1])
    granularity, scale_dtype = scheme.granularity, SCALE_DTYPES[scheme.scale_dtype]
    blocks = _blocks(w, granularity.block_of(shape))
    steps = 2**scheme.format.bits - 1
    offset = None
    if scheme.symmetric:
        spread = blocks.abs().amax((1, 3)) / scheme.format.absmax
    elif scheme.offset:
        offset = blocks.amin((1, 3)).to(scale_dtype)
        spread = (blocks.amax((1, 3)) - offset.float()).clamp(min=0) / steps
    else:
        lowest = blocks.amin((1, 3)).clamp(max=0)
        spread = blocks.amax((1, 3)).clamp(min=0) / steps - lowest / steps  # the difference first could overflow
    scale = _stored(spread if above is None else spread / above, scheme, layer)
    step = scale.float() if above is None else scale.float() * above
    scaled = w / expand_blocks(step, granularity, shape)
    tensors = [scale]
    if offset is not None:
        scaled = (w - expand_blocks(offset.float(), granularity, shape)) / expand_blocks(step, granularity, shape)
        tensors.append(offset)
    elif not scheme.symmetric:
        zero_point = scheme.format.encode(-lowest / step)
        scaled += expand_blocks(zero_point.float(), granularity, shape)
        tensors.append(zero_point)
    if above is not None:
        assert scheme.super_scale is not None
        tensors.append(above.to(SCALE_DTYPES[scheme.super_scale.dtype]).expand(shape[0], 1))
    return pack_bits(scheme.format.encode(scaled), scheme.format.bits), *tensors


def _stored(spread: Tensor, scheme: WeightScheme, layer: str) -> Tensor:
    """Scales as they are stored, none of them zero."""
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    if dtype == torch.float8_e8m0fnu:
        return power_of_two(spread * scheme.format.absmax, scheme.format.absmax)
    scale = spread.to(dtype)
    if not torch.isfinite(scale.float()).all():
        raise LayerError(f"{layer}: a scale overflows {scheme.scale_dtype}; choose another scale_dtype")
    nearest_to_zero = scheme.format.decode(scheme.format.encode(torch.zeros(1)).int())
    assert isinstance(nearest_to_zero, Tensor)
    of_zeros = float(nearest_to_zero.item() == 0)  # IQ4's codebook holds no 0
    return torch.where(scale.float() == 0, of_zeros, scale.float()).to(dtype)


def power_of_two(top: Tensor, largest: float) -> Tensor:
    """E8M0 scales, float8_e8m0fnu, for blocks whose greatest magnitudes are `top` (see `quantize_weight`)."""
    exponent = torch.frexp(top).exponent - math.frexp(largest)[1]
    exponent = torch.where(top == 0, 0, exponent).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that a packed one in the logical layout stands for (see `PackedWeight`), rounded to `dtype`."""
    n, k = packed.shape
    block_rows = packed.scheme.granularity.block_of(packed.shape)[0]
    step = max(1, _CHUNK // max(1, k * block_rows)) * block_rows
    if step >= n:
        return _decode(packed).to(dtype)
    weight = torch.empty(n, k, dtype=dtype, device=packed.device)
    for first in range(0, n, step):
        weight[first : first + step] = _decode(packed.rows(first, first + step))
    return weight


def _decode(packed: PackedWeight) -> Tensor:
    """float32 [N, K], at once."""
    scheme, shape = packed.scheme, packed.shape
    values = scheme.format.decode(packed.unpack_codes().to(torch.int32))
    assert isinstance(values, Tensor)
    if packed.zero_point is not None:
        values = values - expand_blocks(packed.zero_point.float(), scheme.granularity, shape)
    values = values * _every_element(packed.scale, packed.super_scale, packed)
    if packed.offset is not None:
        values = values + _every_element(packed.offset, packed.super_offset, packed)
    if packed.perm is not None:
        values = torch.empty_like(values).index_copy_(1, packed.perm.long(), values)
    return values


def _every_element(per_block: Tensor, above: Tensor | None, packed: PackedWeight) -> Tensor:
    """Scales (or offsets) times what is above them, float32 of the weight's shape."""
    expanded = expand_blocks(per_block.float(), packed.scheme.granularity, packed.shape)
    if above is None:
        return expanded
    assert packed.scheme.super_scale is not None
    return expanded * expand_blocks(above.float(), Granularity(1, packed.scheme.super_scale.columns), packed.shape)


def quantize_activation(
    x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize activations [..., K] to the format's own 8-bit dtype.

    Made of plain torch operators only, so that a compiler fuses it with what produced `x`. With dynamic scales, a token
    that holds NaN or infinity gets a scale that is not finite, so that its outputs are not either; with a static scale
    infinities saturate. The last group of a row may be shorter.

    Args:
        static_scale: float32 scalar; given exactly if the scheme is static.

    Returns:
        codes of x's shape, and float32 scales [..., 1] (per token), [..., groups], or [] (per tensor).
    """
    fmt, dtype = scheme.format, scheme.format.native_dtype
    assert dtype is not None
    values = x.to(torch.float32)
    grouped = scheme.granularity.is_group
    if grouped:
        values = F.pad(values, (0, -x.shape[-1] % scheme.granularity.columns))
        values = values.unflatten(-1, (-1, scheme.granularity.columns))
    if not scheme.dynamic:
        assert static_scale is not None
        scale = static_scale.to(torch.float32).reshape(())
    else:
        per_tensor = scheme.granularity == Granularity.tensor()
        if per_tensor:
            top = values.abs().amax() if values.numel() != 0 else values.new_zeros(())
        else:
            top = values.abs().amax(-1, keepdim=True)
        if scheme.scale_dtype == "float8_e8m0fnu":
            # As `power_of_two`, but in float32 throughout: compilers know no E8M0. Not finite stays so.
            exponent = (top.view(torch.int32) >> 23) - (math.frexp(fmt.absmax)[1] - 1)
            power = (exponent.clamp(min=1) << 23).view(torch.float32).masked_fill(top == 0, 1.0)
            scale = torch.where(top.isfinite(), power, top)
        else:
            scale = top / fmt.absmax
            scale = scale.masked_fill(scale == 0, 1.0)
    scaled = values / scale
    if dtype == torch.int8:
        codes = scaled.round().clamp(-128, 127).to(torch.int8)
    else:
        codes = scaled.clamp(-fmt.absmax, fmt.absmax).to(dtype)
    if grouped:
        return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)
    return codes, scale


def dequantize_activation(codes: Tensor, scale: Tensor, scheme: ActivationScheme) -> Tensor:
    """The float32 activations that codes and scales stand for."""
    values = codes.to(torch.float32)
    if scheme.granularity.is_group:
        return values * scale.repeat_interleave(scheme.granularity.columns, -1)[..., : values.shape[-1]]
    return values * scale
