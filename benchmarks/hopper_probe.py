"""Every tile of `gemm_stream` beside what the shipped table has, torch's product after decoding, and cuBLAS.

    python benchmarks/hopper_probe.py TABLE.json
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from qcompile.codegen.cost_model import candidates
from qcompile.codegen.spec import Tile
from qcompile.presets import preset
from qcompile.runtime import clock, gpu, measure, tuning

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
JOBS = [("int4", m, ()) for m in (64, 128, 256, 512, 1024, 2048, 4096)]
JOBS += [("int4", 64, ("silu(a)*b",)), ("int4", 256, ("silu(a)*b",)), ("int4_asym", 128, ()), ("int4_asym", 1024, ())]


def choices(job, target, name):
    like = job.like(target)
    streams = [kernel.tile for kernel in candidates(like, job.m) if kernel.tile.form == "stream"]
    plain = [k.tile for k in candidates(like, job.m) if k.tile.form != "stream"]
    table = tuning.shipped(name)
    entry = table.get(tuning.family(like), {}).get((like.n, like.k, job.m))
    known = None
    if entry is not None:
        known = next((c for c in [*plain, "decode_mm"] if tuning.plain(c) == entry.choice), None)
    found = [c for c in (known, "decode_mm" if job.m >= 512 and known != "decode_mm" else None) if c is not None]
    return found + streams


def main():
    begun = time.time()
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    target, name = gpu.target_of(device), gpu.name_of(device)
    path = Path(sys.argv[1])
    table = tuning.parse_table((Path(__file__).parents[1] / "codegen" / "tuned" / f"{name}.json").read_text())
    jobs = []
    for scheme, m, steps in JOBS:
        for shape in SHAPES[2:3] if steps else SHAPES:
            job = measure.job(scheme, preset(scheme), shape, m, torch.bfloat16)
            jobs.append(replace(job, spec=job.spec.with_epilogue(*steps)) if steps else job)
    sums = {}
    with measure.compilers(15) as running:
        waiting = []
        submitted = {}
        for job in jobs:
            like = job.like(target)
            row = []
            for choice in choices(job, target, name):
                if isinstance(choice, str):
                    row.append((choice, None))
                    continue
                kernel = replace(like, tile=choice)
                key = replace(kernel, tile=replace(choice, split=1)) if choice.form == "stream" else kernel
                if key not in submitted:
                    submitted[key] = running.submit(key, job.spec)
                row.append((choice, submitted[key]))
            waiting.append(row)
        for job, row in zip(jobs, waiting):
            if time.time() - begun > 175:
                print("no time for", job.title)
                continue
            bench = measure.Bench(job, device)
            times = []
            for choice, future in row:
                note = "" if future is None else future.result()
                if note:
                    timing = measure.Timing(choice, note=note)
                elif job.spec.epilogue:  # of which the bench knows no result
                    what = tuning.chosen(choice, bench.like, job.m, "")
                    calls = [lambda w=w, what=what: bench.call(what, w) for w in bench.copies]
                    timing = measure.Timing(choice, statistics.median(clock.times_in_graph(calls)))
                else:
                    timing = bench.time(choice)
                times.append(timing)
            good = sorted((t for t in times if not t.note), key=lambda t: t.us)
            best = next((t for t in good if bench.repeats(t.choice)), None)
            first = times[0]
            print(f"{job.title} {job.spec.epilogue} table {first.us:.2f} best {best and best.us:.2f}")
            for t in times:
                c = t.choice
                what = c if isinstance(c, str) else f"{c.form} {c.m}x{c.n} split {c.split} stages {c.stages}"
                print(f"    {t.us:8.2f} {t.error:.1e} {what} {t.note[:90]}")
            total = sums.setdefault((job.name, job.m, job.spec.epilogue), [0.0, 0.0, 0.0])
            total[0] += first.us
            total[1] += best.us
            total[2] += min(t.us for t in good if isinstance(t.choice, Tile) and t.choice.form == "stream")
            if not job.spec.epilogue:
                record = tuning.Record(choice=tuning.plain(best.choice), us=round(best.us, 3))
                table.setdefault(tuning.family(job.like(target)), {})[(*job.spec.shape, job.m)] = record
            sys.stdout.flush()
    for key, total in sums.items():
        print(*key, "table {:.1f} best {:.1f} streams {:.1f}".format(*total))
    for job in jobs:
        family, key = tuning.family(job.like(target)), (*job.spec.shape, job.m)
        if not job.spec.epilogue and key in table.get(family, {}):
            print("ENTRY", __import__("json").dumps(tuning.to_json(family, key, table[family][key])))
    versions = {"torch": torch.__version__, "triton": __import__("triton").__version__, "gpu": torch.cuda.get_device_name()}
    path.write_text(tuning.print_table(table, gpu=name, date="2026-11-27", versions=versions))
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
