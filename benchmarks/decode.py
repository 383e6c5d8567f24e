"""Greedy decoding and prefill of a Llama-3-8B-shaped model of random weights, end to end.

    python benchmarks/decode.py [--only bf16,int4,fp8] [--batch 1,16] [--layers 32] [--modes graph,reduce-overhead]
    python benchmarks/decode.py --batch "" --prefill 2048      prompts alone; `--prefill 0` leaves them out
    python benchmarks/decode.py --toy        a model of two small layers on the CPU, to see that the script works

Every implementation is measured in a process of its own (`decode_worker.py`), with a time limit and empty compiler
caches, and each row goes into `<out>/<machine>.decode.json` as soon as it is there; other rows stay, so that several
runs may share the work. Names of implementations:

    bf16                                      the model as it is, compiled by Inductor
    int4, int8, fp8, int4_fp8, ...            ours, any preset: `quantize_`, then `backend="qcompile"`
    torchao-int4, torchao-int8, torchao-fp8   torchao's tile-packed int4; int8 weights; fp8 rows of both operands

Linears of the layers are quantized, the output head only with `--head`. The cache is transformers' `StaticCache`; with
`--kv` ours decode with a quantized one. The prompt is read eagerly, as `generate` does. Modes of decoding:

    graph             compiled, then a step with its argmax captured by hand as one CUDA graph: what the GPU needs
    reduce-overhead   `torch.compile(mode="reduce-overhead")` in a Python loop: what a user gets
    default           `torch.compile` in a Python loop

`step_us` is the mean over the tokens. A row says `lengths`, prompt + tokens, where they are not 128 + 128; of a prompt
the first 2,048 tokens are read, and keys and values of the rest drawn. `ms` is the median of reading a prompt of
`--prefill` tokens, compiled, into an empty cache, up to its last logits. `compile_s` are the seconds of the first call
of what `torch.compile` returns; with `--warm` a second process, which finds the caches of the first, compiles the first
batch and mode again: `warm_compile_s`. `error` is |y - y'| / |y'| (Frobenius) between compiled logits and those of the
same modules run eagerly on the same tokens, and `same` the share of equal argmaxes; a row of ours whose error exceeds
`logits_bound` is not kept. `peak_gb` counts from the built model on; `build_gb` is the peak of building it. `kernels`
lists what the GPU ran in one step, or for one prompt, by time; `linear_us` sums those that multiply by weights.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.evaluate import timing

OURS = "qcompile"
JOBS = ["bf16", "int4", "fp8", "int8", "int4_fp8", "int4_int8", "torchao-int4", "torchao-fp8", "torchao-int8"]
MODES = ["graph", "reduce-overhead"]
USUAL = "128+128"
"""Tokens of the prompt, and decoded, that rows are of unless they say others."""
WORKER = Path(__file__).with_name("decode_worker.py")

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """An implementation by its name on the command line."""

    name: str

    @property
    def impl(self) -> str:
        return {"bf16": "inductor", "torchao": "torchao"}.get(self.name.partition("-")[0], OURS)

    @property
    def scheme(self) -> str:
        return {"bf16": "bfloat16"}.get(self.name, self.name.removeprefix("torchao-"))


class Turns:
    """Building and compiling of several processes may overlap; a measurement has the device to itself."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fcntl.flock(self.file, how)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def building(self) -> contextlib.AbstractContextManager[None]:
        return self._locked(fcntl.LOCK_SH)

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        return self._locked(fcntl.LOCK_EX)


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is about: a new one takes the place of an old one with the same key."""
    names = ("bench", "impl", "scheme", "batch", "mode", "tokens", "layers", "head", "kv", "inductor", "lengths")
    return tuple(row.get(name) for name in names)


def store(out: Path, row: Row, device: torch.device, lock: Path) -> None:
    """Put a row into the results file, which several processes write to, one at a time as `lock` says.

    Fields of the old row that a row with `warm_compile_s` lacks are kept.
    """
    name = f"{timing.machine_name(device)}.decode.json"
    committed = Path(__file__).parent / "results" / name
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        path = out / name
        source = path if path.exists() else committed
        rows = json.loads(source.read_text())["rows"] if source.exists() else []
        old = next((r for r in rows if key_of(r) == key_of(row)), {}) if "warm_compile_s" in row else {}
        rows = [r for r in rows if key_of(r) != key_of(row)] + [old | row]
        result = {
            "machine": timing.machine_name(device),
            "date": datetime.date.today().isoformat(),
            "versions": timing.versions(device),
            "rows": sorted(rows, key=lambda r: [str(part) for part in key_of(r)]),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")


def spawn(job: Job, arguments: list[str], folder: Path, timeout: float) -> str | None:
    """Run a worker; what went wrong, or None."""
    command = [sys.executable, str(WORKER), *arguments, "--worker", job.name, "--turns", str(folder / "turns")]
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / job.name / "inductor"),
        "TRITON_CACHE_DIR": str(folder / job.name / "triton"),
        "QCOMPILE_CACHE_DIR": str(folder / job.name / "qcompile"),
    }
    process = subprocess.Popen(command, env=os.environ | caches, start_new_session=True)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"{job.name}: not done after {timeout:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the compiler's own processes
        process.wait()
    return None if code == 0 else f"{job.name}: exit status {code}"


def parse(arguments: list[str]) -> argparse.Namespace:
    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=listed(str), default=JOBS, help="implementations, separated by commas")
    parser.add_argument("--batch", type=listed(int), default=[1, 16])
    parser.add_argument("--modes", type=listed(str), help="graph, reduce-overhead, default")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, help="to decode; 128")
    parser.add_argument("--prefill", type=int, help="tokens of the prompt that is measured; 2048, and 0 for none")
    parser.add_argument("--head", help="ours: a scheme for the output head")
    parser.add_argument("--kv", help="ours: a format for the cache, such as fp8")
    parser.add_argument("--inductor", type=listed(str), default=[], help="options to switch on, such as combo_kernels")
    parser.add_argument("--warm", action="store_true", help="also compile in a second process, from the caches")
    parser.add_argument("--jobs", type=int, default=1, help="processes that build and compile at the same time")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one implementation")
    parser.add_argument("--out", type=Path, help="folder of the results file; benchmarks/results")
    parser.add_argument("--toy", action="store_true", help="a small model on the CPU; results go to a new folder")
    for hidden in ("--worker", "--turns"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    toy = options.toy
    options.modes = options.modes or (["default"] if toy else MODES)
    options.layers = options.layers or (2 if toy else 32)
    options.tokens = options.tokens or (8 if toy else 128)
    if options.prefill is None:
        options.prefill = 64 if toy else 2048
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="decode-")) if toy else Path(__file__).parent / "results"
    return options


def main(arguments: list[str]) -> int:
    """The number of implementations that failed."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    passed = [*arguments, "--out", str(options.out)]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:

        def measure(name: str) -> str | None:
            begun = time.monotonic()
            failure = spawn(Job(name), passed, Path(scratch), options.timeout)
            if failure is None and options.warm:
                failure = spawn(Job(name), [*passed, "--compile-only"], Path(scratch), options.timeout)
            print(f"{name}: {time.monotonic() - begun:.0f} s in all", flush=True)
            return failure

        failures = [failure for failure in pool.map(measure, options.only) if failure]
    print("\n".join(failures) if failures else f"all rows are in {options.out}", flush=True)
    return len(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
