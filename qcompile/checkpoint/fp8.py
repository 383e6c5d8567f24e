"""FP8 checkpoints: `quant_method` fp8 (DeepSeek, Qwen, Mistral, transformers, vLLM, GPTQModel) and fbgemm_fp8.

`weight` is E4M3 or E5M2; what shares a scale is read off the shape of the scales, whose name does not tell: all
spellings multiply, and files with `weight_scale_inv` for one scale a tensor exist. Which layers are quantized is read
off the weights' dtypes, so `ignored_layers` and `modules_to_not_convert` decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.scaled import (
    activation,
    fp8_weight,
    granularity_of_scale,
    is_plain,
    is_tile,
    mx_weight,
    one_of,
    optional_number,
    take_scale,
)
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError, shown
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear
from qcompile.scheme import ActivationScheme, Granularity, Scheme

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight", "scale_weight")
_INPUT_SCALES = ("input_scale", "activation_scale", "qscale_act", "scale_input")
_TILE = (128, 128)


@register
class FP8(Method):
    """One scale a tensor, a channel, or a tile; inputs quantized per token, per group, or with a fixed scale."""

    name = "fp8"
    aliases: tuple[str, ...] = ("deepseek_v4_fp8",)
    activation_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        scheme = config.get("activation_scheme", "dynamic")
        if not isinstance(scheme, str) or scheme.lower() not in ("dynamic", "static"):
            raise CheckpointError(
                f"quantization_config: activation_scheme is {shown(scheme)}; it is dynamic (scales from each input) or "
                "static (input_scale in the file)"
            )
        self.static = scheme.lower() == "static"
        tile = config.get("weight_block_size")
        if tile is not None and not is_tile(tile):
            raise CheckpointError(
                f"quantization_config: weight_block_size is {shown(tile)}; it is null or [rows, columns], as [128, 128]"
            )
        self.tile = _TILE if tile is None else (tile[0], tile[1])
        scale_format = config.get("scale_fmt")
        if scale_format not in (None, "float", "ue8m0"):
            raise CheckpointError(f"quantization_config: scale_fmt is {shown(scale_format)}; it is float or ue8m0")

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        if is_plain(tensors):
            return None
        suffix = one_of(tensors, _SCALES, "the scale of the weight")
        if tensors.info("weight").dtype in (torch.uint8, torch.int8):
            weight = mx_weight(tensors, shape, "fp4_e2m1", "weight", suffix)
            return PackedLinear(weight=weight, scheme=Scheme(weight=weight.scheme, method=CHECKPOINT))
        granularity = granularity_of_scale(tensors, suffix, shape, self.tile)
        weight = fp8_weight(tensors, shape, take_scale(tensors, suffix, granularity, shape), granularity)
        scheme, input_scale = self._activation(tensors, granularity)
        return PackedLinear(
            weight=weight,
            scheme=Scheme(weight=weight.scheme, activation=scheme, method=CHECKPOINT),
            input_scale=input_scale,
        )

    def _activation(self, tensors: LayerTensors, granularity: Granularity) -> tuple[ActivationScheme, Tensor | None]:
        """Inputs are E4M3 whatever the weights are; with tiles they have a scale for each run of a tile's columns.

        Their scales stay float32 where `scale_fmt` makes those of the weights powers of two.
        """
        if self.static:
            given = optional_number(tensors, *_INPUT_SCALES)
            if given is None:
                raise tensors.error(
                    f"activation_scheme is static, but there is none of {', '.join(_INPUT_SCALES)}; set "
                    "activation_scheme to dynamic in config.json to have scales computed from each input"
                )
            return activation("fp8_e4m3", Granularity.tensor(), dynamic=False), given
        tensors.ignore(*_INPUT_SCALES)
        if granularity in (Granularity.tensor(), Granularity.channel()):
            return activation("fp8_e4m3", Granularity.channel()), None
        return activation("fp8_e4m3", Granularity.group(granularity.columns)), None


@register
class FBGEMM(FP8):
    """Meta's FP8 of Llama 3.1 405B: a scale a row, inputs per token.

    Its `activation_scale_ub`, an upper bound on what a token's scale may grow with, is not applied: tokens beyond it
    keep their largest values, which the original saturates.
    """

    name = "fbgemm_fp8"
    aliases = ()

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        tensors.ignore("input_scale_ub")
        return super().linear(tensors, shape)
