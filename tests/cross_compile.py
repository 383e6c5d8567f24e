"""Compiling kernels for GPUs that are not there: registers, shared memory, spills and machine code of each.

As a program, `python -m tests.cross_compile` reads one encoded `KernelSpec` a line and writes one JSON object a line:
{"registers", "shared", "spills", "seconds", "mma"} or {"error"}; for NVIDIA "looped" too, which is how many of the
instructions that spill are in loops, "copies", the bytes of each asynchronous one, and "loads", the types of others.
Triton can hang on targets that it does not serve, so `measure` runs it as a process with a time limit.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.codegen.attention_spec import AttentionKernelSpec
from qcompile.codegen.columns_spec import ColumnsSpec
from qcompile.codegen.norm_kernel_spec import NormKernelSpec
from qcompile.codegen.ranges_spec import RangesSpec
from qcompile.codegen.spec import (
    AnySpec,
    GroupedSpec,
    KernelSpec,
    decode_kernel_spec,
    native_fp8,
)
from qcompile.norm_spec import decode_norm

_POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "int8": "*i8",
    "uint8": "*u8",
    "float8_e8m0fnu": "*u8",
    "float8_e4m3fn": "*fp8e4nv",
    "float8_e5m2": "*fp8e5",
}


def _pointer(dtype: str, target: str) -> str:
    return "*u8" if dtype.startswith("float8") and not native_fp8(target) else _POINTERS[dtype]


def signature(spec: KernelSpec, names: list[str]) -> dict[str, str]:
    """Types of arguments as `gpu.launch` passes them; the bias is float32 and operands are of `out_dtype`."""
    if not spec.in_rows:
        codes = "*i32"
    else:
        native = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
        codes = _pointer(native[spec.weight], spec.target)
    out = stored = _POINTERS[spec.out_dtype]
    if spec.stored is not None:
        stored = _pointer(str(spec.stored.native_dtype).removeprefix("torch."), spec.target)
    scale = "*u8" if spec.scale_dtype.startswith("float8") else _POINTERS[spec.scale_dtype]
    whole = spec.tile.split == 1 and spec.tile.form != "stream"
    above = "*fp32" if spec.super_columns == spec.k else "*fp16"  # as NVFP4 and K-quants have it
    types = {
        "x": _pointer(spec.x_dtype, spec.target),
        "product": _pointer(spec.x_dtype, spec.target),
        "x_scale": "*fp32",
        "codes": codes,
        "scale": scale,
        "zero_point": codes if spec.symmetric or spec.offset else "*u8",
        **dict.fromkeys(("second", "third"), codes),
        "above": above if spec.super_columns else codes,
        "above_offset": above if spec.super_columns else codes,
        "offset": scale if spec.offset else codes,
        "row_scale": above if spec.super_columns else scale,
        "super_scale": above if spec.super_columns else codes,
        "super_offset": above if spec.super_columns and spec.offset else codes,
        "offsets": "*i32",
        "bias": "*fp32",
        "y": stored,
        f"operand_{spec.operand_count - 1}": out if spec.stored is None else "*fp32",
        "partial": codes if whole else "*fp32",
        "arrived": codes if whole else "*i32",
        "bias_stride": "i32",
        "sharers": "i32",
        "M": "i32",
    }
    return {name: types.get(name, out) for name in names}


def _descriptor(pointer: str, block: list[int], layout: Any) -> str:
    return f"tensordesc<{pointer[1:]}{block},{layout!r}>"


def _descriptors(spec: KernelSpec, types: dict[str, str]) -> dict[str, str]:
    """Types of a stream's arguments that are tensors' descriptors, which it reads through."""
    from qcompile.runtime.streams import blocks

    given = blocks(spec)
    if spec.in_rows:
        return {name: _descriptor(types[name], *block) for name, block in given.items()}
    plain = spec.super_columns in (0, spec.k)
    absent = {
        "zero_point": spec.symmetric or spec.offset,
        "above": plain,
        "offset": not spec.offset,
        "above_offset": plain or not spec.offset,
        "scale": spec.groups == 1,
    }
    unused = [name for name, missing in absent.items() if missing]
    kinds = {name: types[name] for name in given} | dict.fromkeys(unused, types["codes"])
    kinds |= dict.fromkeys({"scale", "offset"} - set(unused), "*i32") if spec.quads else {}
    given |= dict.fromkeys(unused, given["codes"])
    return {name: _descriptor(kinds[name], *block) for name, block in given.items()}


def attention_signature(spec: AttentionKernelSpec, names: list[str]) -> dict[str, str]:
    """Types of arguments as `attention_gpu.launch` passes them; an added mask is of the queries' type."""
    native = {"fp8_e4m3": "*fp8e4nv", "fp8_e5m2": "*fp8e5"}
    codes = native.get(spec.number, _POINTERS[spec.x_dtype]) if spec.constants()["NATIVE"] else "*u8"
    scale = codes if spec.plain else "*bf16" if spec.group_size or spec.offsets else "*fp32"
    split = spec.tile.split > 1 or spec.reach.sequences
    types = {
        "key_codes": codes,
        "value_codes": codes,
        "key_scale": scale,
        "value_scale": scale,
        "mask": {"boolean": "*i1", "added": _POINTERS[spec.x_dtype]}.get(spec.mask, scale),
        "length": "*i64" if spec.reach.length else scale,
        "start": "*i64" if spec.reach.start else scale,
        "block_table": "*i32" if spec.reach.page else scale,
        "partial": "*fp32" if split else scale,
        "arrived": "*i32" if split else scale,
        **dict.fromkeys(("query", "y"), _POINTERS[spec.x_dtype]),
    }
    return {name: types.get(name, "i32") for name in names}


