"""Time of attention from one token over a KV cache on a GPU: quantized caches against torch's own over bfloat16.

    python benchmarks/attention.py [--out FOLDER]

Writes `benchmarks/results/<machine>.attention.json`. Heads are those of Llama-3-8B: 32 of queries, 8 of keys, of size
128. Times are taken as in linear.py: CUDA graphs over several copies of the cache, so that it comes from memory;
medians. torch's attention is cuDNN's, or FlashAttention where cuDNN refuses. `error` is |y - y'| / |y'| (Frobenius) of
the first sequence, where y' is the float64 attention over what the cache stands for. `floor_us` is reading the cache
once, at the rate under `ceilings`. Paged caches have randomly permuted pages; "unequal" is as many tokens in all, half
of them in one sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcompile.caches import KVCache
from qcompile.evaluate.timing import ceilings, copies, microseconds, write_results
from qcompile.kv_cache import AttentionSpec, dequantize, gather_pages

DEVICE = torch.device("cuda")
RESULTS = Path(__file__).parent / "results"
HEADS, GROUP, SIZE = 8, 4, 128
CONTEXTS = [(1, 256), (16, 256), (1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 16384), (64, 4096), (64, 16384)]
CACHES = ["fp8_e4m3", "fp8_e5m2", "int8", "int4"]
PAGE = 64
SCALES = {"fp8_e4m3": "tensor", "fp8_e5m2": "tensor", "int8": "token", "int4": "token"}


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
        cache = KVCache(batch, HEADS, context, SIZE, {"format": name, "scales": SCALES[name]}, device="cuda")
        for first in range(0, context, 4096):
            positions = torch.arange(first, min(first + 4096, context), device="cuda")
            ops, part = torch.ops.qcompile, slice(first, first + 4096)
            ops.store_kv(cache.key_codes, cache.key_scale, key[:, :, part], positions, cache.key_spec.encode())
            ops.store_kv(cache.value_codes, cache.value_scale, value[:, :, part], positions, cache.value_spec.encode())
        spec = AttentionSpec(key=cache.key_spec, value=cache.value_spec, scale=SIZE**-0.5).encode()
        tensors = [cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale]
        restored = [
            dequantize(codes[:1], scale[:1] if scale.dim() == 3 else scale, cache.key_spec.scheme, SIZE)
            for codes, scale in (tensors[:2], tensors[2:])
        ]
        attention = torch.ops.qcompile.attention
        calls = [partial(attention, query, list(t), None, None, spec) for t in copies(DEVICE, *tensors)]
        wrong = error(calls[0](), query, *restored)
        yield row("qcompile", name, microseconds(calls, DEVICE), wrong, sum(t.nbytes for t in tensors))
        del calls
        pages = [in_pages(t) for t in tensors]
        kinds = {f"qcompile, pages of {PAGE}": [context] * batch}
        if batch > 1:
            kinds |= {f"qcompile, pages of {PAGE}, unequal": unequal(batch, context)}
        for impl, lengths in kinds.items():
            table, ends = table_of(lengths), torch.tensor(lengths, device="cuda")
            restored = [
                dequantize(
                    gather_pages(codes, table[:1])[:, :, : lengths[0]],
                    gather_pages(scale, table[:1])[:, :, : lengths[0]] if scale.dim() > 2 else scale,
                    cache.key_spec.scheme,
                    SIZE,
                )
                for codes, scale in (pages[:2], pages[2:])
            ]
            calls = [
                partial(attention, query, list(t), None, ends, spec, block_table=table) for t in copies(DEVICE, *pages)
            ]
            wrong = error(calls[0](), query, *restored)
            yield row(impl, name, microseconds(calls, DEVICE), wrong, sum(t.nbytes for t in pages))
            del calls


def in_pages(tensor: Tensor) -> Tensor:
    """Codes or scales of a cache, cut into pages; static scales as they are."""
    return tensor.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1).contiguous() if tensor.dim() > 2 else tensor


def unequal(batch: int, context: int) -> list[int]:
    """Lengths of whole pages that are batch * context together, of which the last has half."""
    others = batch * context // 2 // (batch - 1) // PAGE * PAGE
    return [*[others] * (batch - 1), batch * context - (batch - 1) * others]


def table_of(lengths: list[int]) -> Tensor:
    """A block table that gives all pages to sequences, at random."""
    counts = [length // PAGE for length in lengths]
    pages = torch.randperm(sum(counts), device="cuda").to(torch.int32).split(counts)
    return torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)


def main() -> None:
    """Measure, write the results and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rates = ceilings(DEVICE)
    rows = [row for batch, context in CONTEXTS for row in measure(batch, context, rates["memory"])]
    write_results(out, "attention", DEVICE, rows, rates)
    for row in rows:
        share = float(str(row["floor_us"])) / float(str(row["us"]))
        fields = (f"{row[key]!s:>10}" for key in ("batch", "context", "impl", "kv", "us", "error"))
        print(*fields, f"{share:>6.0%} of floor")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
