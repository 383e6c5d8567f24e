"""Time of a quantized product on a CPU against torch's bfloat16 one, on weights that are not in the cache.

    python benchmarks/cpu_linear.py [--quick]

Writes `benchmarks/results/<machine>.cpu-linear.json`. Times are medians over rounds in which all candidates take turns;
every call takes the next of several copies of the weight, `COLD_BYTES` of them together at least (large shared caches
may still hold some). Times are eager, one operator call with its activation quantization and scales.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qcompile import ops  # noqa: F401  (registers the operators)
from qcompile.evaluate.timing import machine_name
from qcompile.layouts import choose_layout, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.reference import quantize_weight
from qcompile.runtime.cpu import kernel_name
from qcompile.scheme import PRESETS

SHAPES = [(4096, 4096), (576, 576), (1536, 576), (576, 1536), (49152, 576)]
TOKENS = [1, 4, 32, 512]
SCHEMES = ["int4", "int4_asym", "int3", "nf4", "mxfp4", "nvfp4", "q4_1", "q5_0", "int8_weight_only", "fp8_weight_only"]
SCHEMES += ["int8", "fp8", "int4_int8"]
COLD_BYTES = 96 << 20
MAX_COPIES = 24


def _copies(tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    size = sum(t.nbytes for t in tensors if t is not None)
    count = max(2, min(MAX_COPIES, -(-COLD_BYTES // size)))
    return [tuple(None if t is None else t.clone() for t in tensors) for _ in range(count)]


def _candidates(n: int, k: int) -> dict[tuple[str, str], Callable[[Tensor], Tensor]]:
    """(kernel, scheme) to a function of x; `torch.mm` in bfloat16 comes first."""
    weight = torch.randn(n, k)
    plain = itertools.cycle(_copies((weight.to(torch.bfloat16),)))

    def reference(x: Tensor) -> Tensor:
        (w,) = next(plain)
        assert w is not None
        return torch.mm(x, w.t())

    found: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {("torch.mm bf16", "none"): reference}
    for name in SCHEMES:
        scheme = PRESETS[name].fit(name, (n, k))
        layout = choose_layout(scheme, (n, k), "cpu")
        packed = to_layout(quantize_weight(weight, scheme.weight), layout)
        spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout.name)
        turns = itertools.cycle(_copies(packed.tensors))

        def call(
            x: Tensor, turns: itertools.cycle[tuple[Tensor | None, ...]] = turns, spec: str = spec.encode()
        ) -> Tensor:
            return torch.ops.qcompile.linear(x, list(next(turns)), None, None, None, [], spec)

        found[kernel_name(spec), name] = call
    return found


def measure(
    n: int, k: int, tokens: int, candidates: dict[tuple[str, str], Callable[[Tensor], Tensor]], rounds: int
) -> list[dict[str, object]]:
    """One row a candidate: median microseconds, and the error relative to the bfloat16 product (Frobenius)."""
    x = torch.randn(tokens, k, dtype=torch.bfloat16)
    outputs = {key: run(x).to(torch.float32) for key, run in candidates.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in candidates}
    for _ in range(rounds):
        for key, run in candidates.items():
            start = time.perf_counter()
            run(x)
            times[key].append((time.perf_counter() - start) * 1e6)
    expected = outputs["torch.mm bf16", "none"]
    return [
        {
            "bench": "cpu-linear",
            "impl": impl,
            "scheme": scheme,
            "N": n,
            "K": k,
            "M": tokens,
            "us": round(statistics.median(times[impl, scheme]), 1),
            "error": round(float((outputs[impl, scheme] - expected).norm() / expected.norm()), 5),
        }
        for impl, scheme in candidates
    ]


def main() -> None:
    """Measure every shape and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of one shape, and nothing is written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    rows = []
    for n, k in SHAPES[:1] if quick else SHAPES:
        candidates = _candidates(n, k)
        for tokens in TOKENS:
            rounds = 3 if quick else (7 if tokens * n > 1 << 20 else 15)
            for row in measure(n, k, tokens, candidates, rounds):
                rows.append(row)
                print(
                    f"{n}x{k} M={tokens} {row['scheme']:>16} {row['us']:>10} us  {row['error']}  {row['impl']}",
                    flush=True,
                )
    if quick:
        return
    result = {
        "machine": machine_name(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"{machine_name(torch.device('cpu'))}.cpu-linear.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
