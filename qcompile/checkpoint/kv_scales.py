"""Scales of a quantized KV cache, by all the names that producers give them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError

# What follows the attention module's name. ModelOpt: k_proj.k_scale (also in a fused projection); compressed-tensors:
# k_scale, before 0.11 k_proj.output_scale, which Quark writes too; HunYuan: k_cache.scale; vLLM: attn.k_scale.
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?:(?<=self_attn\.)attn\.|[qkv]_proj\.|qkv_proj\.|qkqkv_proj\.)?(?:(?P<which>[qkv])|prob)_(?:scale|zero_point)"
    r"|(?P<cache>[kv])_cache\.scale"
    r"|(?P<query>q)\.scale"
    r"|(?P<projection>[qkv])_proj\.output_(?:scale|zero_point)"
    r"|(?P<both>kv)_scale"
    r"|prob_output_scale"
    r"|[kv]_proj\.(?P<bias>[kv])_bias"
    r")"
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ZERO_POINTS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn)


@dataclass(frozen=True)
class KVScales:
    """What the FP8 codes of an attention module's keys and values are multiplied with.

    Attributes:
        k_scale, v_scale: float32 [] or [heads]; 1 where the file has none.
    """

    k_scale: Tensor
    v_scale: Tensor


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of that name belongs to a quantized KV cache (or to quantized queries and probabilities)."""
    return _NAME.fullmatch(name) is not None


def kv_scales(store: TensorStore, own: Collection[str] = ()) -> dict[str, KVScales]:
    """The scales of each attention module that has any, by the module's name.

    A cache that zero points or offsets shift as well has no place in `KVScales`; it is left out, with a warning.

    Args:
        own: names of tensors that the model itself has; they are no scales of caches, whatever they are called.

    Raises:
        CheckpointError: a scale that is not finite and positive or has an odd shape or dtype, or a second one for the
            same cache.
    """
    found: dict[str, dict[str, Tensor]] = {}
    shifted: set[str] = set()
    for name in store.names():
        match = None if name in own else _NAME.fullmatch(name)
        if match is None:
            continue
        which = next(filter(None, match.group("which", "cache", "projection", "both", "bias")), None)
        if which in (None, "q"):
            continue
        values = _read(store, name)
        if not name.endswith("scale"):
            if values.any():
                shifted.add(match["module"])
            continue
        if not torch.isfinite(values).all() or (values <= 0).any():
            raise CheckpointError(
                f"{store.info(name).file}: {name} holds a scale that is not finite and positive; get the file again, "
                "or remove the scales of the KV cache"
            )
        scales = found.setdefault(match["module"], {})
        for key in str(which):
            if key in scales:
                raise CheckpointError(
                    f"{store.info(name).file}: {name} is a second scale of the {key} cache of {match['module']}; "
                    "remove one of them"
                )
            scales[key] = values
    if shifted:
        warnings.warn(
            f"{store.path}: the KV caches of {len(shifted)} modules have zero points, which qcompile does not read; "
            "they stay in the model's dtype",
            stacklevel=2,
        )
    one = torch.ones(())
    return {
        module: KVScales(k_scale=scales.get("k", one), v_scale=scales.get("v", one))
        for module, scales in found.items()
        if module not in shifted
    }


def _read(store: TensorStore, name: str) -> Tensor:
    """float32 [] or [heads]."""
    info = store.info(name)
    count = math.prod(info.shape)
    if not 1 <= count <= 1 << 16 or count != max(info.shape, default=1):
        raise CheckpointError(f"{info.file}: {name} has shape {tuple(info.shape)}; it is one number, or one a head")
    if info.dtype not in (*_FLOATS, *(() if name.endswith("scale") else _ZERO_POINTS)):
        raise CheckpointError(f"{info.file}: {name} is {info.dtype}; scales are float32, bfloat16 or float16")
    values = store.read(name).to(torch.float32).flatten()
    return values.reshape(()) if count == 1 else values
