"""The operators of KV caches: storing tokens quantized, reading them all back, and attention that reads for itself.

    store_kv(codes, scale, x, position, spec)        x [B, H, n, D] goes to positions `position` of a static cache
    dequantize_kv(codes, scale, length, spec, dtype) the whole cache [B, H, T, D]
    attention(query, cache, mask, length, spec)      softmax(query key^T) value, without that tensor
    attention_plain(query, key, value, mask, length, scale)   the same over keys and values that are not quantized

All are composite. The first two are plain torch, so that Inductor fuses quantization with the rotary embedding before
it; attention is one operator on CPUs, and on GPUs one for few queries and plain torch for many.
What `dequantize_kv` gives at positions from `length` on is not specified.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.errors import DeviceError, GradientError
from qcompile.kv_cache import AttentionSpec, decode_attention_spec, decode_kv_spec, dequantize, quantize

_library = torch.library.Library("qcompile", "FRAGMENT")
_library.define("store_kv(Tensor(a!) codes, Tensor(b!) scale, Tensor x, Tensor position, str spec) -> ()")
_library.define("dequantize_kv(Tensor codes, Tensor scale, Tensor? length, str spec, ScalarType dtype) -> Tensor")
_library.define("attention(Tensor query, Tensor[] cache, Tensor? mask, Tensor? length, str spec) -> Tensor")
_library.define(
    "attention_plain(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? length, float scale) -> Tensor"
)
_library.define("attention_gpu(Tensor query, Tensor[] cache, Tensor? mask, Tensor? length, str spec) -> Tensor")
_library.define(
    "attention_plain_gpu(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? length, float scale) -> Tensor"
)
for _name in ("attention_cpu", "attention_any"):
    _library.define(f"{_name}(Tensor query, Tensor[] cache, Tensor? mask, Tensor? length, str spec) -> Tensor")
for _name in ("attention_plain_cpu", "attention_plain_any"):
    _library.define(
        f"{_name}(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? length, float scale) -> Tensor"
    )


def _store_kv(codes: Tensor, scale: Tensor, x: Tensor, position: Tensor, spec: str) -> None:
    """Quantize new keys or values into a cache.

    Args:
        codes: uint8 [B, H, T, width]; scale: float32 [], [H], or [B, H, T], which is then written too.
        x: [B, H, n, D].
        position: int64 [n], each below T.
    """
    scheme = decode_kv_spec(spec).scheme
    new_codes, new_scale = quantize(x, scheme, None if scheme.dynamic else scale)
    codes.index_copy_(2, position, new_codes)
    if scheme.dynamic:
        scale.index_copy_(2, position, new_scale)


def _dequantize_kv(codes: Tensor, scale: Tensor, length: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    parsed = decode_kv_spec(spec)
    return dequantize(codes, scale, parsed.scheme, parsed.head_dim).to(dtype)


def scores_of(products: Tensor, mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Products of queries and keys, scaled, capped and masked: float32 [B, Hq, Q, T].

    Args:
        products: float32 of that shape.
        mask: boolean (True: attended) or floating point (added), and broadcast to that shape.
    """
    scores = products * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(torch.float32)


