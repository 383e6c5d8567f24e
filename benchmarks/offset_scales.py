"""Time of products of few rows by weights with offsets on a GPU, by where their scales go: for `cost_model._few_rows`.

    python benchmarks/offset_scales.py [--schemes q4_k] [--rows 16] [--keep 6]

"fragments" rounds a code times its scale before the offset is added; else all is exact until the sum ("products", or
"weights" where groups are too narrow). One row alone has the exact "sums". Prints for each shape the fastest tile of
either in microseconds, and the sums over shapes. Kernels are compiled by several processes beforehand; weights come
from memory.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from dataclasses import replace

import torch

from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.spec import KernelSpec, scales_of
from qcompile.presets import preset
from qcompile.runtime import gpu, measure
from qcompile.runtime.tuning import show

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
DEVICE = torch.device("cuda", 0)
WAYS = {"rounded": "fragments", "exact": "products"}


def kernels_of(job: measure.Job, target: str, keep: int) -> dict[str, list[KernelSpec]]:
    """By way the kernels that the model finds fastest, of the same tiles of loops."""
    tiles = [kernel for kernel in candidates(job.like(target), job.m) if kernel.tile.form == "loop"]
    found = {}
    for way, scales in WAYS.items():
        placed = [replace(kernel, tile=replace(kernel.tile, scales=scales)) for kernel in tiles]
        kept = [kernel for kernel in placed if (scales_of(kernel, scales) == "fragments") == (way == "rounded")]
        found[way] = rank(list(dict.fromkeys(kept)), job.m, keep=keep)
    return found


def main() -> None:
    """Compile all, then time job after job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="q4_k", help="with offsets: q4_k, q5_k, q2_k")
    parser.add_argument("--rows", default="16", help="2 to 32")
    parser.add_argument("--keep", type=int, default=6, help="tiles that are timed for each way")
    given = parser.parse_args()
    torch.manual_seed(0)
    target = gpu.target_of(DEVICE)
    rows = [int(m) for m in given.rows.split(",")]
    with measure.compilers(max(1, (os.cpu_count() or 2) - 1)) as running:
        compiling = []
        for name, m, shape in itertools.product(given.schemes.split(","), rows, SHAPES):
            job = measure.job(name, preset(name), shape, m, torch.bfloat16)
            found = {
                way: [(kernel, running.submit(kernel, job.spec)) for kernel in kernels]
                for way, kernels in kernels_of(job, target, given.keep).items()
            }
            compiling.append((job, found))
        sums: dict[tuple[str, int, str], float] = {}
        for job, found in compiling:
            for way, waiting in found.items():
                kernels = [kernel for kernel, future in waiting if not future.result()]
                outcome = measure.measure(job, [kernel.tile for kernel in kernels], DEVICE)
                print(f"{way:8}{outcome.describe()}", flush=True)
                if outcome.best is not None:
                    print(f"{'':8}{outcome.best.error:.2e} from float64, {show(outcome.best.choice)}")
                key = job.name, job.m, way
                sums[key] = sums.get(key, 0.0) + (math.inf if outcome.best is None else outcome.best.us)
    for (name, m, way), us in sums.items():
        print(f"{name} M={m} {way}: {us:.1f} us for {len(SHAPES)} shapes")


if __name__ == "__main__":
    main()
