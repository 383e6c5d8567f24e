"""Times of 2:4 sparse tiles on sparse tensor cores, checked against float64 and repeated; dense int4 beside them.

    python sparse_probe.py [--buckets 1,16,64] [--seconds 115]
"""

import argparse
import itertools
import time
from dataclasses import replace

import torch

from qcompile.codegen.spec import Tile
from qcompile.presets import preset
from qcompile.runtime import gpu, measure, tuning

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def cores(m: int, n: int, k: int, warps: int, stages: int, **more: object) -> dict:
    return dict(m=m, n=n, k=k, warps=warps, stages=stages, form="cores", **more)


FORMS = {
    1: [
        cores(8, 64, 512, 4, 1),
        cores(8, 64, 512, 4, 2),
        cores(8, 64, 1024, 4, 2),
        cores(8, 64, 1024, 4, 4),
        cores(8, 64, 1024, 8, 2),
        cores(8, 128, 512, 8, 2),
        cores(8, 64, 512, 2, 2),
    ],
    16: [
        cores(16, 64, 512, 4, 1),
        cores(16, 64, 512, 4, 2),
        cores(16, 64, 1024, 8, 2),
        cores(16, 128, 512, 8, 2),
        cores(16, 64, 512, 4, 2, overlap=True),
        cores(16, 128, 512, 8, 2, overlap=True),
    ],
    64: [
        cores(64, 128, 128, 4, 2, overlap=True, scales="fragments"),
        cores(64, 256, 128, 8, 2, overlap=True, scales="fragments"),
        cores(64, 256, 64, 8, 1, overlap=True, scales="fragments"),
        cores(64, 128, 256, 8, 2, overlap=True),
        cores(32, 128, 256, 4, 2, overlap=True),
    ],
}


def tiles(m: int, n: int, k: int) -> list[Tile]:
    found = []
    for form, split in itertools.product(FORMS[m], (1, 2, 4, 8)):
        programs = n // form["n"] * split * -(-m // form["m"])
        if n % form["n"] == 0 and k % (split * form["k"]) == 0 and 190 <= programs <= 1000:
            found.append(Tile(split=split, **form))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--buckets", default="1,16,64")
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
            for scheme in ("int4_24", "int4"):
                job = measure.job(scheme, preset(scheme), (n, k), m, torch.bfloat16)
                like = job.like(target)
                if scheme == "int4":
                    choices = [tuning.choose(job.spec, m, torch.bfloat16, torch.bfloat16, target, name).kernel.tile]
                else:
                    choices = tiles(m, n, k)
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
            if job.name != "int4":
                for t in sorted(outcome.timings, key=lambda t: t.us):
                    print(f"    {t.us:.2f} {t.error:.1e} {tuning.show(t.choice)} {t.note[:160]}", flush=True)
    print({f"{a} M={b}": round(us, 1) for (a, b), us in sums.items()})


if __name__ == "__main__":
    main()
