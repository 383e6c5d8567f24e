"""Blocks of a flattened weight: of [N, K] in row-major order, so that they may begin and end within rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.scheme import Granularity


def block_count(block: int, shape: tuple[int, int]) -> int:
    """How many blocks of so many elements a weight (N, K) has; the last one may be shorter."""
    return -(-shape[0] * shape[1] // block)


def group_granularity(block: int, shape: tuple[int, int]) -> Granularity:
    """The largest groups within rows of which every one lies in a single block."""
    size = math.gcd(block, shape[1])
    return Granularity.channel() if size == shape[1] else Granularity.group(size)


def spread_blocks(values: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """A value for each group of `group_granularity`, from one for each block: [blocks] to [N, K / group]."""
    rows, columns = shape
    size = math.gcd(block, columns)
    groups = columns // size
    first = torch.arange(rows * groups, device=values.device) * size
    return values.flatten()[first // block].view(rows, groups)
