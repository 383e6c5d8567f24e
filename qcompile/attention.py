"""The operators of KV caches: storing tokens quantized, reading them all back, and attention that reads for itself.

    store_kv(codes, scale, x, position, spec)         x [B, H, n, D] goes to positions `position` of a cache
    dequantize_kv(codes, scale, length, spec, dtype)  the whole cache [B, H, T, D]
    kv_mask(length, queries, context, window)         what the last tokens of sequences attend to
    attention(query, cache, mask, length, spec)       softmax(query key^T) value, without the dequantized cache
    attention_plain(query, key, value, mask, length, scale)   the same over keys and values that are not quantized

All are composite. All but attention are plain torch, so that Inductor fuses quantization with the rotary embedding
before it; attention is one operator, and on GPUs plain torch for formats that no kernel reads.

Stores, reads and `attention` take a paged cache too: pages of tokens that any sequence may have, as in "Efficient
Memory Management for Large Language Model Serving with PagedAttention" (W. Kwon et al., 2023). Its tensors have pages
for the batch and `page_size` for T, and `block_table`, int32 [B, most pages], says which page holds the tokens from
i * page_size on of each sequence. What is in no page of a sequence is attended to nowhere, and entries behind its last
page may be anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.compat import constant
from qcompile.errors import DeviceError, GradientError
from qcompile.kv_cache import (
    AttentionSpec,
    KVScheme,
    decode_attention_spec,
    decode_kv_spec,
    dequantize,
    gather_pages,
    quantize,
    rotated,
)

_library = torch.library.Library("qcompile", "FRAGMENT")
_PLACES = "*, Tensor? start=None, Tensor? block_table=None"
_library.define(
    "store_kv(Tensor(a!) codes, Tensor(b!) scale, Tensor x, Tensor position, str spec, "
    "*, Tensor? block_table=None) -> ()"
)
_library.define(
    "dequantize_kv(Tensor codes, Tensor scale, Tensor? length, str spec, ScalarType dtype, "
    "*, Tensor? block_table=None) -> Tensor"
)
_library.define("kv_mask(Tensor length, SymInt queries, SymInt context, int window) -> Tensor")
for _name in ("attention", "attention_gpu", "attention_cpu", "attention_any"):
    _library.define(
        f"{_name}(Tensor query, Tensor[] cache, Tensor? mask, Tensor? length, str spec, {_PLACES}) -> Tensor"
    )
_PLAIN = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? length, float scale"
_library.define(f"attention_plain_gpu({_PLAIN}) -> Tensor")
for _name in ("attention_plain", "attention_plain_cpu", "attention_plain_any"):
    _library.define(f"{_name}({_PLAIN}, bool causal=False, int window=0) -> Tensor")


def _store_kv(
    codes: Tensor, scale: Tensor, x: Tensor, position: Tensor, spec: str, *, block_table: Tensor | None = None
) -> None:
    """Quantize new keys or values into a cache.

    Args:
        codes: uint8 [B, H, T, width]; scale: float32 [], [H], or [B, H, T], which is then written too.
        x: [B, H, n, D].
        position: int64 [n], each below T; with a block table [B, n], of which those below 0 go to page 0, which then
            must belong to no sequence.
    """
    scheme = decode_kv_spec(spec).scheme
    new_codes, new_scale = quantize(x, scheme, None if scheme.dynamic else scale)
    halves = [(codes, new_codes), (scale, new_scale)] if scheme.dynamic else [(codes, new_codes)]
    if block_table is None:
        for stored, new in halves:
            stored.index_copy_(2, position, new)
        return
    size = codes.shape[2]
    page = torch.gather(block_table, 1, (position // size).clamp(min=0)).masked_fill(position < 0, 0)
    for stored, new in halves:
        stored[page, :, position % size] = new.transpose(1, 2)


def _dequantize_kv(
    codes: Tensor,
    scale: Tensor,
    length: Tensor | None,
    spec: str,
    dtype: torch.dtype,
    *,
    block_table: Tensor | None = None,
) -> Tensor:
    """All keys or values [B, H, T, D]. At positions from `length` on it is zeros with a block table, else anything."""
    parsed = decode_kv_spec(spec)
    if block_table is not None:
        codes = gather_pages(codes, block_table)
        scale = gather_pages(scale, block_table) if parsed.scheme.dynamic else scale
    read = dequantize(codes, scale, parsed.scheme, parsed.head_dim).to(dtype)
    unused = outside_of(read.shape[2], length, None, read.device) if block_table is not None else None
    return read if unused is None else read.masked_fill(unused.mT, 0.0)


def outside_of(context: int, length: Tensor | None, start: Tensor | None, device: torch.device) -> Tensor | None:
    """Positions that are not attended to: bool [1 or B, 1, 1, T], or None if all are.

    Args:
        length, start: integers [] or [B]; positions from `length` on, and those before `start`, are outside.
    """
    position = torch.arange(context, device=device)
    behind = None if length is None else position >= length.reshape(-1, 1, 1, 1)
    before = None if start is None else position < start.reshape(-1, 1, 1, 1)
    return before if behind is None else behind if before is None else behind | before


def causal_mask(queries: int, start: int, stop: int, end: Tensor | int, window: int, device: torch.device) -> Tensor:
    """What a causal spec lets queries at the last positions before `end` attend to: bool [1 or B, 1, Q, stop - start].

    Args:
        start, stop: the positions that are asked about.
        end: one number, or integers [] or [B].
    """
    ends = end.reshape(-1, 1, 1, 1) if isinstance(end, Tensor) else end
    last = torch.arange(queries, device=device)[None, None, :, None] + (ends - queries)
    position = torch.arange(start, stop, device=device)
    return (position <= last) & (position > last - window) if window else position <= last


def _kv_mask(length: Tensor, queries: int, context: int, window: int) -> Tensor:
    """What the last tokens of each sequence attend to: bool [B, 1, queries, context].

    Args:
        length: integers [B], tokens of each sequence, these included. Tokens before position 0 attend to nothing.
        window: to how many positions a token attends at most, its own among them; 0 for all.
    """
    return causal_mask(queries, 0, context, length, window, length.device)


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


def rounded_to_e4m3(x: Tensor, unit: Tensor | float) -> Tensor:
    """Float32 numbers of at most 448 units, as E4M3 codes of them have them."""
    return (x / unit).to(torch.float8_e4m3fn).to(torch.float32) * unit


def reference(
    query: Tensor,
    cache: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: str,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """What `attention` means, in float32 over the whole dequantized cache.

    With `compute` "fp8" the elements of a query are rounded to E4M3, in 448ths of their greatest, and weights, of which
    the greatest is 1, in 256ths.

    Args:
        query: [B, Hq, Q, D].
        cache: codes and scale of the keys, codes and scale of the values, for H heads; query head h reads head
            h // (Hq / H).
        mask: boolean (True: attended) or floating point (added), broadcast to [B, Hq, Q, T].
        length: integers [] or [B]; positions from it on are not attended to.
        spec: an `AttentionSpec`.
        start: integers [] or [B]; positions before it are not attended to.
        block_table: int32 [B, most pages], for a paged cache.

    Returns:
        [B, Hq, Q, Dv] in query's dtype; zeros where nothing is attended to.
    """
    parsed = decode_attention_spec(spec)
    key_codes, key_scale, value_codes, value_scale = paged_out(cache, block_table)
    key = dequantize(key_codes, key_scale, parsed.scheme, parsed.key.head_dim)
    value = dequantize(value_codes, value_scale, parsed.scheme, parsed.value.head_dim)
    batch, heads, context, _ = key.shape
    grouped = query.to(torch.float32).unflatten(1, (heads, -1)).flatten(2, 3)
    if parsed.scheme.compute == "fp8":
        grouped = rounded_to_e4m3(grouped, (grouped.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30))
    products = torch.matmul(grouped, key.transpose(-1, -2))
    scores = scores_of(products.reshape(*query.shape[:3], context), mask, parsed)
    outside = outside_of(context, length, start, query.device)
    if outside is not None:  # what lies there may be anything
        scores = scores.masked_fill(outside, -torch.inf)
        value = value.masked_fill(outside.mT, 0.0)
    if parsed.causal:
        end = context if length is None else length.clamp(max=context)
        seen = causal_mask(query.shape[2], 0, context, end, parsed.window, query.device)
        scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    if parsed.scheme.compute == "fp8":
        weights = rounded_to_e4m3(weights, 2.0**-8)
    y = torch.matmul(weights.reshape(batch, heads, -1, context), value).reshape(*query.shape[:3], value.shape[-1])
    return (y / total.masked_fill(total == 0, 1.0)).to(query.dtype)


def paged_out(cache: list[Tensor], block_table: Tensor | None) -> list[Tensor]:
    """A paged cache's tensors as those of a cache that is not; others as they are. Static scales stay."""
    if block_table is None:
        return cache
    return [gather_pages(t, block_table) if t.dim() > 2 else t for t in cache]


