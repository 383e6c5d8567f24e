"""Times of calls on weights that come from memory, the limits of a device, and files of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qcompile.runtime import clock
from qcompile.runtime.tuning import gpu_family

Call = Callable[[], Tensor]
Row = dict[str, object]

COLD_BYTES = {"cuda": clock.COLD_BYTES, "cpu": 96 << 20}
MOST_COPIES = {"cuda": 512, "cpu": 96}


def machine_name(device: torch.device) -> str:
    """Vendor and model, such as `nvidia-h100`; of CPUs also the widest extension and cores: `intel-xeon-amx-2core`."""
    if device.type == "cuda":
        return gpu_family(torch.cuda.get_device_name(device))
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    model = re.search(r"model name\s*: (.*)", text)
    words = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\d+-Core", "", model.group(1) if model else "cpu").lower()
    extension = next((e for e in ("amx", "avx512", "avx2", "asimd") if e in text), "")
    return "-".join([*words.split(), *([extension] if extension else []), f"{text.count('processor	:')}core"])


def copies(device: torch.device, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Clones of a weight's tensors, `COLD_BYTES` and two of them at least, but no more than `MOST_COPIES`.

    On GPUs they are allocated anew: what others have left of torch's memory can take 15 % longer to read.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    size = max(1, sum(t.nbytes for t in tensors))
    wanted = min(MOST_COPIES[device.type], -(-COLD_BYTES[device.type] // size))
    return [tuple(t.clone() for t in tensors) for _ in range(max(2, wanted))]


def microseconds(calls: list[Call], device: torch.device) -> float:
    """Median time of a call: on GPUs in replays of a CUDA graph of all of them, on CPUs of calls in turn."""
    return statistics.median(times_of(calls, device))


def times_of(calls: list[Call], device: torch.device) -> list[float]:
    """Microseconds of a call, several times over."""
    return clock.times_in_graph(calls) if device.type == "cuda" else _in_turn(calls)


def _in_turn(calls: list[Call]) -> list[float]:
    calls[0]()  # compiles
    times = []
    for turn in range(max(clock.ROUNDS, min(2 * clock.ROUNDS, len(calls)))):
        start = time.perf_counter()
        calls[turn % len(calls)]()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second, of a copy or of reading only, and operations a second of torch's largest products, at best.

    Memory is a gibibyte, more than caches hold, such as the hundreds of megabytes that a server's cores share. Products
    are of 8192 x 8192 on GPUs and 2048 x 2048 on CPUs, in bfloat16, and in fp8 or int8.
    """

    def best(calls: list[Call]) -> float:
        return min(times_of(calls, device))

    gpu = device.type == "cuda"
    size = 8192 if gpu else 2048
    source = torch.randint(1 << 30, (1 << 28,), dtype=torch.int32, device=device)
    half, other = source.chunk(2)
    copy = source.nbytes / best([lambda: other.copy_(half)] * 4)
    read = source.nbytes / best([source.amax] * 4)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones((), device=device)
    kind = torch.float8_e4m3fn if gpu else torch.int8
    left8, right8 = (t.to(kind) for t in (left, right))

    def eight() -> Tensor:
        if gpu:
            return torch._scaled_mm(left8, right8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return torch._int_mm(left8, right8.t())

    operations = 2e6 * size**3
    return {
        "memory": 1e6 * max(copy, read),
        "16-bit": operations / best([lambda: torch.mm(left, right.t())] * 8),
        "8-bit": operations / best([eight] * 8),
    }


def versions(device: torch.device) -> dict[str, object]:
    """Of what decides times."""
    found: dict[str, object] = {"torch": torch.__version__}
    if device.type == "cuda":
        return found | {
            "triton": importlib.metadata.version("triton"),
            "gpu": torch.cuda.get_device_name(device),
        }
    return found | {"threads": torch.get_num_threads()}


def results(device: torch.device, rows: list[Row], rates: dict[str, float]) -> dict[str, object]:
    """What a file of results holds."""
    return {
        "machine": machine_name(device),
        "date": datetime.date.today().isoformat(),
        "versions": versions(device),
        "ceilings": rates,
        "rows": rows,
    }


def write_results(folder: Path, bench: str, device: torch.device, rows: list[Row], rates: dict[str, float]) -> Path:
    """Write `<folder>/<machine>.<bench>.json`, into a folder that is made if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine_name(device)}.{bench}.json"
    path.write_text(json.dumps(results(device, rows, rates), indent=1) + "\n")
    return path
