"""Time of attention over a KV cache on a CPU: quantized caches, and torch's own over bfloat16.

    python benchmarks/attention_cpu.py [--out FOLDER]

Writes `benchmarks/results/<machine>.attention.json`. Heads are those of Llama-3-8B: 32 of queries, 8 of keys, of size
128, and those of SmolLM2: 9, 3, of size 64. "paged" caches lie in pages of 64 tokens, shuffled. All kinds take turns
over several copies of their caches, and the fastest call of each counts, with one thread in time of the processor.
torch's attention shares heads (`enable_gqa`), or gets them repeated, as models of transformers do; the quantized caches
are also read by plain torch, as without a compiler. `error` is that of attention.py.

Rows with `queries` are of prompts, or of their last tokens, causal: torch takes `is_causal` for whole prompts and else
a mask, and keys and values of bfloat16 that were repeated beforehand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import RESULTS, error, filled
from torch import Tensor

from qcompile.attention import causal_mask
from qcompile.caches import KVCache
from qcompile.evaluate.timing import ceilings, copies, write_results
from qcompile.kv_cache import AttentionSpec, dequantize
from qcompile.runtime import attention_cpu

CPU = torch.device("cpu")
SHAPES = [(8, 4, 128, 1024), (8, 4, 128, 4096), (8, 4, 128, 16384), (3, 3, 64, 512), (3, 3, 64, 2048)]
"""Heads of keys, query heads for each, size, context."""
PROMPTS = [(8, 4, 128, 512, 512), (8, 4, 128, 512, 4096), (8, 4, 128, 2048, 2048), (3, 3, 64, 512, 512)]
"""Heads of keys, query heads for each, size, queries, context."""
CACHES = ["fp8_e4m3", "fp8_e5m2", "int8", "int4"]
PAGED = ["bfloat16", "fp8_e4m3", "int8", "int4"]
GROUPED = {"int4, groups of 32, offsets": {"format": "int4", "group": 32, "symmetric": False}}
PAGE = 64
ROUNDS, SECONDS = 60, 4.0


def tensors_of(cache: KVCache) -> tuple[list[Tensor], AttentionSpec]:
    """What attention over a cache takes."""
    spec = AttentionSpec(key=cache.key_spec, value=cache.value_spec, scale=cache.key_spec.head_dim**-0.5)
    return [cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale], spec


def in_pages(tensors: list[Tensor], order: Tensor) -> list[Tensor]:
    """A cache's tensors cut into pages, of which the i-th of a sequence is page `order[i]`; page 0 is none's."""
    found = []
    for t in tensors:
        if t.dim() > 2:
            pages = t.new_zeros((len(order) + 1, t.shape[1], PAGE, *t.shape[3:]))
            pages[order] = t.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)
            t = pages
        found.append(t)
    return found


def measure(heads: int, group: int, size: int, context: int) -> Iterator[dict[str, object]]:
    """The rows of one shape."""
    query = torch.randn(1, heads * group, 1, size, dtype=torch.bfloat16)
    key, value = (torch.randn(1, heads, context, size, dtype=torch.bfloat16) for _ in range(2))
    sdpa, plain = F.scaled_dot_product_attention, torch.ops.qcompile.attention_plain

    def repeated(key: Tensor, value: Tensor) -> Tensor:
        shape, whole = (1, heads, group, context, size), (1, heads * group, context, size)
        return sdpa(query, *(t[:, :, None].expand(shape).reshape(whole) for t in (key, value)))

    kinds: dict[tuple[str, str], tuple[list[Callable[[], Tensor]], list[Tensor]]] = {}
    for impl, attend in (
        ("SDPA", partial(sdpa, query, enable_gqa=True)),
        ("SDPA, heads repeated", repeated),
        ("qcompile", lambda k, v: plain(query, k, v, None, None, size**-0.5)),
    ):
        # Copies of its own, or one would find in caches what the other has just read.
        kinds[impl, "bfloat16"] = ([partial(attend, *t) for t in copies(CPU, key, value)], [key, value])
    order, length = 1 + torch.randperm(context // PAGE), torch.tensor([context])
    for name in PAGED:
        tensors, spec = tensors_of(filled(name, key, value))
        wanted = [dequantize(codes, scale, spec.scheme, size) for codes, scale in (tensors[:2], tensors[2:])]
        ours, table, text = torch.ops.qcompile.attention, order[None].to(torch.int32), spec.encode()
        places = copies(CPU, *in_pages(tensors, order))
        calls = [partial(ours, query, list(t), None, length, text, block_table=table) for t in places]
        kinds["qcompile, paged", name] = (calls, wanted)
    for name in [*CACHES, *GROUPED]:
        tensors, spec = tensors_of(filled(GROUPED.get(name, name), key, value))
        wanted = [dequantize(codes, scale, spec.scheme, size) for codes, scale in (tensors[:2], tensors[2:])]
        ours, stretches, text = torch.ops.qcompile.attention, attention_cpu.in_stretches, spec.encode()
        places = copies(CPU, *tensors)
        kinds["qcompile", name] = ([partial(ours, query, list(t), None, None, text) for t in places], wanted)
        without = [partial(stretches, query, list(t), None, spec) for t in places]
        kinds["qcompile, no compiler", name] = (without, wanted)
    errors = {kind: error(calls[0](), query, *wanted) for kind, (calls, wanted) in kinds.items()}
    best = dict.fromkeys(kinds, float("inf"))
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    # What writes many times the cache's size, and slows down what comes after it, takes turns by itself.
    apart = [kind for kind in kinds if kind[0] in ("SDPA, heads repeated", "qcompile, no compiler")]
    for together in ([kind for kind in kinds if kind not in apart], apart):
        end = time.perf_counter() + SECONDS
        for turn in range(ROUNDS):
            for kind in together:
                calls, _ = kinds[kind]
                start = clock()
                calls[turn % len(calls)]()
                best[kind] = min(best[kind], 1e6 * (clock() - start))
            if time.perf_counter() > end:
                break
    for (impl, kv), us in best.items():
        about = {"bench": "attention", "impl": impl, "kv": kv, "batch": 1, "context": context, "us": round(us, 2)}
        yield about | {"error": errors[impl, kv], "shape": [heads * group, heads, size]}


def prompt(heads: int, group: int, size: int, queries: int, context: int) -> Iterator[dict[str, object]]:
    """The rows of many queries at the end of a context."""
    query = torch.randn(1, heads * group, queries, size, dtype=torch.bfloat16)
    key, value = (torch.randn(1, heads, context, size, dtype=torch.bfloat16) for _ in range(2))
    repeated = [t.repeat_interleave(group, 1) for t in (key, value)]
    seen = causal_mask(queries, 0, context, context, 0, CPU)
    how = {"is_causal": True} if queries == context else {"attn_mask": seen}
    plain = torch.ops.qcompile.attention_plain
    kinds: dict[tuple[str, str], tuple[Callable[[], Tensor], list[Tensor]]] = {
        ("SDPA", "bfloat16"): (partial(F.scaled_dot_product_attention, query, *repeated, **how), [key, value]),
        ("qcompile", "bfloat16"): (
            partial(plain, query, key, value, None, None, size**-0.5, True),
            [key, value],
        ),
    }
    for name in CACHES:
        tensors, spec = tensors_of(filled(name, key, value))
        text = replace(spec, causal=True).encode()
        wanted = [dequantize(codes, scale, spec.scheme, size) for codes, scale in (tensors[:2], tensors[2:])]
        kinds["qcompile", name] = (
            partial(torch.ops.qcompile.attention, query, tensors, None, None, text),
            wanted,
        )
    best = dict.fromkeys(kinds, float("inf"))
    end = time.perf_counter() + SECONDS
    for turn in range(ROUNDS):
        for kind, (call, _) in kinds.items():
            start = time.perf_counter()
            call()
            best[kind] = min(best[kind], 1e6 * (time.perf_counter() - start))
        if turn and time.perf_counter() > end:
            break
    for (impl, kv), (call, wanted) in kinds.items():
        keys, values = (t.double().repeat_interleave(group, 1) for t in wanted)
        expected = F.scaled_dot_product_attention(query.double(), keys, values, attn_mask=seen)
        wrong = round(((call().double() - expected).norm() / expected.norm()).item(), 5)
        about = {"bench": "attention", "impl": impl, "kv": kv, "batch": 1, "queries": queries, "context": context}
        yield about | {"us": round(best[impl, kv], 2), "error": wrong, "shape": [heads * group, heads, size]}


def main() -> None:
    """Measure, write the results and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for shape in SHAPES for row in measure(*shape)]
    rows += [row for shape in PROMPTS for row in prompt(*shape)]
    write_results(options.out, "attention", CPU, rows, ceilings(CPU))
    for row in rows:
        print(
            *(f"{row[key]!s:>22}" for key in ("shape", "queries", "context", "impl", "kv", "us", "error") if key in row)
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
