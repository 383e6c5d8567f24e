"""Generated C++ kernels: built by the system's compiler at first use, kept on disk, called through ctypes.

A library lies at `<cache_dir>/kernels/<key>/<hash of its bytes>.so`, where the key is a hash of the source, the
compiler and all its arguments. Its name says whether its content is whole, so a file that was cut off or changed is
built anew. The compiler is `CXX` of the environment, else the first of c++, g++ and clang++ on the path.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from qcompile.codegen.cpp import ISAS, CppSpec, compiler_options, render_cpp
from qcompile.codegen.cpp_attention import CppAttentionSpec, render_attention
from qcompile.errors import ConfigError, shown
from qcompile.flags import flags

_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fopenmp", "-w")
_SECONDS = 300

_Spec = TypeVar("_Spec", CppSpec, CppAttentionSpec)
_Kernel = TypeVar("_Kernel")


class Weight(ctypes.Structure):
    """The struct of the same name in the template: addresses (None where there is nothing), then sizes."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "scale", "zero_point", "offset", "super_scale", "super_offset")
        ),
        *((name, ctypes.c_int64) for name in ("n", "k", "columns", "super_columns")),
    )


class Kernel:
    """The functions of a loaded library; see the template for their arguments.

    Raises:
        OSError: it cannot be loaded, or the operating system keeps its instructions from this process.
    """

    def __init__(self, spec: CppSpec, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if library.prepare() != 0:
            raise OSError(f"the operating system does not permit {spec.isa}")
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        weight = ctypes.POINTER(Weight)
        self.spec = spec
        self.gemm = library.gemm
        self.gemm.restype = None
        if spec.integers is not None:
            self.gemm.argtypes = (pointer, pointer, pointer, size, size, weight, pointer, pointer, integer)
            self.scratch_bytes = library.scratch_bytes
            self.scratch_bytes.argtypes = (weight, size, integer)
            self.scratch_bytes.restype = size
            return
        self.gemm.argtypes = (pointer, size, size, weight, pointer, pointer, integer, integer)
        self.decode = library.decode
        self.decode.argtypes = (weight, size, size, pointer, integer)
        self.decode.restype = None
        if hasattr(library, "decode_int8"):
            self.decode_int8 = library.decode_int8
            self.decode_int8.argtypes = self.decode.argtypes
            self.decode_int8.restype = None


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The words of the compiler's command; None if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    for words in (given, ["c++"], ["g++"], ["clang++"]):
        if words and (found := shutil.which(words[0])) is not None:
            if given and words is not given:
                warnings.warn(f"CXX names {given[0]!r}, which is not on the path: {found} is used", stacklevel=2)
            return (found, *words[1:])
    return None


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout


@functools.cache
def available() -> tuple[str, ...]:
    """Those of `ISAS` that this processor has, from the best."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = set(found[1].split()) if found else set()
    return tuple(name for name, needed in ISAS.items() if features.issuperset(needed))


def isa() -> str:
    """The best of `ISAS` that this processor has, or the lesser one that `flags.cpu_isa` names.

    Raises:
        ConfigError: it names none that the processor has.
    """
    if flags.cpu_isa is None:
        return available()[0]
    if flags.cpu_isa not in available():
        there = ", ".join(available())
        raise ConfigError(f"QCOMPILE_CPU_ISA {shown(flags.cpu_isa)} is none of this processor's {there}")
    return flags.cpu_isa


@functools.cache
def _openmp() -> tuple[str, ...]:
    """torch's own OpenMP library, which a kernel must share, or it would keep a second set of threads."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return ()
    found = sorted(set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b[^/\s]*\.so[^/\s]*)$", mapped, re.MULTILINE)))
    return ("-Wl,--as-needed", *found) if len(found) == 1 else ()


def _command(spec: CppSpec | CppAttentionSpec) -> tuple[str, ...] | None:
    if (found := compiler()) is None:
        return None
    return (*found, *_FLAGS, *compiler_options(spec.isa), *_openmp())


def _intact(folder: Path) -> Path | None:
    for path in folder.glob("*.so"):
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
                return path
            path.unlink()
        except OSError:
            continue
    return None


def build(spec: CppSpec | CppAttentionSpec) -> Path | None:
    """The library of a kernel; None without a compiler. See `compile_source`."""
    if (command := _command(spec)) is None:
        return None
    return compile_source(render_attention(spec) if isinstance(spec, CppAttentionSpec) else render_cpp(spec), command)


def compile_source(source: str, command: tuple[str, ...]) -> Path:
    """The library of a source, from the cache or the compiler.

    Safe when several processes build the same one. With `flags.dump` set, `<dump>/kernels/<key>.cpp` gets the source.

    Args:
        command: the compiler's words and all its arguments but the names of files.

    Raises:
        subprocess.SubprocessError: the compiler failed.
        OSError: the folder cannot be written to, or the compiler not started.
    """
    key = hashlib.sha256("\0".join((source, *command, _version(command[:1]))).encode()).hexdigest()[:32]
    if flags.dump is not None:
        (flags.dump / "kernels").mkdir(parents=True, exist_ok=True)
        (flags.dump / "kernels" / f"{key}.cpp").write_text(source, encoding="utf-8")
    folder = flags.cache_dir / "kernels" / key
    if (found := _intact(folder)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        text, library = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
        text.write_text(source, encoding="utf-8")
        arguments = [*command, "-o", str(library)]
        arguments.insert(len(compiler() or ()), str(text))
        subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=_SECONDS)
        path = folder / f"{hashlib.sha256(library.read_bytes()).hexdigest()}.so"
        os.replace(text, folder / "kernel.cpp")
        os.replace(library, path)
    return path


@functools.cache
def load(spec: CppSpec) -> Kernel | None:
    """The kernel of a spec; see `open_library`."""
    return open_library(spec, Kernel, f"{spec.weight}, torch decodes it instead")


def open_library(spec: _Spec, kind: Callable[[_Spec, Path], _Kernel], what: str) -> _Kernel | None:
    """`kind` of a spec and its library; None, with a warning of `what` there is not and the way out, if that fails.

    A compiler that does not know an instruction set gets the next lesser one.
    """
    if compiler() is None:
        warnings.warn(
            f"no C++ kernel for {what}: no compiler is found; install g++ or clang++, or name one by CXX", stacklevel=3
        )
        return None
    for lesser in (name for name, needed in ISAS.items() if set(ISAS[spec.isa]).issuperset(needed)):
        try:
            path = build(replace(spec, isa=lesser))
            return None if path is None else kind(replace(spec, isa=lesser), path)
        except (subprocess.SubprocessError, OSError) as error:
            failure = error
    said = (getattr(failure, "stderr", None) or str(failure)).strip().splitlines()
    warnings.warn(f"no C++ kernel for {what}: {said[0]}; {remedy(failure)}", stacklevel=3)
    return None


def remedy(failure: Exception) -> str:
    """What to do where a library could not be built or loaded."""
    return "QCOMPILE_CACHE_DIR names another folder" if isinstance(failure, OSError) else "CXX names another compiler"
