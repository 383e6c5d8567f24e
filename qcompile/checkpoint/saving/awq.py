"""AWQ's layout, version gemm (https://github.com/casper-hansen/AutoAWQ): 4 bits, packed along the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.saving.base import (
    Rounding,
    Target,
    common_objection,
    group_size,
    integer_objection,
    middle,
    per_row,
)
from qcompile.checkpoint.saving.layers import Layer
from qcompile.checkpoint.words import pack_words

_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a run of 8 outputs each field of a word holds."""


class AWQ(Target):
    """Scales are float16; a symmetric weight gets the zero point 8 everywhere, which says the same."""

    name = "awq"

    def objection(self, layer: Layer) -> str | None:
        found = common_objection(layer, activations=False) or integer_objection(layer, (4,))
        if found is not None:
            return found
        if layer.scheme.weight.act_order:
            return "its columns are sorted by group (act_order)"
        if layer.shape[0] % 8:
            return f"its {layer.shape[0]} outputs are no multiple of 8"
        size, first = group_size(layer.scheme.weight), self.layers[0]
        if size != group_size(first.scheme.weight):
            return f"its group size {size} is not that of {first.name}, and all layers share one"
        return None

    def tensors(self, layer: Layer, rounding: Rounding) -> dict[str, Tensor]:
        weight = layer.weight()
        scale = per_row(rounding.cast(layer.name, "scales", weight.scale, torch.float16), weight)
        zeros = torch.full(scale.shape, middle(4), dtype=torch.uint8)
        if weight.zero_point is not None:
            zeros = per_row(weight.zero_point, weight)
        return {
            "qweight": _words(weight.unpack_codes()),
            "qzeros": _words(zeros),
            "scales": scale.t().contiguous(),
        }

    def quantization_config(self, plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size(self.layers[0].scheme.weight),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain) or None,
        }


def _words(per_output: Tensor) -> Tensor:
    """Codes or zero points [N, columns] to int32 [columns, N / 8]."""
    fields = per_output.t().unflatten(1, (-1, 8))[..., _PLACES]
    return pack_words(fields.flatten(1), 4)
