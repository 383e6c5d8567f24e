"""Attention over a quantized cache on CPUs: a stretch of the context at a time, with a running softmax.

Scales multiply scores and weights, of which there are fewer than keys and values.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qcompile.attention import causal_mask, scores_of
from qcompile.kv_cache import AttentionSpec, KVSpec, NumberFormat, dequantize_rotated

BLOCK = 512
"""Positions that are decoded at once: their keys stay in the second-level cache."""


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


def _part(scale: Tensor, start: int, stop: int) -> Tensor:
    """Scales of some tokens, where each token has its own."""
    return scale[:, :, start:stop] if scale.dim() > 2 else scale


def attention(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """See `qcompile.attention.reference`; sums are taken block by block."""
    key_codes, key_scale, value_codes, value_scale = cache
    batch, heads, context = key_codes.shape[:3]
    end = context if length is None else min(context, int(length))
    rows = query.to(torch.float32).unflatten(1, (heads, -1)).flatten(2, 3)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], context)
    top = rows.new_full((batch, *query.shape[1:3], 1), -torch.inf)
    total = torch.zeros_like(top)
    y = rows.new_zeros((batch, *query.shape[1:3], spec.value.head_dim))
    for start in range(0, end, BLOCK):
        stop = min(start + BLOCK, end)
        key = _values(key_codes[:, :, start:stop], _part(key_scale, start, stop), spec.key)
        products = torch.matmul(rows, key.transpose(-1, -2)) * _factor(key_scale, start, stop)
        products = products.reshape(*query.shape[:3], stop - start)
        scores = scores_of(products, None if mask is None else mask[..., start:stop], spec)
        if spec.causal:
            reach = context if length is None else int(length)
            seen = causal_mask(query.shape[2], start, stop, reach, spec, query.device)
            scores = scores.masked_fill(~seen, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, rescale = torch.exp(scores - base), torch.exp(top - base)
        value = _values(value_codes[:, :, start:stop], _part(value_scale, start, stop), spec.value)
        scaled = weights.reshape(batch, heads, -1, stop - start) * _factor(value_scale, start, stop)
        y = y * rescale + torch.matmul(scaled, value).reshape(y.shape)
        total = total * rescale + weights.sum(-1, keepdim=True)
        top = higher
    return (y / total.masked_fill(total == 0, 1.0)).to(query.dtype)
