"""Int4 products by the warp-specialized kernel in `hopper_ws.py`, beside those that the table chooses, and torch's.

    python benchmarks/hopper_probe.py
"""

import multiprocessing
import os
import statistics
import sys
import threading
import time

import torch

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [16, 64, 128, 256, 1024]
# M: shape: BM, RT (tiles of 64 rows), WGS, SPLIT (0: persistent, -Z: that with Z programs a tile), STAGES, AHEAD, maxnreg
VARIANTS = {
    64: {
        (6144, 4096): [(64, 4, 2, 5, 6, 4, 0), (64, 2, 2, 5, 4, 2, 128), (64, 2, 1, 3, 3, 2, 0)],
        (4096, 4096): [(64, 4, 2, 8, 6, 4, 0), (64, 2, 2, 4, 8, 6, 0), (64, 2, 2, 8, 4, 2, 128)],
        (28672, 4096): [(64, 4, 2, 1, 6, 4, 0), (64, 4, 2, -1, 6, 4, 0), (64, 2, 2, 1, 8, 6, 0), (64, 2, 2, 1, 4, 2, 128), (64, 4, 2, 1, 3, 2, 128)],
        (4096, 14336): [(64, 4, 2, 8, 6, 4, 0), (64, 2, 2, 4, 8, 6, 0), (64, 2, 2, 8, 4, 2, 128)],
    },
    128: {
        (6144, 4096): [(128, 4, 2, 5, 4, 2, 0), (128, 2, 2, 2, 5, 3, 0), (128, 2, 2, 5, 2, 1, 128), (64, 4, 2, 2, 6, 4, 0), (128, 4, 2, 0, 4, 2, 0)],
        (4096, 4096): [(128, 4, 2, 8, 4, 2, 0), (128, 2, 2, 4, 5, 3, 0), (128, 2, 2, 8, 2, 1, 128), (64, 4, 2, 4, 6, 4, 0), (128, 4, 2, 0, 4, 2, 0)],
        (28672, 4096): [(128, 4, 2, 1, 4, 2, 0), (128, 4, 2, 1, 4, 3, 0), (128, 4, 2, -1, 4, 2, 0), (128, 2, 2, 1, 5, 3, 0), (128, 2, 2, 1, 2, 1, 128), (128, 4, 2, 0, 4, 2, 0)],
        (4096, 14336): [(128, 4, 2, 8, 4, 2, 0), (128, 2, 2, 4, 5, 3, 0), (128, 2, 2, 8, 2, 1, 128), (64, 4, 2, 4, 6, 4, 0), (128, 4, 2, 0, 4, 2, 0)],
    },
    256: {
        (6144, 4096): [(128, 4, 2, 2, 4, 2, 0), (128, 2, 2, 1, 5, 3, 0), (128, 2, 2, 5, 2, 1, 128), (128, 4, 2, 0, 4, 2, 0)],
        (4096, 4096): [(128, 4, 2, 4, 4, 2, 0), (128, 2, 2, 2, 5, 3, 0), (256, 2, 2, 4, 3, 2, 0), (128, 4, 2, 0, 4, 2, 0)],
        (28672, 4096): [(128, 4, 2, 1, 4, 2, 0), (256, 2, 2, 1, 3, 2, 0), (128, 2, 2, 1, 2, 1, 128), (128, 4, 2, 0, 4, 2, 0)],
        (4096, 14336): [(128, 4, 2, 4, 4, 2, 0), (128, 2, 2, 2, 5, 3, 0), (256, 2, 2, 4, 3, 2, 0), (128, 4, 2, 0, 4, 2, 0)],
    },
    1024: {
        (6144, 4096): [(128, 4, 2, 1, 4, 2, 0), (128, 4, 2, 0, 4, 2, 0)],
        (4096, 4096): [(128, 4, 2, 1, 4, 2, 0), (128, 4, 2, 0, 4, 2, 0), (256, 2, 2, 1, 3, 2, 0)],
        (28672, 4096): [(128, 4, 2, 1, 4, 2, 0), (128, 4, 2, 0, 4, 2, 0), (256, 2, 2, 1, 3, 2, 0)],
        (4096, 14336): [(128, 4, 2, 1, 4, 2, 0), (128, 4, 2, 0, 4, 2, 0), (256, 2, 2, 1, 3, 2, 0)],
    },
}


