"""Time of quantized products on a GPU against torch's own kernels, on weights that come from memory.

    python benchmarks/linear.py [--quick]

Writes `benchmarks/results/<machine>.linear.json`. The shapes are the four linears of a Llama-3-8B layer, with the
query, key and value projections and the gate and up projections merged. Every call takes the next of several copies
of the weight, `COLD_BYTES` of them together at least; the calls are captured in a CUDA graph, and a time is the
median over its replays. 8-bit activations start as bfloat16: their quantization, compiled by Inductor, is part of the
time, for torch's kernels as for ours.

`error` is |y - y'| / |y'| (Frobenius), where y' is the float64 product of the very numbers that the kernel multiplies:
dequantized weights and, for 8-bit activations, dequantized activations. `floor_us` is the longer of moving each byte of
weight, input and output once and of multiplying, at the rates under `ceilings`, measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from qcompile.layouts import LAYOUTS, choose_layout
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation, quantize_activation, quantize_weight
from qcompile.runtime import gpu
from qcompile.scheme import PRESETS, ActivationScheme, Scheme

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 16, 32, 64, 128, 256, 1024, 4096]
SCHEMES = ["int4", "int8_weight_only", "fp8", "int8"]
COLD_BYTES = 240 << 20
"""Several times the L2 cache of the GPUs at hand, which is 50 MB."""
SLOW = 2000.0
"""Microseconds of a call above which two calls make a graph: reading weights is then a small part."""
OURS = "qcompile"
LIMIT = 2.0**-8
"""Greatest `error` of ours: rounding to bfloat16 errs by at most 2**-9 of each element; the rest is for the sum."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Candidate:
    """`calls`, one for each copy of the weight, that give the product; `expected` is their float64 result."""

    impl: str
    scheme: str
    calls: list[Call]
    expected: Tensor


def machine_name() -> str:
    """Vendor and model, such as `nvidia-h100` for "NVIDIA H100 80GB HBM3"."""
    words = re.split(r"\b\d+GB\b", torch.cuda.get_device_name())[0].lower().split()
    return "-".join(words)


