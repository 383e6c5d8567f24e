"""Make the table of choices that ships for a GPU: which kernel multiplies fastest, by scheme, shape and bucket of M.

    python benchmarks/tune.py --minutes 8 [--table codegen/tuned/nvidia-h100.json] [--timings all.jsonl]

Kernels are compiled by all processors but one, in the order in which they are timed; see `qcompile.runtime.measure` for
what counts. The table is written after each job, and one that is there already is continued: jobs that it has are
skipped, unless `--again` is given. A job is a scheme, a shape and a bucket; all shapes and schemes of the first bucket
come first. With `--experts` shapes are those of a mixture's experts, and buckets are of twice the rows that one has.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

import torch
import triton

from qcompile.presets import PRESETS, preset
from qcompile.runtime import gpu, measure, tuning
from qcompile.runtime.cache import write_file

SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336"
"""N x K of the linears of a Llama-3-8B layer, with the query, key and value and the gate and up projections merged."""
BUCKETS = "1,16,1024,64,4096,32,256,128,2048,512"
SCHEMES = "int4,fp8,int8,int8_weight_only,fp8_weight_only,mxfp4,nvfp4,nf4,int4_asym,fp8_block,int4_24,int8_24"


def jobs(schemes: str, shapes: str, buckets: str, dtype: torch.dtype, experts: int) -> list[measure.Job]:
    """Every scheme with every shape, bucket by bucket."""
    given = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    return [
        measure.job(name, preset(name), (n, k), int(bucket), dtype, experts)
        for bucket in buckets.split(",")
        for name in schemes.split(",")
        for n, k in given
    ]


def main() -> None:
    """Time jobs until all are done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=SCHEMES, help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--shapes", default=SHAPES, help="N x K")
    parser.add_argument("--buckets", default=BUCKETS, help="1, and powers of two from 16 to 4096")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture, whose experts have the shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--minutes", type=float, default=8.0, help="no job is begun later")
    parser.add_argument("--keep", type=int, default=12, help="tiles that are timed for a job")
    parser.add_argument("--workers", type=int, help="compiling processes")
    parser.add_argument("--table", type=Path, help="by default codegen/tuned/<gpu>.json")
    parser.add_argument("--timings", type=Path, help="gets all times, a JSON object a line")
    parser.add_argument("--again", action="store_true", help="time jobs that the table has")
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    name, target = gpu.name_of(device), gpu.target_of(device)
    path = given.table or Path(__file__).parents[1] / "codegen" / "tuned" / f"{name}.json"
    table = tuning.parse_table(path.read_text()) if path.exists() else {}
    wanted = []
    for job in jobs(given.schemes, given.shapes, given.buckets, getattr(torch, given.dtype), given.experts):
        like = job.like(target)
        known = table.get(tuning.family(like), {}).get((like.n, like.k, job.m))
        if given.again or known is None or tuning.resolve(known.choice, like, job.m) is None:
            wanted.append(job)
    print(f"{name} ({target}): {len(wanted)} jobs, table {path}", flush=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "gpu": torch.cuda.get_device_name()}
    begun = time.monotonic()
    found = measure.tune_all(wanted, device, keep=given.keep, workers=given.workers, seconds=60 * given.minutes)
    for count, outcome in enumerate(found, 1):
        print(f"[{count}/{len(wanted)} {time.monotonic() - begun:.0f} s] {outcome.describe()}", flush=True)
        if outcome.best is not None:
            job, best = outcome.job, outcome.best
            record = tuning.Record(choice=tuning.plain(best.choice), us=round(best.us, 3))
            table.setdefault(tuning.family(job.like(target)), {})[(*job.spec.shape, job.m)] = record
            date = datetime.date.today().isoformat()
            write_file(path, tuning.print_table(table, gpu=name, date=date, versions=versions))
        if given.timings is not None:
            with given.timings.open("a") as file:
                file.write(measure.to_lines(outcome))


if __name__ == "__main__":
    main()
