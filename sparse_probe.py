"""Times of 2:4 sparse tiles on sparse tensor cores, checked against float64 and repeated; dense int4 beside them.

python sparse_probe.py [--buckets 1,16,64] [--seconds 115]
"""

import argparse
import itertools
import math
import time
from dataclasses import replace

import torch

from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.spec import KernelSpec, Tile
from qcompile.presets import preset
from qcompile.runtime import gpu, measure, tuning

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def tiles(like: KernelSpec, m: int, keep: int) -> list[Tile]:
    """Cuts that were fast, with longer runs of x in shared memory; and at 64 rows the dense product's."""
    ranked = [kernel.tile for kernel in rank(candidates(like, m), m, keep=10000)]
    own = [t for t in ranked if t.form == "cores" and t.stages == 3]
    cuts = {
        1: [(128, 512, 8), (128, 128, 4), (64, 256, 2), (64, 512, 4), (64, 256, 4)],
        16: [(128, 256, 8), (128, 512, 8), (64, 512, 4), (64, 256, 4)],
        64: [(128, 64, 4), (128, 128, 4), (256, 64, 8), (128, 128, 8), (256, 128, 8)],
    }[m]
    found = []
    for n, k, warps in cuts:
        fit = [t for t in own if (t.n, t.k, t.warps) == (n, k, warps)]
        fit = [t for t in fit if 128 <= -(-like.n // n) * t.split <= 1000]
        fit.sort(key=lambda t: abs(math.log2(-(-like.n // n) * t.split / 280)))
        found += fit[: 2 if m == 1 else 1]
    if like.weight == "int4":
        found = [replace(t, overlap=True) for t in found]
    else:
        found = found[:4]
    loops = [t for t in ranked if t.form == "loop"]
    if m == 64:
        found += [*loops[:2], replace(loops[0], overlap=False)] + [
            t for t in loops if t.n == 128 and t.k == 128 and not t.overlap
        ][:2]
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--buckets", default="1,16,64")
    parser.add_argument("--schemes", default="int4_24,int4")
    parser.add_argument("--keep", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=115)
    given = parser.parse_args()
    begun = time.monotonic()
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    target, name = gpu.target_of(device), gpu.name_of(device)
    print(torch.cuda.get_device_name(), torch.__version__)
    sums: dict[tuple[str, int], float] = {}
    with measure.compilers(15) as running:
        waiting = []
        for m, (n, k) in itertools.product(map(int, given.buckets.split(",")), SHAPES):
            for scheme in given.schemes.split(","):
                job = measure.job(scheme, preset(scheme), (n, k), m, torch.bfloat16)
                like = job.like(target)
                if "24" not in scheme:
                    choices = [tuning.choose(job.spec, m, torch.bfloat16, torch.bfloat16, target, name).kernel.tile]
                else:
                    choices = tiles(like, m, given.keep)
                waiting.append((job, [(c, running.submit(replace(like, tile=c), job.spec)) for c in choices]))
        for job, choices in waiting:
            if time.monotonic() - begun > given.seconds:
                break
            ready = [c for c, future in choices if not future.result()]
            for c, future in choices:
                if future.result():
                    print("  not compiled", tuning.show(c), future.result()[:200])
            outcome = measure.measure(job, ready, device)
            best = outcome.best.us if outcome.best else float("nan")
            sums[job.name, job.m] = sums.get((job.name, job.m), 0.0) + best
            print(f"[{time.monotonic() - begun:.0f} s] {job.title}: {best:.2f}")
            if "24" in job.name:
                for t in sorted(outcome.timings, key=lambda t: t.us):
                    c = t.choice
                    what = f"{c.form} m{c.m} n{c.n} k{c.k} z{c.split} w{c.warps} s{c.stages} {c.scales} {c.overlap}"
                    print(f"    {t.us:.2f} {t.error:.1e} {what} {t.note[:160]}", flush=True)
    print({f"{a} M={b}": round(us, 1) for (a, b), us in sums.items()})


if __name__ == "__main__":
    main()
