"""Processes of one group, which stay for many calls."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh


class Ranks:
    """`size` processes that share a mesh over a device's backend; `call` runs a function in all.

    Args:
        folder: for the file by which they find each other.
    """

    def __init__(self, size: int, folder: Path, device_type: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        self._ends = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            given = (rank, size, str(folder / "store"), device_type, theirs)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
        """`function(mesh, *args)` of each process, which must be importable; what it raises is raised here."""
        for end in self._ends:
            end.send((function, args))
        results = []
        for rank, end in enumerate(self._ends):
            if not end.poll(seconds):
                raise TimeoutError(f"rank {rank} does not answer")
            results.append(end.recv())
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, size: int, store: str, device_type: str, end: Connection) -> None:
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh(device_type, (size,))
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            break
        try:
            end.send(function(mesh, *args))
        except Exception as error:
            traceback.print_exc()  # which does not travel
            end.send(error)
    torch.compiler.reset()  # communicators end after the CUDA graphs that hold them
    dist.destroy_process_group()
