"""bitsandbytes' layouts (https://github.com/bitsandbytes-foundation/bitsandbytes): NF4, FP4 and LLM.int8()."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.saving.base import Rounding, Target
from qcompile.checkpoint.saving.layers import Layer
from qcompile.formats import TableFormat
from qcompile.scheme import FLOAT_SCALES, Granularity

_BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""Block sizes that bitsandbytes has kernels for."""


class BitsAndBytes(Target):
    """A model is all of one kind: NF4, FP4 or LLM.int8(). Scales of 4-bit blocks are float32, not quantized again."""

    name = "bitsandbytes"

    def objection(self, layer: Layer) -> str | None:
        if layer.pre_quant_scale is not None:
            return "it multiplies its inputs by scales per channel (pre_quant_scale)"
        kind, first = _kind(layer), self.layers[0]
        if kind is None:
            return f"it is {layer.scheme}, neither nf4 or fp4 in groups nor int8 per channel with int8 inputs per token"
        if kind != _kind(first):
            return f"it is {kind}, {first.name} is {_kind(first)}, and all layers are of one kind"
        if kind != "int8" and _block(layer) is None:
            return f"its scales are per {layer.scheme.weight.granularity}; blocks are of {_BLOCKS[-1]} to {_BLOCKS[0]}"
        if kind == "int8" and _threshold(layer) != _threshold(first):
            return f"its outlier_threshold is not that of {first.name}, and all layers share one"
        return None

    def tensors(self, layer: Layer, rounding: Rounding) -> dict[str, Tensor]:
        if _kind(layer) == "int8":
            return _eight_bit(layer, rounding)
        weight, block = layer.weight(), _block(layer)
        assert block is not None
        codes = weight.unpack_codes().flatten()
        scale = rounding.cast(layer.name, "scales", weight.scale, torch.float32)
        fmt = weight.scheme.format
        assert isinstance(fmt, TableFormat)
        group = weight.scheme.granularity.block_of(weight.shape)[1]
        state = {
            "quant_type": fmt.name,
            "blocksize": block,
            "dtype": _dtype(layer),
            "shape": list(weight.shape),
        }
        return {
            "weight": (codes[::2] << 4 | codes[1::2])[:, None],
            "weight.absmax": scale.flatten().repeat_interleave(group // block),
            "weight.quant_map": torch.tensor(fmt.values),
            f"weight.quant_state.bitsandbytes__{fmt.name}": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }

    def quantization_config(self, plain: Sequence[str]) -> dict[str, Any]:
        first = self.layers[0]
        four = _kind(first) != "int8"
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": first.scheme.weight.format.name if four else "fp4",
            "bnb_4bit_compute_dtype": _dtype(first),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_threshold": 6.0 if four else _threshold(first),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": list(plain),
        }


def _eight_bit(layer: Layer, rounding: Rounding) -> dict[str, Tensor]:
    """W = q * (SCB / 127): an SCB that this division turns into the scale, which not every float32 is."""
    weight = layer.weight()
    scale = weight.scale.float().flatten()
    near = scale * 127
    below, above = (near.nextafter(torch.full_like(near, limit)) for limit in (0.0, torch.inf))
    absmax = torch.where(below / 127 == scale, below, torch.where(above / 127 == scale, above, near))
    rounding.exact_or_note(layer.name, "scales", scale, absmax / 127)
    return {
        "weight": (weight.unpack_codes() ^ 0x80).view(torch.int8),
        "SCB": absmax,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _kind(layer: Layer) -> str | None:
    weight, activation = layer.scheme.weight, layer.scheme.activation
    rows = weight.granularity == Granularity.channel() or weight.granularity.is_group
    if weight.arranges_inputs or weight.super_scale is not None or weight.scale_dtype not in FLOAT_SCALES or not rows:
        return None
    if weight.format.name in ("nf4", "fp4") and activation is None and weight.symmetric:
        return weight.format.name
    tokens = activation is not None and activation.format.name == "int8" and activation.dynamic
    per_token = tokens and activation is not None and activation.granularity == Granularity.channel()
    whole_rows = weight.granularity == Granularity.channel()
    return "int8" if weight.format.name == "int8" and whole_rows and per_token and weight.symmetric else None


def _block(layer: Layer) -> int | None:
    """The largest block size that divides a group, if groups divide rows."""
    columns = layer.shape[1]
    group = layer.scheme.weight.granularity.block_of(layer.shape)[1]
    return next((size for size in _BLOCKS if group % size == 0 and columns % group == 0), None)


def _threshold(layer: Layer) -> float:
    assert layer.scheme.activation is not None
    return layer.scheme.activation.outlier_threshold or 0.0


def _dtype(layer: Layer) -> str:
    return str(layer.dtype).removeprefix("torch.")
