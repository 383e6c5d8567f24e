"""Times of 2:4 sparse tiles on sparse tensor cores, checked against float64 and repeated; dense int4 beside them.

    python sparse_probe.py [--buckets 1,16,64] [--seconds 115]
"""

import argparse
import itertools
import time
from dataclasses import replace

import torch

from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.spec import KernelSpec, Tile
from qcompile.presets import preset
from qcompile.runtime import gpu, measure, tuning

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def tiles(like: KernelSpec, m: int, keep: int) -> list[Tile]:
    """The first of each form by the cost model; of sparse tensor cores one of each cut, then more."""
    ranked = [kernel.tile for kernel in rank(candidates(like, m), m, keep=10000)]
    own = [t for t in ranked if t.form == "cores" and 128 <= -(-like.n // t.n) * t.split * -(-m // t.m) <= 1200]
    first: dict[tuple[int, ...], Tile] = {}
    for t in own:
        first.setdefault((t.n, t.k, t.warps), t)
    best = list(first.values())
    own.sort(key=lambda t: t.stages)
    return [*best, *[t for t in own if t not in best]][:keep] + [t for t in ranked if t.form != "cores"][: 2 * (m >= 64)]


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
                    what = f"{c.form} m{c.m} n{c.n} k{c.k} z{c.split} w{c.warps} s{c.stages} {c.scales}"
                    print(f"    {t.us:.2f} {t.error:.1e} {what} {t.note[:160]}", flush=True)
    print({f"{a} M={b}": round(us, 1) for (a, b), us in sums.items()})


if __name__ == "__main__":
    main()
