"""What everything means, in plain torch: quantizing weights and activations, and the dequantized product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.errors import LayerError
from qcompile.formats import IntegerFormat
from qcompile.hadamard import turn_weight, unturn_weight
from qcompile.packed import PackedWeight
from qcompile.scheme import SCALE_DTYPES, WHOLE, ActivationScheme, Granularity, WeightScheme


def blocks_of(matrix: Tensor, block: tuple[int, int]) -> Tensor:
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
    that `scale_dtype` holds; in a super-block (integer scales) the largest scale, and the lowest offset, become the
    largest integer. Codes are chosen for the scale as it is stored, after its rounding to `scale_dtype`. A block of
    zeros gets scale 1, or 0 if no code of the format is 0. 2:4 sparse weights are pruned first (`leave_two_of_four`).

    Args:
        weight: floating point [N, K].
        scheme: its group must divide K (`WeightScheme.fit`).
        layer: named in errors.

    Raises:
        LayerError: a weight that is no matrix, or holds NaN or infinity, or whose scale overflows its dtype.
    """
    rows = row_strips(weight, scheme, layer)
    if scheme.rotated:
        turned = quantize_weight(turn_weight(weight.detach()), replace(scheme, rotated=False), layer)
        return replace(turned, scheme=scheme)
    above = super_scale(rows, scheme, layer)
    chunks = [_quantize_rows(part, scheme, above, layer) for part in rows]
    tensors = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    packed = PackedWeight.from_tensors(tensors, (weight.shape[0], weight.shape[1]), scheme)
    packed.check(layer)
    return packed


def row_strips(weight: Tensor, scheme: WeightScheme, layer: str) -> tuple[Tensor, ...]:
    """Strips of a weight's rows, whole blocks each, that are quantized one after another.

    Raises:
        LayerError: a weight that is no matrix of floating point, or is empty.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise LayerError(
            f"{layer}: a weight to quantize is a floating-point matrix, not {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise LayerError(f"{layer}: the weight is empty, {tuple(weight.shape)}")
    block_rows = scheme.granularity.block_of((weight.shape[0], weight.shape[1]))[0]
    step = max(1, _CHUNK // (weight.shape[1] * block_rows)) * block_rows
    return weight.detach().split(step)


_CHUNK = 1 << 22
"""Weights that are quantized or decoded at a time, so that the float32 copies of a large layer stay small."""


def super_scale(rows: Sequence[Tensor], scheme: WeightScheme, layer: str) -> Tensor | None:
    """One number for the whole weight, float32 []; None where there is none, or super-blocks have their own.

    Args:
        rows: all of the weight, in strips [n, K].

    Raises:
        LayerError: scales of scales that only checkpoints have.
    """
    if scheme.super_scale is None or scheme.has_super_blocks:
        return None
    if scheme.scale_dtype != "float8_e4m3fn" or not scheme.symmetric or scheme.super_scale.columns != WHOLE:
        raise LayerError(f"{layer}: {scheme.scale_dtype} scales of scales are read from checkpoints, not chosen here")
    top = torch.stack([part.abs().amax() for part in rows]).amax().to(torch.float32)
    scale = top / (scheme.format.absmax * torch.finfo(torch.float8_e4m3fn).max)
    return 1 / (1 / scale.masked_fill(scale == 0, 1.0))  # an inverse itself, for formats that store its divisor


def _quantize_rows(weight: Tensor, scheme: WeightScheme, above: Tensor | None, layer: str) -> tuple[Tensor, ...]:
    """The tensors of some packed rows, a multiple of a block's."""
    w = leave_two_of_four(finite_float32(weight, layer), scheme)
    grid = choose_grid(w, scheme, above, layer)
    return pack_bits(grid.encode(w), scheme.format.bits), *grid.tensors


def finite_float32(weight: Tensor, layer: str) -> Tensor:
    """The weight in float32.

    Raises:
        LayerError: it holds NaN or infinity.
    """
    w = weight.to(torch.float32)
    if not torch.isfinite(w).all():
        raise LayerError(
            f"{layer}: the weight holds NaN or infinity, so it has no scale; keep the layer with scheme null"
        )
    return w


