"""Generated C++ for Arm: built by a cross compiler and run by QEMU, against the float64 oracle.

Both are skipped where they are missing (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompile.codegen.cpp import compiler_options, cpp_spec, render_cpp
from qcompile.layouts import LAYOUTS, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.presets import PRESETS
from qcompile.reference import dequantize_activation, quantize_activation, quantize_weight
from qcompile.runtime import cpu
from qcompile.scheme import Scheme
from tests import oracle, tolerance
from tests.kernels.test_cpu_integers import INTEGERS

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++")

MAIN = """
#include <cstdio>
#include <cstdlib>
#include <vector>
using Bytes = std::vector<char>;
static Bytes part() {
  i64 size = 0;
  if (std::fread(&size, sizeof(size), 1, stdin) != 1) std::abort();
  Bytes bytes(size + 64);
  if (size && std::fread(bytes.data(), 1, size, stdin) != (size_t)size) std::abort();
  return bytes;
}
int main() {
  i64 sizes[6];  // m, n, k, columns, super_columns, bytes of the scratch buffer
  if (std::fread(sizes, sizeof(i64), 6, stdin) != 6) return 1;
  Bytes x = part(), fields[6];
  for (Bytes& field : fields) field = part();
  const Weight weight{
      (const std::uint32_t*)fields[0].data(), (const Scale*)fields[1].data(), (const std::uint8_t*)fields[2].data(),
      (const Scale*)fields[3].data(), (const SuperScale*)fields[4].data(), (const SuperScale*)fields[5].data(),
      sizes[1], sizes[2], sizes[3], sizes[4]};
  std::vector<Element> y(sizes[0] * sizes[1]);
  const auto* rows = (const Element*)x.data();
  CALL
  return std::fwrite(y.data(), sizeof(Element), y.size(), stdout) != y.size();
}
"""
CALLS = {
    False: "std::vector<float> scratch(sizes[5]); "
    "gemm(rows, sizes[0], sizes[2], &weight, scratch.data(), y.data(), 0, 1);",
    True: "std::vector<std::uint8_t> scratch(scratch_bytes(&weight, sizes[0], 1) + 64); "
    "gemm(rows, nullptr, nullptr, sizes[0], sizes[2], &weight, scratch.data(), y.data(), 1);",
}


def _program(spec: LinearSpec, isa: str, integers: bool, folder: Path) -> Path:
    """A program whose input is x and the weight's tensors, and whose output is their product."""
    kernel = cpp_spec(spec, torch.float32, isa, integers=integers)
    source, program = folder / "kernel.cpp", folder / "kernel"
    source.write_text(render_cpp(kernel) + MAIN.replace("CALL", CALLS[integers]))
    command = [COMPILER, "-std=c++17", "-O2", "-w", "-static", *compiler_options(isa), str(source), "-o", str(program)]
    subprocess.run([str(word) for word in command], check=True)
    return program


def _part(tensor: Tensor | None) -> bytes:
    data = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        *((name, isa) for name in ("int8", "q4_k") for isa in ("dotprod", "i8mm", "portable")),
        ("q5_1 floating", "portable"),
    ],
)
def test_on_arm(name: str, isa: str, tmp_path: Path) -> None:
    integers = name in INTEGERS
    scheme: Scheme = INTEGERS[name] if integers else PRESETS[name.split()[0]]
    m, n, k = 15, 40, 256
    logical = quantize_weight(torch.randn(n, k), scheme.weight)
    packed = to_layout(logical, LAYOUTS["rows16"])
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout="rows16")
    program = _program(spec, isa, integers, tmp_path)
    if EMULATOR is None:
        pytest.skip("built; needs qemu-aarch64 to run it")
    x, linear = torch.randn(m, k), cpu._linear(spec.encode())
    data = struct.pack("<6q", m, n, k, linear.columns, linear.super_columns, 2 * m * k) + _part(x)
    for field in ("codes", "scale", "zero_point", "offset", "super_scale", "super_offset"):
        data += _part(getattr(packed, field))
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], input=data, capture_output=True, check=True)
    y = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(m, n)
    given = x
    if scheme.activation is not None:
        codes, scale = quantize_activation(x, scheme.activation)
        given = dequantize_activation(codes.double(), scale.double(), scheme.activation)
    weight = oracle.dequantize(logical)
    bound = tolerance.gemm_bound(given, weight, torch.float64 if integers else torch.float32)
    if logical.offset is not None:
        offset = torch.zeros(logical.offset.shape).to(logical.offset.dtype)
        scaled = oracle.dequantize(replace(logical, offset=offset))
        bound = bound + tolerance.offset_bound(given, scaled, weight - scaled)
    tolerance.assert_within(y, oracle.linear(given, weight), bound)
