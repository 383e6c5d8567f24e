"""Attention over a quantized cache on CPUs: a stretch of the context at a time, with a running softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.attention import scores_of
from qcompile.kv_cache import AttentionSpec, dequantize

BLOCK = 512
"""Positions that are decoded at once: their keys stay in the second-level cache."""


def _part(scale: Tensor, start: int, end: int) -> Tensor:
    return scale[:, :, start:end] if scale.dim() == 3 else scale


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
        key = dequantize(key_codes[:, :, start:stop], _part(key_scale, start, stop), spec.scheme, spec.key.head_dim)
        products = torch.matmul(rows, key.transpose(-1, -2)).reshape(*query.shape[:3], stop - start)
        scores = scores_of(products, None if mask is None else mask[..., start:stop], spec)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, rescale = torch.exp(scores - base), torch.exp(top - base)
        value = dequantize(
            value_codes[:, :, start:stop], _part(value_scale, start, stop), spec.scheme, spec.value.head_dim
        )
        part = torch.matmul(weights.reshape(batch, heads, -1, stop - start), value)
        y = y * rescale + part.reshape(y.shape)
        total = total * rescale + weights.sum(-1, keepdim=True)
        top = higher
    return (y / total.masked_fill(total == 0, 1.0)).to(query.dtype)
