"""Times of calls on a GPU, on weights that come from memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COLD_BYTES = 240 << 20
"""Of copies of a weight together, so that none stays in a cache: several times an H100's, which holds 50 MB."""

ROUNDS = 9

SLOW = 2000.0
"""Microseconds of a call above which two calls make a graph: reading weights is then a small part."""


def times_in_graph(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Microseconds of a call, in `ROUNDS` replays of a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
        start.record()
        calls[0]()
        end.record()
        end.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    captured = calls[:2] if start.elapsed_time(end) * 1e3 > SLOW else calls
    graph = torch.cuda.CUDAGraph()
    # Other threads may compile kernels meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in captured:
            call()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(captured))
    return times
