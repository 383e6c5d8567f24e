"""gpt-oss: experts in MXFP4 (OCP microscaling specification, version 1.0), everything else unquantized.

Layout: `Mxfp4GptOssExperts` of https://github.com/huggingface/transformers, `gpt_oss/torch/weights.py` of
https://github.com/openai/gpt-oss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import Granularity, Scheme, WeightScheme

_BLOCK = 32
_NAN = 0xFF
_SCHEME = Scheme(
    weight=WeightScheme(
        format=get_format("fp4_e2m1"), granularity=Granularity.group(_BLOCK), scale_dtype="float8_e8m0fnu"
    ),
    method=CHECKPOINT,
)


@register
class MXFP4(Method):
    """Stacked experts whose codes are `<projection>_blocks` and whose scales are `<projection>_scales`."""

    name = "mxfp4"
    aliases = ("gpt_oss_mxfp4",)

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        pass

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        return None

    def stacked(
        self, tensors: LayerTensors, projection: str, experts: int, shape: tuple[int, int]
    ) -> list[PackedLinear] | None:
        """Blocks uint8 [experts, N, K / 32, 16], low nibbles first; scales uint8 [experts, N, K / 32], 127 for 1."""
        if f"{projection}_blocks" not in tensors:
            return None
        rows, columns = shape
        if columns % _BLOCK:
            raise tensors.error(f"the {columns} input features of {projection} are no multiple of blocks of {_BLOCK}")
        groups = columns // _BLOCK
        blocks = tensors.take(f"{projection}_blocks", torch.uint8, shape=(experts, rows, groups, _BLOCK // 2))
        scales = tensors.take(f"{projection}_scales", torch.uint8, shape=(experts, rows, groups))
        if bool((scales == _NAN).any()):
            raise tensors.error(f"{projection}_scales holds 255, which is NaN in MX formats; get the file again")
        return [
            PackedLinear(
                weight=PackedWeight(
                    codes=blocks[index].flatten(1),
                    scale=scales[index].view(torch.float8_e8m0fnu),
                    shape=shape,
                    scheme=_SCHEME.weight,
                ),
                scheme=_SCHEME,
            )
            for index in range(experts)
        ]
