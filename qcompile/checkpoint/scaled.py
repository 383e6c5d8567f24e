"""What several checkpoint formats store alike: scales, FP8, FP6 and FP4 codes, static input scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from qcompile.checkpoint.method import LayerTensors
from qcompile.formats import Format, get_format
from qcompile.packed import PackedWeight
from qcompile.scheme import SCALE_DTYPES, WHOLE, ActivationScheme, Granularity, SuperScale, WeightScheme

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What scales, and weights that are not quantized, are stored in."""

FP8_FORMATS = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""What E8M0 scales of the OCP microscaling specification (version 1.0, section 5.4.1) are stored in."""

_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}
_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
_E8M0_NAN = 255


_RENAMED = ("model.language_model.", "language_model.model.")


def spellings(layer: str) -> tuple[str, ...]:
    """A layer's name, and what it was before transformers 5 renamed the parts of models that also see."""
    other = (new + layer.removeprefix(old) for old, new in (_RENAMED, _RENAMED[::-1]) if layer.startswith(old))
    return (layer, *other)


def is_plain(tensors: LayerTensors) -> bool:
    """Whether the layer is not quantized: its `weight` is floating point of 16 bits or more, or it has no tensor."""
    return not tensors.suffixes() or ("weight" in tensors and tensors.info("weight").dtype in (*FLOATS, torch.float64))


def is_tile(given: object) -> TypeGuard[Sequence[int]]:
    """Whether a configuration's value is [rows, columns] of a tile."""
    return isinstance(given, (list, tuple)) and len(given) == 2 and all(type(n) is int and 0 < n < 2**31 for n in given)


def one_of(tensors: LayerTensors, suffixes: Sequence[str], what: str) -> str:
    """The one of several spellings of a tensor's name that is there.

    Raises:
        CheckpointError: none of them, or more than one.
    """
    found = [suffix for suffix in suffixes if suffix in tensors]
    if len(found) != 1:
        has = f"it has {' and '.join(found)}" if found else f"it has none of {', '.join(suffixes)}"
        raise tensors.error(f"{what} is needed once, and {has}")
    return found[0]


def check_scale(tensors: LayerTensors, suffix: str, scale: Tensor, *, zero: bool = False) -> Tensor:
    """The scale, of any shape, if all its numbers are finite and positive (or zero, where the format rounds to it).

    Raises:
        CheckpointError: otherwise.
    """
    if scale.dtype == torch.float8_e8m0fnu:
        bad = scale.view(torch.uint8) == _E8M0_NAN
    else:
        values = scale.to(torch.float32)
        bad = ~torch.isfinite(values) | (values < 0) | ((values == 0) & (not zero))
    if bad.any():
        raise tensors.error(
            f"{suffix} holds a scale that is {scale[bad][0].item()}; scales are finite and positive, so the file is "
            "damaged or its quantization failed: get it again or quantize again"
        )
    return scale


def take_number(tensors: LayerTensors, suffix: str) -> Tensor:
    """A positive number in a tensor of one element: float32 [].

    Raises:
        CheckpointError: another count, dtype or value.
    """
    shape = tensors.info(suffix).shape
    if math.prod(shape) != 1:
        raise tensors.error(f"{suffix} has shape {tuple(shape)}; it is one number")
    number = tensors.take(suffix, *FLOATS).reshape(()).to(torch.float32)
    return check_scale(tensors, suffix, number)


def optional_number(tensors: LayerTensors, *suffixes: str) -> Tensor | None:
    """`take_number` of the first of several spellings that is there."""
    return next((take_number(tensors, suffix) for suffix in suffixes if suffix in tensors), None)


def take_scale(
    tensors: LayerTensors,
    suffix: str,
    granularity: Granularity,
    shape: tuple[int, int],
    dtypes: Sequence[torch.dtype] = (*FLOATS, *EXPONENTS),
) -> Tensor:
    """Scales of a weight of `shape`, as they are stored: [row blocks, column blocks].

    Extents of 1 may be missing or added: [] of a tensor's, [N] of channels', [rows, 1, columns, 1] of tiles'.

    Raises:
        CheckpointError: another shape or dtype; a scale that is not finite and positive.
    """
    stored, expected = tuple(tensors.info(suffix).shape), granularity.scale_shape(shape)
    if not _same(stored, expected):
        raise tensors.error(f"{suffix} has shape {stored}; scales per {granularity} of {shape} are {expected}")
    scale = tensors.take(suffix, *dtypes, shape=stored).reshape(expected)
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return check_scale(tensors, suffix, scale).contiguous()


