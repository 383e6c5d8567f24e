"""The operators of CPUs in C++ (`codegen/templates/cpp/operators.cpp`): calls of a kernel that pass no Python.

They are built at the first call of an operator, which is Python until then and stays so without a compiler, and know
the kernels that are added. What they have none for goes to operators in Python: `qcompile::gemm_any`, `attention_any`
and `attention_plain_any`.
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
from qcompile.kv_cache import AttentionSpec
from qcompile.runtime import cpp, cpp_attention

_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}


class _Product(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("gemm", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "single")),
    )


class _Linear(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("products", _Product * 2),
        ("threads", ctypes.c_int64),
        ("places", ctypes.c_int64 * 6),
        ("weight", cpp.Weight),
    )


class _Attend(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("attention", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "key_size", "value_size")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("causal", "window")),
    )


@functools.cache
def build() -> Path | None:
    """The library's file; None where it cannot be built, with a warning unless that is for want of a compiler."""
    if (command := cpp.compiler()) is None:
        return None
    folder = Path(torch.__file__).parent
    options = ("-std=c++17", "-O3", "-shared", "-fPIC", f"-I{folder / 'include'}")
    linked = (f"-L{folder / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}")
    try:
        return cpp.compile_source(operators_source(), (*command, *options, *linked))
    except (subprocess.SubprocessError, OSError) as error:
        _warn(getattr(error, "stderr", None) or str(error), cpp.remedy(error))
        return None


def _warn(reason: str, remedy: str) -> None:
    said = reason.strip().splitlines()[0]
    warnings.warn(f"kernels on CPUs are called through Python: {said}; {remedy}", stacklevel=3)


@functools.cache
def _library() -> Any:
    """The loaded library; None where there is none, as `build` says."""
    if (path := build()) is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        _warn(str(error), cpp.remedy(error))
        return None
    found.add_linear.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(_Linear))
    found.add_attention.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(_Attend))
    found.add_linear.restype = found.add_attention.restype = found.forget_kernels.restype = None
    return found if found.prepare() == 0 else None


def add_linear(
    spec: str,
    dtype: torch.dtype,
    kernels: Sequence[tuple[cpp.Kernel, int]],
    threads: int,
    weight: cpp.Weight,
    places: Sequence[int],
) -> None:
    """Let `qcompile::gemm_cpu` call kernels for x of `dtype`.

    Args:
        spec: as graphs have it.
        kernels: two at most, each with the most rows of x that it takes, from the fewest.
        threads: at most.
        weight: without addresses.
        places: of the tensors that `cpp.Weight` has addresses of in the weight's list; -1 for those it lacks.
    """
    if (library := _library()) is None or dtype not in _KINDS:
        return
    products = (_Product * 2)()
    for place, (kernel, rows) in enumerate(kernels):
        gemm = ctypes.cast(kernel.gemm, ctypes.c_void_p)
        scratch_bytes = None if kernel.spec.integers is None else ctypes.cast(kernel.scratch_bytes, ctypes.c_void_p)
        products[place] = _Product(gemm, scratch_bytes, rows, kernel.spec.element == "float32")
    linear = _Linear(products, threads, (ctypes.c_int64 * 6)(*places), weight)
    library.add_linear(spec.encode(), _KINDS[dtype], linear)


def add_attention(
    spec: AttentionSpec | None, dtype: torch.dtype, kernel: cpp_attention.AttentionKernel, rows: int
) -> None:
    """Let `qcompile::attention_cpu`, or without a spec `attention_plain_cpu`, call a kernel for queries of `dtype`.

    Args:
        rows: queries times query heads for each head of keys, at most.
    """
    if (library := _library()) is None or dtype not in _KINDS:
        return
    given, text = _Attend(ctypes.cast(kernel.attention, ctypes.c_void_p), rows), ""
    if spec is not None:
        text = spec.encode()
        given.key_size, given.value_size = spec.key.head_dim, spec.value.head_dim
        given.scale, given.softcap, given.causal, given.window = spec.scale, spec.softcap, spec.causal, spec.window
    library.add_attention(text.encode(), _KINDS[dtype], given)


def forget_kernels() -> None:
    """Let the operators know no kernels any more."""
    if (library := _library()) is not None:
        library.forget_kernels()
