"""What everything means, in plain torch: quantizing weights and activations, and the dequantized product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.errors import LayerError
from qcompile.packed import PackedWeight
from qcompile.scheme import SCALE_DTYPES, ActivationScheme, Granularity, WeightScheme


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

    Symmetric: scale = max|w| / `format.absmax` of each block. Asymmetric: the range between the least and the greatest
    weight, both taken to include 0, is spread over all codes, and the zero point is the code of 0. Codes are chosen for
    the scale as it is stored, after its rounding to `scale_dtype`. A block of zeros gets scale 1.

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
    chunks = [_quantize_rows(rows, scheme, layer) for rows in weight.detach().split(step)]
    codes, scales, zero_points = zip(*chunks, strict=True)
    packed = PackedWeight(
        codes=torch.cat(codes),
        scale=torch.cat(scales),
        zero_point=None if scheme.symmetric else torch.cat(zero_points),
        shape=(weight.shape[0], weight.shape[1]),
        scheme=scheme,
    )
    packed.check(layer)
    return packed


_CHUNK = 1 << 22
"""Weights that are quantized at a time, so that the float32 copies of a large layer stay small."""


def _quantize_rows(weight: Tensor, scheme: WeightScheme, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes, scale and zero point of some rows, a multiple of a block's."""
    w = weight.to(torch.float32)
    if not torch.isfinite(w).all():
        raise LayerError(
            f"{layer}: the weight holds NaN or infinity, so it has no scale; keep the layer with scheme null"
        )
    shape = (w.shape[0], w.shape[1])
    granularity, scale_dtype = scheme.granularity, SCALE_DTYPES[scheme.scale_dtype]
    blocks = _blocks(w, granularity.block_of(shape))
    if scheme.symmetric:
        spread = blocks.abs().amax((1, 3)) / scheme.format.absmax
    else:
        lowest = blocks.amin((1, 3)).clamp(max=0)
        steps = 2**scheme.format.bits - 1
        spread = blocks.amax((1, 3)).clamp(min=0) / steps - lowest / steps  # the difference first could overflow
    scale = spread.to(scale_dtype)
    if torch.isinf(scale).any():
        raise LayerError(f"{layer}: a scale overflows {scheme.scale_dtype}; choose another scale_dtype")
    scale = scale.masked_fill(scale == 0, 1.0)
    scaled = w / expand_blocks(scale.float(), granularity, shape)
    zero_point = None
    if not scheme.symmetric:
        zero_point = scheme.format.encode(-lowest / scale.float())
        scaled += expand_blocks(zero_point.float(), granularity, shape)
    return pack_bits(scheme.format.encode(scaled), scheme.format.bits), scale, zero_point


def dequantize(packed: PackedWeight) -> Tensor:
    """The float32 weight [N, K] that a packed one in the logical layout stands for (see `PackedWeight`)."""
    scheme, shape = packed.scheme, packed.shape
    values = scheme.format.decode(packed.unpack_codes().to(torch.int32))
    assert isinstance(values, Tensor)
    if packed.zero_point is not None:
        values = values - expand_blocks(packed.zero_point.float(), scheme.granularity, shape)
    return values * expand_blocks(packed.scale.float(), scheme.granularity, shape)


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
