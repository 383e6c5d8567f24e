"""Memory in pages of 2 MB, for weights that are read from one end to the other at every token.

Reading 4 KB pages, a processor looks up an address for every 64 cache lines; in huge pages (Linux' transparent ones,
https://docs.kernel.org/admin-guide/mm/transhuge.html) that is one in 32768. The system gives them where it has them
free and `/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`; else the memory is as any other.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21
"""Bytes of a huge page."""


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """As `like.new_empty(shape)`. On CPUs, what has `PAGE` bytes or more is in huge pages as far as they fill.

    What is left behind the last whole page stays in small ones, so no memory is lost.
    """
    size = math.prod(shape) * like.element_size()
    if type(like) is not Tensor or like.device.type != "cpu" or size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(tuple(shape))
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, first, size // PAGE * PAGE)
    own = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=first)
    # Not a view, and its storage keeps the memory.
    return torch.empty(0, dtype=like.dtype).set_(own.untyped_storage(), 0, tuple(shape))  # type: ignore[call-overload]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All rows of the given tensors, one below another, in memory of `empty`: a copy of them."""
    first = tensors[0]
    together = empty((sum(t.shape[0] for t in tensors), *first.shape[1:]), first)
    row = 0
    for tensor in tensors:
        together[row : row + tensor.shape[0]] = tensor
        row += tensor.shape[0]
    return together
