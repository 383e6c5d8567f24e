"""compressed-tensors, what vLLM and transformers read (https://github.com/vllm-project/compressed-tensors)."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.saving.base import (
    Rounding,
    Target,
    Unsavable,
    column_groups,
    common_objection,
    fused_name,
    integer_objection,
    middle,
)
from qcompile.checkpoint.saving.layers import Layer
from qcompile.checkpoint.words import pack_words
from qcompile.formats import IntegerFormat
from qcompile.packed import PackedWeight
from qcompile.scheme import FLOAT_SCALES, WHOLE, ActivationScheme, Granularity, WeightScheme

_BITS = tuple(range(2, 9))
_MX = {
    "fp4_e2m1": "mxfp4-pack-quantized",
    "fp6_e2m3": "mxfp6-pack-quantized",
    "fp8_e4m3": "mxfp8-quantized",
}
_FP8_SCALES = (*FLOAT_SCALES, "float8_e8m0fnu")
_NVFP4 = "nvfp4-pack-quantized"


class CompressedTensors(Target):
    """Integers of 2 to 8 bits, FP8, NVFP4 and the MX formats; quantized inputs; scales keep their dtype."""

    name = "compressed-tensors"
    holds_kv_scales = True

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self._divisors: dict[str, dict[str, float]] = defaultdict(dict)

    def objection(self, layer: Layer) -> str | None:
        try:
            _format(layer)
        except Unsavable as reason:
            return str(reason)
        return common_objection(layer, activations=True)

    def tensors(self, layer: Layer, rounding: Rounding) -> dict[str, Tensor]:
        weight, form = layer.weight(), _format(layer)
        scale = weight.scale.reshape(1) if weight.scheme.granularity == Granularity.tensor() else weight.scale
        tensors: dict[str, Tensor] = {"weight_scale": scale}
        if form == "pack-quantized":
            tensors |= _words(weight)
        elif form == "int-quantized":
            tensors |= _bytes(weight)
        elif form == "float-quantized":
            exponents = scale.dtype == torch.float8_e8m0fnu  # powers of two, which float32 holds
            codes = weight.codes.view(torch.float8_e4m3fn)
            tensors |= {"weight": codes, "weight_scale": scale.float() if exponents else scale}
        elif form == "mxfp8-quantized":
            tensors |= {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": scale.view(torch.uint8)}
        elif form == _NVFP4:
            divisor = _divisor(layer, weight, rounding)
            self._divisors[fused_name(layer.name)][layer.name] = divisor.item()
            tensors |= {"weight_packed": weight.codes, "weight_global_scale": divisor}
        else:
            tensors |= {"weight_packed": weight.codes, "weight_scale": scale.view(torch.uint8)}
        if layer.input_scale is not None:
            tensors["input_scale"] = layer.input_scale.reshape(1).to("cpu")
        return tensors

    def _warn_of_divisors(self) -> None:
        apart = [names for names in self._divisors.values() if len(set(names.values())) > 1]
        if apart:
            more = f", and layers of {len(apart) - 1} more sets," if len(apart) > 1 else ""
            warnings.warn(
                f"{', '.join(apart[0])}{more} have NVFP4 global scales of their own. The file is exact, but vLLM fuses "
                "these layers, takes one scale for all of them, and computes something else; for vLLM save mxfp4, or "
                "NVFP4 of a checkpoint where they share it",
                stacklevel=2,
            )

    def quantization_config(self, plain: Sequence[str]) -> dict[str, Any]:
        self._warn_of_divisors()
        groups: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            described = {
                "weights": _weights(layer.scheme.weight),
                "input_activations": _inputs(layer.scheme.activation),
                "output_activations": None,
                "format": _format(layer),
            }
            key = json.dumps(described, sort_keys=True)
            groups.setdefault(key, {"targets": [], **described})["targets"].append(layer.name)
        if len(groups) == 1:
            # To vLLM a head is no linear: a quantized one needs its name.
            head = [layer.name for layer in self.layers if layer.name == "lm_head"]
            next(iter(groups.values()))["targets"] = ["Linear", *head]
        forms = sorted({group["format"] for group in groups.values()})
        return {
            "quant_method": "compressed-tensors",
            "format": forms[0] if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
            "ignore": list(plain),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def kv_cache_scheme(per_head: bool) -> dict[str, Any]:
    """The configuration's words for a KV cache in FP8 with fixed scales."""
    strategy = "attn_head" if per_head else "tensor"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}


