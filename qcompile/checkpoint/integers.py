"""What GPTQ, AWQ and Marlin files have in common: group sizes, float scales, integer zero points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.method import LayerTensors
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import Granularity, Scheme, WeightScheme

SCALES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""What scales are stored in, with the names that schemes have for it."""


def setting(config: Mapping[str, Any], names: Sequence[str], default: Any, kind: type, meaning: str) -> Any:
    """The value of the first of several spellings of a key that is not null.

    Raises:
        CheckpointError: it is not of that type; the message says what it means.
    """
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not kind:
                raise CheckpointError(f"quantization_config: {name} is {shown(value)}; it is {meaning}")
            return value
    return default


def group_setting(config: Mapping[str, Any], default: int | None = None) -> int | None:
    """`group_size` or `q_group_size`: -1 for a scale per channel.

    Raises:
        CheckpointError: neither positive nor -1.
    """
    size: int | None = setting(config, ("group_size", "q_group_size"), default, int, "a number of columns, or -1")
    if size is not None and size != -1 and not 0 < size < 2**31:
        raise CheckpointError(f"quantization_config: group_size is {size}; it is positive, or -1 for whole rows")
    return size


def bits_setting(config: Mapping[str, Any], default: int | None, readable: Sequence[int]) -> int | None:
    """`bits`, `w_bit` or `wbits`.

    Raises:
        CheckpointError: not readable.
    """
    bits: int | None = setting(config, ("bits", "w_bit", "wbits"), default, int, "a number of bits")
    if bits is not None and bits not in readable:
        raise CheckpointError(
            f"quantization_config: bits is {bits}; readable are {', '.join(map(str, readable))}: quantize the original "
            "model to one of those"
        )
    return bits


def bits_from_words(tensors: LayerTensors, suffix: str, codes: int, readable: Sequence[int]) -> int:
    """The bits of each of `codes` codes that fill the words of a tensor, for configurations that do not tell.

    Raises:
        CheckpointError: they do not fill them, or are not readable.
    """
    info = tensors.info(suffix)
    bits, rest = divmod(math.prod(info.shape) * info.dtype.itemsize * 8, codes)
    if rest or bits not in readable:
        raise tensors.error(
            f"{suffix} has shape {info.shape}, which does not tell the bits of its codes; set bits in the configuration"
        )
    return bits


def group_from_scales(tensors: LayerTensors, suffix: str, shape: tuple[int, int]) -> int:
    """The group size that scales [groups, N] tell, for configurations that do not.

    Raises:
        CheckpointError: another shape, or groups of several sizes.
    """
    stored = tensors.info(suffix).shape
    if len(stored) != 2 or stored[0] < 1 or shape[1] % stored[0]:
        raise tensors.error(
            f"{suffix} has shape {stored}; it is [groups, {shape[0]}] with groups that divide {shape[1]}"
        )
    return shape[1] // stored[0]


def granularity_of(group_size: int, columns: int) -> Granularity:
    """What shares a scale: a group of columns, or a channel where a group is the whole row."""
    return Granularity.channel() if group_size == -1 or group_size >= columns else Granularity.group(group_size)


def take_finite(tensors: LayerTensors, suffix: str, shape: tuple[int | None, ...]) -> Tensor:
    """Scales or offsets in the shape they are stored in.

    Raises:
        CheckpointError: NaN or infinity; another shape or dtype.
    """
    values = tensors.take(suffix, *SCALES, shape=shape)
    if not torch.isfinite(values).all():
        raise tensors.error(
            f"{suffix} holds NaN or infinity: the file is damaged, or its quantization failed; get it again, or "
            "quantize the original model again"
        )
    return values


def check_middle(tensors: LayerTensors, suffix: str, zeros: Tensor, middle: Sequence[int], where: str) -> None:
    """See that zero points of a symmetric weight are all one of the values that say so.

    Raises:
        CheckpointError: they are not.
    """
    if not any(bool((zeros == value).all()) for value in middle):
        raise tensors.error(
            f"{suffix} holds zero points other than the middle of the range, but {where} in its configuration says "
            "that there are none; if they are meant, correct the configuration"
        )


def loaded_integers(
    tensors: LayerTensors,
    codes: Tensor,
    bits: int,
    shape: tuple[int, int],
    granularity: Granularity,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    perm: Tensor | None = None,
    sparsity: str | None = None,
) -> PackedLinear:
    """A layer of unsigned codes whose zero points, where none are given or all are so, are half of their range.

    Args:
        codes: as a bit stream, uint8 [N, ceil(K * bits / 8)].
        scale: [N, column blocks].
        zero_point: uint8 of the scale's shape.
        offset: of the scale's shape and dtype, in place of zero points.
        perm: int32 [K], the input feature of each column of the codes.
        sparsity: of the scheme.
    """
    if zero_point is not None and bool((zero_point == 1 << (bits - 1)).all()):
        zero_point = None
    symmetric = zero_point is None and offset is None
    scheme = WeightScheme(
        format=get_format(f"{'int' if symmetric else 'uint'}{bits}"),
        granularity=granularity,
        symmetric=symmetric,
        offset=offset is not None,
        scale_dtype=SCALES[scale.dtype],
        act_order=perm is not None,
        sparsity=sparsity,
    )
    weight = PackedWeight(
        codes=codes.contiguous(),
        scale=scale.contiguous(),
        zero_point=None if zero_point is None else zero_point.contiguous(),
        offset=None if offset is None else offset.contiguous(),
        perm=perm,
        shape=shape,
        scheme=scheme,
    )
    weight.check(tensors.name)
    return PackedLinear(weight=weight, scheme=Scheme(weight=scheme, method=CHECKPOINT))
