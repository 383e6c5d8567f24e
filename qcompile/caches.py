"""Quantized KV caches, static and paged: their tensors, and modules for models that keep their own.

Stores and reads are the operators of `qcompile.attention`. In eager mode a read gives dequantized keys and values; in a
compiled graph the pass `quantize_attention` takes reads into the attention that follows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.attention import check_compute
from qcompile.errors import ConfigError
from qcompile.formats import get_format
from qcompile.kv_cache import KVScheme, KVSpec, parse_kv_cache
from qcompile.pages import PageTable

_E4M3_MAX = get_format("fp8_e4m3").absmax


def half_of(
    kv_cache: KVScheme, shape: tuple[int, int, int, int], device: torch.device, given: Tensor | None
) -> tuple[Tensor, Tensor, KVSpec]:
    """An empty cache of keys or of values: codes of zeros, the scale (1 for numbers as they are), and the spec of both.

    Args:
        shape: (B, H, T, D).
        given: the scale of E4M3 codes, [] or [H], as checkpoints and calibration have it: greatest magnitude / 448. One
            a head is kept even if the scheme asks for one a tensor.

    Raises:
        ConfigError: integers with one scale for many tokens that nothing gave; a scale of another shape.
        DeviceError: products that the device has not.
    """
    check_compute(kv_cache, device, f"a cache on {device}")
    batch, heads, length, head_dim = shape
    fmt, scales = kv_cache.format, kv_cache.scales
    if kv_cache.compact:
        count = kv_cache.scale_count(head_dim)
        scale = torch.empty(batch, heads, length, count, device=device, dtype=torch.bfloat16)
        _clear_scale(scale, kv_cache)
    elif kv_cache.dynamic:
        scale = torch.ones(batch, heads, length, device=device)
    elif given is None or kv_cache.plain:
        if fmt.scales == "token":
            raise ConfigError(
                f"kv_cache {fmt.name} with scales per {scales}: nothing gives the scales; calibrate with "
                'qcompile.calibrate_kv_cache(model, batches), or choose "scales": "token"'
            )
        scale = torch.ones(heads if scales == "head" else (), device=device)
    else:
        if given.dim() > 1 or given.numel() not in (1, heads):
            raise ConfigError(f"a scale of the KV cache has shape {tuple(given.shape)}; it is [] or [{heads}]")
        scale = given.to(device=device, dtype=torch.float32) * (_E4M3_MAX / fmt.absmax)
        if given.numel() > 1:
            scales = "head"
        scale = scale.reshape(-1).expand(heads).clone() if scales == "head" else scale.reshape(())
    spec = KVSpec(scheme=replace(kv_cache, scales=scales), head_dim=head_dim)
    zero = fmt.encode(torch.zeros(head_dim, device=device))
    return zero.expand(batch, heads, length, fmt.width(head_dim)).contiguous(), scale, spec


def _clear_scale(scale: Tensor, scheme: KVScheme) -> None:
    """Scales of 1, offsets of 0."""
    scale.fill_(1.0)
    if not scheme.symmetric:
        scale[..., scale.shape[-1] // 2 :] = 0.0


def clear_half(codes: Tensor, scale: Tensor, spec: KVSpec) -> None:
    """Empty a cache in place."""
    codes.copy_(spec.scheme.format.encode(torch.zeros(spec.head_dim, device=codes.device)).expand_as(codes))
    if spec.scheme.dynamic:
        _clear_scale(scale, spec.scheme)


class KVCache(nn.Module):
    """The keys and values of one layer, for models that call `update` themselves.

    Buffers, none of which a `state_dict` holds: `key_codes` and `value_codes`, uint8 [batch, heads, length, width] or
    numbers as they are, and their float32 scales.

    Args:
        batch, heads, length, head_dim: heads of keys; the most tokens; the size of a key.
        kv_cache: what `parse_kv_cache` takes; "auto" is `dtype`.
        dtype: of the keys and values that `update` returns.
        value_dim: the size of a value; `head_dim` unless given.
        k_scale, v_scale: of E4M3 codes, [] or [heads]; see `half_of`.

    Raises:
        ConfigError: a scheme that cannot be.
    """

    key_codes: Tensor
    key_scale: Tensor
    value_codes: Tensor
    value_scale: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        kv_cache: Any = "fp8",
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        value_dim: int | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        scheme = parse_kv_cache(kv_cache, dtype)
        if scheme is None:
            raise ConfigError("a quantized KV cache needs a format, such as 'fp8'")
        self.dtype = dtype
        sizes = {"key": (head_dim, k_scale), "value": (head_dim if value_dim is None else value_dim, v_scale)}
        specs = {}
        for name, (size, given) in sizes.items():
            codes, scale, spec = half_of(scheme, (batch, heads, length, size), torch.device(device), given)
            self.register_buffer(f"{name}_codes", codes, persistent=False)
            self.register_buffer(f"{name}_scale", scale, persistent=False)
            specs[name] = spec
        self.key_spec, self.value_spec = specs["key"], specs["value"]
        self._key_text, self._value_text = self.key_spec.encode(), self.value_spec.encode()

    def update(self, position: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [batch, heads, n, size] at `position`, int64 [n]; return the whole cache.

        What is returned behind the last position is not specified: attention needs a mask that leaves it out.
        """
        ops = torch.ops.qcompile
        ops.store_kv(self.key_codes, self.key_scale, key, position, self._key_text)
        ops.store_kv(self.value_codes, self.value_scale, value, position, self._value_text)
        length = position.amax() + 1
        return (
            ops.dequantize_kv(self.key_codes, self.key_scale, length, self._key_text, self.dtype),
            ops.dequantize_kv(self.value_codes, self.value_scale, length, self._value_text, self.dtype),
        )

    def reset(self) -> None:
        """Empty the cache in place."""
        clear_half(self.key_codes, self.key_scale, self.key_spec)
        clear_half(self.value_codes, self.value_scale, self.value_spec)


