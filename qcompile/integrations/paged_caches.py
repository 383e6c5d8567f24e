"""Paged caches for transformers' models: sequences of unequal length that come and go, decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from qcompile.attention import check_compute
from qcompile.caches import PagedKVCache
from qcompile.checkpoint.kv_scales import KVScales
from qcompile.errors import ConfigError
from qcompile.integrations.caches import attention_scales, cache_argument, layers_of, scheme_of, text_config
from qcompile.kv_cache import KVScheme
from qcompile.pages import PageTable

_KINDS = {"full_attention", "sliding_attention"}


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer of a `TransformersPagedCache`; `update` returns them dequantized."""

    is_compileable = False
    is_sliding = False

    def __init__(self, pages: PageTable, kv_cache: KVScheme, scales: KVScales | None) -> None:
        super().__init__()
        self.pages, self.kv_cache, self.scales = pages, kv_cache, scales
        self.rows: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the heads, sizes and dtype of the first keys and values."""
        scales = {} if self.scales is None else {"k_scale": self.scales.k_scale, "v_scale": self.scales.v_scale}
        self.store = PagedKVCache(
            self.pages,
            key_states.shape[1],
            key_states.shape[3],
            self.kv_cache,
            dtype=key_states.dtype,
            value_dim=value_states.shape[3],
            **scales,
        )
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; 0 before the first update."""
        return sum(t.nbytes for t in self.store.buffers()) if self.is_initialized else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the last tokens of the rows of this call; return all their keys and values [b, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.store.update(key_states, value_states, self.rows)

    def get_seq_length(self) -> int:
        raise ConfigError(
            "sequences of a paged cache have lengths of their own, which transformers' generate does not know: call "
            "the model with **cache.inputs(...), or give generate a qcompile.TransformersCache"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise ConfigError("a model with a paged cache is called with the masks of **cache.inputs(...)")

    def get_max_length(self) -> int:
        return self.pages.max_length


class TransformersPagedCache(Cache):  # type: ignore[misc]
    """A paged cache for a transformers model, quantized unless `kv_cache` is "auto" or the name of a type.

    Make room with `cache.pages.append`, then call `model(ids, **cache.inputs(tokens))`. Layers that attend to a sliding
    window read that window. Where all do, pages before the longest are free again; else the others read them.

    Attributes:
        pages: the rows, and which pages their sequences have.

    Args:
        model: whose configuration says what the layers are, and whose attention modules may have scales.
        kv_cache: see `TransformersCache`.
        batch, max_length, num_pages, page_size: see `PageTable`.

    Raises:
        ConfigError: a scheme that cannot be; layers of another kind than full attention and sliding windows.
        DeviceError: products that the model's device has not.
    """

    def __init__(
        self,
        model: nn.Module,
        kv_cache: Any = "fp8",
        *,
        batch: int,
        max_length: int,
        num_pages: int | None = None,
        page_size: int = 64,
    ) -> None:
        scheme = scheme_of(kv_cache, model)
        config = text_config(model)
        layers = layers_of(model)
        if unknown := {kind for kind, _ in layers} - _KINDS:
            raise ConfigError(f"paged caches are for full and sliding attention; the model has {sorted(unknown)} too")
        device = next(model.parameters()).device
        check_compute(scheme, device, f"a cache for {type(model).__name__}")
        self._windows = {kind: given["sliding_window"] if kind == "sliding_attention" else 0 for kind, given in layers}
        windows = list(self._windows.values())
        window = max(windows) if all(windows) else 0
        self.pages = PageTable(batch, max_length, pages=num_pages, page_size=page_size, window=window, device=device)
        self._added = config._attn_implementation == "eager"
        self._argument = cache_argument(model)
        self._dtype = next(model.parameters()).dtype
        scales = attention_scales(model)
        super().__init__(layers=[PagedLayer(self.pages, scheme, scales.get(i)) for i in range(len(layers))])

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales that are allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def inputs(self, tokens: int, rows: Tensor | Sequence[int] | None = None) -> dict[str, Any]:
        """Arguments of the next call of the model, about the last tokens of some rows.

        Args:
            tokens: of each row, in the call's `input_ids` [b, tokens]; shorter sequences are padded on the left.
            rows: integers [b], the rows that the call is about; all, in their order, unless given.

        Returns:
            The cache, under the name that the model has for it, `position_ids` and `attention_mask`.
        """
        if rows is not None and not isinstance(rows, Tensor):
            rows = torch.tensor(rows, device=self.pages.lengths.device)
        for layer in self.layers:
            layer.rows = rows
        masks = {kind: self._mask(tokens, rows, window) for kind, window in self._windows.items()}
        return {
            self._argument: self,
            "position_ids": self.pages.positions(tokens, rows).clamp(min=0),
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        }

    def _mask(self, tokens: int, rows: Tensor | None, window: int) -> Tensor:
        mask = self.pages.mask(tokens, rows, window=window)
        return torch.where(mask, 0.0, torch.finfo(self._dtype).min).to(self._dtype) if self._added else mask
