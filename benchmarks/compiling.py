"""Attention kernels compiled by several processes, before a script times them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from qcompile.codegen.attention_spec import AttentionKernelSpec
from qcompile.codegen.spec import decode_kernel_spec

_Given = TypeVar("_Given")


def compile_by(launch: Callable[[AttentionKernelSpec], object], encoded: str) -> str:
    """Compile a kernel by a launch on little: what failed, or nothing."""
    kernel = decode_kernel_spec(encoded)
    assert isinstance(kernel, AttentionKernelSpec)
    try:
        launch(kernel)
        torch.cuda.synchronize()
    except Exception as error:  # a compiler's error of any kind is the result
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def in_processes(
    compile_one: Callable[[tuple[str, _Given]], str], kernels: Mapping[AttentionKernelSpec, _Given]
) -> dict[AttentionKernelSpec, str]:
    """What `compile_one` returns of each kernel, encoded, and what is given with it, in processes of their own.

    Prints how long that took, and what failed.
    """
    start, processes = time.monotonic(), max(1, (os.cpu_count() or 2) - 2)
    at_once = max(1, min(4, len(kernels) // processes))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        made = pool.imap(compile_one, [(kernel.encode(), given) for kernel, given in kernels.items()], at_once)
        notes = dict(zip(kernels, made, strict=True))
    print(f"{len(kernels)} kernels compiled in {time.monotonic() - start:.0f} s")
    for kernel, note in notes.items():
        if note:
            print("failed:", kernel.tile, note)
    return notes
