"""Tiles of `gemm_stream_rows8` and changed forms of it against the tuned choice and torch's own products.

    python benchmarks/streams.py [--tokens 1024,4096] [--schemes fp8,int8] [--seconds 110]

All kernels are compiled first, by all processors; times are those of `qcompile.runtime.measure`, in microseconds, and
errors are relative to float64's product. Forms: what `FORMS` replaces in the templates' text.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from qcompile.codegen import render
from qcompile.codegen.cost_model import candidates
from qcompile.codegen.spec import KernelSpec, decode_kernel_spec
from qcompile.flags import flags
from qcompile.linear_spec import decode_spec
from qcompile.presets import preset
from qcompile.runtime import cache, clock, gpu, measure, tuning

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
FORMS: dict[str, list[tuple[str, str]]] = {
    "": [],
    "no turns": [
        ("if GROUP == 1:\n                    mbarrier.wait(turn", "if False:\n                    mbarrier.wait(turn")
    ],
    "separate": [("product, use_acc=never", "zeros, use_acc=False")],
    "scaled late": [
        ("        if INTEGER:\n            sum0, sum1 = warpgroup_mma_wait(0, deps=[sum0, sum1])\n", ""),
        (
            "        of_rows0, of_tokens",
            "        if INTEGER:\n            sum0, sum1 = warpgroup_mma_wait(0, deps=[sum0, sum1])\n        of_rows0, of_tokens",
        ),
    ],
    "no ending": [("    if length == STEPS:\n", "    if length > STEPS:\n")],
}
"""The last computes something else: what do endings cost?"""
_template = render._template


def patched(form: str) -> None:
    """From here on templates have a form."""

    def template(name: str) -> str:
        text = _template(name)
        for old, new in FORMS[form]:
            text = text.replace(old, new)
        return text

    render._template = template  # type: ignore[assignment]
    cache.load.cache_clear()


def compile_one(task: tuple[str, str, str, str]) -> str:
    form, kernel, spec, cache_dir = task
    flags.cache_dir = Path(cache_dir)
    patched(form)
    given = decode_kernel_spec(kernel)
    assert isinstance(given, KernelSpec)
    try:
        measure.compile_kernel(given, decode_spec(spec))
    except Exception as error:  # a compiler's error of any kind is the result
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,1024")
    parser.add_argument("--schemes", default="fp8,int8")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--seconds", type=float, default=110)
    given = parser.parse_args()
    begun = time.monotonic()
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    target, name = gpu.target_of(device), gpu.name_of(device)
    jobs = [
        measure.job(scheme, preset(scheme), shape, m, torch.bfloat16)
        for m in map(int, given.tokens.split(","))
        for shape in SHAPES
        for scheme in given.schemes.split(",")
    ]
    work: list[tuple[measure.Job, str, KernelSpec]] = []
    for job in jobs:
        like = job.like(target)
        streams = [
            k
            for k in candidates(like, job.m)
            if k.tile.form == "stream" and k.tile.n == 256 and k.tile.m == 128 and k.tile.split == 1
        ]
        work += [(job, "", k) for k in streams]
        widest = [k for k in streams if (k.tile.m, k.tile.n, k.tile.split) == (128, 256, 1)]
        for form in given.forms.split(","):
            if form and not (
                job.name == ("int8" if form in ("no turns", "separate") else "fp8" if form == "scaled late" else "")
            ):
                work += [(job, form, k) for k in widest]
    # One compilation serves all numbers of rows.
    tasks = {(form, k.encode(), job.spec.encode(), str(flags.cache_dir)) for job, form, k in work}
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        notes = dict(zip(tasks, pool.map(compile_one, tasks, chunksize=1), strict=True))
    print(f"{len(tasks)} kernels in {time.monotonic() - begun:.0f} s", flush=True)
    for task, note in notes.items():
        if note:
            print("not compiled:", task[0], tuning.show(decode_kernel_spec(task[1]).tile), note)  # type: ignore[union-attr]
    sums: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for job in jobs:
        if time.monotonic() - begun > given.seconds:
            print("no time left")
            break
        bench = measure.Bench(job, device)
        found: list[tuple[str, measure.Timing]] = []
        tuned = tuning.choose(
            job.spec, job.m, torch.int8 if job.name == "int8" else torch.float8_e4m3fn, torch.bfloat16, target, name
        )
        patched("")
        found.append(("tuned", bench.time(tuned.vendor or tuned.kernel.tile)))
        found.append(("torch", bench.time("int_mm" if job.name == "int8" else "scaled_mm")))
        if job.name == "fp8":
            x, x_scale = bench.problem.x, bench.problem.x_scale
            assert x_scale is not None

            def fast(weight: Any) -> torch.Tensor:
                return torch._scaled_mm(
                    x,
                    weight.codes.t(),
                    x_scale,
                    weight.scale.view(1, -1),
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )

            y = fast(bench.copies[0])
            error = float((measure.ends(y).double() - bench.problem.expected).norm() / bench.problem.expected.norm())  # type: ignore[union-attr]
            us = statistics.median(clock.times_in_graph([lambda w=w: fast(w) for w in bench.copies]))  # type: ignore[misc]
            found.append(("torch, fast sums", measure.Timing("scaled_mm", us, error)))
        for owner, form, kernel in work:
            if owner is job and not notes[form, kernel.encode(), job.spec.encode(), str(flags.cache_dir)]:
                patched(form)
                if form == "no ending":  # which leaves y as it was
                    what = tuning.chosen(kernel.tile, bench.like, job.m, "")
                    calls = [lambda w=w: bench.call(what, w) for w in bench.copies]  # type: ignore[misc]
                    found.append((form, measure.Timing(kernel.tile, statistics.median(clock.times_in_graph(calls)))))
                else:
                    found.append((form or "stream", bench.time(kernel.tile)))
        print(job.title, flush=True)
        own = [(form, t) for form, t in found if form == "stream"]
        for form, timing in found:
            where = tuning.show(timing.choice).replace("form=stream scales=fragments overlap=False", "")
            print(f"  {form:<16} {timing.us:>8.1f} {timing.error:.1e} {where} {timing.note[:150]}", flush=True)
            if form != "stream":
                sums[job.name, job.m, form].append(timing.us)
        sums[job.name, job.m, "best stream"].append(
            min(t.us for _, t in own if not t.note) if any(not t.note for _, t in own) else 1e9
        )
        # The same bits at many launches.
        patched("")
        best = min((t for _, t in own if not t.note), key=lambda t: t.us, default=None)
        if best is not None:
            print(f"  {'repeats' if bench.repeats(best.choice) else 'LAUNCHES DIFFER'}", flush=True)
    for (scheme, m, form), times in sorted(sums.items()):
        print(f"sum of {len(times)}: {scheme} M={m} {form}: {sum(times):.0f}")
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    with torch.no_grad():
        main()