def _format(layer: Layer) -> str:
    """The format's name.

    Raises:
        Unsavable: there is none.
    """
    scheme, inputs = layer.scheme.weight, layer.scheme.activation
    if inputs is not None and inputs.format.name == "fp8_e5m2":
        raise Unsavable("its inputs are quantized to fp8_e5m2")
    if isinstance(scheme.format, IntegerFormat):
        if found := integer_objection(layer, _BITS):
            raise Unsavable(found)
        if inputs is None or not isinstance(inputs.format, IntegerFormat):
            return "pack-quantized"
        if scheme.act_order:
            raise Unsavable("its columns are sorted by group (act_order), and its inputs are quantized to integers")
        return "int-quantized"
    kind, block, above = scheme.format.name, scheme.granularity, scheme.super_scale
    nvfp4 = ("fp4_e2m1", "float8_e4m3fn", Granularity.group(16))
    if scheme.act_order:
        raise Unsavable(f"its columns are sorted by group (act_order), and its weight is {kind}")
    if scheme.scale_dtype == "float8_e8m0fnu" and kind in _MX and block == Granularity.group(32):
        if layer.shape[1] % 32 == 0:
            return _MX[kind]
    elif above is not None and (kind, scheme.scale_dtype, block) == nvfp4:
        if (above.columns, above.dtype) == (WHOLE, "float32") and layer.shape[1] % 16 == 0:
            return _NVFP4
    elif above is None and kind == "fp8_e4m3" and scheme.scale_dtype in _FP8_SCALES and not block.is_group:
        return "float-quantized"
    raise Unsavable(
        f"its weight is {scheme} with {scheme.scale_dtype} scales" + (" under other scales" if above else "")
    )


def _words(weight: PackedWeight) -> dict[str, Tensor]:
    bits = weight.scheme.format.bits
    codes, group = column_groups(weight)
    tensors = {
        "weight_packed": pack_words(codes, bits),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        if weight.scheme.granularity == Granularity.tensor():
            tensors["weight_zero_point"] = _signed(weight.zero_point, bits).reshape(1)
        else:
            tensors["weight_zero_point"] = pack_words(weight.zero_point, bits, dim=0)
    if weight.perm is not None:
        tensors["weight_g_idx"] = group
    return tensors


def _bytes(weight: PackedWeight) -> dict[str, Tensor]:
    bits = weight.scheme.format.bits
    tensors = {"weight": _signed(weight.unpack_codes(), bits)}
    if weight.zero_point is not None:
        zero = _signed(weight.zero_point, bits)
        tensors["weight_zero_point"] = zero.reshape(1) if weight.scheme.granularity == Granularity.tensor() else zero
    return tensors


def _signed(codes: Tensor, bits: int) -> Tensor:
    """int8 values of codes that count up from the least value."""
    return (codes.to(torch.int16) - middle(bits)).to(torch.int8)


def _divisor(layer: Layer, weight: PackedWeight, rounding: Rounding) -> Tensor:
    """float32 [1]: the number whose inverse is the scale of all scales."""
    assert weight.super_scale is not None
    above = weight.super_scale.flatten()
    if not bool((above == above[0]).all()):
        raise Unsavable("its rows have global scales of their own")
    near = 1 / above[:1]
    candidates = torch.cat([near, near.nextafter(torch.zeros(1)), near.nextafter(torch.full((1,), torch.inf))])
    exact = candidates[1 / candidates == above[0]]
    divisor = exact[:1] if len(exact) else near
    rounding.exact_or_note(layer.name, "global scale, as a divisor,", above[:1], 1 / divisor)
    return divisor


def _weights(scheme: WeightScheme) -> dict[str, Any]:
    """The library's `QuantizationArgs`."""
    args: dict[str, Any] = {
        "num_bits": scheme.format.bits,
        "type": "int" if isinstance(scheme.format, IntegerFormat) else "float",
        "symmetric": scheme.symmetric,
        "dynamic": False,
        **_strategy(scheme.granularity, "channel"),
    }
    if scheme.super_scale is not None:
        args |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    elif scheme.scale_dtype == "float8_e8m0fnu" and scheme.granularity.is_group:
        args["scale_dtype"] = "torch.uint8"
    if scheme.act_order:
        args["actorder"] = "group"
    return args


def _inputs(scheme: ActivationScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    args: dict[str, Any] = {
        "num_bits": scheme.format.bits,
        "type": "int" if isinstance(scheme.format, IntegerFormat) else "float",
        "symmetric": scheme.symmetric,
        "dynamic": scheme.dynamic,
        **_strategy(scheme.granularity, "token"),
    }
    if scheme.scale_dtype == "float8_e8m0fnu":
        args["scale_dtype"] = "torch.uint8"
    return args


def _strategy(granularity: Granularity, row: str) -> dict[str, Any]:
    if granularity == Granularity.tensor():
        return {"strategy": "tensor"}
    if granularity == Granularity.channel():
        return {"strategy": row}
    if granularity.is_group:
        return {"strategy": "group", "group_size": granularity.columns}
    return {"strategy": "block", "block_structure": [granularity.rows, granularity.columns]}