def columns_signature(spec: ColumnsSpec, names: list[str]) -> dict[str, str]:
    """Types of arguments as `calibrate.columns` passes them."""
    types = {"places": "*i32", "codes": "*u8", **dict.fromkeys(("N", "columns", "strips", "tall"), "i32")}
    return {name: types.get(name, "*fp32") for name in names}


def ranges_signature(spec: RangesSpec, names: list[str]) -> dict[str, str]:
    """Types of arguments as `calibrate.ranges` passes them."""
    types = {"zero_point": "*u8", **dict.fromkeys(("N", "groups", "ranges", "count"), "i32")}
    return {name: types.get(name, "*fp32") for name in names}


def norm_signature(spec: NormKernelSpec, names: list[str]) -> dict[str, str]:
    """Types of arguments as `norm_gpu.launch` passes them; parameters are of the rows' type."""
    norm = decode_norm(spec.norm)
    types = {"scale": "*fp32", "mine": "*i64", "peers": "*i64", "calls": "*i32", "rank": "i32"}
    if norm.number:
        types["codes"] = _pointer(str(norm.activation.dtype).removeprefix("torch."), spec.target)
    return {name: types.get(name, _POINTERS[spec.x_dtype]) for name in names}


_SIGNATURES: dict[type, Any] = {
    KernelSpec: signature,
    GroupedSpec: signature,
    AttentionKernelSpec: attention_signature,
    ColumnsSpec: columns_signature,
    NormKernelSpec: norm_signature,
    RangesSpec: ranges_signature,
}


