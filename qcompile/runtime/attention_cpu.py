"""Attention over a cache on CPUs: a generated C++ kernel, or torch.

Where the kernel multiplies by a matrix unit it takes any number of queries, elsewhere few: of many, torch's own
attention takes those over a quantized cache, once that is dequantized. Without a compiler torch takes few queries a
stretch of the context at a time, with a running softmax; scales multiply scores and weights, of which there are fewer
than keys and values.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.attention import causal_mask, combined_mask, paged_out, scores_of
from qcompile.codegen.cpp import ISAS
from qcompile.codegen.cpp_attention import CppAttentionSpec, cpp_attention_spec
from qcompile.kv_cache import MOST_ROWS, AttentionSpec, KVSpec, NumberFormat, dequantize_rotated
from qcompile.runtime import cpp, cpp_attention, cpu_operators

BLOCK = 512
"""Positions that torch decodes at once: their keys stay in the second-level cache."""

ANY_ROWS = 1 << 62

MANY_ROWS = 512
"""Queries of a head of keys above which dequantizing the cache takes less time than torch's attention then saves: it
costs about what the kernel takes for 400 to 550 queries, where that has no matrix unit."""


def attention(
    query: Tensor,
    cache: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: AttentionSpec,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """See `qcompile.attention.reference`; by torch, sequences of unequal length are taken one by one, out of pages."""
    if (kernel := _kernel_over(query, cache, spec)) is not None:
        y = kernel(
            _narrow(query),
            (cache[0], cache[1], spec.key.head_dim),
            (cache[2], cache[3], spec.value.head_dim),
            mask,
            length,
            spec.scale,
            spec.softcap,
            causal=spec.causal,
            window=spec.window,
            start=start,
            block_table=block_table,
        )
        return y.to(query.dtype)
    batch, pages = query.shape[0], 1 if block_table is None else block_table.shape[1]
    context = cache[0].shape[2] * pages
    firsts = [0] * batch if start is None else start.clamp(min=0).expand(batch).tolist()
    ends = [context] * batch if length is None else length.clamp(max=context).expand(batch).tolist()
    if spec.window:
        firsts = [max(first, end - query.shape[2] + 1 - spec.window) for first, end in zip(firsts, ends, strict=True)]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())].expand(batch, -1, -1, context)
    if block_table is None and len(set(zip(firsts, ends, strict=True))) == 1:
        return _by_torch(query, _part(cache, firsts[0], ends[0]), _seen(mask, firsts[0], ends[0]), spec)
    results = []
    for sequence, (first, end) in enumerate(zip(firsts, ends, strict=True)):
        one, skipped = slice(sequence, sequence + 1), 0
        if block_table is None:
            own = [t[one] if t.dim() > 2 else t for t in cache]
        else:
            size = cache[0].shape[2]
            skipped = first // size * size
            own = paged_out(cache, block_table[one, first // size : -(-end // size)])
        seen = _seen(None if mask is None else mask[one], first, end)
        results.append(_by_torch(query[one], _part(own, first - skipped, end - skipped), seen, spec))
    return torch.cat(results) if results else query.new_empty((*query.shape[:3], spec.value.head_dim))


def _part(cache: list[Tensor], first: int, end: int) -> list[Tensor]:
    """Positions of a cache, of which static scales stay."""
    return [t[:, :, first : max(first, end)] if t.dim() > 2 else t for t in cache]


def _seen(mask: Tensor | None, first: int, end: int) -> Tensor | None:
    return None if mask is None else mask[..., first : max(first, end)]


def _kernel_over(query: Tensor, cache: list[Tensor], spec: AttentionSpec) -> cpp_attention.AttentionKernel | None:
    """The kernel, if it is the one to take."""
    rows = query.shape[1] // cache[0].shape[1] * query.shape[2]
    many = rows > MANY_ROWS and (spec.scheme.compact or not multiplies_squares(query.dtype))
    return None if many and not spec.softcap else _kernel(query.dtype, spec)


def _by_torch(query: Tensor, cache: list[Tensor], mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """To all positions of a cache that is not paged, of which the queries are at the last."""
    context, queries = cache[0].shape[2], query.shape[2]
    if query.shape[1] // cache[0].shape[1] * queries <= MOST_ROWS or spec.softcap:
        return in_stretches(query, cache, mask, spec)
    if spec.causal and queries > 1:
        seen = causal_mask(queries, 0, context, context, spec.window, query.device)
        if mask is None or mask.dtype == torch.bool:
            mask = seen if mask is None else mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
    return dequantized(query, cache, mask, spec)


def attention_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    scale: float,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """Attention over keys and values of the queries' type; see `qcompile.attention`."""
    taken = query.shape[1] // key.shape[1] * query.shape[2] <= MOST_ROWS or multiplies_squares(query.dtype)
    if not taken or (kernel := _kernel(query.dtype, None)) is None:
        mask = combined_mask(query, key.shape[2], mask, length, causal, window)
        return _sdpa(query, key, value, mask, scale)
    halves = (key, None, key.shape[3]), (value, None, value.shape[3])
    y = kernel(_narrow(query), *halves, mask, length, scale, 0.0, causal=causal, window=window)
    return y.to(query.dtype)


def multiplies_squares(dtype: torch.dtype) -> bool:
    """Whether the kernels for queries of a type multiply by a matrix unit, as fast for many as torch's."""
    return dtype == torch.bfloat16 and cpp.compiler() is not None and "amx_bf16" in ISAS[cpp.isa()]


