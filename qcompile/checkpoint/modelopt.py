"""NVIDIA Model Optimizer: what its `export_hf_checkpoint` writes (https://github.com/NVIDIA/Model-Optimizer).

Both spellings of the configuration: `hf_quant_config.json` and the one embedded in `config.json`, which may lack the
group size. So groups are read off the scales' shapes, and whether a layer is quantized off its tensors: the lists of
excluded modules decide nothing. All scales multiply.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.bitpack import pack_bits
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.scaled import (
    EXPONENTS,
    FLOATS,
    activation,
    check_scale,
    fp8_weight,
    group_of_scale,
    is_plain,
    mx_weight,
    nvfp4_weight,
    one_of,
    packed,
    spellings,
    take_number,
    take_scale,
)
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import ActivationScheme, Granularity, Scheme

_Weight = Callable[[LayerTensors, tuple[int, int]], PackedWeight]
_CHANNEL, _TENSOR = Granularity.channel(), Granularity.tensor()
_TILE = Granularity.block(128, 128)


def _fp8(granularity: Granularity, *spellings: str) -> _Weight:
    def read(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
        suffix = one_of(tensors, spellings or ("weight_scale",), "the scale of the weight")
        return fp8_weight(tensors, shape, take_scale(tensors, suffix, granularity, shape, FLOATS), granularity)

    return read


def _mxfp8(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
    granularity = Granularity.group(32)
    scale = take_scale(tensors, "weight_scale", granularity, shape, EXPONENTS)
    return fp8_weight(tensors, shape, scale, granularity)


def _mxfp4(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
    return mx_weight(tensors, shape, "fp4_e2m1", "weight", "weight_scale")


def _nvfp4(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
    above = take_number(tensors, "weight_scale_2")
    return nvfp4_weight(tensors, shape, "weight", "weight_scale", above)


def _int4(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
    """Byte [i, k] holds rows 2i (low nibble) and 2i + 1 as two's complement.

    `weight_scale_2` of W4A8 is what an FP8 kernel scales its intermediates with, not a factor of the weight.
    """
    rows, columns = shape
    if rows % 2:
        raise tensors.error(f"it has {rows} output features, an odd number, which this format cannot hold")
    stored = tensors.take("weight", torch.uint8, shape=(rows // 2, columns))
    codes = torch.stack([stored & 15, stored >> 4], 1).reshape(rows, columns) ^ 8
    granularity = group_of_scale(tensors, "weight_scale", columns)
    scale = take_scale(tensors, "weight_scale", granularity, shape, FLOATS)
    return packed(tensors, get_format("int4"), pack_bits(codes, 4), scale, granularity, shape)


def _int8(tensors: LayerTensors, shape: tuple[int, int]) -> PackedWeight:
    codes = tensors.take("weight", torch.int8, shape=shape).view(torch.uint8) ^ 0x80
    scale = take_scale(tensors, "weight_scale", _CHANNEL, shape, FLOATS)
    return packed(tensors, get_format("int8"), codes, scale, _CHANNEL, shape)


@dataclass(frozen=True)
class _Algorithm:
    """How a `quant_algo` stores weights, and what it does to inputs.

    Attributes:
        inputs: None leaves them; a name is that of numbers which no device here multiplies.
    """

    weight: _Weight
    inputs: ActivationScheme | str | None = None


_STATIC_FP8 = activation("fp8_e4m3", _TENSOR, dynamic=False)
_NVFP4 = _Algorithm(_nvfp4, "FP4")
_FP8_TILES = _fp8(_TILE, "weight_scale", "weight_scale_inv")
_INT8_SQ = _Algorithm(_int8, activation("int8", _TENSOR, dynamic=False))

_ALGORITHMS = {
    "FP8": _Algorithm(_fp8(_TENSOR), _STATIC_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": _Algorithm(_fp8(_CHANNEL), activation("fp8_e4m3", _CHANNEL)),
    "FP8_PB_WO": _Algorithm(_FP8_TILES),
    "FP8_PB_REAL": _Algorithm(_FP8_TILES),
    "FP8_BLOCK_SCALES": _Algorithm(_FP8_TILES),
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": _NVFP4,
    "W4A16_NVFP4": _Algorithm(_nvfp4),
    "W4A8_NVFP4_FP8": _Algorithm(_nvfp4, _STATIC_FP8),
    "MXFP8": _Algorithm(_mxfp8, activation("fp8_e4m3", Granularity.group(32), powers_of_two=True)),
    "MXFP4": _Algorithm(_mxfp4, "FP4"),
    "W4A8_MXFP4_FP8": _Algorithm(_mxfp4, _STATIC_FP8),
    "W4A16_AWQ": _Algorithm(_int4),
    "W4A8_AWQ": _Algorithm(_int4, _STATIC_FP8),
    "INT8_SQ": _INT8_SQ,
    "W8A8_SQ_PER_CHANNEL": _INT8_SQ,
    "W8A16": _Algorithm(_int8),
}


def _algorithm(where: str, given: Mapping[str, Any]) -> _Algorithm:
    name = given.get("quant_algo")
    algorithm = _ALGORITHMS.get(name.upper()) if isinstance(name, str) else None
    if algorithm is None:
        hint = "; its low-rank part has no place in a linear here" if str(name).upper() == "NVFP4_SVD" else ""
        raise CheckpointError(f"{where}: quant_algo is {shown(name)}{hint}; readable are {', '.join(_ALGORITHMS)}")
    return algorithm


@register
class ModelOpt(Method):
    """FP8, NVFP4, MXFP8, INT4 AWQ and INT8 SmoothQuant; one for all layers, or one a layer (MIXED_PRECISION)."""

    name = "modelopt"
    aliases = ("modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
    activation_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        config = config.get("quantization", config)
        if not isinstance(config, Mapping):
            raise CheckpointError(f"quantization is {shown(config)}; it is an object with quant_algo")
        self.layers: dict[str, _Algorithm] = {}
        self.default: _Algorithm | None = None
        self._noted = False
        algorithm = config.get("quant_algo")
        if isinstance(algorithm, str) and algorithm.upper() == "MIXED_PRECISION":
            layers = config.get("quantized_layers")
            if not isinstance(layers, Mapping) or not all(isinstance(given, Mapping) for given in layers.values()):
                raise CheckpointError(
                    f"quant_algo is MIXED_PRECISION, but quantized_layers is {shown(layers)}; it maps layers to recipes"
                )
            self.layers = {str(name): _algorithm(f"quantized_layers: {name}", given) for name, given in layers.items()}
        elif set(config) <= {"quant_method"}:  # without a configuration, weight_scale_2 tells that it is ModelOpt's
            self.default = _NVFP4
        else:
            self.default = _algorithm("quantization_config", config)

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        if is_plain(tensors):
            return None
        named = (self.layers[name] for name in spellings(tensors.name) if name in self.layers)
        algorithm = next(named, self.default)
        if algorithm is None:
            raise tensors.error("its tensors are quantized, but quantized_layers does not name it")
        if any("svdquant_lora" in suffix for suffix in tensors.suffixes()):
            raise tensors.error("it has a low-rank part (SVDQuant), which has no place in a linear here")
        weight = algorithm.weight(tensors, shape)
        scheme = self._activation(tensors, algorithm.inputs)
        static = scheme is not None and not scheme.dynamic
        input_scale = take_number(tensors, "input_scale") if static else None
        tensors.ignore("input_scale", "weight_scale_2")
        pre_quant_scale = None
        if "pre_quant_scale" in tensors:
            pre_quant_scale = tensors.take("pre_quant_scale", *FLOATS, shape=(shape[1],))
            check_scale(tensors, "pre_quant_scale", pre_quant_scale)
        return PackedLinear(
            weight=weight,
            scheme=Scheme(weight=weight.scheme, activation=scheme, method=CHECKPOINT),
            input_scale=input_scale,
            pre_quant_scale=pre_quant_scale,
        )

    def _activation(self, tensors: LayerTensors, inputs: ActivationScheme | str | None) -> ActivationScheme | None:
        """Without `input_scale` the producer computed a scale from each input; here it is one for each token."""
        if isinstance(inputs, str):
            if not self._noted:
                self._noted = True
                warnings.warn(
                    f"the checkpoint quantizes inputs to {inputs}, which no device of qcompile multiplies; they stay "
                    "in the model's dtype here",
                    stacklevel=2,
                )
            return None
        if inputs is None or inputs.dynamic or "input_scale" in tensors:
            return inputs
        return activation(inputs.format.name, _CHANNEL)
