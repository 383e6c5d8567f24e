"""The operators of CPUs in C++ (`codegen/templates/cpp/operators.cpp`): calls of a kernel that pass no Python.

They are built at the first call of `qcompile::gemm_cpu`, which is Python until then and stays so without a compiler;
they know the kernels that `add` tells them. What they have none for goes to `qcompile::gemm_any`.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qcompile.codegen.cpp import operators_source
from qcompile.runtime import cpp

_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}


class _Linear(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("gemm", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "single", "threads")),
        ("places", ctypes.c_int64 * 6),
        ("weight", cpp.Weight),
    )


@functools.cache
def _library() -> Any:
    """The loaded library; None where it cannot be built, with a warning unless that is for want of a compiler."""
    if (command := cpp.compiler()) is None:
        return None
    folder = Path(torch.__file__).parent
    options = ("-std=c++17", "-O3", "-shared", "-fPIC", f"-I{folder / 'include'}")
    linked = (f"-L{folder / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}")
    try:
        found = ctypes.CDLL(str(cpp.compile_source(operators_source(), (*command, *options, *linked))))
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(f"products on CPUs are called through Python: {said[0]}", stacklevel=2)
        return None
    found.add_linear.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(_Linear))
    found.add_linear.restype = None
    return found if found.prepare() == 0 else None


def add(
    spec: str,
    dtype: torch.dtype,
    kernel: cpp.Kernel,
    rows: int,
    threads: int,
    weight: cpp.Weight,
    places: Sequence[int],
) -> None:
    """Let `qcompile::gemm_cpu` call a kernel for x of `dtype`.

    Args:
        spec: as graphs have it.
        rows: of x, at most.
        threads: at most.
        weight: without addresses.
        places: of the tensors that `cpp.Weight` has addresses of in the weight's list; -1 for those it lacks.
    """
    if (library := _library()) is None or dtype not in _KINDS:
        return
    gemm = ctypes.cast(kernel.gemm, ctypes.c_void_p)
    scratch_bytes = None if kernel.spec.integers is None else ctypes.cast(kernel.scratch_bytes, ctypes.c_void_p)
    single = kernel.spec.element == "float32"
    linear = _Linear(gemm, scratch_bytes, rows, single, threads, (ctypes.c_int64 * 6)(*places), weight)
    library.add_linear(spec.encode(), _KINDS[dtype], linear)
