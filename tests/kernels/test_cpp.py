"""Generated C++: formulas on every code, the cache of libraries, and what happens without a working compiler."""

from __future__ import annotations

import ctypes
import multiprocessing
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from qcompile.codegen.cpp import CppSpec, decode_functions, placed, render_cpp
from qcompile.codegen.printers import cpp_constant, to_cpp
from qcompile.errors import ConfigError
from qcompile.expr import Expr, var
from qcompile.flags import override
from qcompile.formats import FORMATS
from qcompile.runtime import cpp
from tests import oracle

SPEC = CppSpec(
    weight="int4",
    zero_point=False,
    offset=False,
    scale_dtype="bfloat16",
    super_dtype=None,
    unit=32,
    element="float32",
    isa="portable",
)
HERE = [isa for isa in cpp.available() if isa in (cpp.available()[0], "avx2", "portable")]

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler")

STUB = """// {}
extern "C" int prepare() {{ return 0; }}
extern "C" void gemm() {{}}
extern "C" void decode() {{}}
"""

DECODER = """
namespace {name} {{
{functions}
}}
extern "C" void {name}_values(const std::uint32_t* codes, float* out, i64 count) {{
  for (i64 i = 0; i < count; i += LANES) store(out + i, {name}::decode((i32)load<u32>(codes + i)), LANES);
}}
extern "C" void {name}_pairs(const std::uint32_t* codes, std::uint32_t* out, i64 count) {{
  for (i64 i = 0; i < count; i += LANES) {{
    u32 pair = {name}::decode_pair(load<u32>(codes + i));
    std::memcpy(out + i, &pair, sizeof(pair));
  }}
}}
"""


@pytest.mark.parametrize("isa", HERE)
def test_every_code_of_every_format(isa: str, tmp_path: Path) -> None:
    header = resources.files("qcompile.codegen.templates").joinpath("cpp").joinpath("vector.h").read_text()
    source = header
    for name in FORMATS:
        functions, _ = decode_functions(name, "bfloat16", isa)
        source += DECODER.format(name=name, functions=functions)
        if placed(name, "bfloat16") is not None:
            functions, _ = decode_functions(name, "bfloat16", isa, place=True)
            source += DECODER.format(name=f"placed_{name}", functions=functions)
    command = cpp._command(replace(SPEC, isa=isa))
    assert command is not None
    (tmp_path / "all.cpp").write_text(source)
    options = [option for option in command if option.startswith("-")]
    built = [command[0], *options, str(tmp_path / "all.cpp"), "-o", str(tmp_path / "all.so")]
    subprocess.run(built, check=True)
    library = ctypes.CDLL(str(tmp_path / "all.so"))
    for name, fmt in FORMATS.items():
        codes = torch.arange(max(16, 2**fmt.bits), dtype=torch.int32) % 2**fmt.bits
        expected = oracle.decode_values(name)[codes.long()]
        values, count = torch.empty(len(codes)), ctypes.c_int64(len(codes))
        getattr(library, f"{name}_values")(*map(ctypes.c_void_p, (codes.data_ptr(), values.data_ptr())), count)
        assert torch.equal(values.double().nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9)), name
        both, pairs = codes | codes.flip(0) << 16, torch.empty_like(codes)
        getattr(library, f"{name}_pairs")(*map(ctypes.c_void_p, (both.data_ptr(), pairs.data_ptr())), count)
        low, high = pairs.view(torch.bfloat16).view(-1, 2).unbind(1)
        for half, wanted in ((low, expected), (high, expected.flip(0))):
            rounded = wanted.to(torch.bfloat16).double()
            assert torch.equal(half.double().nan_to_num(nan=-1e9), rounded.nan_to_num(nan=-1e9)), name
        if placed(name, "bfloat16") is not None:
            getattr(library, f"placed_{name}_pairs")(*map(ctypes.c_void_p, (both.data_ptr(), pairs.data_ptr())), count)
            low, high = pairs.view(torch.bfloat16).view(-1, 2).unbind(1)
            assert torch.equal(low.double(), 1 + codes.double() / 2**fmt.bits), name
            assert torch.equal(high, low.flip(0)), name


