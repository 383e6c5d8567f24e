"""Weights in the order of the Marlin kernels: dense of 4 bits, 2:4 sparse ("marlin_24") of 4 or 8, and QQQ.

Layouts: `Layer.pack` of https://github.com/IST-DASLab/marlin (Frantar et al. 2024, arXiv:2408.11743),
`Marlin24Compressor` of compressed-tensors up to 0.12 with the metadata of NVIDIA's sparse matrix instructions, and
`QQQLinear` of https://github.com/ModelCloud/GPTQModel (Zhang et al. 2024, arXiv:2406.09904).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.checkpoint.integers import granularity_of, group_from_scales, loaded_integers, take_finite
from qcompile.checkpoint.method import LayerTensors
from qcompile.checkpoint.words import unpack_words
from qcompile.formats import get_format
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import ActivationScheme, Granularity

_TILE = 16
_DENSE_SCALES = [i + 8 * j for i in range(8) for j in range(8)]
_DENSE_CHANNELS = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
_SPARSE_SCALES = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
_FLOAT_ROWS, _INT8_ROWS = (2, (0, 1, 8, 9)), (4, (0, 1, 2, 3))
"""The rows of a tile that a quarter of the threads multiplies with inputs of 16 and of 8 bits: stride, steps."""
_QQQ_CHANNEL_INTERLEAVE = (4, 0, 5, 1, 6, 2, 7, 3)
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
"""Of the codes in a word, by their bits."""


def marlin_linear(tensors: LayerTensors, shape: tuple[int, int], *, codes: str, scales: str) -> PackedLinear:
    """A dense, symmetric weight of 4 bits.

    Args:
        codes: suffix of int32 [K / 16, 2 N].
        scales: suffix of [groups, N].
    """
    rows, columns = shape
    _check_tiles(tensors, shape, _TILE)
    tensors.ignore("workspace")
    words = tensors.take(codes, torch.int32, shape=(columns // _TILE, 2 * rows))
    unpacked = _untile(words, 4, _dense_order(_FLOAT_ROWS, _INTERLEAVE[4]), columns, rows)
    scale = _scales(tensors, scales, shape, _DENSE_SCALES, _DENSE_CHANNELS)
    granularity = granularity_of(columns // scale.shape[1], columns)
    return loaded_integers(tensors, pack_bits(unpacked, 4), 4, shape, granularity, scale)


def marlin_24_weight(
    tensors: LayerTensors, shape: tuple[int, int], *, bits: int, codes: str, meta: str, scales: str
) -> PackedWeight:
    """A symmetric 2:4 sparse weight: of each four columns two are stored; the others become the code of 0.

    Args:
        bits: 4 or 8.
        codes: suffix of the kept codes, int32 [K / 32, N * bits / 2].
        meta: suffix of their places, int16 [K / 32, 2 N].
        scales: suffix of [groups, N].

    Raises:
        CheckpointError: also for metadata that keeps one column twice.
    """
    rows, columns = shape
    _check_tiles(tensors, shape, 2 * _TILE)
    tensors.ignore("workspace")
    words = tensors.take(codes, torch.int32, shape=(columns // 2 // _TILE, rows * bits // 2))
    kept = _untile(words, bits, _sparse_order(bits), columns // 2, rows)
    stored = tensors.take(meta, torch.int16, shape=(columns // 2 // _TILE, 2 * rows))
    places = stored.flatten()[_meta_positions(rows, columns // 16)].to(torch.int32)
    quads = (places.unsqueeze(-1) >> torch.tensor([0, 4, 8, 12])) & 15
    pairs = torch.stack([quads & 3, quads >> 2], -1).view(rows, columns // 4, 2).to(torch.int64)
    if not (pairs[..., 0] < pairs[..., 1]).all():
        raise tensors.error(
            f"{meta} does not name two different columns of each four: the file is damaged; get it again"
        )
    dense = torch.full((rows, columns // 4, 4), 1 << (bits - 1), dtype=torch.uint8)
    dense.scatter_(2, pairs, kept.view(rows, columns // 4, 2))
    scale = _scales(tensors, scales, shape, _SPARSE_SCALES, range(8))
    granularity = granularity_of(columns // scale.shape[1], columns)
    spread = pack_bits(dense.flatten(1), bits)
    return loaded_integers(tensors, spread, bits, shape, granularity, scale, sparsity="2:4").weight


def qqq_linear(tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear:
    """A weight whose inputs are quantized to int8 per token: `B` int32 [K / 16, 2 N], `s_channel` float32 [1, N].

    With `s_group` [groups, N], codes less 8 times that are rounded to int8, as the kernel rounds them, so the weight is
    int8 per channel. Without, codes are int4 in two's complement, 16 of whose scales are stored.
    """
    rows, columns = shape
    _check_tiles(tensors, shape, _TILE)
    tensors.ignore("workspace", "reduce_buffer")
    words = tensors.take("B", torch.int32, shape=(columns // _TILE, 2 * rows))
    scale = _scales(tensors, "s_channel", shape, _DENSE_SCALES, _DENSE_CHANNELS).to(torch.float32)
    if scale.shape[1] != 1:
        raise tensors.error(f"s_channel has {scale.shape[1]} rows; it is one scale a channel")
    if "s_group" in tensors and 0 not in tensors.info("s_group").shape:
        codes = _untile(words, 4, _dense_order(_INT8_ROWS, _INTERLEAVE[4]), columns, rows)
        groups = _scales(tensors, "s_group", shape, _DENSE_SCALES, _DENSE_SCALES).to(torch.float32)
        products = (codes.to(torch.float32) - 8) * groups.repeat_interleave(columns // groups.shape[1], 1)
        bits, packed = 8, (products.round().clamp(-128, 127) + 128).to(torch.uint8)
    else:
        tensors.ignore("s_group")
        codes = _untile(words, 4, _dense_order(_INT8_ROWS, _QQQ_CHANNEL_INTERLEAVE), columns, rows)
        bits, packed, scale = 4, pack_bits(codes ^ 8, 4), scale * 16
    layer = loaded_integers(tensors, packed, bits, shape, Granularity.channel(), scale)
    inputs = ActivationScheme(format=get_format("int8"), granularity=Granularity.channel())
    return replace(layer, scheme=replace(layer.scheme, activation=inputs))


def _check_tiles(tensors: LayerTensors, shape: tuple[int, int], columns: int) -> None:
    if shape[0] % 64 or shape[1] % columns:
        raise tensors.error(f"its shape {shape} is no multiple of Marlin's tiles of 64 outputs by {columns} inputs")


def _untile(words: Tensor, bits: int, order: Tensor, columns: int, rows: int) -> Tensor:
    """Codes [rows, columns], contiguous, of words that hold tiles of 16 x 16 with runs of 1024 codes in `order`."""
    codes = unpack_words(words, bits, 1).reshape(-1, len(order))[:, order.argsort()]
    tiles = codes.view(columns // _TILE, rows // _TILE, _TILE, _TILE)  # column tile, row tile, column, row
    return tiles.permute(1, 3, 0, 2).reshape(rows, columns)


@functools.cache
def _dense_order(thread_rows: tuple[int, tuple[int, ...]], interleave: tuple[int, ...]) -> Tensor:
    """Where the codes of a run come from: thread by thread, as tensor cores take them."""
    stride, steps = thread_rows
    threads = [
        [
            16 * (stride * (thread % 4) + step) + thread // 4 + 8 * half + 256 * tile
            for half in range(2)
            for step in steps
        ]
        for thread in range(32)
        for tile in range(4)
    ]
    return torch.tensor(threads)[:, interleave].flatten()


@functools.cache
def _sparse_order(bits: int) -> Tensor:
    """As `_dense_order`, for the kept codes of sparse weights."""
    threads = [
        [
            16 * row + 256 * (thread // 8) + 8 * (thread // 4 % 2) + 4 * half + column
            for half in range(2)
            for row in (2 * (thread % 4) + step for step in (0, 1, 8, 9))
        ]
        for thread in range(32)
        for column in range(4)
    ]
    interleave = _INTERLEAVE[bits]
    return torch.tensor(threads).view(-1, len(interleave))[:, interleave].flatten()


def _meta_positions(rows: int, words: int) -> Tensor:
    """Where the metadata of a row's 16 columns lies in the stored buffer: int64 [rows, words]."""
    n = torch.arange(rows).unsqueeze(1).expand(rows, words)
    c = torch.arange(words).expand(rows, words)
    moved = n // 64 * 64 + n % 2 * 2 + n % 8 // 4 + n % 32 % 4 // 2 * 32 + n % 64 // 8 * 4
    swap = (moved % 2 == 0) & (c % 2 == 1), (moved % 2 == 1) & (c % 2 == 0)
    row = moved + swap[0].to(torch.int64) - swap[1].to(torch.int64)
    column = c - swap[0].to(torch.int64) + swap[1].to(torch.int64)
    return column // 2 * 2 * rows + row * 2 + column % 2


def _scales(
    tensors: LayerTensors, suffix: str, shape: tuple[int, int], grouped: Sequence[int], channel: Sequence[int]
) -> Tensor:
    """Scales [N, groups], of stored ones [groups, N] whose runs are permuted."""
    groups = shape[1] // group_from_scales(tensors, suffix, shape)
    scales = take_finite(tensors, suffix, (groups, shape[0]))
    order = torch.tensor(channel if groups == 1 else grouped)
    return scales.reshape(-1, len(order))[:, order.argsort()].view(groups, shape[0]).t()
