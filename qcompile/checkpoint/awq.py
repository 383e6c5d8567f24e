"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978): `quant_method` awq in all its versions.

Layouts: `WQLinear_GEMM`, `WQLinear_GEMV`, `WQLinear_GEMVFast` and `WQLinear_Marlin` of
https://github.com/casper-hansen/AutoAWQ, `WQLinear` of https://github.com/mit-han-lab/llm-awq. Which layers are
quantized is read off the tensors, so `modules_to_not_convert` decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.checkpoint.integers import (
    SCALES,
    bits_setting,
    check_middle,
    granularity_of,
    group_from_scales,
    group_setting,
    loaded_integers,
    setting,
    take_finite,
)
from qcompile.checkpoint.marlin import marlin_linear
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.checkpoint.words import stream_bytes, unpack_words
from qcompile.errors import CheckpointError, shown
from qcompile.packed import PackedLinear

_VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin")
_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of each run of 8 that holds output feature j of it (version gemm)."""
_DEFAULT_GROUP = 128
_PACKED = 8
"""Codes in a word of 32 bits."""


@register
class AWQ(Method):
    """Integers of 4 bits with zero points, or in llm-awq's layout with offsets."""

    name = "awq"
    aliases = ("awq_marlin",)
    activation_dtypes = tuple(SCALES)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        bits_setting(config, 4, (4,))
        self.group_size = group_setting(config)
        self.zero_point = setting(config, ("zero_point",), True, bool, "true or false")
        names = ("version", "checkpoint_format", "format")
        version = setting(config, names, "gemm", str, "a string").lower().replace("llm_awq", "llm-awq")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"quantization_config: version is {shown(version)}; AWQ versions are {', '.join(_VERSIONS)}"
            )
        self.version = version

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        if "qweight" not in tensors:
            return None
        if self.version == "marlin":
            return marlin_linear(tensors, shape, codes="qweight", scales="scales")
        if tensors.info("qweight").dtype == torch.int16:
            return _fast(tensors, shape, self.group_size or _DEFAULT_GROUP)
        if self.version == "gemv":
            return _gemv(tensors, shape, self.group_size or _DEFAULT_GROUP, self.zero_point)
        return gemm_linear(tensors, shape, 4, self.group_size, self.zero_point)


def gemm_linear(
    tensors: LayerTensors, shape: tuple[int, int], bits: int, group_size: int | None, zero_point: bool
) -> PackedLinear:
    """Version gemm: `qweight` int32 [K, N * bits / 32], `qzeros` likewise [groups, ...], `scales` [groups, N].

    Args:
        bits: 4, or with auto-round 5 to 7, whose codes may straddle words.
        group_size: None to have it from the scales.
        zero_point: whether there are zero points; they are stored in both cases, or missing where there are none.
    """
    rows, columns = shape
    if rows * bits % 32 or rows % _PACKED:
        raise tensors.error(
            f"its {rows} output features of {bits} bits do not fill words of 32 bits, as version gemm does"
        )
    group = group_from_scales(tensors, "scales", shape) if group_size is None else group_size
    granularity = granularity_of(group, columns)
    groups = granularity.scale_shape(shape)[1]
    words = tensors.take("qweight", torch.int32, shape=(columns, rows * bits // 32))
    codes = pack_bits(_gemm_codes(words, bits), bits)
    scale = take_finite(tensors, "scales", (groups, rows)).t()
    zeros = None
    if zero_point or "qzeros" in tensors:
        zeros = _gemm_codes(tensors.take("qzeros", torch.int32, shape=(groups, rows * bits // 32)), bits)
        if not zero_point:
            check_middle(tensors, "qzeros", zeros, (1 << (bits - 1),), "zero_point: false")
    return loaded_integers(tensors, codes, bits, shape, granularity, scale, zero_point=zeros)


def _gemm_codes(words: Tensor, bits: int) -> Tensor:
    """Codes [N, rows of words], contiguous."""
    fields = unpack_words(words, bits).unflatten(1, (-1, _PACKED))[..., _FIELDS]
    return fields.flatten(1).t().contiguous()


def _padded_groups(group_size: int, shape: tuple[int, int]) -> tuple[int, int]:
    """How many groups a row has, and how many its stored scales are for: words of zero points come in 1, 2 or 4."""
    granularity = granularity_of(group_size, shape[1])
    groups, multiple = granularity.scale_shape(shape)[1], max(1, 128 // granularity.block_of(shape)[1])
    words = -(-groups // _PACKED)
    return groups, -(-words // multiple) * multiple * _PACKED


def _gemv(tensors: LayerTensors, shape: tuple[int, int], group_size: int, zero_point: bool) -> PackedLinear:
    """`qweight` int32 [N, K / 8]; `qzeros` and `scales` likewise, padded to whole words."""
    rows, columns = shape
    groups, padded = _padded_groups(group_size, shape)
    if columns % _PACKED:
        raise tensors.error(f"its {columns} input features do not fill words of 8, as version gemv does")
    words = tensors.take("qweight", torch.int32, shape=(rows, columns // _PACKED))
    scale = take_finite(tensors, "scales", (rows, padded))[:, :groups]
    zeros = None
    if zero_point or "qzeros" in tensors:
        stored = tensors.take("qzeros", torch.int32, shape=(rows, padded // _PACKED))
        zeros = unpack_words(stored, 4, count=padded)[:, :groups]
        if not zero_point:
            check_middle(tensors, "qzeros", zeros, (8,), "zero_point: false")
    granularity = granularity_of(group_size, columns)
    return loaded_integers(tensors, stream_bytes(words, -1), 4, shape, granularity, scale, zero_point=zeros)


def _fast(tensors: LayerTensors, shape: tuple[int, int], group_size: int) -> PackedLinear:
    """Versions gemv_fast and llm-awq: `qweight` int16 [N / 4, K], `scales` and `qzeros` float [padded groups, N].

    A word has 4 rows' codes of a column; runs of 64 words are 4 rows after one another, in whose runs of 32 columns
    pairs and then quadruples are interleaved. `qzeros`, which llm-awq calls `scaled_zeros`, is minus scale times zero
    point.
    """
    rows, columns = shape
    groups, padded = _padded_groups(group_size, shape)
    if rows % 4 or columns % 64:
        raise tensors.error(f"its shape {shape} is no multiple of tiles of 4 outputs by 64 inputs")
    words = tensors.take("qweight", torch.int16, shape=(rows // 4, columns))
    rows_of_tiles = unpack_words(words, 4).view(rows // 4, columns // 64, 4, 64).transpose(1, 2)
    runs = rows_of_tiles.reshape(rows, columns // 32, 4, 2, 4)  # pairs of a run of 8: first all even columns, then odd
    pairs = runs.transpose(3, 4).reshape(rows, columns // 32, 4, 4, 2)
    codes = pairs.transpose(2, 3).reshape(rows, columns)
    suffix = "qzeros" if "qzeros" in tensors else "scaled_zeros"
    scale = take_finite(tensors, "scales", (padded, rows))[:groups].t()
    offset = take_finite(tensors, suffix, (padded, rows))[:groups].t()
    if offset.dtype != scale.dtype:
        raise tensors.error(f"{suffix} is {offset.dtype}, but scales are {scale.dtype}")
    return loaded_integers(
        tensors, pack_bits(codes, 4), 4, shape, granularity_of(group_size, columns), scale, offset=offset
    )
