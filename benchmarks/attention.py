"""Time of attention over a KV cache on a GPU: quantized caches against torch's own over bfloat16.

    python benchmarks/attention.py [--out FOLDER] [--only decode|prefill|flex] [--caches "int4;int4, offsets"]

Writes `benchmarks/results/<machine>.attention.json`; a part alone is written only to a folder that is named. Heads are
those of Llama-3-8B: 32 of queries, 8 of keys, of size 128, and for some contexts of 64 and 256 (`shape`: heads of
queries, of keys, size). Times are taken as in linear.py: CUDA graphs over several copies of the cache, so that it comes
from memory; medians. Which attention torch has is its own choice: on an H100 cuDNN's. FlexAttention is compiled by
torch.compile, without a block mask, with which its programs do not share a context, and with one of blocks of 128
tokens that hides nothing. `error` is |y - y'| / |y'| (Frobenius) of the first sequence, where y' is the float64
attention over what the cache stands for. `floor_us` is reading the cache once, at the rate under `ceilings`. Paged
caches have randomly permuted pages; "unequal" is as many tokens in all, half of them in one sequence.

Rows with `queries` are of prompts (as long as the context) and chunks of prompts, causal. There torch attends to keys
and values of 16 bits, with `is_causal` where the prompt is all of the context, else with a mask; `dequantize` is that
after dequantizing the whole cache. `floor_us` is of both products, at the rate of 16 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from qcompile import compat
from qcompile.caches import KVCache
from qcompile.evaluate.timing import ceilings, copies, microseconds, write_results
from qcompile.kv_cache import AttentionSpec, dequantize, gather_pages

DEVICE = torch.device("cuda")
RESULTS = Path(__file__).parent / "results"
HEADS, GROUP, SIZE = 8, 4, 128
CONTEXTS = [(1, 256), (16, 256), (1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 16384), (64, 4096), (64, 16384)]
CONTEXTS += [(64, 65536)]
OTHERS = {size: [(1, 4096), (1, 16384), (8, 4096), (8, 16384)] for size in (64, 256)}
"""Sequences and context, of heads of SIZE and of other sizes."""
PROMPTS = [(1, 2048, 2048), (1, 8192, 8192), (8, 2048, 2048), (1, 512, 16384), (1, 32, 16384)]
"""Sequences, queries and context."""
CACHES: dict[str, Any] = {
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e4m3, FP8 compute": {"format": "fp8_e4m3", "compute": "fp8"},
    "fp8_e5m2": "fp8_e5m2",
    "int8": "int8",
    "int4": "int4",
    "int4, offsets": {"format": "int4", "symmetric": False},
    "int4, groups of 32, offsets": {"format": "int4", "group": 32, "symmetric": False},
}
PREFILL = {name: CACHES[name] for name in ("fp8_e4m3", "fp8_e4m3, FP8 compute", "int8", "int4")}
PAGED, PAGE = ("fp8_e4m3", "int4"), 64


def error(y: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Of the first sequence."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query[:1].double(), key.double(), value.double(), enable_gqa=True)
    return round(((y[:1].double() - expected).norm() / expected.norm()).item(), 5)


def inputs(batch: int, context: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of one token, keys and values."""
    query = torch.randn(batch, HEADS * GROUP, 1, size, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(batch, HEADS, context, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return query, key, value


def decode_row(
    batch: int, context: int, size: int, rate: float, impl: str, kv: str, us: float, wrong: float, nbytes: int
) -> dict[str, object]:
    """A row of decoding."""
    return {
        "bench": "attention",
        "impl": impl,
        "kv": kv,
        "batch": batch,
        "context": context,
        "shape": [HEADS * GROUP, HEADS, size],
        "us": round(us, 2),
        "error": wrong,
        "floor_us": round(1e6 * nbytes / rate, 2),
    }


def flex(batch: int, context: int, rate: float, size: int = SIZE) -> Iterator[dict[str, object]]:
    """The rows of FlexAttention of one batch and context; where it fails, the reason is printed."""
    query, key, value = inputs(batch, context, size)
    cold = copies(DEVICE, key, value)
    blocks = create_block_mask(lambda b, h, q, kv: kv >= 0, None, None, 1, context, DEVICE, BLOCK_SIZE=128)
    for impl, block_mask in {"FlexAttention": None, "FlexAttention, block mask": blocks}.items():
        torch.compiler.reset()  # or later shapes exceed the limit of recompiling
        attention = partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask, enable_gqa=True)
        try:
            calls = [partial(attention, query, *t) for t in cold]
            wrong = error(calls[0](), query, key[:1], value[:1])
            us = microseconds(calls, DEVICE)
        except Exception as failure:  # a compiler's error of any kind is the result
            print(f"skipped {impl} at {batch} x {context} of {size}: {type(failure).__name__}: {failure}"[:500])
            continue
        yield decode_row(batch, context, size, rate, impl, "bfloat16", us, wrong, 2 * key.nbytes)


def plain(batch: int, context: int, rate: float, size: int = SIZE) -> Iterator[dict[str, object]]:
    """The other rows of bfloat16 caches of one batch and context."""
    query, key, value = inputs(batch, context, size)
    row = partial(decode_row, batch, context, size, rate)
    theirs = [partial(F.scaled_dot_product_attention, query, *t, enable_gqa=True) for t in copies(DEVICE, key, value)]
    wrong = error(theirs[0](), query, key[:1], value[:1])
    yield row("SDPA", "bfloat16", microseconds(theirs, DEVICE), wrong, 2 * key.nbytes)
    del theirs
    shared = torch.ops.qcompile.attention_plain
    ours = [partial(shared, query, *t, None, None, size**-0.5) for t in copies(DEVICE, key, value)]
    wrong = error(ours[0](), query, key[:1], value[:1])
    yield row("qcompile", "bfloat16", microseconds(ours, DEVICE), wrong, 2 * key.nbytes)


def quantized(
    batch: int, context: int, rate: float, size: int = SIZE, caches: dict[str, Any] = CACHES
) -> Iterator[dict[str, object]]:
    """The rows of quantized caches."""
    query, key, value = inputs(batch, context, size)
    row = partial(decode_row, batch, context, size, rate)
    for name, scheme in caches.items():
        cache = filled(scheme, key, value)
        spec = AttentionSpec(key=cache.key_spec, value=cache.value_spec, scale=size**-0.5).encode()
        tensors = [cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale]
        restored = [
            dequantize(codes[:1], scale[:1] if scale.dim() > 2 else scale, cache.key_spec.scheme, size)
            for codes, scale in (tensors[:2], tensors[2:])
        ]
        attention = torch.ops.qcompile.attention
        calls = [partial(attention, query, list(t), None, None, spec) for t in copies(DEVICE, *tensors)]
        wrong = error(calls[0](), query, *restored)
        yield row("qcompile", name, microseconds(calls, DEVICE), wrong, sum(t.nbytes for t in tensors))
        del calls
        if name not in PAGED:
            continue
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
                    size,
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


def filled(kv: Any, key: Tensor, value: Tensor) -> KVCache:
    """A cache that holds keys and values [B, H, T, D]."""
    batch, heads, context, size = key.shape
    cache = KVCache(batch, heads, context, size, kv, device=key.device)
    ops = torch.ops.qcompile
    for first in range(0, context, 4096):
        positions = torch.arange(first, min(first + 4096, context), device=key.device)
        part = slice(first, first + 4096)
        ops.store_kv(cache.key_codes, cache.key_scale, key[:, :, part], positions, cache.key_spec.encode())
        ops.store_kv(cache.value_codes, cache.value_scale, value[:, :, part], positions, cache.value_spec.encode())
    return cache


def prefill(batch: int, queries: int, context: int, rate: float) -> Iterator[dict[str, object]]:
    """The rows of one prompt or chunk."""
    shape = (batch, HEADS, context, SIZE)
    query = torch.randn(batch, HEADS * GROUP, queries, SIZE, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    before = context - queries
    pairs = batch * HEADS * GROUP * (queries * before + queries * (queries + 1) / 2)
    floor = 1e6 * 4 * SIZE * pairs / rate
    last = torch.arange(before, context, device="cuda")
    mask = torch.arange(context, device="cuda") <= last[:, None]
    exact = before + torch.tensor([0, queries // 2, queries - 1])

    def row(impl: str, kv: str, call: Callable[[], Tensor], keys: Tensor, values: Tensor) -> dict[str, object]:
        y = call()
        wrong, size = 0.0, 0.0
        for position in exact.tolist():  # of three tokens of the first sequence
            end = position + 1
            with sdpa_kernel(SDPBackend.MATH):
                expected = F.scaled_dot_product_attention(
                    query[:1, :, position - before : end - before].double(),
                    keys[:1, :, :end].double(),
                    values[:1, :, :end].double(),
                    enable_gqa=True,
                )
            wrong += (y[:1, :, position - before : end - before].double() - expected).square().sum().item()
            size += expected.square().sum().item()
        return {
            "bench": "attention",
            "impl": impl,
            "kv": kv,
            "batch": batch,
            "queries": queries,
            "context": context,
            "us": round(microseconds([call] * 4, DEVICE), 2),
            "error": round((wrong / size) ** 0.5, 5),
            "floor_us": round(floor, 2),
        }

    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
    causal: dict[str, Any] = {"is_causal": True} if before == 0 else {"attn_mask": mask}
    yield row("SDPA", "bfloat16", partial(sdpa, query, key, value, **causal), key, value)
    for name, scheme in PREFILL.items():
        cache = filled(scheme, key, value)
        spec = AttentionSpec(key=cache.key_spec, value=cache.value_spec, scale=SIZE**-0.5, causal=True)
        tensors = [cache.key_codes, cache.key_scale, cache.value_codes, cache.value_scale]
        halves = (tensors[:2], tensors[2:])
        restored = [dequantize(*half, cache.key_spec.scheme, SIZE).to(torch.bfloat16) for half in halves]
        attention = partial(torch.ops.qcompile.attention, query, tensors, None, None, spec.encode())
        yield row("qcompile", name, attention, *restored)
        if name == "fp8_e4m3":

            def dequantized() -> Tensor:
                found = [dequantize(*half, cache.key_spec.scheme, SIZE).to(torch.bfloat16) for half in halves]  # noqa: B023
                return sdpa(query, *found, attn_mask=mask)

            yield row("dequantize", name, dequantized, *restored)
        if before == 0:
            first = partial(first_prompt, cache, torch.arange(context, device=DEVICE), query, key, value)
            yield row("qcompile, first prompt", name, first, *restored)


@torch.compile(dynamic=False)
def first_prompt(cache: KVCache, positions: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Store a prompt in a cache that is empty, and attend to what was stored: as `passes.quantize_attention` has it."""
    stored = []
    for codes, scale, x, spec in (
        (cache.key_codes, cache.key_scale, key, cache.key_spec),
        (cache.value_codes, cache.value_scale, value, cache.value_spec),
    ):
        torch.ops.qcompile.store_kv(codes, scale, x, positions, spec.encode())
        stored.append(torch.ops.qcompile.dequantize_kv(codes, scale, None, spec.encode(), x.dtype))
    return F.scaled_dot_product_attention(query, *stored, is_causal=True, enable_gqa=True)


def main() -> None:
    """Measure, write the results and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of the results file, {RESULTS} unless a part is asked for")
    parser.add_argument("--only", choices=["decode", "prefill", "flex"], help="a part; flex is one of decode")
    parser.add_argument("--caches", help="decoding from these quantized caches alone, separated by semicolons")
    given = parser.parse_args()
    torch.manual_seed(0)
    compat.allow_recompilations(256)  # a first prompt for each shape and cache
    rates = ceilings(DEVICE)
    rows = []
    parts: tuple[Callable[..., Iterator[dict[str, object]]], ...] = (plain, quantized, flex)
    if given.caches:
        parts = (partial(quantized, caches={name: CACHES[name] for name in given.caches.split(";")}),)
    elif given.only == "flex":
        parts = (flex,)
    if given.only != "prefill":
        for size, contexts in ({SIZE: CONTEXTS} | OTHERS).items():
            for part in parts:
                rows += [row for batch, context in contexts for row in part(batch, context, rates["memory"], size)]
    if given.only in (None, "prefill") and not given.caches:
        rows += [row for shape in PROMPTS for row in prefill(*shape, rates["16-bit"])]
    if given.out or not (given.only or given.caches):
        write_results(given.out or RESULTS, "attention", DEVICE, rows, rates)
    for row in rows:
        share = float(str(row["floor_us"])) / float(str(row["us"]))
        fields = (
            f"{row.get(key, '')!s:>10}" for key in ("shape", "batch", "queries", "context", "impl", "kv", "us", "error")
        )
        print(*fields, f"{share:>6.0%} of floor")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