def spec_as_stored(spec: AttentionSpec) -> AttentionSpec:
    """Attention to rotated keys and values as they lie in the cache: of rotated queries, with a rotated result."""
    halves = (replace(half, scheme=replace(half.scheme, rotate=False)) for half in (spec.key, spec.value))
    key, value = halves
    return replace(spec, key=key, value=value)


@constant
def _without_fp8(device: torch.device) -> str | None:
    """The name of a device that does not multiply FP8."""
    if device.type != "cuda":
        return device.type
    from qcompile.runtime import attention_gpu, gpu

    name = gpu.target_of(device)
    return None if attention_gpu.multiplies_fp8(name) else name


def check_compute(scheme: KVScheme, device: torch.device, where: str) -> None:
    """Refuse to multiply in FP8 where nothing does.

    Args:
        where: what the message begins with.

    Raises:
        DeviceError: the cache asks for it, and the device has no such products.
    """
    if scheme.compute != "fp8" or device.type == "meta" or (name := _without_fp8(device)) is None:
        return
    raise DeviceError(
        f'{where}: the KV cache has "compute": "fp8", and {name} does not multiply FP8 (NVIDIA from sm_89 on, AMD '
        'gfx950 and gfx12 do); leave "compute" out, and codes are multiplied in 16 bits'
    )


