"""Attention over a cache on CPUs: a generated C++ kernel for few queries, torch for many or without a compiler.

Over a quantized cache torch takes a stretch of the context at a time, with a running softmax; scales multiply scores
and weights, of which there are fewer than keys and values.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.attention import combined_mask, scores_of
from qcompile.codegen.cpp_attention import CppAttentionSpec, cpp_attention_spec
from qcompile.kv_cache import MOST_ROWS, AttentionSpec, KVSpec, NumberFormat
from qcompile.runtime import cpp, cpp_attention, cpu_operators

BLOCK = 512
"""Positions that torch decodes at once: their keys stay in the second-level cache."""


def attention(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """See `qcompile.attention.reference`."""
    key, key_scale, value, value_scale = cache
    if (kernel := _kernel(query, key.shape[1], spec)) is None:
        return in_stretches(query, cache, mask, length, spec)
    halves = (key, key_scale, spec.key.head_dim), (value, value_scale, spec.value.head_dim)
    end = _end(key.shape[2], length)
    y = kernel(_narrow(query), *halves, mask, end, spec.scale, spec.softcap)
    return y.to(query.dtype)


def attention_plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    """Attention over keys and values of the queries' type; see `qcompile.attention`."""
    if (kernel := _kernel(query, key.shape[1], None)) is None:
        mask = combined_mask(query, key.shape[2], mask, length)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    halves = (key, None, key.shape[3]), (value, None, value.shape[3])
    y = kernel(_narrow(query), *halves, mask, _end(key.shape[2], length), scale, 0.0)
    return y.to(query.dtype)


def _end(context: int, length: Tensor | None) -> int:
    """How many positions are attended to."""
    return context if length is None else max(0, min(context, int(length)))


def _narrow(query: Tensor) -> Tensor:
    """Queries in a type that kernels take."""
    return query if query.dtype == torch.bfloat16 else query.to(torch.float32)


def _kernel(query: Tensor, heads: int, spec: AttentionSpec | None) -> cpp_attention.AttentionKernel | None:
    """The kernel for these queries, over a cache that is quantized if there is a spec."""
    if query.shape[1] // heads * query.shape[2] > MOST_ROWS or cpp.compiler() is None:
        return None
    return _kernel_of(query.dtype, spec, cpp.isa())


@functools.cache
def _kernel_of(dtype: torch.dtype, spec: AttentionSpec | None, isa: str) -> cpp_attention.AttentionKernel | None:
    taken = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if spec is not None:
        found = cpp_attention_spec(spec, taken, isa)
    else:
        number, query = (str(t).removeprefix("torch.") for t in (dtype, taken))
        found = CppAttentionSpec(number=number, query=query, isa=isa)
    kernel = None if found is None else cpp_attention.load(found)
    if kernel is not None and dtype == taken:
        cpu_operators.add_attention(spec, dtype, kernel, MOST_ROWS)
    return kernel


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