def leave_two_of_four(w: Tensor, scheme: WeightScheme) -> Tensor:
    """A matrix of which, for a 2:4 sparse scheme, the two greatest magnitudes of each four columns are left.

    Of equal ones the first are. A matrix that is sparse already stays as it is.
    """
    if scheme.sparsity is None:
        return w
    fours = F.pad(w, (0, -w.shape[1] % 4)).unflatten(1, (-1, 4))
    sizes = fours.abs()
    smaller = torch.zeros(fours.shape, dtype=torch.int8, device=w.device)
    for i, j in itertools.combinations(range(4), 2):
        first = sizes[..., i] >= sizes[..., j]
        smaller[..., i] += first
        smaller[..., j] += ~first
    return fours.masked_fill(smaller < 2, 0.0).flatten(1)[:, : w.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that the elements of a matrix of this shape may become; see `PackedWeight` for the equations.

    Attributes:
        scale, zero_point, offset: as a packed weight stores them.
        above: the super scale that all share, float32 [], or those of super-blocks, float32 [rows, D].
        above_offset: those of super-blocks' offsets.
    """

    scheme: WeightScheme
    shape: tuple[int, int]
    scale: Tensor
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    above: Tensor | None = None
    above_offset: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """What a code's value is multiplied by, float32 of the scale's shape."""
        return self._under(self.scale, self.above)

    @property
    def shift(self) -> Tensor | None:
        """What is added to a code's value after that, float32 of the scale's shape."""
        return None if self.offset is None else self._under(self.offset, self.above_offset)

    def _under(self, per_block: Tensor, above: Tensor | None) -> Tensor:
        if above is None:
            return per_block.float()
        if above.dim() == 0:
            return per_block.float() * above
        return per_block.float() * above.repeat_interleave(per_block.shape[1] // above.shape[1], 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a packed weight stores beside its codes, in its order."""
        stored = [t for t in (self.scale, self.zero_point, self.offset) if t is not None]
        for above in (self.above, self.above_offset):
            if above is not None:
                assert self.scheme.super_scale is not None
                above = above.expand(self.shape[0], 1) if above.dim() == 0 else above
                stored.append(above.to(SCALE_DTYPES[self.scheme.super_scale.dtype]))
        return tuple(stored)

    def every(self, per_block: Tensor) -> Tensor:
        """A value per block repeated to every element."""
        return expand_blocks(per_block, self.scheme.granularity, self.shape)

    def encode(self, w: Tensor) -> Tensor:
        """The nearest codes, uint8 [rows, columns], of a float32 matrix."""
        if (shift := self.shift) is not None:
            w = w - self.every(shift)
        scaled = w / self.every(self.step)
        if self.zero_point is not None:
            scaled += self.every(self.zero_point.float())
        return self.scheme.format.encode(scaled)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 of the codes' shape."""
        values = self.scheme.format.decode(codes.to(torch.int32))
        assert isinstance(values, Tensor)
        if self.zero_point is not None:
            values = values - self.every(self.zero_point.float())
        values = values * self.every(self.step)
        return values if (shift := self.shift) is None else values + self.every(shift)

    def pack(self, codes: Tensor, layer: str, perm: Tensor | None = None) -> PackedWeight:
        """The packed weight of codes uint8 [rows, columns].

        Args:
            perm: int32 [columns], exactly for a scheme with `act_order`.

        Raises:
            LayerError: what `PackedWeight.check` finds.
        """
        tensors = (pack_bits(codes, self.scheme.format.bits), *self.tensors, *(() if perm is None else (perm,)))
        packed = PackedWeight.from_tensors(tensors, self.shape, self.scheme)
        packed.check(layer)
        return packed


def choose_grid(w: Tensor, scheme: WeightScheme, above: Tensor | None, layer: str, shrink: float = 1.0) -> Grid:
    """The grid whose blocks reach over the range of their weights; see `quantize_weight`.

    Args:
        w: float32 [rows, columns], finite; blocks begin at its first row and column.
        above: the weight's super scale, float32 [].
        shrink: what the ranges are multiplied by; offsets move by half of what a range loses.

    Raises:
        LayerError: a scale overflows its dtype.
    """
    shape = (w.shape[0], w.shape[1])
    blocks = blocks_of(w, scheme.granularity.block_of(shape))
    steps = 2**scheme.format.bits - 1
    offset = None
    if scheme.symmetric:
        spread = blocks.abs().amax((1, 3)) * shrink / scheme.format.absmax
    elif scheme.offset:
        lowest, highest = blocks.amin((1, 3)), blocks.amax((1, 3))
        if shrink != 1.0:
            lost = (highest - lowest) * ((1 - shrink) / 2)
            lowest, highest = lowest + lost, highest - lost
        if scheme.has_super_blocks:
            lowest = lowest.clamp(max=0)
            return under_super_blocks((highest - lowest).clamp(min=0) / steps, lowest, scheme, shape, layer)
        offset = lowest.to(SCALE_DTYPES[scheme.scale_dtype])
        spread = (highest - offset.float()).clamp(min=0) / steps
    else:
        lowest = blocks.amin((1, 3)).clamp(max=0) * shrink
        spread = blocks.amax((1, 3)).clamp(min=0) * shrink / steps - lowest / steps  # first the difference: overflows
    if scheme.has_super_blocks:
        return under_super_blocks(spread, None, scheme, shape, layer)
    scale = stored_scale(spread if above is None else spread / above, scheme, layer)
    grid = Grid(scheme=scheme, shape=shape, scale=scale, offset=offset, above=above)
    if scheme.symmetric or scheme.offset:
        return grid
    zero_point = scheme.format.encode(-lowest / grid.step)
    return replace(grid, zero_point=zero_point)


def under_super_blocks(
    step: Tensor, shift: Tensor | None, scheme: WeightScheme, shape: tuple[int, int], layer: str
) -> Grid:
    """The grid whose integer scales and offsets are nearest to given ones, under the least super scales for them.

    Args:
        step: float32 [rows, blocks], which super-blocks divide; of either sign where scales are int8.
        shift: float32 [rows, blocks], not positive.

    Raises:
        LayerError: a super scale overflows its dtype; zero points, or blocks that cross super-blocks.
    """
    assert scheme.super_scale is not None
    count = scheme.super_scale.count(shape[1])
    if step.shape[1] % count or scheme.symmetric != (shift is None):
        raise LayerError(
            f"{layer}: {scheme.scale_dtype} scales of scales with zero points, or for {scheme.super_scale.columns} "
            f"columns over {scheme.granularity}, are read from checkpoints, not chosen here"
        )
    scale, above = _integers(step, count, scheme, layer)
    if shift is None:
        return Grid(scheme=scheme, shape=shape, scale=scale, above=above)
    offset, above_offset = _integers(-shift, count, scheme, layer)
    return Grid(scheme=scheme, shape=shape, scale=scale, offset=offset, above=above, above_offset=-above_offset)


def _integers(values: Tensor, count: int, scheme: WeightScheme, layer: str) -> tuple[Tensor, Tensor]:
    """Integers [rows, blocks], and what multiplies those of each of `count` super-blocks, float32 [rows, count]."""
    assert scheme.super_scale is not None
    top = values.unflatten(1, (count, -1)).abs().amax(2)
    above = (top / largest_scale(scheme)).to(SCALE_DTYPES[scheme.super_scale.dtype]).float()
    if not torch.isfinite(above).all():
        raise LayerError(f"{layer}: a super scale overflows {scheme.super_scale.dtype}; choose another scheme")
    return to_integers(values, above, scheme), above


def largest_scale(scheme: WeightScheme) -> int:
    """The largest integer scale; signed ones also have its negative, and one less."""
    assert scheme.super_scale is not None
    return 2 ** (scheme.super_scale.bits - (scheme.scale_dtype == "int8")) - 1


def to_integers(values: Tensor, above: Tensor, scheme: WeightScheme) -> Tensor:
    """Values [rows, blocks] in units of what is above them, float32 [rows, D], as integers of the scales' dtype."""
    top = largest_scale(scheme)
    lowest = -top - 1 if scheme.scale_dtype == "int8" else 0
    above = above.repeat_interleave(values.shape[1] // above.shape[1], 1)
    return (values / above).nan_to_num(0.0).round().clamp(lowest, top).to(SCALE_DTYPES[scheme.scale_dtype])


def stored_scale(spread: Tensor, scheme: WeightScheme, layer: str) -> Tensor:
    """Scales as they are stored, none of them zero.

    Args:
        spread: float32, what a step of codes is in each block.

    Raises:
        LayerError: a scale that its dtype does not hold.
    """
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    if dtype == torch.float8_e8m0fnu:
        return power_of_two(spread * scheme.format.absmax, scheme.format.absmax)
    if scheme.super_scale is not None:  # which the largest range sets; one that is searched may reach beyond
        spread = spread.clamp(max=torch.finfo(dtype).max)
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
    return unturn_weight(values) if scheme.rotated else values


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
    """Quantize activations [..., K] to 8-bit codes of `scheme.dtype`.

    Made of plain torch operators only, so that a compiler fuses it with what produced `x`. With dynamic scales, a token
    that holds NaN or infinity gets a scale that is not finite, so that its outputs are not either; with a static scale
    infinities saturate. The last group of a row may be shorter.

    Args:
        static_scale: float32 scalar; given exactly if the scheme is static.

    Returns:
        codes of x's shape, and float32 scales [..., 1] (per token), [..., groups], or [] (per tensor).
    """
    fmt, dtype = scheme.format, scheme.dtype
    values = x.to(torch.float32)
    grouped = scheme.granularity.is_group
    if grouped:
        values = F.pad(values, (0, -x.shape[-1] % scheme.granularity.columns))
        values = values.unflatten(-1, (-1, scheme.granularity.columns))
    if not scheme.dynamic:
        assert static_scale is not None
        scale = static_scale.to(torch.float32).reshape(())
    elif not scheme.symmetric:
        return _shifted(values, scheme, x.shape[-1])
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
    if isinstance(fmt, IntegerFormat):
        codes = scaled.round().clamp(-fmt.offset, fmt.offset - 1).to(dtype)
    else:
        codes = scaled.clamp(-fmt.absmax, fmt.absmax).to(dtype)
    if grouped:
        return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)
    return codes, scale


def _shifted(values: Tensor, scheme: ActivationScheme, columns: int) -> tuple[Tensor, Tensor]:
    """`quantize_activation` with zero points, which are taken from the codes: int8, and scales.

    Args:
        values: float32 [..., K], or [..., groups, columns of a group].
    """
    steps = 2**scheme.format.bits - 1
    grouped = scheme.granularity.is_group
    if scheme.granularity == Granularity.tensor():
        some = values if values.numel() != 0 else values.new_zeros(1)
        low, high = some.amin(), some.amax()
    else:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    low = low.clamp(max=0)
    scale = high.clamp(min=0) / steps - low / steps
    scale = scale.masked_fill(scale == 0, 1.0)
    zero_point = (-low / scale).round()
    codes = torch.minimum(torch.maximum((values / scale).round(), -zero_point), steps - zero_point).to(torch.int8)
    if grouped:
        return codes.flatten(-2)[..., :columns], scale.squeeze(-1)
    return codes, scale


def dequantize_activation(codes: Tensor, scale: Tensor, scheme: ActivationScheme) -> Tensor:
    """The float32 activations that codes and scales stand for."""
    values = codes.to(torch.float32)
    if scheme.granularity.is_group:
        return values * scale.repeat_interleave(scheme.granularity.columns, -1)[..., : values.shape[-1]]
    return values * scale
