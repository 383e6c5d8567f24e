"""Time of attention from one token over a KV cache: quantized caches against torch's own attention over bfloat16.

    python benchmarks/attention.py [--device cpu] [--out FOLDER]

Writes `benchmarks/results/<machine>.attention.json`. Heads are those of Llama-3-8B: 32 of queries, 8 of keys, of size
128; on CPUs also those of SmolLM2: 9, 3, of size 64. On GPUs times are taken as in linear.py: CUDA graphs over several
copies of the cache, so that it comes from memory; medians. torch's attention is cuDNN's, or FlashAttention where cuDNN
refuses. `floor_us` is reading the cache once, at the rate under `ceilings`. On CPUs all kinds take turns over several
copies of their caches, and the fastest call of each counts, with one thread in time of the processor; torch's attention
shares heads (`enable_gqa`), or gets them repeated, as models of transformers do, and the quantized caches are also read
by plain torch, as without a compiler. `error` is |y - y'| / |y'| (Frobenius) of the first sequence, where y' is the
float64 attention over what the cache stands for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompile.caches import KVCache
from qcompile.evaluate.timing import ceilings, copies, microseconds, write_results
from qcompile.kv_cache import AttentionSpec, dequantize
from qcompile.runtime import attention_cpu

DEVICE = torch.device("cuda")
RESULTS = Path(__file__).parent / "results"
HEADS, GROUP, SIZE = 8, 4, 128
CONTEXTS = [(1, 256), (16, 256), (1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 16384), (64, 4096), (64, 16384)]
CACHES = ["fp8_e4m3", "fp8_e5m2", "int8", "int4"]
SCALES = {"fp8_e4m3": "tensor", "fp8_e5m2": "tensor", "int8": "token", "int4": "token"}
CPU = torch.device("cpu")
CPU_SHAPES = [(8, 4, 128, 1024), (8, 4, 128, 4096), (8, 4, 128, 16384), (3, 3, 64, 512), (3, 3, 64, 2048)]
"""Heads of keys, query heads for each, size, context."""
ROUNDS, SECONDS = 60, 4.0


def error(y: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Of the first sequence."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query[:1].double(), key.double(), value.double(), enable_gqa=True)
    return round(((y[:1].double() - expected).norm() / expected.norm()).item(), 5)


def measure(batch: int, context: int, rate: float) -> Iterator[dict[str, object]]:
    """The rows of one batch and context."""
    shape = (batch, HEADS, context, SIZE)
    query = torch.randn(batch, HEADS * GROUP, 1, SIZE, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def row(impl: str, kv: str, us: float, wrong: float, nbytes: int) -> dict[str, object]:
        return {
            "bench": "attention",
            "impl": impl,
            "kv": kv,
            "batch": batch,
            "context": context,
            "us": round(us, 2),
            "error": wrong,
            "floor_us": round(1e6 * nbytes / rate, 2),
        }

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        plain = [
            partial(F.scaled_dot_product_attention, query, *t, enable_gqa=True) for t in copies(DEVICE, key, value)
        ]
        yield row(
            "SDPA",
            "bfloat16",
            microseconds(plain, DEVICE),
            error(plain[0](), query, key[:1], value[:1]),
            2 * key.nbytes,
        )
    del plain
    shared = torch.ops.qcompile.attention_plain
    ours = [partial(shared, query, *t, None, None, SIZE**-0.5) for t in copies(DEVICE, key, value)]
    wrong = error(ours[0](), query, key[:1], value[:1])
    yield row("qcompile", "bfloat16", microseconds(ours, DEVICE), wrong, 2 * key.nbytes)
    del ours
    for name in CACHES:
        cache = filled(name, key, value)
        tensors, spec = tensors_of(cache)
        attention = torch.ops.qcompile.attention
        calls = [partial(attention, query, list(t), None, None, spec.encode()) for t in copies(DEVICE, *tensors)]
        wrong = error(calls[0](), query, *restored(cache))
        yield row("qcompile", name, microseconds(calls, DEVICE), wrong, sum(t.nbytes for t in tensors))


def filled(name: str, key: Tensor, value: Tensor) -> KVCache:
    """A cache of keys and values [B, H, T, D]."""
    batch, heads, context, size = key.shape
    cache = KVCache(batch, heads, context, size, {"format": name, "scales": SCALES[name]}, device=key.device)
    for first in range(0, context, 4096):
        positions = torch.arange(first, min(first + 4096, context), device=key.device)
        ops, part = torch.ops.qcompile, slice(first, first + 4096)
        ops.store_kv(cache.key_codes, cache.key_scale, key[:, :, part], positions, cache.key_spec.encode())
        ops.store_kv(cache.value_codes, cache.value_scale, value[:, :, part], positions, cache.value_spec.encode())
    return cache


def tensors_of(cache: KVCache) -> tuple[list[Tensor], AttentionSpec]:
    """What attention over a cache takes."""
    spec = AttentionSpec(key=cache.key_spec, value=cache.value_spec, scale=cache.key_spec.head_dim**-0.5)
    return [cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale], spec


def restored(cache: KVCache) -> list[Tensor]:
    """Keys and values that the codes of the first sequence stand for."""
    tensors, spec = tensors_of(cache)
    return [
        dequantize(codes[:1], scale[:1] if scale.dim() == 3 else scale, spec.scheme, spec.key.head_dim)
        for codes, scale in (tensors[:2], tensors[2:])
    ]


def measure_on_cpu(heads: int, group: int, size: int, context: int) -> Iterator[dict[str, object]]:
    """The rows of one shape."""
    query = torch.randn(1, heads * group, 1, size, dtype=torch.bfloat16)
    key, value = (torch.randn(1, heads, context, size, dtype=torch.bfloat16) for _ in range(2))
    sdpa, plain = F.scaled_dot_product_attention, torch.ops.qcompile.attention_plain

    def repeated(key: Tensor, value: Tensor) -> Tensor:
        shape, whole = (1, heads, group, context, size), (1, heads * group, context, size)
        return sdpa(query, *(t[:, :, None].expand(shape).reshape(whole) for t in (key, value)))

    kinds: dict[tuple[str, str], tuple[list[Callable[[], Tensor]], list[Tensor]]] = {}
    places = copies(CPU, key, value)
    for impl, attend in (
        ("SDPA", partial(sdpa, query, enable_gqa=True)),
        ("SDPA, heads repeated", repeated),
        ("qcompile", lambda k, v: plain(query, k, v, None, None, size**-0.5)),
    ):
        kinds[impl, "bfloat16"] = ([partial(attend, *t) for t in places], [key, value])
    for name in CACHES:
        cache = filled(name, key, value)
        tensors, spec = tensors_of(cache)
        wanted, text = restored(cache), spec.encode()
        ours, stretches = torch.ops.qcompile.attention, attention_cpu.in_stretches
        places = copies(CPU, *tensors)
        kinds["qcompile", name] = ([partial(ours, query, list(t), None, None, text) for t in places], wanted)
        without = [partial(stretches, query, list(t), None, None, spec) for t in places]
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


def main() -> None:
    """Measure, write the results and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    rates = ceilings(device)
    if device == CPU:
        rows = [row for shape in CPU_SHAPES for row in measure_on_cpu(*shape)]
    else:
        rows = [row for batch, context in CONTEXTS for row in measure(batch, context, rates["memory"])]
    write_results(options.out, "attention", device, rows, rates)
    for row in rows:
        fields = (f"{row[key]!s:>22}" for key in ("batch", "context", "impl", "kv", "us", "error"))
        share = f"{float(str(row['floor_us'])) / float(str(row['us'])):>6.0%} of floor" if "floor_us" in row else ""
        print(*fields, share)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
