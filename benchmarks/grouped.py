"""Time of products with stacks of experts on a GPU against torch's own kernels, on weights that come from memory.

    python benchmarks/grouped.py [--models mixtral,gpt-oss] [--schemes int4,fp8,mxfp4] [--tokens 1,16,64,256,1024]
    python benchmarks/grouped.py --gate

Rows go into `benchmarks/results/<machine>.grouped.json` and take the place of those of the same model, shape, scheme
and tokens. The shapes are the two products of a layer's experts, gate and up merged, and down; every token chooses its
experts at random, and rows are sorted by expert. A time is the median over replays of a CUDA graph whose calls take
turns with copies of the weights. `error` is |y - y'| / |y'| (Frobenius), where y' is the float64 product of the very
numbers that a kernel multiplies. The limit is the longer of moving once the weights of the experts that are chosen, the
rows and the products, and of multiplying, at the rates of `timing.ceilings`. Peers:

    _grouped_mm          torch's product of bfloat16 rows and stacks
    mm                   a `torch.mm` for each expert that is chosen, which the host knows here, and `torch.cat`
    _scaled_grouped_mm   torch's product of fp8 rows and stacks, and their scales; quantizing is part of the time

With --gate it times the first product alone, with the model's gate behind it: in the product's kernel, and in a kernel
of Inductor's after it. Rows go into `<machine>.grouped_gate.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qcompile import compat, gates
from qcompile.evaluate.linear import LIMIT, OURS, Candidate, quantize_by_inductor
from qcompile.evaluate.timing import Call, Row, ceilings, copies, machine_name, microseconds, write_results
from qcompile.layouts import LAYOUTS, to_layout
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.reference import dequantize_activation
from qcompile.runtime import gpu_grouped, measure
from qcompile.scheme import Scheme
from qcompile.stacks import expert

TOKENS = "1,16,64,256,1024"
SCHEMES = "int4,fp8,fp8_block,int8,mxfp4"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Model:
    """A mixture: `chosen` of `experts` for each token, and (N, K) of an expert's products."""

    chosen: int
    experts: int
    shapes: tuple[tuple[int, int], ...]
    gate: str = "silu(a)*b"


GPT_OSS = "pairs (min(max(b,-7.0),7.0)+1.0)*(min(a,7.0)*sigmoid(min(a,7.0)*1.702))"
MODELS = {
    "mixtral": Model(2, 8, ((28672, 4096), (4096, 14336))),
    "gpt-oss": Model(4, 32, ((5760, 2880), (2880, 2880)), GPT_OSS),
    "qwen3": Model(8, 128, ((1536, 2048), (2048, 768))),
    "toy": Model(2, 4, ((128, 256),)),
}


def key_of(row: Row) -> tuple[object, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("model", "scheme", "impl", "N", "K", "M"))


def plain(x: Tensor, stack: Tensor, offsets: Tensor, ids: Tensor) -> Iterator[Candidate]:
    """torch's kernels for bfloat16 weights [experts, N, K]."""
    expected = torch.empty(len(x), stack.shape[1], dtype=torch.float64, device=x.device)
    for index in ids.unique().tolist():
        expected[ids == index] = x[ids == index].double() @ stack[index].double().t()
    weights = copies(x.device, stack)
    if x.device.type == "cuda":
        calls: list[Call] = [
            lambda w=w: torch._grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])  # type: ignore[misc]
            for (w,) in weights
        ]
        yield Candidate("_grouped_mm", "bfloat16", calls, expected)
    ends = offsets.tolist()
    parts = [(index, slice(*ends[index : index + 2])) for index in ids.unique().tolist()]

    def loop(weight: Tensor) -> Tensor:
        return torch.cat([torch.mm(x[rows], weight[index].t()) for index, rows in parts])

    calls = [lambda w=w: loop(w) for (w,) in weights]  # type: ignore[misc]
    yield Candidate("mm", "bfloat16", calls, expected)


@dataclass(frozen=True)
class Stack:
    """The experts of a layer, and copies of their tensors in the layout of our kernel."""

    name: str
    job: measure.Job
    packed: PackedWeight
    cold: list[tuple[Tensor, ...]]


def random_stack(name: str, n: int, k: int, experts: int, device: torch.device) -> Stack:
    """A stack of random weights, quantized by a preset."""
    given = measure.job(name, PRESETS[name], (n, k), 16, torch.bfloat16, experts)
    packed = measure.random_stack(given, str(device))
    return Stack(name, given, packed, copies(device, *to_layout(packed, LAYOUTS[given.spec.layout]).tensors))


def quantized(stack: Stack, x: Tensor, offsets: Tensor, ids: Tensor, step: str = "") -> Iterator[Candidate]:
    """Ours, with a gate in the product if a step says so, and torch's of the same scheme."""
    name, given, packed = stack.name, stack.job, stack.packed
    spec = given.spec.with_epilogue(step) if step else given.spec
    activation, inputs = given.spec.scheme.activation, x
    if activation is not None:
        inputs = dequantize_activation(*quantize_by_inductor(x, activation), activation)
    expected = measure.grouped_product(inputs, ids, packed, given.spec.out_features)

    def call(weight: tuple[Tensor, ...]) -> Tensor:
        rows, x_scale = (x, None) if activation is None else quantize_by_inductor(x, activation)
        return gpu_grouped.grouped_gemm(rows, x_scale, offsets, list(weight), None, spec, torch.bfloat16)

    calls: list[Call] = [lambda w=w: call(w) for w in stack.cold]  # type: ignore[misc]
    yield Candidate(OURS, name, calls, expected)
    if name == "fp8" and x.device.type == "cuda":
        assert activation is not None
        of_experts = [expert(packed, index, given.spec.out_features) for index in range(given.experts)]
        codes = torch.stack([LAYOUTS["rows8"].pack(each).codes for each in of_experts])
        scale = torch.stack([each.scale.reshape(-1) for each in of_experts])
        for fast in (False, True):

            def theirs(codes: Tensor, scale: Tensor, fast: bool = fast) -> Tensor:
                rows, x_scale = quantize_by_inductor(x, activation)
                return torch._scaled_grouped_mm(
                    rows,
                    codes.transpose(1, 2),
                    x_scale.reshape(-1),
                    scale,
                    offs=offsets[1:],
                    out_dtype=torch.bfloat16,
                    use_fast_accum=fast,
                )

            calls = [lambda w=w: theirs(*w) for w in copies(x.device, codes, scale)]  # type: ignore[misc]
            yield Candidate("_scaled_grouped_mm" + ", fast accumulation" * fast, name, calls, expected)


