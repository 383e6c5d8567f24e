"""The block types of GGUF tensors, as codes and scales: nothing is rounded.

A tensor's rows are cut into blocks of `columns` weights; a block is a record of `nbytes` bytes that holds the scales
and the codes of its weights. Taking it apart gives the codes in the order of the weights, and the scales of a
`PackedWeight`. Numbers of several bytes are little-endian.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.formats import get_format
from qcompile.packed import PackedWeight
from qcompile.scheme import Granularity, SuperScale, WeightScheme

_SUPER = 256
"""Weights of a block of the "K" types: its sub-blocks have small integer scales under one scale in float16."""


@dataclass(frozen=True)
class Parts:
    """Rows of blocks taken apart: codes uint8 [N, K], and the scales of `PackedWeight`, each [N, blocks]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """A quantized type.

    Attributes:
        name: as ggml writes it.
        columns, nbytes: weights and bytes of a block.
        scheme: what its codes and scales mean.
        take_apart: uint8 [N, blocks, nbytes] to `Parts`.
    """

    name: str
    columns: int
    nbytes: int
    scheme: WeightScheme
    take_apart: Callable[[Tensor], Parts]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block: [N, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _rows(values: Tensor) -> Tensor:
    """[N, blocks, ...] to [N, all of a row's]."""
    return values.flatten(1).contiguous()


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Fields of 1, 2 or 4 bits where every `run` bytes hold 8 / bits runs of `run` values, lowest bits first.

    uint8 [..., B] to [..., B * 8 / bits].
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((packed.unflatten(-1, (-1, 1, run)) >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _bits(packed: Tensor) -> Tensor:
    """Single bits, the lowest of the first byte first: uint8 [..., B] to [..., 8 B]."""
    return _fields(packed, 1, 1)


def _q4_0(blocks: Tensor) -> Parts:
    return Parts(_rows(_fields(blocks[..., 2:], 4, 16)), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    return Parts(_rows(_fields(blocks[..., 4:], 4, 16)), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., 6:], 4, 16) | _bits(blocks[..., 2:6]) << 4
    return Parts(_rows(codes), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., 8:], 4, 16) | _bits(blocks[..., 4:8]) << 4
    return Parts(_rows(codes), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Parts:
    return Parts(_rows(blocks[..., 2:] ^ 0x80), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Parts:
    scales = blocks[..., :16]
    return Parts(
        codes=_rows(_fields(blocks[..., 16:80], 2, 32)),
        scale=_rows(scales & 15),
        offset=_rows(scales >> 4),
        super_scale=_half(blocks, 80),
        super_offset=-_half(blocks, 82),
    )


def _q3_k(blocks: Tensor) -> Parts:
    high = _fields(blocks[..., :32], 1, 32)  # bit r of byte l: the highest bit of weight 32 r + l
    packed = blocks[..., 96:108]
    scales = _fields(packed[..., :8], 4, 8) | _fields(packed[..., 8:], 2, 4) << 4
    return Parts(
        codes=_rows(_fields(blocks[..., 32:96], 2, 32) | high << 2),
        scale=_rows(scales.view(torch.int8) - 32),
        super_scale=_half(blocks, 108),
    )


def _scales_of_6_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima in the 12 bytes of Q4_K and Q5_K.

    The first four of each are the low 6 bits of bytes 0..7; the others have their low 4 bits in bytes 8..11 and their
    high 2 bits where the first four leave room.
    """
    first, second, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat([first & 63, (low & 15) | (first >> 6 << 4)], -1)
    minimum = torch.cat([second & 63, (low >> 4) | (second >> 6 << 4)], -1)
    return scale, minimum


def _q4_k(blocks: Tensor) -> Parts:
    scale, minimum = _scales_of_6_bits(blocks[..., 4:16])
    codes = _fields(blocks[..., 16:], 4, 32)
    return Parts(_rows(codes), _rows(scale), _rows(minimum), _half(blocks, 0), -_half(blocks, 2))


def _q5_k(blocks: Tensor) -> Parts:
    scale, minimum = _scales_of_6_bits(blocks[..., 4:16])
    codes = _fields(blocks[..., 48:], 4, 32) | _fields(blocks[..., 16:48], 1, 32) << 4
    return Parts(_rows(codes), _rows(scale), _rows(minimum), _half(blocks, 0), -_half(blocks, 2))


def _q6_k(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., :128], 4, 64) | _fields(blocks[..., 128:192], 2, 32) << 4
    return Parts(codes=_rows(codes), scale=_rows(blocks[..., 192:208].view(torch.int8)), super_scale=_half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> Parts:
    scales = _fields(blocks[..., 4:8], 4, 1) | _fields(blocks[..., 2:4], 2, 1) << 4
    return Parts(
        codes=_rows(_fields(blocks[..., 8:], 4, 16)),
        scale=_rows(scales.view(torch.int8) - 32),
        super_scale=_half(blocks, 0),
    )


def _mxfp4(blocks: Tensor) -> Parts:
    return Parts(_rows(_fields(blocks[..., 1:], 4, 16)), _rows(blocks[..., 0]).view(torch.float8_e8m0fnu))


def _scheme(
    format_name: str, group: int, scale_dtype: str = "float16", bits: int = 0, *, offset: bool = False
) -> WeightScheme:
    return WeightScheme(
        format=get_format(format_name),
        granularity=Granularity.group(group),
        symmetric=not offset,
        offset=offset,
        scale_dtype=scale_dtype,
        super_scale=SuperScale(columns=_SUPER, dtype="float16", bits=bits) if bits else None,
    )


BLOCK_TYPES: dict[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18, _scheme("int4", 32), _q4_0),
    3: BlockType("Q4_1", 32, 20, _scheme("uint4", 32, offset=True), _q4_1),
    6: BlockType("Q5_0", 32, 22, _scheme("int5", 32), _q5_0),
    7: BlockType("Q5_1", 32, 24, _scheme("uint5", 32, offset=True), _q5_1),
    8: BlockType("Q8_0", 32, 34, _scheme("int8", 32), _q8_0),
    10: BlockType("Q2_K", 256, 84, _scheme("uint2", 16, "uint8", 4, offset=True), _q2_k),
    11: BlockType("Q3_K", 256, 110, _scheme("int3", 16, "int8", 6), _q3_k),
    12: BlockType("Q4_K", 256, 144, _scheme("uint4", 32, "uint8", 6, offset=True), _q4_k),
    13: BlockType("Q5_K", 256, 176, _scheme("uint5", 32, "uint8", 6, offset=True), _q5_k),
    14: BlockType("Q6_K", 256, 210, _scheme("int6", 16, "int8", 8), _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _scheme("iq4_nl", 32), _q4_0),
    23: BlockType("IQ4_XS", 256, 136, _scheme("iq4_nl", 32, "int8", 6), _iq4_xs),
    39: BlockType("MXFP4", 32, 17, _scheme("fp4_e2m1", 32, "float8_e8m0fnu"), _mxfp4),
}
"""The types that can be read, by their numbers in files."""

PLAIN_TYPES: dict[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}

OTHER_TYPES: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
    42: "Q2_0",
}  # fmt: skip
"""Types that are known by name, for errors."""

_CHUNK = 1 << 22
"""Weights taken apart at a time, so that the codes of a large layer, a byte each, never lie in memory at once."""


def pack_rows(read: Callable[[int, int], Tensor], shape: tuple[int, int], kind: BlockType) -> PackedWeight:
    """A weight from its rows of blocks.

    Args:
        read: the bytes of rows [start, stop): uint8 [stop - start, K / columns * nbytes].
        shape: (N, K); the type's `columns` divide K.
    """
    n, k = shape
    step = max(1, _CHUNK // k)
    collected: list[Parts] = []
    for start in range(0, n, step):
        rows = read(start, min(start + step, n))
        parts = kind.take_apart(rows.unflatten(1, (-1, kind.nbytes)))
        packed = pack_bits(parts.codes, kind.scheme.format.bits)
        collected.append(Parts(packed, parts.scale, parts.offset, parts.super_scale, parts.super_offset))

    def join(name: str) -> Tensor | None:
        pieces = [getattr(parts, name) for parts in collected]
        return None if pieces[0] is None else pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    codes, scale = join("codes"), join("scale")
    assert codes is not None
    assert scale is not None
    return PackedWeight(
        codes=codes,
        scale=scale,
        shape=shape,
        scheme=kind.scheme,
        offset=join("offset"),
        super_scale=join("super_scale"),
        super_offset=join("super_offset"),
    )
