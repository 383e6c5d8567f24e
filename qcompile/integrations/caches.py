"""Static quantized caches for transformers: `generate(..., past_key_values=TransformersCache(model, "fp8", ...))`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from qcompile import compat
from qcompile.attention import check_compute
from qcompile.caches import clear_half, half_of
from qcompile.checkpoint.kv_scales import KVScales
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import ConfigError, shown
from qcompile.formats import get_format
from qcompile.kv_cache import KVScheme, parse_kv_cache, quantize

_FULL = ("full_attention",)
_SLIDING = ("sliding_attention", "chunked_attention")


class QuantizedStaticLayer(StaticLayer):  # type: ignore[misc]
    """A `StaticLayer` whose `keys` and `values` are codes, uint8 [B, H, max_cache_len, width].

    `update` quantizes what it stores, and returns the whole cache dequantized. That is how eager attention sees it; a
    graph compiled by qcompile reads the codes.

    Attributes:
        empty: whether nothing was stored since it was made or reset. A graph then knows the positions of a prompt.
    """

    def __init__(self, max_cache_len: int, kv_cache: KVScheme, scales: KVScales | None = None, **kwargs: Any) -> None:
        super().__init__(max_cache_len, **kwargs)
        self.kv_cache, self.scales, self.empty = kv_cache, scales, True

    def get_seq_length(self) -> Any:
        """Tokens that are stored: a number where a graph may know it, else a tensor."""
        return 0 if self.empty else super().get_seq_length()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, sizes, dtype and device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        k_scale, v_scale = (None, None) if self.scales is None else (self.scales.k_scale, self.scales.v_scale)
        self.keys, self.key_scale, self.key_spec = half_of(
            self.kv_cache, (*shape, self.k_head_dim), self.device, k_scale
        )
        self.values, self.value_scale, self.value_spec = half_of(
            self.kv_cache, (*shape, self.v_head_dim), self.device, v_scale
        )
        self.key_text, self.value_text = self.key_spec.encode(), self.value_spec.encode()
        self.cumulative_length: Tensor = self.cumulative_length.to(self.device)
        compat.mark_static(self.keys, self.key_scale, self.values, self.value_scale, self.cumulative_length)
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; 0 before the first update."""
        if not self.is_initialized:
            return 0
        return sum(t.nbytes for t in (self.keys, self.key_scale, self.values, self.value_scale))

    def _store(self, key_states: Tensor, value_states: Tensor) -> None:
        """At the positions after those that are stored."""
        count = key_states.shape[-2]
        position = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        self.empty = False
        torch.ops.qcompile.store_kv(self.keys, self.key_scale, key_states, position, self.key_text)
        torch.ops.qcompile.store_kv(self.values, self.value_scale, value_states, position, self.value_text)

    def _read(self, length: Tensor | None) -> tuple[Tensor, Tensor]:
        read = torch.ops.qcompile.dequantize_kv
        return (
            read(self.keys, self.key_scale, length, self.key_text, self.dtype),
            read(self.values, self.value_scale, length, self.value_text, self.dtype),
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store, then return all keys and values [B, H, max_cache_len, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._store(key_states, value_states)
        return self._read(self.cumulative_length)

    def reset(self) -> None:
        """Empty the cache in place."""
        if self.is_initialized:
            clear_half(self.keys, self.key_scale, self.key_spec)
            clear_half(self.values, self.value_scale, self.value_spec)
        self.cumulative_length.zero_()
        self.empty = True

    def _per_token(self) -> list[Tensor]:
        """The tensors that differ between sequences and tokens."""
        scales = [self.key_scale, self.value_scale] if self.kv_cache.dynamic else []
        return [self.keys, self.values, *scales]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i continue what sequence `beam_idx[i]` has, in place."""
        if self.is_initialized:
            for tensor in self._per_token():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def offload(self) -> None:
        raise NotImplementedError("a quantized cache is not offloaded")

    prefetch = offload


class QuantizedSlidingLayer(QuantizedStaticLayer, StaticSlidingWindowLayer):  # type: ignore[misc]
    """Keeps the last `sliding_window` tokens, oldest first, as `StaticSlidingWindowLayer` does."""

    def __init__(
        self, max_cache_len: int, sliding_window: int, kv_cache: KVScheme, scales: KVScales | None = None
    ) -> None:
        super().__init__(max_cache_len=max_cache_len, kv_cache=kv_cache, scales=scales, sliding_window=sliding_window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store, then return the window, or all that these tokens may attend to if they outrun it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, before = key_states.shape[-2], self.cumulative_length_int
        self.cumulative_length_int += count
        self.empty = False
        if before + count <= self.max_cache_len:
            self._store(key_states, value_states)
            return self._read(self.cumulative_length)
        if before >= self.max_cache_len and count == 1:
            for tensor in self._per_token():
                tensor.copy_(tensor.roll(-1, dims=2))
            last = torch.tensor([self.max_cache_len - 1], device=self.device)
            torch.ops.qcompile.store_kv(self.keys, self.key_scale, key_states, last, self.key_text)
            torch.ops.qcompile.store_kv(self.values, self.value_scale, value_states, last, self.value_text)
            return self._read(None)
        # Of a full window the oldest token is out of sight of all new ones.
        kept = slice(1, None) if before >= self.max_cache_len else slice(0, before)
        whole = []
        halves = (
            (self.keys, self.key_scale, self.key_spec, self.key_text, key_states),
            (self.values, self.value_scale, self.value_spec, self.value_text, value_states),
        )
        for codes, scale, spec, text, states in halves:
            new_codes, new_scale = quantize(states, spec.scheme, None if spec.scheme.dynamic else scale)
            codes_all = torch.cat([codes[:, :, kept], new_codes], 2)
            scale_all = torch.cat([scale[:, :, kept], new_scale], 2) if spec.scheme.dynamic else scale
            codes.copy_(codes_all[:, :, -self.max_cache_len :])
            if spec.scheme.dynamic:
                scale.copy_(scale_all[:, :, -self.max_cache_len :])
            whole.append(torch.ops.qcompile.dequantize_kv(codes_all, scale_all, None, text, self.dtype))
        return whole[0], whole[1]

    def reset(self) -> None:
        """Empty the cache in place."""
        super().reset()
        self.cumulative_length_int = 0


def scheme_of(kv_cache: Any, model: nn.Module) -> KVScheme:
    """A scheme from what `parse_kv_cache` takes, "auto" for the model's type, or from a configuration that has one."""
    in_file = isinstance(kv_cache, Path) or (isinstance(kv_cache, str) and Path(kv_cache).suffix != "")
    if in_file or isinstance(kv_cache, QuantConfig) or (isinstance(kv_cache, Mapping) and "format" not in kv_cache):
        scheme = parse_config(kv_cache).kv_cache
    else:
        scheme = parse_kv_cache(kv_cache, next(model.parameters()).dtype)
    if scheme is None:
        raise ConfigError('the configuration has no kv_cache; add one, such as "kv_cache": "fp8"')
    return scheme


def text_config(model: nn.Module) -> Any:
    """The configuration of a transformers model's decoder.

    Raises:
        ConfigError: another library's model.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ConfigError(
            f"{type(model).__name__} is no model of transformers; models that keep their own cache take "
            "qcompile.caches.KVCache"
        )
    return config.get_text_config(decoder=True)


def layers_of(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """For each layer of a model its kind, and what transformers makes its cache with."""
    kinds, given = get_layer_types_and_kwargs(text_config(model))
    # Releases up to 5.17 at least have one dictionary for all layers.
    return list(zip(kinds, [given] * len(kinds) if isinstance(given, dict) else given, strict=True))


def cache_argument(model: nn.Module) -> str:
    """What a model's `forward` calls its cache: `cache` in releases from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def attention_scales(model: nn.Module) -> dict[int, KVScales]:
    """The scales that a checkpoint or `calibrate_kv_cache` left on attention modules, by the number of the layer."""
    return {
        int(module.layer_idx): module.kv_scales  # type: ignore[arg-type,misc]
        for module in model.modules()
        if isinstance(getattr(module, "kv_scales", None), KVScales) and hasattr(module, "layer_idx")
    }


class TransformersCache(StaticCache):  # type: ignore[misc]
    """A static cache whose attention layers are quantized.

    Layers of other kinds (linear attention, state spaces) are what `StaticCache` makes them.

    Args:
        model: whose configuration says what the layers are, and whose attention modules may have scales.
        kv_cache: what `qcompile.kv_cache.parse_kv_cache` takes, or a configuration with the key `kv_cache`.
        max_cache_len: the most tokens of a sequence, those it begins with included.

    Raises:
        ConfigError: a scheme that cannot be.
        DeviceError: products that the model's device has not.
    """

    def __init__(self, model: nn.Module, kv_cache: Any = "fp8", *, max_cache_len: int) -> None:
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ConfigError(f"max_cache_len is a number of tokens, not {shown(max_cache_len)}")
        scheme = scheme_of(kv_cache, model)
        check_compute(scheme, next(model.parameters()).device, f"a cache for {type(model).__name__}")
        scales = attention_scales(model)
        layers = []
        for index, (kind, given) in enumerate(layers_of(model)):
            if kind in _FULL:
                layer = QuantizedStaticLayer(max_cache_len, scheme, scales.get(index))
            elif kind in _SLIDING:
                layer = QuantizedSlidingLayer(max_cache_len, given["sliding_window"], scheme, scales.get(index))
            else:
                layer = STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=max_cache_len, **given)
            layers.append(layer)
        Cache.__init__(self, layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales that are allocated."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedStaticLayer))


def use_kv_cache(model: nn.Module, kv_cache: Any = "fp8") -> nn.Module:
    """Let `model.generate(..., cache_implementation="static")` make caches of that kind.

    transformers has a closed list of `cache_implementation`s, so "static" is given another meaning for this one model.

    Raises:
        ConfigError: a scheme that cannot be.
    """
    scheme = scheme_of(kv_cache, model)

    def prepare(self: Any, *args: Any, max_cache_len: int, **kwargs: Any) -> TransformersCache:
        length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
        self._previous_max_cache_length = length
        return TransformersCache(self, scheme, max_cache_len=length)

    model._prepare_static_cache = types.MethodType(prepare, model)  # type: ignore[assignment]
    return model


class _Recorder(DynamicCache):  # type: ignore[misc]
    """Notes the greatest magnitude of each head's keys and values."""

    def __init__(self, config: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__(config=config)
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tops = tuple(states.abs().amax((0, 2, 3)).float() for states in (key_states, value_states))
        before = self.seen.get(layer_idx, tops)
        self.seen[layer_idx] = torch.maximum(tops[0], before[0]), torch.maximum(tops[1], before[1])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def calibrate_kv_cache(model: nn.Module, batches: Iterable[Any], *, per_head: bool = True) -> nn.Module:
    """Set `kv_scales` on a transformers model's attention modules: the greatest magnitude seen / 448.

    Args:
        batches: what the model is called with: token ids, or mappings of arguments.
        per_head: a scale for each head of keys and values, or one for a layer.

    Raises:
        ConfigError: no batches.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        recorder = _Recorder(text_config(model), seen)
        model(**given, **{cache_argument(model): recorder}, use_cache=True)
    if not seen:
        raise ConfigError("calibrating a KV cache needs at least one batch")
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer in seen and hasattr(module, "k_proj"):
            tops = (top if per_head else top.amax() for top in seen[layer])
            k_scale, v_scale = ((top / get_format("fp8_e4m3").absmax).clamp(min=1e-8) for top in tops)
            module.kv_scales = KVScales(k_scale=k_scale, v_scale=v_scale)  # type: ignore[assignment]
    return model