def _attention(
    query: Tensor,
    cache: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: str,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    if torch.is_grad_enabled() and query.requires_grad:
        raise GradientError(
            "attention over a quantized KV cache is for inference only, and autograd is recording: call the model "
            "under torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False) first"
        )
    parsed = decode_attention_spec(spec)
    check_compute(parsed.scheme, query.device, "attention")
    if parsed.scheme.rotate:
        as_stored = spec_as_stored(parsed).encode()
        y = _attention(
            rotated(query).to(query.dtype), cache, mask, length, as_stored, start=start, block_table=block_table
        )
        return rotated(y).to(y.dtype)
    if query.device.type == "cpu":
        return torch.ops.qcompile.attention_cpu(query, cache, mask, length, spec, start=start, block_table=block_table)
    if query.device.type == "cuda":
        from qcompile.runtime import attention_gpu

        if not attention_gpu.has_kernel(parsed, query.dtype):
            return attention_gpu.in_plain_torch(
                query, cache, mask, length, parsed, start=start, block_table=block_table
            )
        return torch.ops.qcompile.attention_gpu(
            query.contiguous(), cache, mask, length, spec, start=start, block_table=block_table
        )
    raise DeviceError(f"qcompile has kernels for cpu and cuda, not for {query.device.type}")


def _attention_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    scale: float,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """softmax(query key^T * scale) value, each head of keys read once for all query heads that share it.

    Args:
        query: [B, Hq, Q, D], with key and value of its dtype.
        key, value: [B, H, T, D] and [B, H, T, Dv]; query head h reads head h // (Hq / H).
        mask, length: as in `reference`.
        causal, window: as in an `AttentionSpec`.
    """
    if query.device.type == "cuda" and not causal:
        from qcompile.runtime import attention_gpu

        fixed = isinstance(query.shape[2], int)
        group = query.shape[1] // key.shape[1]
        if fixed and attention_gpu.has_plain_kernel(query.shape[2], group, key.shape[3], value.shape[3], query.dtype):
            return torch.ops.qcompile.attention_plain_gpu(query.contiguous(), key, value, mask, length, scale)
    if query.device.type == "cpu" and query.dtype == key.dtype == value.dtype:
        return torch.ops.qcompile.attention_plain_cpu(query, key, value, mask, length, scale, causal, window)
    mask = combined_mask(query, key.shape[2], mask, length, causal, window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def combined_mask(
    query: Tensor, context: int, mask: Tensor | None, length: Tensor | None, causal: bool = False, window: int = 0
) -> Tensor | None:
    """A mask that also leaves out positions from `length` on, and those that a causal spec does."""
    if length is None and not causal:
        return mask
    if causal:
        end: Tensor | int = context if length is None else length.clamp(max=context)
        inside = causal_mask(query.shape[2], 0, context, end, window, query.device)
    else:
        assert length is not None
        inside = (torch.arange(context, device=query.device) < length).expand(query.shape[2], -1)
    if mask is None or mask.dtype == torch.bool:
        return inside if mask is None else mask & inside
    return mask.masked_fill(~inside, -torch.inf)


def attends_from_many(query: Tensor) -> bool:
    """Whether there is a kernel of attention from many tokens of such a query to keys that are not quantized."""
    if query.device.type != "cpu":
        return False
    from qcompile.runtime import attention_cpu

    return attention_cpu.multiplies_squares(query.dtype)


def _attention_any(
    query: Tensor,
    cache: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: str,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """`attention_cpu` until the operator of C++ is there, and then for what that has no kernel for."""
    from qcompile.runtime import attention_cpu

    parsed = decode_attention_spec(spec)
    y = attention_cpu.attention(query, cache, mask, length, parsed, start=start, block_table=block_table)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _attention_plain_any(*given: Any) -> Tensor:
    """What `_attention_any` is, for `attention_plain_cpu`."""
    from qcompile.runtime import attention_cpu

    y = attention_cpu.attention_plain(*given)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def prepare(dtype: torch.dtype, spec: str | None) -> None:
    """Have what attention on CPUs calls, over a cache that is quantized if there is a spec, before it is called."""
    from qcompile.runtime import attention_cpu

    attention_cpu.prepare(dtype, None if spec is None else spec_as_stored(decode_attention_spec(spec)))


def _attention_gpu(
    query: Tensor,
    cache: list[Tensor],
    mask: Tensor | None,
    length: Tensor | None,
    spec: str,
    *,
    start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    from qcompile.runtime import attention_gpu

    parsed = decode_attention_spec(spec)
    return attention_gpu.attention(query, cache, mask, length, parsed, start=start, block_table=block_table)


def _attention_plain_gpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float
) -> Tensor:
    from qcompile.runtime import attention_gpu

    return attention_gpu.attention_plain(query, key, value, mask, length, scale)


_library.impl("store_kv", _store_kv, "CompositeImplicitAutograd")
_library.impl("dequantize_kv", _dequantize_kv, "CompositeImplicitAutograd")
_library.impl("kv_mask", _kv_mask, "CompositeImplicitAutograd")
_library.impl("attention", _attention, "CompositeImplicitAutograd")
_library.impl("attention_plain", _attention_plain, "CompositeImplicitAutograd")
# C++ registers these two for CPUs: runtime/cpu_operators.py.
_library.impl("attention_cpu", _attention_any, "CompositeExplicitAutograd")
_library.impl("attention_plain_cpu", _attention_plain_any, "CompositeExplicitAutograd")
_library.impl("attention_any", _attention_any, "CPU")
_library.impl("attention_plain_any", _attention_plain_any, "CPU")
_library.impl("attention_gpu", _attention_gpu, "CUDA")
_library.impl("attention_plain_gpu", _attention_plain_gpu, "CUDA")


def empty_result(query: Tensor, size: int) -> Tensor:
    """Where attention on CPUs puts its result [B, Hq, Q, size]: all heads of a token together, as readers want them."""
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, size)).transpose(1, 2)


@torch.library.register_fake("qcompile::attention_cpu", lib=_library)
def _(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str, **places: Tensor | None
) -> Tensor:
    return empty_result(query, decode_attention_spec(spec).value.head_dim)


@torch.library.register_fake("qcompile::attention_gpu", lib=_library)
def _(
    query: Tensor, cache: list[Tensor], mask: Tensor | None, length: Tensor | None, spec: str, **places: Tensor | None
) -> Tensor:
    return query.new_empty((*query.shape[:3], decode_attention_spec(spec).value.head_dim))


@torch.library.register_fake("qcompile::attention_plain_cpu", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return empty_result(query, value.shape[3])


@torch.library.register_fake("qcompile::attention_plain_gpu", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, length: Tensor | None, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