def microseconds(calls: list[Call]) -> float:
    """Median time of a call, in replays of a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        calls[0]()  # compiles
        start.record()
        calls[0]()
        end.record()
        end.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    captured = calls[:2] if start.elapsed_time(end) * 1e3 > SLOW else calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in captured:
            call()
    graph.replay()
    times = []
    for _ in range(9):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(captured))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Bytes a second, of a copy or of reading only, and operations a second of torch's products of 8192 x 8192."""
    size = 8192
    source = torch.randint(1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / microseconds([lambda: target.copy_(source)] * 4)
    read = source.nbytes / microseconds([source.amax] * 4)
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    left8, right8 = (t.to(torch.float8_e4m3fn) for t in (left, right))
    one = torch.ones((), device="cuda")

    def fp8() -> Tensor:
        return torch._scaled_mm(left8, right8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    operations = 2e6 * size**3
    return {
        "memory": 1e6 * max(copy, read),
        "16-bit": operations / microseconds([lambda: torch.mm(left, right.t())] * 8),
        "8-bit": operations / microseconds([fp8] * 8),
    }


def floor(scheme: Scheme | None, n: int, k: int, m: int, rates: dict[str, float]) -> float:
    """Microseconds that no kernel stays below: `ceilings` for what must be moved and multiplied."""
    weight = 16.0 * n * k
    if scheme is not None:
        rows, columns = scheme.weight.granularity.block_of((n, k))
        scale = 16 if scheme.weight.scale_dtype == "bfloat16" else 32
        weight = n * k * (scheme.weight.format.bits + scale / (rows * columns))
    moved = weight / 8 + 2 * m * (n + k)
    rate = rates["8-bit" if scheme is not None and scheme.activation is not None else "16-bit"]
    return 1e6 * max(moved / rates["memory"], 2 * m * n * k / rate)


def copies(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Clones of a weight's tensors, `COLD_BYTES` and two of them at least."""
    size = sum(t.nbytes for t in tensors)
    return [tuple(t.clone() for t in tensors) for _ in range(max(2, -(-COLD_BYTES // size)))]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float64."""
    return torch.mm(x.to(torch.float64), weight.to(torch.float64).t())


def bfloat16(x: Tensor, weight: Tensor) -> Candidate:
    """cuBLAS."""
    weight = weight.to(torch.bfloat16)
    calls = [lambda w=w: F.linear(x, w) for (w,) in copies(weight)]
    return Candidate("F.linear", "bfloat16", calls, product(x, weight))


@torch.compile(dynamic=False)
def quantize_rows(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scales [M, 1]."""
    return quantize_activation(x, scheme)


@torch.compile(dynamic=False)
def scale_product(y: Tensor, x_scale: Tensor, scale: Tensor) -> Tensor:
    """An int32 product [M, N], times its scales [M, 1] and [1, N], in bfloat16."""
    return (y.to(torch.float32) * x_scale * scale).to(torch.bfloat16)


def ours(name: str, x: Tensor, packed: PackedWeight, expected: Tensor) -> Candidate:
    """What a linear of this scheme runs in a compiled graph: quantization, if any, and one kernel."""
    n, k = packed.shape
    scheme = PRESETS[name].fit(name, (n, k))
    layout = choose_layout(scheme, (n, k), "cuda")
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout.name)

    def call(weight: tuple[Tensor, ...]) -> Tensor:
        rows, x_scale = (x, None) if scheme.activation is None else quantize_rows(x, scheme.activation)
        return gpu.gemm(rows, x_scale, list(weight), None, [], spec, torch.bfloat16)

    calls = [lambda w=w: call(w) for w in copies(*layout.pack(packed).tensors)]
    return Candidate(OURS, name, calls, expected)


def tinygemm(x: Tensor, packed: PackedWeight, expected: Tensor) -> Candidate:
    """torch's int4 kernel: codes minus 8, times the scale, plus a zero point that is 0 here."""
    codes = packed.unpack_codes()
    pairs = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale = packed.scale.t().to(torch.bfloat16)
    scale = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    group = packed.scheme.granularity.columns
    calls = [lambda w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, group, s) for w, s in copies(pairs, scale)]
    return Candidate("_weight_int4pack_mm", "int4", calls, expected)


def scaled_mm(x: Tensor, packed: PackedWeight, activation: ActivationScheme, expected: Tensor, fast: bool) -> Candidate:
    """cuBLAS or CUTLASS, as torch chooses; `fast` adds products with few bits."""

    def call(codes: Tensor, scale: Tensor) -> Tensor:
        rows, x_scale = quantize_rows(x, activation)
        return torch._scaled_mm(rows, codes.t(), x_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)

    laid_out = LAYOUTS["rows8"].pack(packed)
    calls = [lambda w=w: call(*w) for w in copies(laid_out.codes, laid_out.scale)]
    return Candidate("_scaled_mm, fast accumulation" if fast else "_scaled_mm", "fp8", calls, expected)


def int_mm(x: Tensor, packed: PackedWeight, activation: ActivationScheme, expected: Tensor) -> Candidate:
    """torch's int8 product, which takes more than 16 rows, and its scales in a kernel of Inductor's."""

    def call(codes: Tensor, scale: Tensor) -> Tensor:
        rows, x_scale = quantize_rows(x, activation)
        return scale_product(torch._int_mm(rows, codes.t()), x_scale, scale.t())

    laid_out = LAYOUTS["rows8"].pack(packed)
    calls = [lambda w=w: call(*w) for w in copies(laid_out.codes, laid_out.scale)]
    return Candidate("_int_mm", "int8", calls, expected)


def candidates(x: Tensor, weight: Tensor, packed: dict[str, PackedWeight]) -> Iterator[Candidate]:
    """One after another, so that only one's copies are in memory."""
    yield bfloat16(x, weight)
    for name, quantized in packed.items():
        activation, inputs = PRESETS[name].activation, x
        if activation is not None:
            inputs = dequantize_activation(*quantize_rows(x, activation), activation)
        expected = product(inputs, dequantize(quantized))
        yield ours(name, x, quantized, expected)
        if name == "int4":
            yield tinygemm(x, quantized, expected)
        if name == "fp8" and activation is not None:
            yield scaled_mm(x, quantized, activation, expected, fast=False)
            yield scaled_mm(x, quantized, activation, expected, fast=True)
        if name == "int8" and activation is not None and len(x) > 16:
            yield int_mm(x, quantized, activation, expected)


def measure(n: int, k: int, tokens: list[int], rates: dict[str, float]) -> Iterator[dict[str, object]]:
    """One row for each number of tokens and candidate.

    Raises:
        AssertionError: a result of ours is wrong.
    """
    weight = torch.randn(n, k, device="cuda") / k**0.5
    schemes = {name: PRESETS[name].fit(name, (n, k)) for name in SCHEMES}
    packed = {name: quantize_weight(weight, scheme.weight) for name, scheme in schemes.items()}
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for candidate in candidates(x, weight, packed):
            expected = candidate.expected
            error = float((candidate.calls[0]().to(torch.float64) - expected).norm() / expected.norm())
            assert candidate.impl != OURS or error <= LIMIT, f"{candidate.scheme} {n}x{k} M={m}: error {error:.2g}"
            yield {
                "bench": "linear",
                "impl": candidate.impl,
                "scheme": candidate.scheme,
                "N": n,
                "K": k,
                "M": m,
                "us": round(microseconds(candidate.calls), 2),
                "error": float(f"{error:.3g}"),
                "floor_us": round(floor(schemes.get(candidate.scheme), n, k, m, rates), 2),
            }


def summary(rows: list[dict[str, object]]) -> str:
    """A line for each scheme, implementation and M: the sum over shapes, its share of the floor, bfloat16 over it."""
    sums: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        total = sums[str(row["scheme"]), str(row["impl"]), int(str(row["M"]))]
        total[0] += float(str(row["us"]))
        total[1] += float(str(row["floor_us"]))
    lines = [f"{'scheme':<16} {'':<30} {'M':>5} {'us':>9} {'of floor':>8} {'bf16 / it':>9}"]
    for (scheme, impl, m), (us, least) in sorted(sums.items()):
        plain = sums["bfloat16", "F.linear", m][0]
        lines.append(f"{scheme:<16} {impl:<30} {m:>5} {us:>9.1f} {least / us:>8.0%} {plain / us:>9.2f}")
    return "\n".join(lines)


def write(bench: str, rows: list[dict[str, object]], rates: dict[str, float]) -> None:
    """The results file of a benchmark on this machine."""
    result = {
        "machine": machine_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "gpu": torch.cuda.get_device_name()},
        "ceilings": rates,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"{machine_name()}.{bench}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure every shape, write the results and print sums over the shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, three numbers of tokens; nothing is written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = len(TOKENS) * len(SHAPES) * len(SCHEMES)
    rates = ceilings()
    shapes, tokens = (SHAPES[:1], [1, 64, 1024]) if quick else (SHAPES, TOKENS)
    rows = list(itertools.chain.from_iterable(measure(n, k, tokens, rates) for n, k in shapes))
    if not quick:
        write("linear", rows, rates)
    print(summary(rows))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
