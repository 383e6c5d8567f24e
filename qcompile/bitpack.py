"""Codes of 1 to 8 bits as a dense little-endian bit stream along the last dimension."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes that hold `count` codes."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., K] (uint8) into bytes [..., ceil(K * bits / 8)]: code k starts at bit k * bits, LSB first."""
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[-1]
    per_byte, remainder = divmod(8, bits)
    if remainder == 0 and count % per_byte == 0:
        fields = codes.unflatten(-1, (-1, per_byte))
        packed = fields[..., 0].clone()
        for i in range(1, per_byte):
            packed |= fields[..., i] << (bits * i)
        return packed
    # Any width: 8 codes fill `bits` bytes.
    fields = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8))
    packed = torch.zeros(*fields.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= fields[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= fields[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_width(count, bits)].contiguous()


@functools.lru_cache(maxsize=64)
def _field_positions(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.arange(count, device=device) * bits
    first = start // 8
    return first, ((start + bits - 1) // 8), (start % 8).to(torch.int32)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: bytes to codes [..., count] (uint8)."""
    if bits == 8:
        return packed
    per_byte, remainder = divmod(8, bits)
    mask = (1 << bits) - 1
    if remainder == 0:
        shifts = bits * torch.arange(per_byte, device=packed.device, dtype=torch.uint8)
        return ((packed.unsqueeze(-1) >> shifts) & mask).flatten(-2)[..., :count]
    first, last, shift = _field_positions(count, bits, packed.device)
    low, high = packed[..., first].to(torch.int32), packed[..., last].to(torch.int32)
    return (((low | (high << 8)) >> shift) & mask).to(torch.uint8)
