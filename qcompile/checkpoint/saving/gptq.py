"""GPTQ's layout (https://github.com/ModelCloud/GPTQModel), with codes as streams of bits in words along the inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.saving.base import (
    Rounding,
    Target,
    column_groups,
    common_objection,
    fused_name,
    group_size,
    integer_objection,
    middle,
    most_common,
    per_row,
)
from qcompile.checkpoint.saving.layers import Layer
from qcompile.checkpoint.words import pack_words

_BITS = (2, 3, 4, 8)


class GPTQ(Target):
    """Scales are float16. Zero points are stored less 1, as the first version has them, unless one of them is 0."""

    name = "gptq"

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        zeros = [layer.weight().zero_point for layer in layers if "zero_point" in layer.scheme.weight.fields]
        self.exact_zeros = any(bool((zero == 0).any()) for zero in zeros if zero is not None)

    def objection(self, layer: Layer) -> str | None:
        found = common_objection(layer, activations=False) or integer_objection(layer, _BITS, ragged=True)
        if found is None and any(extent * layer.scheme.weight.format.bits % 32 for extent in layer.shape):
            return f"codes of its shape {layer.shape} do not fill words of 32 bits"
        return found

    def tensors(self, layer: Layer, rounding: Rounding) -> dict[str, Tensor]:
        weight = layer.weight()
        bits = weight.scheme.format.bits
        codes, group = column_groups(weight)
        scale = per_row(rounding.cast(layer.name, "scales", weight.scale, torch.float16), weight)
        zeros = torch.full(scale.shape, middle(bits), dtype=torch.uint8)
        if weight.zero_point is not None:
            zeros = per_row(weight.zero_point, weight)
        stored = zeros if self.exact_zeros else (zeros - 1) & ((1 << bits) - 1)
        return {
            "qweight": pack_words(codes, bits).t().contiguous(),
            "qzeros": pack_words(stored.t().contiguous(), bits),
            "scales": scale.t().contiguous(),
            "g_idx": group,
        }

    def quantization_config(self, plain: Sequence[str]) -> dict[str, Any]:
        def settings(layer: Layer) -> tuple[int, int, bool]:
            weight = layer.scheme.weight
            return weight.format.bits, group_size(weight), weight.act_order

        common = most_common([settings(layer) for layer in self.layers])
        keys = ("bits", "group_size", "desc_act")
        dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in plain if name != "lm_head"}
        for layer in self.layers:
            if settings(layer) != common:
                # vLLM looks for the name of what it fuses, all others for that of the layer.
                for name in dict.fromkeys((layer.name, fused_name(layer.name))):
                    dynamic[f"+:^{re.escape(name)}$"] = dict(zip(keys, settings(layer), strict=True))
        config: dict[str, Any] = {
            "quant_method": "gptq",
            **dict(zip(keys, common, strict=True)),
            "sym": all(layer.scheme.weight.symmetric for layer in self.layers),
            "checkpoint_format": "gptq_v2" if self.exact_zeros else "gptq",
            "pack_dtype": "int32",
            "lm_head": any(layer.name == "lm_head" for layer in self.layers),
            "meta": {"quantizer": ["qcompile"]},
        }
        return config | ({"dynamic": dynamic} if dynamic else {})