def reference(query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str) -> Tensor:
    """What `attention` means, in float32 over the whole dequantized cache.

    Args:
        query: [B, Hq, Q, D].
        cache: codes and scale of the keys, codes and scale of the values, for H heads; query head h reads head
            h // (Hq / H).
        mask: boolean (True: attended) or floating point (added), broadcast to [B, Hq, Q, T].
        length: int64 []; positions from it on are not attended to.
        spec: an `AttentionSpec`.

    Returns:
        [B, Hq, Q, Dv] in query's dtype; zeros where nothing is attended to.
    """
    parsed = decode_attention_spec(spec)
    key_codes, key_scale, value_codes, value_scale = cache
    key = dequantize(key_codes, key_scale, parsed.scheme, parsed.key.head_dim)
    value = dequantize(value_codes, value_scale, parsed.scheme, parsed.value.head_dim)
    batch, heads, context, _ = key.shape
    grouped = query.to(torch.float32).unflatten(1, (heads, -1)).flatten(2, 3)
    products = torch.matmul(grouped, key.transpose(-1, -2))
    scores = scores_of(products.reshape(*query.shape[:3], context), mask, parsed)
    outside = None
    if length is not None:
        outside = torch.arange(context, device=query.device) >= length
        scores = scores.masked_fill(outside, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    if outside is not None:  # what lies there may be anything
        value = value.masked_fill(outside[:, None], 0.0)
    y = torch.matmul(weights.reshape(batch, heads, -1, context), value).reshape(*query.shape[:3], value.shape[-1])
    return (y / total.masked_fill(total == 0, 1.0)).to(query.dtype)


def _attention(query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str) -> Tensor:
    if torch.is_grad_enabled() and query.requires_grad:
        raise GradientError(
            "attention over a quantized KV cache is for inference only, and autograd is recording: call the model "
            "under torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False) first"
        )
    if query.device.type == "cpu":
        return torch.ops.qcompile.attention_cpu(query, cache, mask, length, spec)
    if query.device.type == "cuda":
        from qcompile.runtime import attention_gpu

        parsed = decode_attention_spec(spec)
        group, queries = query.shape[1] // cache[0].shape[1], query.shape[2]
        if not isinstance(queries, int) or not attention_gpu.has_kernel(parsed, queries, group, query.dtype):
            return attention_gpu.many_queries(query, cache, mask, length, parsed)
        return torch.ops.qcompile.attention_gpu(query.contiguous(), cache, mask, length, spec)
    raise DeviceError(f"qcompile has kernels for cpu and cuda, not for {query.device.type}")


def _attention_plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    """softmax(query key^T * scale) value, each head of keys read once for all query heads that share it.

    Args:
        query: [B, Hq, Q, D], with key and value of its dtype.
        key, value: [B, H, T, D] and [B, H, T, Dv]; query head h reads head h // (Hq / H).
        mask, length: as in `reference`.
    """
    if query.device.type == "cuda":
        from qcompile.runtime import attention_gpu

        fixed = isinstance(query.shape[2], int)
        group = query.shape[1] // key.shape[1]
        if fixed and attention_gpu.has_plain_kernel(query.shape[2], group, key.shape[3], value.shape[3], query.dtype):
            return torch.ops.qcompile.attention_plain_gpu(query.contiguous(), key, value, mask, length, scale)
    if query.device.type == "cpu" and query.dtype == key.dtype == value.dtype:
        return torch.ops.qcompile.attention_plain_cpu(query, key, value, mask, length, scale)
    mask = combined_mask(query, key.shape[2], mask, length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def combined_mask(query: Tensor, context: int, mask: Tensor | None, length: Tensor | None) -> Tensor | None:
    """A mask that also leaves out positions from `length` on."""
    if length is None:
        return mask
    inside = torch.arange(context, device=query.device) < length
    if mask is None or mask.dtype == torch.bool:
        return inside.expand(query.shape[2], -1) if mask is None else mask & inside
    return mask.masked_fill(~inside, -torch.inf)


def _attention_any(query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str) -> Tensor:
    """`attention_cpu` until the operator of C++ is there, and then for what that has no kernel for."""
    from qcompile.runtime import attention_cpu

    return attention_cpu.attention(query, cache, mask, length, decode_attention_spec(spec))


def _attention_plain_any(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    """What `_attention_any` is, for `attention_plain_cpu`."""
    from qcompile.runtime import attention_cpu

    return attention_cpu.attention_plain(query, key, value, mask, length, scale)


def _attention_gpu(query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str) -> Tensor:
    from qcompile.runtime import attention_gpu

    return attention_gpu.attention(query, cache, mask, length, decode_attention_spec(spec))


def _attention_plain_gpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    from qcompile.runtime import attention_gpu

    return attention_gpu.attention_plain(query, key, value, mask, length, scale)


_library.impl("store_kv", _store_kv, "CompositeImplicitAutograd")
_library.impl("dequantize_kv", _dequantize_kv, "CompositeImplicitAutograd")
_library.impl("attention", _attention, "CompositeImplicitAutograd")
_library.impl("attention_plain", _attention_plain, "CompositeImplicitAutograd")
# C++ registers these two for CPUs: runtime/cpu_operators.py.
_library.impl("attention_cpu", _attention_any, "CompositeExplicitAutograd")
_library.impl("attention_plain_cpu", _attention_plain_any, "CompositeExplicitAutograd")
_library.impl("attention_any", _attention_any, "CPU")
_library.impl("attention_plain_any", _attention_plain_any, "CPU")
_library.impl("attention_gpu", _attention_gpu, "CUDA")
_library.impl("attention_plain_gpu", _attention_plain_gpu, "CUDA")


@torch.library.register_fake("qcompile::attention_cpu", lib=_library)
@torch.library.register_fake("qcompile::attention_gpu", lib=_library)
def _(query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str) -> Tensor:
    return query.new_empty((*query.shape[:3], decode_attention_spec(spec).value.head_dim))


@torch.library.register_fake("qcompile::attention_plain_cpu", lib=_library)
@torch.library.register_fake("qcompile::attention_plain_gpu", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
