"""Sums between GPUs that divide a model's layers, and greedy decoding of the model of `decode.py` by them.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --sums
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py [--only int4,fp8,bf16] [--batch 1,16] [--layers 32]
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --toy     two small layers on CPUs, to see that it works

Sums of rows of 4,096 in bfloat16 are timed in a CUDA graph of 64, one after the other: by NCCL, and "direct", by one
kernel that writes into other GPUs' memory (`qcompile/exchange.py`). Of decoding, modes, `step_us`, `error` and `same`
are those of `decode.py`; what is measured is the first process, which waits for others at each sum. With
`--nproc-per-node 1` nothing is divided, so that both are of one machine; `--nccl` leaves all sums to NCCL. Rows go into
`<out>/<machine>-x<processes>.parallel.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from decode import Job, Row, parse
from decode_steps import synchronize
from decode_worker import (
    CHECKED,
    LLAMA_8B,
    TOY,
    Captured,
    Prompted,
    build,
    compiled,
    difference,
    logits_bound,
    time_loop,
)
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import qcompile
from qcompile.evaluate import timing
from qcompile.norm_spec import largest_sum
from qcompile.parallel import place_in
from qcompile.parts import PARTS, Place


def measure(model: Any, job: Job, batch: int, mode: str, options: argparse.Namespace, device: str) -> Row:
    """One row: a batch in a mode."""
    prompted = Prompted.start(model, batch, options.prompt, options.prompt + options.tokens + 8, options.kv, device)
    tokens, expected = prompted.greedy(model, min(CHECKED, options.tokens))
    run = compiled(model, job, "reduce-overhead" if mode == "reduce-overhead" else None, {})
    error, same = difference(prompted.follow(run, tokens), expected)
    assert error <= logits_bound(options.layers, job), f"{job.name}: compiled logits differ by {error:.3g}"
    row: Row = {"error": float(f"{error:.3g}"), "same": round(same, 4)}
    if mode == "graph" and device == "cuda":
        step_us = Captured(prompted, run).time(options.tokens)
    else:
        step_us = time_loop(prompted, run, options.tokens, device)
    return row | {"step_us": round(step_us, 1), "tok_s": round(batch * 1e6 / step_us, 1)}


SIZES = (1 << 13, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22)
"""Bytes: of 1, 16, 32, 64, ... 512 tokens of 4,096 features."""


def time_sums(place: Place, device: str) -> list[Row]:
    """Microseconds of a sum, by each way."""
    rows = []
    for size in SIZES:
        x = torch.full((size // 8192, 4096), place.rank + 1.0, device=device, dtype=torch.bfloat16)
        for direct in (False, True) if place.direct and size <= largest_sum(place.size) else (False,):
            add_up = dataclasses.replace(place, direct=direct).add_up
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    add_up(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(64):
                    y = add_up(x)
            graph.replay()
            assert bool((y == place.size * (place.size + 1) / 2).all())
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                graph.replay()
            end.record()
            end.synchronize()
            us = round(start.elapsed_time(end) * 1e3 / (20 * 64), 2)
            rows.append({"bench": "sums", "impl": "direct" if direct else "nccl", "bytes": size, "us": us})
    return rows


def time_decoding(mesh: Any, nccl: bool, options: argparse.Namespace, device: str) -> list[Row]:
    """A row for each scheme, batch and mode."""
    shape = (TOY if options.toy else LLAMA_8B) | {"num_hidden_layers": options.layers}
    rows = []
    for name in options.only:
        job = Job(name)
        torch.manual_seed(0)
        with torch.no_grad():
            model = build(job, shape, options.head, device)
        if mesh is not None:
            qcompile.parallelize(model, mesh)
        for module in model.modules() if nccl else ():
            if isinstance(module, PARTS):
                module.place = dataclasses.replace(module.place, direct=False)
        if device == "cuda":
            torch.cuda.empty_cache()
        memory = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
        held = round(sum({m.data_ptr(): m.nbytes() for m in memory}.values()) / 1e9, 3)
        impl = "whole" if mesh is None else "nccl" if nccl else "direct"
        common = {"bench": "decode", "impl": impl, "scheme": job.scheme, "layers": options.layers, "weight_gb": held}
        for batch in options.batch:
            for mode in options.modes:
                synchronize(device)
                measured = measure(model, job, batch, mode, options, device)
                rows.append(common | {"batch": batch, "mode": mode} | measured)
    return rows


def main(arguments: list[str]) -> None:
    own = {"--sums", "--nccl"} & set(arguments)
    options = parse(["--only", "int4,fp8,bf16", *(argument for argument in arguments if argument not in own)])
    device = "cpu" if options.toy else "cuda"
    rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (size,)) if size > 1 else None
    if "--sums" in own:
        rows = time_sums(place_in(mesh), device)
    else:
        rows = time_decoding(mesh, "--nccl" in own, options, device)
    if rank == 0:
        store(options.out, rows, f"{timing.machine_name(torch.device(device))}-x{size}", torch.device(device))
    if mesh is not None:
        torch.compiler.reset()  # communicators end after the CUDA graphs that hold them
        gc.collect()
        dist.destroy_process_group()


def store(out: Path, rows: list[Row], machine: str, device: torch.device) -> None:
    """Print rows, and add them to the file of results, in the place of those about the same."""
    keys = ("bench", "impl", "bytes", "scheme", "layers", "batch", "mode")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{machine}.parallel.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {tuple(row.get(key) for key in keys): row for row in [*old, *rows]}
    about = {"machine": machine, "date": datetime.date.today().isoformat(), "versions": timing.versions(device)}
    path.write_text(json.dumps(about | {"rows": list(fresh.values())}, indent=1) + "\n")
    print("\n".join(map(json.dumps, rows)), f"rows are in {path}", sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