def test_constants_are_exact_and_only_numbers_are_printed() -> None:
    assert [cpp_constant(v) for v in (3, -3, 8.0, -0.1)] == ["3", "(-3)", "0x1.0000000000000p+3f", f"({(-0.1).hex()}f)"]
    for hostile in ("1; system()", True, None):
        with pytest.raises(TypeError):
            cpp_constant(hostile)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        to_cpp(Expr("sqrt", (var("x"),)))
    with pytest.raises(KeyError):
        to_cpp(Expr("cast", (var("x"),), "f16"))


def test_specs_name_registered_things_only() -> None:
    for change in ({"weight": "int4;"}, {"scale_dtype": "float;"}, {"super_dtype": "x"}, {"element": "int"}):
        with pytest.raises(KeyError):
            render_cpp(replace(SPEC, **change))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and kernels that compile fast."""
    monkeypatch.setattr(cpp, "render_cpp", lambda spec: STUB.format(spec))
    cpp.load.cache_clear()
    with override(cache_dir=tmp_path):
        yield tmp_path
    cpp.load.cache_clear()


def test_libraries_that_were_cut_off_or_changed_are_built_anew(folder: Path) -> None:
    path = cpp.build(SPEC)
    assert path is not None
    whole = path.read_bytes()
    assert cpp.build(SPEC) == path
    path.write_bytes(whole[: len(whole) // 2])
    again = cpp.build(SPEC)
    assert again is not None
    assert cpp._intact(again.parent) == again
    assert [p.name for p in again.parent.iterdir() if p.suffix == ".so"] == [again.name]
    assert cpp.Kernel(SPEC, again).spec == SPEC


def _build(folder: Path) -> str:
    with override(cache_dir=folder):
        return str(cpp.build(SPEC))


def test_processes_that_build_the_same_library(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map(_build, [folder] * 2)
    for path in paths:
        assert cpp._intact(Path(path).parent) is not None
        assert cpp.Kernel(SPEC, Path(path)).gemm is not None


def test_the_source_is_dumped(folder: Path) -> None:
    with override(dump=folder / "dump"):
        cpp.build(SPEC)
    (dumped,) = (folder / "dump" / "kernels").iterdir()
    assert dumped.read_text() == STUB.format(SPEC)


def test_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(folder))
    assert cpp.compiler.__wrapped__() is None
    monkeypatch.setattr(cpp, "compiler", cpp.compiler.__wrapped__)
    with pytest.warns(UserWarning, match=r"no C\+\+ kernel for int4.*no compiler is found; install g\+\+"):
        assert cpp.load(SPEC) is None


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.warns(UserWarning, match="CXX names 'no-such-compiler', which is not on the path: .* is used"):
        assert cpp.compiler.__wrapped__() is not None


def test_a_compiler_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = folder / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpp, "compiler", lambda: (str(broken),))
    with pytest.warns(UserWarning, match="no C\\+\\+ kernel for int4.*out of order; CXX names another"):
        assert cpp.load(SPEC) is None


def test_a_compiler_that_lacks_an_instruction_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cpp.compiler()
    assert found is not None
    old = folder / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx*) exit 1;; esac\nexec {" ".join(found)} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setattr(cpp, "compiler", lambda: (str(old),))
    kernel = cpp.load(replace(SPEC, isa="avx2"))
    assert kernel is not None
    assert kernel.spec.isa == "portable"


def test_an_instruction_set_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "available", lambda: ("avx2", "portable"))
    for name in ("avx512", "sse9"):
        with override(cpu_isa=name), pytest.raises(ConfigError, match="is none of this processor's avx2, portable"):
            cpp.isa()
    with override(cpu_isa="portable"):
        assert cpp.isa() == "portable"
