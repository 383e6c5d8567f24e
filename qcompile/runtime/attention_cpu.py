"""Attention over a cache on CPUs: a generated C++ kernel for few queries, torch for many or without a compiler.

Torch's own attention takes many queries of a quantized cache, once that is dequantized. For few, without a compiler,
torch takes a stretch of the context at a time, with a running softmax; scales multiply scores and weights, of which
there are fewer than keys and values.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.attention import combined_mask, scores_of
from qcompile.codegen.cpp_attention import CppAttentionSpec, cpp_attention_spec
from qcompile.kv_cache import MOST_ROWS, AttentionSpec, KVSpec, NumberFormat
from qcompile.runtime import cpp, cpp_attention

BLOCK = 512
"""Positions that torch decodes at once: their keys stay in the second-level cache."""

MANY_ROWS = 512
"""Queries of a head of keys above which dequantizing the cache takes less time than torch's attention then saves: it
costs about what the kernel takes for 400 to 550 queries."""


def attention(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """See `qcompile.attention.reference`."""
    key, key_scale, value, value_scale = cache
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    kernel = _kernel(query.dtype, spec) if rows <= MANY_ROWS or spec.softcap else None
    if kernel is None and rows > MOST_ROWS and not spec.softcap:
        return dequantized(query, cache, mask, length, spec)
    if kernel is None:
        return in_stretches(query, cache, mask, length, spec)
    halves = (key, key_scale, spec.key.head_dim), (value, value_scale, spec.value.head_dim)
    end = _end(key.shape[2], length)
    y = kernel(_narrow(query), *halves, mask, end, spec.scale, spec.softcap)
    return y.to(query.dtype)


def attention_plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    """Attention over keys and values of the queries' type; see `qcompile.attention`."""
    few = query.shape[1] // key.shape[1] * query.shape[2] <= MOST_ROWS
    if not few or (kernel := _kernel(query.dtype, None)) is None:
        return _by_torch(query, key, value, combined_mask(query, key.shape[2], mask, length), scale)
    halves = (key, None, key.shape[3]), (value, None, value.shape[3])
    y = kernel(_narrow(query), *halves, mask, _end(key.shape[2], length), scale, 0.0)
    return y.to(query.dtype)


def _end(context: int, length: Tensor | None) -> int:
    """How many positions are attended to."""
    return context if length is None else max(0, min(context, int(length)))


def _narrow(query: Tensor) -> Tensor:
    """Queries in a type that kernels take."""
    return query if query.dtype == torch.bfloat16 else query.to(torch.float32)


def _kernel(dtype: torch.dtype, spec: AttentionSpec | None) -> cpp_attention.AttentionKernel | None:
    """The kernel for queries of a type, over a cache that is quantized if there is a spec."""
    return None if cpp.compiler() is None else _kernel_of(dtype, spec, cpp.isa())


@functools.cache
def _kernel_of(dtype: torch.dtype, spec: AttentionSpec | None, isa: str) -> cpp_attention.AttentionKernel | None:
    taken = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if spec is not None:
        found = cpp_attention_spec(spec, taken, isa)
    else:
        number, query = (str(t).removeprefix("torch.") for t in (dtype, taken))
        found = CppAttentionSpec(number=number, query=query, isa=isa)
    return None if found is None else cpp_attention.load(found)


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """The values of all codes of an 8-bit type."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


def _values(codes: Tensor, half: KVSpec) -> Tensor:
    """float32 values of codes, before their scale."""
    fmt = half.scheme.format
    dtype = fmt.number.native_dtype if isinstance(fmt, NumberFormat) else None
    if dtype is None or not dtype.is_floating_point:
        return fmt.decode(codes, half.head_dim)
    # torch converts these one by one.
    return _table(dtype).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def _factor(scale: Tensor, start: int, stop: int) -> Tensor:
    """A scale as something to multiply [B, H, rows, stop - start] with."""
    if scale.dim() == 3:
        return scale[:, :, None, start:stop]
    return scale[:, None, None] if scale.dim() == 1 else scale


def dequantized(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """`attention` without a soft cap, by torch's own over the keys and values that the cache stands for."""
    end = _end(cache[0].shape[2], length)
    if end == 0:
        return query.new_zeros((*query.shape[:3], spec.value.head_dim))
    halves = ((cache[0], cache[1], spec.key), (cache[2], cache[3], spec.value))
    key, value = (
        (_values(codes[:, :, :end], half) * _factor(scale, 0, end).transpose(-1, -2)).to(query.dtype)
        for codes, scale, half in halves
    )
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], cache[0].shape[2])[..., :end]
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    return _by_torch(query, key, value, mask, spec.scale)


def _by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's attention, in the order that operators give their results in."""
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.contiguous()


def in_stretches(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """`attention` by torch, `BLOCK` positions at a time."""
    key_codes, key_scale, value_codes, value_scale = cache
    batch, heads, context = key_codes.shape[:3]
    end = _end(context, length)
    rows = query.to(torch.float32).unflatten(1, (heads, -1)).flatten(2, 3)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], context)
    top = rows.new_full((batch, *query.shape[1:3], 1), -torch.inf)
    total = torch.zeros_like(top)
    y = rows.new_zeros((batch, *query.shape[1:3], spec.value.head_dim))
    for start in range(0, end, BLOCK):
        stop = min(start + BLOCK, end)
        key = _values(key_codes[:, :, start:stop], spec.key)
        products = torch.matmul(rows, key.transpose(-1, -2)) * _factor(key_scale, start, stop)
        products = products.reshape(*query.shape[:3], stop - start)
        scores = scores_of(products, None if mask is None else mask[..., start:stop], spec)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, rescale = torch.exp(scores - base), torch.exp(top - base)
        value = _values(value_codes[:, :, start:stop], spec.value)
        scaled = weights.reshape(batch, heads, -1, stop - start) * _factor(value_scale, start, stop)
        y = y * rescale + torch.matmul(scaled, value).reshape(y.shape)
        total = total * rescale + weights.sum(-1, keepdim=True)
        top = higher
    return (y / total.masked_fill(total == 0, 1.0)).to(query.dtype)
