"""Time of quantized products against torch's own kernels, on weights that come from memory.

    python benchmarks/linear.py [--quick] [--schemes int4,int4_24] [--tokens 1,16,64] [--out folder]
    python benchmarks/linear.py --gate

Writes `benchmarks/results/<machine>.linear.json`. The shapes are the four linears of a Llama-3-8B layer, with the
query, key and value projections and the gate and up projections merged. Every call takes the next of several copies
of the weight, `COLD_BYTES` of them together at least; the calls are captured in a CUDA graph, and a time is the median
over its replays. Kernels are compiled by all processors but one beforehand. What is measured is written down in
`qcompile/evaluate/linear.py`; `qcompile bench` measures other shapes, and `cpu.py` the products on CPUs.

With --gate it times silu(gate) * up of the gate and up projections instead, by the product itself and by a kernel after
it, and writes `benchmarks/results/<machine>.gate.json`.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import defaultdict
from pathlib import Path

import torch

from qcompile.evaluate.linear import measure, measure_gate
from qcompile.evaluate.timing import Row, ceilings, write_results
from qcompile.presets import PRESETS
from qcompile.runtime import gpu, tuning
from qcompile.runtime import measure as timing

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 16, 32, 64, 128, 256, 1024, 4096]
SCHEMES = ["int4", "int8_weight_only", "fp8", "int8", "int4_24", "int8_24"]
GATE_SHAPE, GATE_TOKENS = (28672, 4096), [1, 16, 64, 256]
GATE_SCHEMES = ["int4", "fp8"]
RESULTS = Path(__file__).parent / "results"


def summary(rows: list[Row]) -> str:
    """A line for each scheme, implementation and M: the sum over shapes, its share of the floor, bfloat16 over it."""
    sums: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        total = sums[str(row["scheme"]), str(row["impl"]), int(str(row["M"]))]
        total[0] += float(str(row["us"]))
        total[1] += float(str(row["floor_us"]))
    lines = [f"{'scheme':<16} {'':<30} {'M':>5} {'us':>9} {'of floor':>8} {'bf16 / it':>9}"]
    for (scheme, impl, m), (us, least) in sorted(sums.items()):
        plain = sums.get(("bfloat16", "F.linear", m), [0.0])[0]
        ratio = f"{plain / us:>9.2f}" if plain else ""
        lines.append(f"{scheme:<16} {impl:<30} {m:>5} {us:>9.1f} {least / us:>8.0%} {ratio}".rstrip())
    return "\n".join(lines)


def compile_ahead(names: list[str], shapes: list[tuple[int, int]], tokens: list[int], device: torch.device) -> None:
    """Compile all kernels that will be timed, in processes of their own."""
    target, name, kernels = gpu.target_of(device), gpu.name_of(device), {}
    for scheme, shape, m in itertools.product(names, shapes, tokens):
        job = timing.job(scheme, PRESETS[scheme].fit(scheme, shape), shape, gpu.bucket(m), torch.bfloat16)
        like = job.like(target)
        found = tuning.choose(job.spec, job.m, getattr(torch, like.x_dtype), torch.bfloat16, target, name)
        if found.vendor is None:
            kernels[found.kernel] = job.spec
    with timing.compilers(max(1, (os.cpu_count() or 2) - 1)) as running:
        for future in [running.submit(*each) for each in kernels.items()]:
            if note := future.result():
                print(note)


def main() -> None:
    """Measure every shape, write the results and print sums over the shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few numbers of tokens; nothing is written")
    parser.add_argument("--gate", action="store_true", help="gate and up with and without the gate in the product")
    parser.add_argument("--schemes", help="separated by commas, in place of the usual ones")
    parser.add_argument("--tokens", help="numbers of rows, likewise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    rates = ceilings(device)
    if options.gate:
        schemes = {name: PRESETS[name].fit(name, GATE_SHAPE) for name in GATE_SCHEMES}
        rows = list(measure_gate(*GATE_SHAPE, GATE_TOKENS, schemes, rates, device))
        write_results(options.out, "gate", device, rows, rates)
        print(summary(rows))
        return
    names = options.schemes.split(",") if options.schemes else SCHEMES
    tokens = [*map(int, options.tokens.split(","))] if options.tokens else TOKENS
    shapes, tokens = (SHAPES[:1], tokens[::3]) if options.quick else (SHAPES, tokens)

    compile_ahead(names, shapes, tokens, device)

    def rows_of(n: int, k: int) -> list[Row]:
        schemes = {name: PRESETS[name].fit(name, (n, k)) for name in names}
        return list(measure(n, k, tokens, schemes, rates, device))

    rows = list(itertools.chain.from_iterable(rows_of(n, k) for n, k in shapes))
    if not options.quick:
        write_results(options.out, "linear", device, rows, rates)
    print(summary(rows))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
