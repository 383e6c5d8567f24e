"""Attention over a cache on GPUs: generated Triton kernels, one for few queries and one for many."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.attention import causal_mask, outside_of, paged_out, reference
from qcompile.codegen.attention_spec import (
    PREFILL_TEMPLATE,
    WARP_GROUPS,
    AttentionKernelSpec,
    AttentionTile,
    Reach,
    attention_kernel_spec,
    has_integers,
    lanes_objection,
    reads,
)
from qcompile.codegen.devices import device_of
from qcompile.codegen.spec import launches_early, native_fp8
from qcompile.errors import DeviceError
from qcompile.kv_cache import (
    MOST_QUERIES,
    MOST_ROWS,
    MOST_SIZE,
    AttentionSpec,
    KVSpec,
    dequantize,
    parse_kv_cache,
)
from qcompile.powers import power_above
from qcompile.runtime import cache, launcher
from qcompile.runtime.counters import zeros_kept_zero
from qcompile.runtime.gpu import target_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_SPLITS = 64


def has_kernel(spec: AttentionSpec, x_dtype: torch.dtype) -> bool:
    """Whether the templates read a cache for queries of a type."""
    return reads(spec.scheme.format, x_dtype)


def multiplies_fp8(target: str) -> bool:
    """Whether a target has the products of `compute` "fp8"."""
    return native_fp8(target)


def few(spec: AttentionSpec, queries: int, group: int, x_dtype: torch.dtype) -> bool:
    """Whether the kernel for few queries takes so many, without spilling registers."""
    wide = x_dtype == torch.float32 and max(spec.key.head_dim, spec.value.head_dim) > 128
    return queries <= MOST_QUERIES and queries * group <= (16 if wide else MOST_ROWS)


def tile_of(
    pairs: int,
    context: int,
    size: int,
    rows: int,
    target: str,
    x_dtype: torch.dtype = torch.bfloat16,
    sequences: int = 0,
    integers: bool = False,
    in_fp8: bool = False,
    page: int = 0,
    grouped: bool = False,
) -> AttentionTile:
    """Parts of the context until about every processor has a program, which has enough loads in flight by itself.

    Args:
        pairs: sequences times heads of keys.
        size: of a key or a value, whichever is greater.
        rows: queries of a program.
        sequences: how many, if their lengths differ; else 0.
        integers: whether codes are integers, whose decoding and scales take registers too: more and smaller programs.
        in_fp8: see `AttentionKernelSpec`, whose products are of 32 tokens and more.
        page: tokens of a page, of a paged cache; else 0.
        grouped: whether a vector has several scales.
    """
    wide = x_dtype == torch.float32
    # As many tokens as registers hold: decoded keys and values, and beside them a program's results.
    nvidia = target.startswith("sm_")
    small = nvidia and rows <= 16 and size <= 128 and not wide
    block = 128 if small and (page or not integers) else 64 if nvidia else 16
    # Where there is much to attend to, two warps share a block of integers, and each attends by itself.
    halved = target == "sm_90" and small and block == 64 and not grouped and pairs * context >= 1 << 17
    if size > 128:
        block = 32 if in_fp8 or (nvidia and not wide and rows <= 32) else 16
    warps = 8 if rows > 32 or (rows > 16 and size > 64) or (wide and size > 128) else 2 if halved else 4
    ways = 2 if halved else 1
    enough = device_of(target).processors * (2 if integers else 1)
    if sequences:
        split = _parts_of_all(pairs, context, block, sequences, target)
    else:
        split = _parts(pairs, context, block, enough, 8 if integers and context >= 4096 else 4)
    return AttentionTile(context=block, split=split, warps=warps, stages=3, ways=ways)


def lanes_tile_of(
    pairs: int,
    context: int,
    target: str,
    sequences: int = 0,
    page: int = 0,
    size: int = 128,
    grouped: bool = False,
) -> AttentionTile:
    """A tile with `lanes`: for few heads a program a processor, whose warps load two steps ahead; else two, one ahead.

    Vectors of 256 with several scales are loaded as registers become free.

    Args: see `tile_of`.
    """
    wide, processors = size > 128, device_of(target).processors
    twice = pairs >= 32 or wide
    # As registers hold: places of pages take some, and scales of groups.
    warps = 4 if twice and (page or grouped or wide) else 8
    held = 2 if wide else 16 // warps if twice else 1
    if grouped and not wide and pairs >= 2 * processors:
        held *= 4  # there is room for three at a time: of small ones fewer processors wait at the end
    block = 16 * warps
    if sequences:
        split = _parts_of_all(pairs, context, block, sequences, target)
    else:
        split = _parts(pairs, context, block, processors * held, 4)
    stages = 1 if grouped and wide else 2 if twice else 3
    return AttentionTile(context=block, split=split, warps=warps, stages=stages, ways=warps, lanes=True)


def _parts(pairs: int, context: int, block: int, enough: int, least: int) -> int:
    """Programs that share a pair: until there are `enough`, each of `least` / 2 blocks or more."""
    split = 1
    while split < _MOST_SPLITS and 2 * split * pairs <= enough and least * split * block <= context:
        split *= 2
    return split


def _parts_of_all(pairs: int, context: int, block: int, sequences: int, target: str) -> int:
    """Programs that share all sequences of a head, of which each may take one more."""
    parts = max(2 * device_of(target).processors * sequences // pairs, 2 * sequences)
    return 1 << (max(1, min(parts, sequences * (context // (4 * block)))).bit_length() - 1)


def prefill_tile_of(
    rows: int,
    size: int,
    target: str,
    x_dtype: torch.dtype,
    grouped: bool = False,
    in_fp8: bool = False,
    plain: bool = False,
) -> AttentionTile:
    """As many queries as registers hold results of.

    Args:
        rows: tokens times query heads for each head of keys.
        size: of a key or a value, whichever is greater.
        grouped: whether a vector has several scales.
        in_fp8: see `AttentionKernelSpec`; the type of queries then does not matter.
        plain: whether keys and values are not quantized.
    """
    least = max(16, power_above(rows))
    if not target.startswith("sm_"):
        block, most = 16 if grouped else 32, 64 if size <= 128 else 32
        return AttentionTile(context=block, split=1, warps=4, stages=1, rows=min(least, most))
    if x_dtype == torch.float32 and not in_fp8:
        most, block = (32, 32) if size <= 64 else (32, 16) if size <= 128 else (16, 16)
        return AttentionTile(context=block, split=1, warps=8, stages=2, rows=min(least, most))
    # Where matrix units take operands from registers only, decoded keys and values are there as well.
    if grouped and size > 128:
        return AttentionTile(context=16, split=1, warps=8, stages=2, rows=64)
    if grouped:
        most = 64 if target == "sm_90" else 32
        block = 32 if target == "sm_90" else 16
        return AttentionTile(context=block, split=1, warps=4, stages=2, rows=min(least, most))
    if size > 128 and target in WARP_GROUPS and not in_fp8:
        return AttentionTile(context=32, split=1, warps=8 if least > 64 else 4, stages=3, rows=min(least, 128))
    if size > 128 or target not in WARP_GROUPS:
        stages = 3 if size <= 64 else 2
        return AttentionTile(context=32, split=1, warps=8 if least >= 64 else 4, stages=stages, rows=min(least, 64))
    held = min(least, 128)
    block, stages = (64, 3) if target == "sm_90" else (32, 2 if plain or size <= 64 else 3)
    return AttentionTile(context=block, split=1, warps=8 if held > 64 else 4, stages=stages, rows=held)


def shared_by(tile: AttentionTile, programs: int, context: int, target: str) -> AttentionTile:
    """A tile for many queries whose programs share the context, until about every processor has one."""
    split = 1
    while split < _MOST_SPLITS and 2 * split * programs <= device_of(target).processors:
        if 8 * split * tile.context > context:
            break
        split *= 2
    return replace(tile, split=split)


@functools.cache
def choose_prefill(
    spec: AttentionSpec,
    batch: int,
    heads: int,
    group: int,
    queries: int,
    context: int,
    mask: str,
    reach: Reach,
    x_dtype: torch.dtype,
    target: str,
) -> AttentionKernelSpec:
    """The kernel for many queries."""
    rows = min(256, power_above(queries * group))
    size = max(spec.key.head_dim, spec.value.head_dim)
    scheme = spec.scheme
    tile = prefill_tile_of(rows, size, target, x_dtype, scheme.group > 0, scheme.compute == "fp8", scheme.plain)
    tile = shared_by(tile, batch * heads * -(-queries * group // tile.rows), context, target)
    return attention_kernel_spec(spec, heads, group, 0, mask, reach, x_dtype, target, tile)


@functools.cache
def choose(
    spec: AttentionSpec,
    batch: int,
    heads: int,
    group: int,
    queries: int,
    context: int,
    mask: str,
    reach: Reach,
    x_dtype: torch.dtype,
    target: str,
) -> AttentionKernelSpec:
    """The kernel for a shape."""
    size = max(spec.key.head_dim, spec.value.head_dim)
    sequences = batch if reach.sequences else 0
    integers, in_fp8 = has_integers(spec.scheme.format), spec.scheme.compute == "fp8"
    rows = group * queries
    if lanes_objection(spec, rows, reach.page, x_dtype, target) is None:
        tile = lanes_tile_of(batch * heads, context, target, sequences, reach.page, size, spec.scheme.group > 0)
    else:
        grouped = spec.scheme.group > 0
        tile = tile_of(
            batch * heads, context, size, rows, target, x_dtype, sequences, integers, in_fp8, reach.page, grouped
        )
    return attention_kernel_spec(spec, heads, group, queries, mask, reach, x_dtype, target, tile)


def reach_of(
    cache: list[Tensor], length: Tensor | None, start: Tensor | None, block_table: Tensor | None
) -> tuple[Reach, int]:
    """Which positions a kernel looks at, and how many there are of a sequence."""
    unequal = max(0 if t is None else t.numel() for t in (length, start))
    size = cache[0].shape[2]
    reach = Reach(
        length=length is not None,
        start=start is not None,
        sequences=power_above(unequal) if unequal > 1 else 0,
        page=0 if block_table is None else size,
    )
    return reach, size if block_table is None else size * block_table.shape[1]


def mask_kind(mask: Tensor | None) -> str:
    """As `AttentionKernelSpec.mask` says it."""
    return "none" if mask is None else "boolean" if mask.dtype == torch.bool else "added"


def launch(
    kernel: AttentionKernelSpec,
    function: Any,
    query: Tensor,
    tensors: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Allocate the result and run `function`, the Triton function of `kernel`'s module, over its grid.

    Args:
        tensors: of the cache; where it has no scales, anything stands for them.
    """
    key_codes, key_scale, value_codes, value_scale = (t.contiguous() for t in tensors)
    (batch, heads), (_, context) = (len(query), kernel.heads), reach_of(tensors, length, start, block_table)
    y = query.new_empty((*query.shape[:3], kernel.value_size))
    if y.numel() == 0:
        return y
    if kernel.bits == 8 and kernel.constants()["NATIVE"]:
        native = torch.float8_e4m3fn if kernel.number == "fp8_e4m3" else torch.float8_e5m2
        key_codes, value_codes = key_codes.view(native), value_codes.view(native)
    steps = [0, 0, 0]
    if mask is not None:
        mask = mask.expand(*query.shape[:3], context)
        mask = mask if mask.stride(-1) == 1 or context == 1 else mask.contiguous()
        steps = list(mask.stride()[:3])
    options: dict[str, Any] = {"num_warps": kernel.tile.warps, "num_stages": kernel.tile.stages}
    if launches_early(kernel.target) and query.device.type != "cpu":  # which has Triton's interpreter
        options["launch_pdl"] = True
    # Pointers that a kernel does not use get some input, so that one signature serves all.
    given = [
        query.contiguous(),
        key_codes,
        key_scale,
        value_codes,
        value_scale,
        key_scale if mask is None else mask,
        key_scale if length is None else length.contiguous(),
        key_scale if start is None else start.contiguous(),
        key_scale if block_table is None else block_table.contiguous(),
        y,
    ]
    steps = [*(int(t is not None and t.numel() > 1) for t in (length, start)), *steps]
    pairs, split, tokens = batch * heads, kernel.tile.split, query.shape[2]
    partial = arrived = key_scale
    shared, counts = pairs, (batch, context)
    grid: tuple[int, ...] = (pairs, split)
    if kernel.template == PREFILL_TEMPLATE:
        tiles = -(-kernel.group * tokens // kernel.rows)
        shared, grid, counts = tiles * pairs, (tiles, pairs, split), (context, tokens)
    elif kernel.reach.sequences:
        grid = (heads * (batch + split),)
    if math.prod(grid) > shared:
        partial = query.new_empty(math.prod(grid) * kernel.part, dtype=torch.float32)
        arrived = zeros_kept_zero(shared, query.device)
    launcher.launch(function, grid, *given, partial, arrived, *counts, *steps, **options)
    return y


def attention(
    query: Tensor,
    tensors: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: AttentionSpec,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """See `qcompile.attention.reference`; of caches that `has_kernel` takes.

    Raises:
        DeviceError: queries of another type than float32, bfloat16 and float16.
    """
    if query.dtype not in _DTYPES:
        raise DeviceError(f"GPU kernels take float32, bfloat16 or float16 queries, not {query.dtype}: cast the model")
    heads, kind = tensors[0].shape[1], mask_kind(mask)
    group, queries = query.shape[1] // heads, query.shape[2]
    target = target_of(query.device)
    reach, context = reach_of(tensors, length, start, block_table)
    if few(spec, queries, group, query.dtype):
        kernel = choose(spec, len(query), heads, group, queries, context, kind, reach, query.dtype, target)
    else:
        apart = replace(reach, sequences=0)
        kernel = choose_prefill(spec, len(query), heads, group, queries, context, kind, apart, query.dtype, target)
    return _run(kernel, query, tensors, mask, length, start, block_table)


def has_plain_kernel(queries: int, group: int, key_size: int, value_size: int, x_dtype: torch.dtype) -> bool:
    """Whether the template attends from so many tokens to keys and values of the queries' type."""
    half = x_dtype in (torch.bfloat16, torch.float16)
    return half and queries <= MOST_QUERIES and queries * group <= MOST_ROWS and max(key_size, value_size) <= MOST_SIZE


@functools.cache
def choose_plain(
    batch: int,
    heads: int,
    group: int,
    queries: int,
    context: int,
    sizes: tuple[int, int],
    scale: float,
    mask: str,
    length: bool,
    x_dtype: torch.dtype,
    target: str,
) -> AttentionKernelSpec:
    """The kernel for a shape; `sizes` are those of a key and of a value."""
    scheme = parse_kv_cache("auto", x_dtype)
    assert scheme is not None
    key, value = (KVSpec(scheme=scheme, head_dim=size) for size in sizes)
    spec = AttentionSpec(key=key, value=value, scale=scale)
    return choose(spec, batch, heads, group, queries, context, mask, Reach(length=length), x_dtype, target)


def attention_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention to plain keys and values, of what `has_plain_kernel` takes; see `qcompile.attention`."""
    batch, heads, context, size = key.shape
    group, queries = query.shape[1] // heads, query.shape[2]
    kind, target = mask_kind(mask), target_of(query.device)
    sizes = (size, value.shape[3])
    kernel = choose_plain(
        batch, heads, group, queries, context, sizes, scale, kind, length is not None, query.dtype, target
    )
    return _run(kernel, query, [key, key, value, value], mask, length)


def _run(
    kernel: AttentionKernelSpec,
    query: Tensor,
    tensors: list[Tensor],
    mask: Tensor | None,
    *places: Tensor | None,
) -> Tensor:
    function = cache.load(kernel).kernel
    # Triton launches on the current device.
    guard = torch.cuda.device(query.device) if torch.cuda.device_count() > 1 else contextlib.nullcontext()
    with guard:
        return launch(kernel, function, query, tensors, mask, *places)


def in_plain_torch(
    query: Tensor,
    tensors: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: AttentionSpec,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Dequantize all keys and values, then torch's attention; made of plain torch operators."""
    if spec.softcap:
        return reference(query, tensors, mask, length, spec.encode(), start=start, block_table=block_table)
    key_codes, key_scale, value_codes, value_scale = paged_out(tensors, block_table)
    key = dequantize(key_codes, key_scale, spec.scheme, spec.key.head_dim).to(query.dtype)
    value = dequantize(value_codes, value_scale, spec.scheme, spec.value.head_dim).to(query.dtype)
    outside = outside_of(key.shape[2], length, start, query.device)
    if outside is not None:  # what lies there may be anything
        key, value = (t.masked_fill(outside.mT, 0.0) for t in (key, value))
    allowed = None if outside is None else ~outside.expand(-1, -1, query.shape[2], -1)
    if spec.causal:
        end = key.shape[2] if length is None else length.clamp(max=key.shape[2])
        seen = causal_mask(query.shape[2], 0, key.shape[2], end, spec.window, query.device)
        allowed = seen if allowed is None else allowed & seen
    if mask is None or mask.dtype == torch.bool:
        mask = allowed if mask is None else mask if allowed is None else mask & allowed
    elif allowed is not None:
        mask = mask.masked_fill(~allowed, -torch.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=spec.scale, enable_gqa=True)