def compile_spec(spec: AnySpec) -> dict[str, Any]:
    """Compile in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qcompile.runtime import cache

    kernel = cache.load(spec).kernel
    types = _SIGNATURES[type(spec)](spec, kernel.arg_names)
    streams = isinstance(spec, KernelSpec) and spec.streams
    if streams:
        types |= _descriptors(spec, types)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name][0] == "*"}
    source: Any = ASTSource(fn=kernel, signature=types, constexprs={}, attrs=aligned)
    if streams:
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource(kernel, types, {}, aligned)
    nvidia = spec.target.startswith("sm_")
    target = GPUTarget("cuda", int(spec.target[3:]), 32) if nvidia else GPUTarget("hip", spec.target, 64)
    start = time.perf_counter()
    options = {"num_warps": 4 if streams else spec.tile.warps, "num_stages": spec.tile.stages}
    compiled = triton.compile(source, target=target, options=options)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2), "shared": compiled.metadata.shared}
    return found | (_nvidia(compiled.asm) if nvidia else _amd(compiled.asm["amdgcn"]))


_SPILL = r"\b(?:STL|LDL)\b"


def _in_loops(code: str) -> int:
    """How many instructions that spill or reload are in innermost loops: between a branch backwards and its target."""
    lines = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", code)]
    branches = [(place, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for place, text in lines]
    loops = [(int(to[1], 16), place) for place, to in branches if to is not None and int(to[1], 16) < place]
    loops = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    spills = [place for place, text in lines if re.search(_SPILL, text)]
    return sum(any(first <= place <= last for first, last in loops) for place in spills)


def _nvidia(assembly: dict[str, Any]) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) .* LOCAL:(\d+)", usage)
        assert found is not None, usage
        # What is spilled lies on the stack, and reading the code takes a quarter as long as compiling.
        spilled = int(found[2]) + int(found[3]) != 0
        read = [tools / "cuobjdump", "-sass", file.name]
        code = subprocess.run(read, capture_output=True, text=True).stdout if spilled else ""
    mma = re.findall(r"(?:wgmma\.mma_async|mma\.sync|mma\.sp|tcgen05\.mma)[\w.:]*", assembly["ptx"])
    return {
        "registers": int(found[1]),
        "spills": len(re.findall(_SPILL, code)),
        "looped": _in_loops(code),
        "flush": len(re.findall(r"(?:mul|fma|add|sub)(?:\.rn)?\.ftz", assembly["ptx"])),
        "mma": max(set(mma), key=mma.count) if mma else "",
        "order": _order(assembly["ptx"]),
        "exchanges": assembly["ptx"].count("shfl.sync"),
        "scattered": _scattered(assembly["ttgir"]),
        "copies": sorted(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*, (0x\w+)", assembly["ptx"])),
        "loads": sorted(re.findall(r"\bld\.global[.\w]*?\.((?:v\d\.)?[bu]\d+)", assembly["ptx"])),
        "added": len(re.findall(r"\b(?:add|fma)(?:\.rn)?\.f32(?:x2)?\b", assembly["ptx"])),
    }


def _scattered(ttgir: str) -> list[str]:
    """Layouts of operands of mma.sp other than that which has element i in thread i."""
    in_order = r"#ttg.blocked<{sizePerThread = \[1\], threadsPerWarp = \[32\], warpsPerCTA = \[\d+\], order = \[0\]}>"
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    operations = re.findall(r'elementwise_inline_asm "mma\.sp.*', ttgir)
    used = {name for line in operations for name in re.findall(r"tensor<\d+x[if]32, (#\w+)>", line)}
    return [layouts[name] for name in used if not re.fullmatch(in_order, layouts[name])]


def _order(ptx: str) -> str:
    """What Hopper's code does: d decodes words, m multiplies, a digit waits for all but so many products."""
    found = re.finditer(r"(?:lop3|and|prmt)\.b32 t\d?\b|wgmma\.mma_async|wgmma\.wait_group\.sync\.aligned (\d)", ptx)
    letters = [match[1] or ("d" if match[0].startswith(("lop3", "and", "prmt")) else "m") for match in found]
    return "".join(letter for letter, before in zip(letters, ["", *letters], strict=False) if letter != before)


def _amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found[1])

    mma = re.findall(r"v_(?:mfma|wmma)_\w+", code)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "mma": max(set(mma), key=mma.count) if mma else "",
    }


class _Compiler:
    """A process that compiles for all tests of this one: importing torch and Triton takes as long as a small kernel."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "errors"
        environment = os.environ | dict.fromkeys(("TRITON_CACHE_DIR", "QCOMPILE_CACHE_DIR"), self._folder.name)
        environment.pop("TRITON_INTERPRET", None)
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cross_compile"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=Path(__file__).parents[1],
            )

    def measure(self, specs: Sequence[AnySpec], limit: float) -> list[dict[str, Any]]:
        """What the process writes of each spec.

        Raises:
            RuntimeError: it ended, of itself or after `limit` seconds; the next call begins another.
        """
        given, made = self._process.stdin, self._process.stdout
        assert given is not None
        assert made is not None
        timer = threading.Timer(limit, self._process.kill)
        timer.start()
        try:
            found = []
            for spec in specs:
                given.write(spec.encode() + "\n")
                given.flush()
                found.append(json.loads(made.readline()))
            return found
        except (OSError, ValueError) as error:
            _compiler.cache_clear()
            self._process.kill()
            self._process.wait()
            ended = "" if timer.is_alive() else f"after {limit} s, "
            raise RuntimeError(f"compiling ended {ended}at {spec.encode()}\n{self._errors.read_text()}") from error
        finally:
            timer.cancel()


@functools.cache
def _compiler() -> _Compiler:
    return _Compiler()


def measure(specs: Sequence[AnySpec], limit: float = 480) -> list[dict[str, Any]]:
    """Compile in another process, for `limit` seconds at most.

    Raises:
        RuntimeError: the process ended before.
    """
    return _compiler().measure(specs, limit)


def main() -> None:
    for line in sys.stdin:
        try:
            result = compile_spec(decode_kernel_spec(line))
        except Exception as error:  # a compiler's error of any kind is the result
            result = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
