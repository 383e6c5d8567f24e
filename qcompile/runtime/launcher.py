"""Launches of Triton's functions, without asking Triton anew at each which compiled kernel it is.

`function[grid](...)` looks at every argument, and at all options and global values, to find the kernel that it compiled
for arguments like these, which takes longer than small kernels do. It returns that kernel, which is kept here, and
launched itself when arguments come that Triton would compile alike.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

_kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}
"""Compiled kernels, and the functions that they are of, whose addresses thus stay theirs."""


def launch(function: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`function[grid](*args, **options)`.

    Args:
        function: of Triton, or what takes its place: an interpreter, or what a compiler traces.
        args: tensors, descriptors of tensors, which a function takes in blocks of its own, and integers. The first, or
            the tensor that it describes, says the device.
        options: the same for each launch of a function on a device.
    """
    if not _is_triton(function):
        function[grid](*args, **options)
        return
    # Triton compiles apart for types, addresses that 16 divides, and integers that are 1, divisible or wide.
    first = args[0]
    alike: list[Hashable] = [id(function), first.device if hasattr(first, "device") else first.base.device]
    addresses = 0
    for argument in args:
        if isinstance(argument, int):
            alike.append((argument == 1, argument % 16 == 0, argument.bit_length() > 31))
        elif hasattr(argument, "base"):  # at an address that 16 divides
            alike.append(argument.base.dtype)
        else:
            alike.append(argument.dtype)
            addresses |= argument.data_ptr()
    if addresses % 16:  # which is rare
        function[grid](*args, **options)
        return
    key = tuple(alike)
    kept = _kept.get(key)
    if kept is None:
        _kept[key] = function[grid](*args, **options), function
    else:
        kept[0][(*grid, 1, 1)[:3]](*args)


def _is_triton(function: Any) -> bool:
    triton: Any = sys.modules.get("triton.runtime.jit")
    return triton is not None and isinstance(function, triton.JITFunction)
