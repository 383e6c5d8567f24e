"""Codes in machine words: the bit streams and bit planes that checkpoints of integer weights are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits, unpack_bits

WORD_DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
"""Words that codes are packed in, by the names that configurations call them."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""The widths of the bit planes, lowest first, that a code of so many bits is cut into by planar packing."""


def stream_bytes(words: Tensor, dim: int) -> Tensor:
    """The bytes of words along `dim`, as the last dimension: uint8 [..., words * bytes a word], contiguous.

    Words are little-endian, so that a bit stream in words is the same bit stream in bytes.
    """
    moved = words.movedim(dim, -1)
    if not moved.is_contiguous() or moved.stride(-1) != 1:  # a single word counts as contiguous with any stride
        moved = moved.clone(memory_format=torch.contiguous_format)
    return moved.view(torch.uint8)


def unpack_words(words: Tensor, bits: int, dim: int = -1, count: int | None = None) -> Tensor:
    """Codes of a little-endian bit stream that runs along `dim`: uint8, `count` of them (default: as many as fit).

    Code k starts at bit k * bits of the stream. Where `bits` divides the word, this is "code j of a word lies at bit
    j * bits"; where it does not (3 bits), codes may straddle words.

    Args:
        words: any integer dtype; int32 words count as unsigned.
    """
    stream = stream_bytes(words, dim)
    wanted = stream.shape[-1] * 8 // bits if count is None else count
    return unpack_bits(stream, bits, wanted)[..., :wanted].movedim(-1, dim)


def pack_words(codes: Tensor, bits: int, dim: int = -1, dtype: torch.dtype = torch.int32) -> Tensor:
    """The inverse of `unpack_words`: uint8 codes to words of `dtype`, the last one filled up with zeros."""
    stream = pack_bits(codes.movedim(dim, -1), bits)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % dtype.itemsize))
    words = padded.reshape(-1).view(dtype).view(*padded.shape[:-1], padded.shape[-1] // dtype.itemsize)
    return words.movedim(-1, dim).contiguous()


def unpack_planes(words: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Codes of planar packing along `dim`: uint8, 32 for each run of `bits` int32 words.

    A run holds the bit planes of 32 codes (`PLANES`) one after another; a plane of width w takes w words, a stream of
    w-bit fields, code 0 first.
    """
    runs = words.movedim(dim, -1).unflatten(-1, (-1, bits))
    codes = torch.zeros(*runs.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    low = 0
    for width in PLANES[bits]:
        codes |= unpack_words(runs[..., low : low + width], width) << low
        low += width
    return codes.flatten(-2).movedim(-1, dim)
