"""What a step of decoding, or a prompt, is made of: the kernels that the device ran, for `decode_worker.py`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import Row

LINEAR = re.compile(
    r"qcompile_gemm|gemm_|gemv|nvjet|tinygemm|cutlass|cublas|splitKreduce|_scaled_mm|int8pack|int4pack"
    r"|triton_(red|per|poi|tem)\w*fused\w*_mm(_|$)"
)
"""Names of kernels that multiply by weights."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kernels_of(step: Callable[[], object], device: str) -> list[Row]:
    """What the device ran in a step: name, grid, count and microseconds, the longest first.

    On a GPU one entry for each kernel and grid, so that a kernel's shapes stay apart; on CPUs operators.
    """
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    step()
    synchronize(device)
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        synchronize(device)
    if device == "cpu":
        found = {(e.key, ""): (e.count, e.self_cpu_time_total) for e in profile.key_averages()}
    else:
        found = _device_events(profile)
    rows = [{"name": n, "grid": g, "count": c, "us": round(us, 1)} for (n, g), (c, us) in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def _device_events(profile: Any) -> dict[tuple[str, str], tuple[int, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            key = event["name"][:100], "x".join(map(str, event["args"].get("grid", [])))
            count, us = found.get(key, (0, 0.0))
            found[key] = count + 1, us + event["dur"]
    return found


def composition(kernels: list[Row], batch: int, step_us: float) -> Row:
    """The fields of a row that say what a step is made of; a table of it is printed."""
    busy, count = sum(k["us"] for k in kernels), sum(k["count"] for k in kernels)
    linear = sum(k["us"] for k in kernels if LINEAR.search(k["name"]))
    print(f"  batch {batch}: {count} kernels, {busy:.0f} us busy of {step_us:.0f}; linears {linear:.0f} us", flush=True)
    for kernel in kernels[:25]:
        mark = "*" if LINEAR.search(kernel["name"]) else " "
        print(f"  {mark}{kernel['us']:>9.1f} us {kernel['count']:>4} x {kernel['grid']:<14} {kernel['name']}")
    return {
        "kernel_count": count,
        "busy_us": round(busy, 1),
        "linear_us": round(linear, 1),
        "kernels": kernels[:40],
    }