def limited(seconds, what):
    def leave():
        print("hangs:", what, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    return timer


def compile_one(args):
    timer = limited(50, args)
    note = compile_variant(args)
    timer.cancel()
    return args, note


def compile_variant(args):
    from hopper_ws import Product

    shape, variant = args
    n, k = shape
    codes = torch.zeros(n // 64, k // 64, 512, dtype=torch.int32, device="cuda")
    scale = torch.zeros(n // 64, k // 128, 64, dtype=torch.bfloat16, device="cuda")
    product = Product(shape, 16, variant)
    try:
        product.prepare(codes, scale, torch.zeros(16, k, dtype=torch.bfloat16, device="cuda"))()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{shape} {variant}: {type(error).__name__} {error}"[:300]
    return ""


def set_decoding(new):
    from qcompile.codegen import decoders, render
    from qcompile.runtime import cache

    render.word_factor = decoders.word_factor if new else (lambda *args, **named: 1.0)
    cache.load.cache_clear()


def choice_of(shape, m):
    from qcompile.presets import PRESETS
    from qcompile.runtime import gpu, measure
    from qcompile.runtime.tuning import choose

    device = torch.device("cuda", 0)
    job = measure.job("", PRESETS["int4"].fit("", shape), shape, m, torch.bfloat16)
    return job, choose(job.spec, m, torch.bfloat16, torch.bfloat16, gpu.target_of(device), gpu.name_of(device))


def compile_plain(args):
    from qcompile.runtime import measure

    shape, m, new = args
    set_decoding(new)
    job, chosen = choice_of(shape, m)
    if chosen.vendor is None:
        measure.compile_kernel(chosen.kernel, job.spec)
    return ""


def streams_of(like, m):
    from qcompile.codegen.cost_model import candidates

    return [kernel for kernel in candidates(like, m) if kernel.tile.form == "stream"]


def compile_streams(args):
    from qcompile.runtime import gpu, measure

    shape, i = args
    job, _ = choice_of(shape, 1024)
    kernels = streams_of(job.like(gpu.target_of(torch.device("cuda", 0))), 1024)
    if i < len(kernels):
        measure.compile_kernel(kernels[i], job.spec)


def main():
    from hopper_ws import Product

    from qcompile.presets import PRESETS
    from qcompile.runtime import clock, gpu, measure
    from qcompile.runtime.tuning import choose

    device = torch.device("cuda", 0)
    begun = time.time()
    torch.manual_seed(0)
    wanted = sorted({(s, v) for shapes in VARIANTS.values() for s, vs in shapes.items() for v in vs})
    fine = set()
    pool = multiprocessing.get_context("spawn").Pool(14, maxtasksperchild=3)
    plain = [(shape, m, new) for shape in SHAPES for m in TOKENS for new in (False, True)]
    templates = pool.imap_unordered(compile_plain, plain, chunksize=1)
    streams = pool.imap_unordered(compile_streams, [(shape, i) for shape in SHAPES for i in range(5)], chunksize=1)
    results = pool.imap_unordered(compile_one, wanted, chunksize=1)
    try:
        for _ in plain:
            templates.next(timeout=100)
        for _ in range(5 * len(SHAPES)):
            streams.next(timeout=60)
        for _ in wanted:
            args, note = results.next(timeout=60)
            if note:
                print("dropped", note)
            else:
                fine.add(args)
    except multiprocessing.TimeoutError:
        print("not compiled:", [args for args in wanted if args not in fine])
    pool.terminate()
    print(f"compiled {len(wanted)} in {time.time() - begun:.0f} s", flush=True)
    sums = {}
    print("the template: us with three and with one shift a word")
    for m in TOKENS:
        totals = [0.0, 0.0]
        for shape in SHAPES:
            job, chosen = choice_of(shape, m)
            bench = measure.Bench(job, device)
            times = []
            for new in (False, True):
                set_decoding(new)
                y = bench.call(chosen, bench.copies[0])
                error = float((measure.ends(y).double() - bench.problem.expected).norm() / bench.problem.expected.norm())
                assert error <= measure.LIMIT[torch.bfloat16], error
                times.append(statistics.median(clock.times_in_graph([lambda w=w: bench.call(chosen, w) for w in bench.copies])))
            totals = [total + us for total, us in zip(totals, times)]
            print(f"  M={m} {shape[0]}x{shape[1]} " + " ".join(f"{us:.2f}" for us in times))
        print(f"  M={m} {totals[0]:.1f} {totals[1]:.1f}", flush=True)
    for m, shapes in VARIANTS.items():
        for (n, k), variants in shapes.items():
            job = measure.job("", PRESETS["int4"].fit("", (n, k)), (n, k), m, torch.bfloat16)
            bench = measure.Bench(job, device)
            chosen = choose(job.spec, m, torch.bfloat16, torch.bfloat16, gpu.target_of(device), gpu.name_of(device))
            x, expected = bench.problem.x, bench.problem.expected
            ours = statistics.median(clock.times_in_graph([lambda w=w: bench.call(chosen, w) for w in bench.copies]))
            rows = [(ours, "table", 0.0, "")]
            dense = torch.randn(n, k, device=device, dtype=torch.bfloat16)
            many = [dense.clone() for _ in range(max(2, clock.COLD_BYTES // (2 * n * k)))]
            rows.append((statistics.median(clock.times_in_graph([lambda w=w: torch.mm(x, w.t()) for w in many])), "cuBLAS", 0.0, ""))
            del dense, many
            for variant in variants:
                if ((n, k), variant) not in fine:
                    continue
                timer = limited(15, (m, n, k, variant))
                product = Product((n, k), m, variant)
                try:
                    calls = [product.prepare(w.codes, w.scale, x) for w in bench.copies]
                    first = calls[0]()
                    error = float((measure.ends(first).double() - expected).norm() / expected.norm())
                    note = "" if error <= measure.LIMIT[torch.bfloat16] else "WRONG "
                    if not all(torch.equal(calls[0]().view(torch.int16), first.view(torch.int16)) for _ in range(50)):
                        note += "DIFFERS "
                    us = statistics.median(clock.times_in_graph(calls))
                except Exception as failure:
                    us, error, note = float("inf"), 0.0, f"{type(failure).__name__}: {failure}"[:150]
                rows.append((us, str(variant), error, note))
                timer.cancel()
            for kernel in streams_of(bench.like, m):
                timer = limited(15, (m, n, k, kernel.tile))
                timing = bench.time(kernel.tile)
                note = timing.note or ("" if bench.repeats(kernel.tile) else "DIFFERS")
                t = kernel.tile
                rows.append((timing.us, f"stream {t.m} x {t.n}, {t.stages} stages", timing.error, note))
                timer.cancel()
            good = [r[0] for r in rows[2:] if not r[3]]
            best = min(good, default=float("inf"))
            total = sums.setdefault(m, [0.0, 0.0, 0.0])
            total[0] += ours
            total[1] += rows[1][0]
            total[2] += min(best, ours)
            print(f"M={m} {n}x{k}")
            for us, name, error, note in rows:
                print(f"   {us:8.2f} {name:28} {error:.1e} {note}")
            sys.stdout.flush()
            del bench
            torch.cuda.empty_cache()
    for m, (ours, cublas, best) in sums.items():
        print(f"M={m}: table {ours:.1f}, cuBLAS {cublas:.1f}, best {best:.1f}")
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