def _same(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return [extent for extent in stored if extent != 1] == [extent for extent in expected if extent != 1]


def granularity_of_scale(
    tensors: LayerTensors, suffix: str, shape: tuple[int, int], tile: tuple[int, int]
) -> Granularity:
    """What shares a scale, by the scale's shape: a tile of (rows, columns), an output channel, or all.

    Raises:
        CheckpointError: a shape that is none of these.
    """
    stored = tuple(tensors.info(suffix).shape)
    block = Granularity.block(*tile)
    if len(stored) >= 2 and _same(stored, block.scale_shape(shape)):
        return block
    if math.prod(stored) == 1:
        return Granularity.tensor()
    if stored in ((shape[0],), (shape[0], 1)):
        return Granularity.channel()
    raise tensors.error(
        f"{suffix} has shape {stored}, but a weight {shape} has one scale, {shape[0]} (one a row), or "
        f"{block.scale_shape(shape)} (one a tile of {tile[0]}x{tile[1]})"
    )


def group_of_scale(tensors: LayerTensors, suffix: str, columns: int) -> Granularity:
    """The group of columns that shares a scale, by the scales' shape [N, K / group].

    Raises:
        CheckpointError: no matrix, or a count of scales that does not divide K.
    """
    stored = tuple(tensors.info(suffix).shape)
    if len(stored) != 2 or stored[1] < 1 or columns % stored[1]:
        raise tensors.error(f"{suffix} has shape {stored}; it is [outputs, groups] with groups that divide {columns}")
    return Granularity.group(columns // stored[1])


def packed(
    tensors: LayerTensors,
    fmt: Format,
    codes: Tensor,
    scale: Tensor,
    granularity: Granularity,
    shape: tuple[int, int],
    *,
    zero_point: Tensor | None = None,
    super_scale: Tensor | None = None,
    perm: Tensor | None = None,
) -> PackedWeight:
    """A weight from its codes as a bit stream, uint8 [N, ceil(K * bits / 8)], and its scales as they are stored."""
    scheme = WeightScheme(
        format=fmt,
        granularity=granularity,
        symmetric=zero_point is None,
        scale_dtype=_NAMES[scale.dtype],
        super_scale=None if super_scale is None else SuperScale(columns=WHOLE, dtype=_NAMES[super_scale.dtype]),
        act_order=perm is not None,
    )
    weight = PackedWeight(
        codes=codes.contiguous(),
        scale=scale,
        zero_point=zero_point,
        super_scale=super_scale,
        perm=perm,
        shape=shape,
        scheme=scheme,
    )
    weight.check(tensors.name)
    return weight


def check_fp8(tensors: LayerTensors, suffix: str, weight: Tensor) -> Tensor:
    """The codes of an FP8 tensor, uint8 of its shape, if they all stand for finite numbers.

    Raises:
        CheckpointError: NaN or infinity.
    """
    codes, special = weight.view(torch.uint8), _NOT_FINITE[weight.dtype]
    if ((codes & special) == special).any():
        raise tensors.error(
            f"{suffix} holds NaN or infinity, so the file is damaged or its quantization failed: get it again or "
            "quantize again"
        )
    return codes


def fp8_weight(
    tensors: LayerTensors,
    shape: tuple[int, int],
    scale: Tensor,
    granularity: Granularity,
    *,
    codes: Tensor | None = None,
) -> PackedWeight:
    """`weight`, E4M3 or E5M2 [N, K], with scales from `take_scale`.

    Args:
        codes: the weight, where it is not `weight` as it is stored.
    """
    weight = tensors.take("weight", *FP8_FORMATS, shape=shape) if codes is None else codes
    fmt = get_format(FP8_FORMATS[weight.dtype])
    return packed(tensors, fmt, check_fp8(tensors, "weight", weight), scale, granularity, shape)


def mx_weight(tensors: LayerTensors, shape: tuple[int, int], format_name: str, weight: str, scale: str) -> PackedWeight:
    """FP4 (two codes a byte, the first in the low nibble) or FP6 (four in three bytes), E8M0 scales for 32 columns.

    Args:
        format_name: of the codes.
        weight: suffix of the codes, uint8 or int8 [N, K * bits / 8].
        scale: suffix of the scales, uint8 or float8_e8m0fnu [N, K / 32].
    """
    fmt, granularity = get_format(format_name), Granularity.group(32)
    exponents = take_scale(tensors, scale, granularity, shape, EXPONENTS)
    return packed(tensors, fmt, _code_bytes(tensors, shape, fmt, 4, weight), exponents, granularity, shape)


def nvfp4_weight(tensors: LayerTensors, shape: tuple[int, int], weight: str, scale: str, above: Tensor) -> PackedWeight:
    """FP4 with E4M3 scales for groups of columns, 16 as a rule, and one number that multiplies them.

    A block of small weights may have the scale 0: E4M3 rounds to it.

    Args:
        weight: suffix of the codes, uint8 [N, K / 2], the first of a byte in the low nibble.
        scale: suffix of the scales, float8_e4m3fn [N, groups].
        above: float32 [], positive and finite.
    """
    fmt, granularity = get_format("fp4_e2m1"), group_of_scale(tensors, scale, shape[1])
    codes = _code_bytes(tensors, shape, fmt, 2, weight)
    scales = tensors.take(scale, torch.float8_e4m3fn, shape=granularity.scale_shape(shape))
    check_scale(tensors, scale, scales, zero=True)
    super_scale = above.expand(shape[0], 1).contiguous()
    return packed(tensors, fmt, codes, scales, granularity, shape, super_scale=super_scale)


def _code_bytes(tensors: LayerTensors, shape: tuple[int, int], fmt: Format, multiple: int, suffix: str) -> Tensor:
    rows, columns = shape
    if columns % multiple:
        raise tensors.error(
            f"its {columns} input features are no multiple of {multiple}, so they do not fill whole bytes"
        )
    stored = tensors.take(suffix, torch.uint8, torch.int8, shape=(rows, columns * fmt.bits // 8))
    return stored.view(torch.uint8)


def activation(
    name: str, granularity: Granularity, *, dynamic: bool = True, powers_of_two: bool = False
) -> ActivationScheme:
    """How a layer's input is quantized.

    Args:
        name: of the number format.
        powers_of_two: scales are E8M0.
    """
    scale_dtype = "float8_e8m0fnu" if powers_of_two else "float32"
    return ActivationScheme(format=get_format(name), granularity=granularity, dynamic=dynamic, scale_dtype=scale_dtype)