def _narrow(query: Tensor) -> Tensor:
    """Queries in a type that kernels take."""
    return query if query.dtype == torch.bfloat16 else query.to(torch.float32)


def _kernel(dtype: torch.dtype, spec: AttentionSpec | None) -> cpp_attention.AttentionKernel | None:
    """The kernel for queries of a type, over a cache that is quantized if there is a spec."""
    return None if cpp.compiler() is None else kernel_of(dtype, spec, cpp.isa())


@functools.cache
def kernel_of(dtype: torch.dtype, spec: AttentionSpec | None, isa: str) -> cpp_attention.AttentionKernel | None:
    found = _cpp_spec(dtype, spec, isa)
    kernel = None if found is None else cpp_attention.load(found)
    if found is not None and kernel is not None and found.query == str(dtype).removeprefix("torch."):
        compact = spec is not None and spec.scheme.compact
        rows = ANY_ROWS if multiplies_squares(dtype) and not compact else MOST_ROWS
        cpu_operators.add_attention(spec, dtype, kernel, rows)
    return kernel


def _cpp_spec(dtype: torch.dtype, spec: AttentionSpec | None, isa: str) -> CppAttentionSpec | None:
    taken = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if spec is not None:
        return cpp_attention_spec(spec, taken, isa)
    number, query = (str(t).removeprefix("torch.") for t in (dtype, taken))
    return CppAttentionSpec(number=number, query=query, isa=isa)


def prepare(dtype: torch.dtype, spec: AttentionSpec | None) -> None:
    """Build and load the kernel, which a call otherwise does; may run beside other threads."""
    if cpp.compiler() is not None and (found := _cpp_spec(dtype, spec, cpp.isa())) is not None:
        cpp_attention.load(found)


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """The values of all codes of an 8-bit type."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


def _values(codes: Tensor, scale: Tensor, half: KVSpec) -> Tensor:
    """float32 values of codes, before their scale, unless a vector has several."""
    fmt = half.scheme.format
    if half.scheme.compact:
        return dequantize_rotated(codes, scale, half.scheme, half.head_dim)
    dtype = fmt.number.native_dtype if isinstance(fmt, NumberFormat) else None
    if dtype is None or not dtype.is_floating_point:
        return fmt.decode(codes, half.head_dim)
    # torch converts these one by one.
    return _table(dtype).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def _factor(scale: Tensor, start: int, stop: int) -> Tensor | float:
    """A scale as something to multiply [B, H, rows, stop - start] with; 1 where values have theirs."""
    if scale.dim() == 4:
        return 1.0
    if scale.dim() == 3:
        return scale[:, :, None, start:stop]
    return scale[:, None, None] if scale.dim() == 1 else scale


def _scale_of(scale: Tensor, start: int, stop: int) -> Tensor:
    """Scales of some tokens, where each token has its own."""
    return scale[:, :, start:stop] if scale.dim() > 2 else scale


def dequantized(query: Tensor, cache: list[Tensor], mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """`_by_torch` without a soft cap, by torch's own over the keys and values that the cache stands for."""
    if cache[0].shape[2] == 0:
        return query.new_zeros((*query.shape[:3], spec.value.head_dim))
    key = _decoded(cache[0], cache[1], spec.key).to(query.dtype)
    value = _decoded(cache[2], cache[3], spec.value).to(query.dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return _sdpa(query, key, value, mask, spec.scale)


def _decoded(codes: Tensor, scale: Tensor, half: KVSpec) -> Tensor:
    """float32 values of codes."""
    values, factor = _values(codes, scale, half), _factor(scale, 0, codes.shape[2])
    return values * (factor.transpose(-1, -2) if isinstance(factor, Tensor) and factor.dim() > 1 else factor)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def in_stretches(query: Tensor, cache: list[Tensor], mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """`_by_torch` by torch, `BLOCK` positions at a time."""
    key_codes, key_scale, value_codes, value_scale = cache
    batch, heads, end = key_codes.shape[:3]
    rows = query.to(torch.float32).unflatten(1, (heads, -1)).flatten(2, 3)
    top = rows.new_full((batch, *query.shape[1:3], 1), -torch.inf)
    total = torch.zeros_like(top)
    y = rows.new_zeros((batch, *query.shape[1:3], spec.value.head_dim))
    for start in range(0, end, BLOCK):
        stop = min(start + BLOCK, end)
        key = _values(key_codes[:, :, start:stop], _scale_of(key_scale, start, stop), spec.key)
        products = torch.matmul(rows, key.transpose(-1, -2)) * _factor(key_scale, start, stop)
        products = products.reshape(*query.shape[:3], stop - start)
        scores = scores_of(products, None if mask is None else mask[..., start:stop], spec)
        if spec.causal:
            seen = causal_mask(query.shape[2], start, stop, end, spec.window, query.device)
            scores = scores.masked_fill(~seen, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, rescale = torch.exp(scores - base), torch.exp(top - base)
        value = _values(value_codes[:, :, start:stop], _scale_of(value_scale, start, stop), spec.value)
        scaled = weights.reshape(batch, heads, -1, stop - start) * _factor(value_scale, start, stop)
        y = y * rescale + torch.matmul(scaled, value).reshape(y.shape)
        total = total * rescale + weights.sum(-1, keepdim=True)
        top = higher
    return (y / total.masked_fill(total == 0, 1.0)).to(query.dtype)