@torch.compile(dynamic=False)
def gated(step: str, y: Tensor) -> Tensor:
    """The gate of a product in 16 bits, computed in float32."""
    return gates.gate(step, *gates.columns(step, y.float())).to(y.dtype)


def gate_candidates(step: str, stack: Stack, x: Tensor, offsets: Tensor, ids: Tensor) -> Iterator[Candidate]:
    """Ours with the gate in the product, and after it, for rows whose products are about 1, where gates bend."""
    x = x / measure.grouped_product(x, ids, stack.packed, stack.job.spec.out_features).std().to(x.dtype)
    within, apart = (next(quantized(stack, x, offsets, ids, each)) for each in (step, ""))
    expected = gates.gate(step, *gates.columns(step, apart.expected))
    yield replace(within, impl=f"{OURS}, gate in the product", expected=expected)
    calls: list[Call] = [lambda call=call: gated(step, call()) for call in apart.calls]  # type: ignore[misc]
    yield replace(apart, impl=f"{OURS}, gate apart", calls=calls, expected=expected)


def floor(
    scheme: Scheme | None, stack_bytes: int, experts: int, n: int, k: int, ids: Tensor, rates: dict[str, float]
) -> float:
    """Microseconds that no kernel stays below."""
    rows = len(ids)
    moved = stack_bytes * len(ids.unique()) / experts + 2 * rows * (n + k)
    rate = rates["8-bit" if scheme is not None and scheme.activation is not None else "16-bit"]
    return 1e6 * max(moved / rates["memory"], 2 * rows * n * k / rate)


def rows_of(
    name: str, schemes: list[str], tokens: list[int], rates: dict[str, float], device: torch.device, gate: bool
) -> Iterator[Row]:
    """One row for each shape, number of tokens and candidate; of the first shape alone with its gate.

    Raises:
        AssertionError: a result of ours is wrong.
    """
    model = MODELS[name]
    routes = {m: measure.routed(m, model.chosen, model.experts, str(device)) for m in tokens}
    for n, k in model.shapes[:1] if gate else model.shapes:
        for scheme in schemes if gate else [None, *schemes]:
            weights: Tensor | Stack
            if scheme is None:
                weights = torch.randn(model.experts, n, k, device=device, dtype=torch.bfloat16)
                size, fitted = weights.nbytes, None
            else:
                weights = random_stack(scheme, n, k, model.experts, device)
                size, fitted = weights.packed.nbytes, weights.job.spec.scheme
            for m in tokens:
                offsets, rows = routes[m], m * model.chosen
                ids = measure.experts_of(offsets, rows)
                x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
                if isinstance(weights, Tensor):
                    found = plain(x, weights, offsets, ids)
                elif gate:
                    found = gate_candidates(model.gate, weights, x, offsets, ids)
                else:
                    found = quantized(weights, x, offsets, ids)
                for candidate in found:
                    try:
                        y, us = candidate.calls[0](), microseconds(candidate.calls, device)
                    except RuntimeError as failure:
                        if candidate.impl.startswith(OURS):
                            raise
                        print(f"{candidate.impl}: {failure}", flush=True)
                        continue
                    error = float((y.double() - candidate.expected).norm() / candidate.expected.norm())
                    wrong = f"{candidate.scheme} {n}x{k} M={m}: error {error:.2g}"
                    assert not candidate.impl.startswith(OURS) or error <= LIMIT, wrong
                    yield {
                        "bench": "grouped_gate" if gate else "grouped",
                        "impl": candidate.impl,
                        "scheme": candidate.scheme,
                        "model": name,
                        "chosen": model.chosen,
                        "experts": model.experts,
                        "N": n,
                        "K": k,
                        "M": m,
                        "us": round(us, 2),
                        "error": float(f"{error:.3g}"),
                        "floor_us": round(floor(fitted, size, model.experts, n, k, ids, rates), 2),
                    }


def main() -> None:
    """Measure, write the results after each shape's rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mixtral,gpt-oss", help=", ".join(MODELS))
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--gate", action="store_true", help="the first product with its gate in it and after it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args()
    torch.manual_seed(0)
    compat.allow_recompilations(256)  # a kernel that quantizes for each number of rows
    device = torch.device("cuda")
    rates = ceilings(device)
    kind = "grouped_gate" if options.gate else "grouped"
    name = f"{machine_name(device)}.{kind}.json"
    path = next((folder / name for folder in (options.out, RESULTS) if (folder / name).exists()), None)
    kept = {key_of(row): row for row in json.loads(path.read_text())["rows"]} if path is not None else {}
    for model in options.models.split(","):
        schemes, tokens = options.schemes.split(","), list(map(int, options.tokens.split(",")))
        for row in rows_of(model, schemes, tokens, rates, device, options.gate):
            kept[key_of(row)] = row
            print(json.dumps(row), flush=True)
            write_results(options.out, kind, device, list(kept.values()), rates)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
