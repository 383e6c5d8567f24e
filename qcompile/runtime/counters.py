"""Zeroed memory for kernels that leave it zeroed, so that it is not zeroed for each launch.

Two launches may share counters if one has ended when the other begins to count. Launches in one stream do; what a CUDA
graph holds may run beside anything, so each launch that is captured gets counters of its own.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_LEAST = 4096
_CAPTURED = 1 << 18
"""int32 numbers in a block for captured launches: a few thousand launches."""

_of_streams: dict[tuple[int, int], Tensor] = {}
_blocks: dict[int, Tensor] = {}
"""By device, what is left of the block for captured launches."""
_kept: list[Tensor] = []
"""All that was ever allocated: graphs and running kernels hold its addresses."""
_lock = threading.Lock()


def zeros_kept_zero(count: int, device: torch.device) -> Tensor:
    """int32 [at least `count`], all 0, for a kernel launched now in the current stream that leaves them 0."""
    count = -(-count // 4) * 4  # so that each launch's counters are aligned alike
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            block = _blocks.get(index)
            if block is not None and len(block) >= count:
                _blocks[index] = block[count:]
                return block[:count]
        return torch.zeros(count, dtype=torch.int32, device=device)  # zeroed in every replay
    if len(_blocks.get(index, ())) < _CAPTURED // 2:
        _blocks[index] = _allocate(_CAPTURED, index)
    stream = index, torch.cuda.current_stream(device).cuda_stream
    found = _of_streams.get(stream)
    if found is None or len(found) < count:
        found = _of_streams[stream] = _allocate(max(_LEAST, 2 * count), index)
    return found


def _allocate(count: int, index: int) -> Tensor:
    """Zeros that outlive whatever pool the calling thread allocates from, as while a CUDA graph is warmed up."""
    with ThreadPoolExecutor(1) as other:
        found = other.submit(_zeros, count, index).result()
    _kept.append(found)
    return found


def _zeros(count: int, index: int) -> Tensor:
    found = torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", index))
    torch.cuda.current_stream(index).synchronize()
    return found
