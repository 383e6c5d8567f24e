"""Greedy decoding of the model of `decode.py` by several GPUs, which divide its layers.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py [--only int4,fp8,bf16] [--batch 1,16] [--layers 32]
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --toy     two small layers on CPUs, to see that it works

With `--nproc-per-node 1` nothing is divided, so that both are of one machine; `--nccl` leaves all sums to NCCL. Modes,
`step_us`, `error` and `same` are those of `decode.py`; what is measured is the first process, which waits for others at
each sum. `collective_us` is what sums and joins take of a step, waiting included. Rows go into
`<out>/<machine>.parallel.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from decode import Job, Row, parse
from decode_steps import kernels_of, synchronize
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
from qcompile.parts import PARTS


def measure(model: Any, job: Job, batch: int, mode: str, options: argparse.Namespace, device: str) -> Row:
    """One row: a batch in a mode."""
    prompted = Prompted.start(model, batch, options.prompt, options.prompt + options.tokens + 8, options.kv, device)
    tokens, expected = prompted.greedy(model, min(CHECKED, options.tokens))
    run = compiled(model, job, "reduce-overhead" if mode == "reduce-overhead" else None, {})
    error, same = difference(prompted.follow(run, tokens), expected)
    assert error <= logits_bound(options.layers, job), f"{job.name}: compiled logits differ by {error:.3g}"
    row: Row = {"error": float(f"{error:.3g}"), "same": round(same, 4)}
    if mode == "graph" and device == "cuda":
        captured = Captured(prompted, run)
        step_us = captured.time(options.tokens)
        prompted.rewind()
        kernels = kernels_of(captured.replay, device)
        sums = [kernel for kernel in kernels if re.search("AllReduce|AllGather|all_reduce", kernel["name"])]
        row["collective_us"] = round(sum(kernel["us"] for kernel in sums), 1)
        row["collectives"] = sum(kernel["count"] for kernel in sums)
    else:
        step_us = time_loop(prompted, run, options.tokens, device)
    return row | {"step_us": round(step_us, 1), "tok_s": round(batch * 1e6 / step_us, 1)}


def main(arguments: list[str]) -> None:
    nccl = "--nccl" in arguments
    options = parse([argument for argument in arguments if argument != "--nccl"])
    device = "cpu" if options.toy else "cuda"
    rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (size,)) if size > 1 else None
    shape = (TOY if options.toy else LLAMA_8B) | {"num_hidden_layers": options.layers}
    rows = []
    for name in options.only:
        job = Job(name)
        torch.manual_seed(0)
        with torch.no_grad():
            model = build(job, shape, options.head, device)
        if mesh is not None:
            qcompile.parallelize(model, mesh)
        if nccl:
            for module in model.modules():
                if isinstance(module, PARTS):
                    module.place = dataclasses.replace(module.place, direct=False)
        if device == "cuda":
            torch.cuda.empty_cache()
        memory = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
        held = round(sum({m.data_ptr(): m.nbytes() for m in memory}.values()) / 1e9, 3)
        for batch in options.batch:
            for mode in options.modes:
                synchronize(device)
                row = {
                    "scheme": job.scheme,
                    "gpus": size,
                    "batch": batch,
                    "mode": mode,
                    "weight_gb": held,
                    "nccl": nccl,
                }
                row |= {"layers": options.layers} | measure(model, job, batch, mode, options, device)
                rows.append(row)
                if rank == 0:
                    print(json.dumps(row), flush=True)
        del model
    if rank == 0:
        store(options.out, rows, torch.device(device))
    if dist.is_initialized():
        dist.destroy_process_group()


def store(out: Path, rows: list[Row], device: torch.device) -> None:
    """Add rows to the file of results, in the place of those about the same."""
    keys = ("scheme", "gpus", "batch", "mode", "layers", "nccl")
    path = out / f"{timing.machine_name(device)}.parallel.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {tuple(row[key] for key in keys): row for row in [*old, *rows]}
    about = {"date": datetime.date.today().isoformat(), "versions": timing.versions(device)}
    path.write_text(json.dumps(about | {"rows": list(fresh.values())}, indent=1) + "\n")
    print(f"rows are in {path}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