class PagedKVCache(KVCache):
    """The keys and values of one layer, in pages that sequences take as they grow.

    Buffers are those of a `KVCache` with pages for `batch` and the tokens of a page for `length`.

    Args:
        pages: which pages each sequence has; one for all layers.
        heads, head_dim, kv_cache: see `KVCache`, as the rest.

    Raises:
        ConfigError: a scheme that cannot be.
    """

    def __init__(self, pages: PageTable, heads: int, head_dim: int, kv_cache: Any = "fp8", **options: Any) -> None:
        device = pages.block_table.device
        super().__init__(pages.pages + 1, heads, pages.page_size, head_dim, kv_cache, device=device, **options)
        self.pages = pages
        pages.attach(self)

    def update(  # type: ignore[override]
        self, key: Tensor, value: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store the last tokens of each sequence, for which `pages.append` has made room; return all of its tokens.

        Args:
            key, value: [b, heads, n, size].
            rows: integers [b], the rows of the page table that these are of; all, in their order, unless given.

        Returns:
            keys and values [b, heads, T, size] for the longest sequence that may be; attention needs `pages.mask`.
        """
        ops = torch.ops.qcompile
        table, lengths = self.pages.of(rows)
        position = self.pages.positions(key.shape[2], rows)
        ops.store_kv(self.key_codes, self.key_scale, key, position, self._key_text, block_table=table)
        ops.store_kv(self.value_codes, self.value_scale, value, position, self._value_text, block_table=table)
        return (
            ops.dequantize_kv(self.key_codes, self.key_scale, lengths, self._key_text, self.dtype, block_table=table),
            ops.dequantize_kv(
                self.value_codes, self.value_scale, lengths, self._value_text, self.dtype, block_table=table
            ),
        )

    def copy_page(self, source: int, target: int) -> None:
        """Let a page hold what another one does."""
        for tensor in (self.key_codes, self.key_scale, self.value_codes, self.value_scale):
            if tensor.dim() > 2:
                tensor[target].copy_(tensor[source])
