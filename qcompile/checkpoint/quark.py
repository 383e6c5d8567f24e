"""AMD Quark: what its `export_safetensors` writes (https://quark.docs.amd.com).

The configuration of a layer is that of the first pattern of `layer_quant_config` that fits its name, else that of its
class, else the global one. Whether a layer is quantized is read off its tensors, so `exclude` decides nothing.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.scaled import (
    FLOATS,
    activation,
    check_scale,
    fp8_weight,
    is_plain,
    is_tile,
    mx_weight,
    nvfp4_weight,
    packed,
    spellings,
    take_number,
    take_scale,
)
from qcompile.checkpoint.store import TensorStore
from qcompile.checkpoint.words import unpack_words
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import ActivationScheme, Granularity, Scheme

_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of a word that holds code j of 8, with `pack_method` reorder."""

_FP8 = {"fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
_SMALL_FLOATS = {"fp4": "fp4_e2m1", "fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}
_INTEGERS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}

_Spec = Mapping[str, Any]


def _specs(where: str, given: object) -> tuple[_Spec, ...]:
    """The stages of a quantization, of which there are none, one or two."""
    stages: list[Any] = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if len(stages) > 2 or not all(
        isinstance(stage, Mapping) and isinstance(stage.get("dtype"), str) for stage in stages
    ):
        raise CheckpointError(
            f"{where} is {shown(given)}; it is an object with dtype and qscheme, two of them, or null"
        )
    return tuple(stages)


def _granularity(where: str, spec: _Spec) -> Granularity:
    scheme, group, tile = spec.get("qscheme"), spec.get("group_size"), spec.get("block_size")
    if scheme == "per_tensor":
        return Granularity.tensor()
    if scheme == "per_channel":
        return Granularity.channel()
    if scheme == "per_group" and type(group) is int and 0 < group < 2**31:
        return Granularity.group(group)
    if scheme == "per_block" and is_tile(tile):
        return Granularity.block(*tile)
    raise CheckpointError(
        f"{where}: qscheme is {shown(scheme)} with group_size {shown(group)} and block_size {shown(tile)}; it is "
        "per_tensor, per_channel, per_group with a group_size, or per_block with a block_size"
    )


def _has_exponents(spec: _Spec) -> bool:
    """Whether scales are powers of two, in either of the spellings."""
    return spec.get("scale_format") == "e8m0" or spec.get("scale_type") == "float8_e8m0fnu"


@register
class Quark(Method):
    """FP8, INT8, INT4 and UINT4, MXFP4, MXFP6, NVFP4, and INT4 of FP8 (`weight_format` real_quantized)."""

    name = "quark"
    activation_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        for key in ("global_quant_config", "layer_quant_config", "layer_type_quant_config", "export"):
            if not isinstance(config.get(key) or {}, Mapping):
                raise CheckpointError(f"quantization_config: {key} is {shown(config[key])}; it is an object")
        self.default = config.get("global_quant_config") or {}
        self.by_class = config.get("layer_type_quant_config") or {}
        self.by_name = config.get("layer_quant_config") or {}
        method = (config.get("export") or {}).get("pack_method") or "reorder"
        if method not in ("reorder", "order"):
            raise CheckpointError(
                f"quantization_config: export: pack_method is {shown(method)}; it is reorder or order"
            )
        self.reorder = method == "reorder"
        self._noted: set[str] = set()

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        if is_plain(tensors):
            return None
        config = self._config_of(tensors.name)
        where = f"quantization_config of {tensors.name}"
        weight = self._weight(tensors, shape, _specs(f"{where}: weight", config.get("weight")))
        scheme, input_scale = self._activation(
            tensors, _specs(f"{where}: input_tensors", config.get("input_tensors")), weight
        )
        return PackedLinear(
            weight=weight,
            scheme=Scheme(weight=weight.scheme, activation=scheme, method=CHECKPOINT),
            input_scale=input_scale,
        )

    def _config_of(self, layer: str) -> _Spec:
        names = spellings(layer)
        named = (
            given
            for pattern, given in self.by_name.items()
            if any(fnmatch.fnmatchcase(name, str(pattern)) for name in names)
        )
        config = next(named, self.by_class.get("Linear", self.default))
        if not isinstance(config, Mapping):
            raise CheckpointError(f"quantization_config: the one of {layer} is {shown(config)}; it is an object")
        return config

    def _weight(self, tensors: LayerTensors, shape: tuple[int, int], specs: tuple[_Spec, ...]) -> PackedWeight:
        if not specs:
            raise tensors.error("its tensors are quantized, but its configuration has no weight")
        kinds = [spec.get("dtype") for spec in specs]
        granularity = _granularity(f"quantization_config of {tensors.name}", specs[-1 if kinds[-1] == "int4" else 0])
        if kinds == ["fp4", "fp8_e4m3"] and granularity.is_group:
            above = take_number(tensors, "weight_scale_2")
            return nvfp4_weight(tensors, shape, "weight", "weight_scale", above)
        if kinds == ["fp8_e4m3", "int4"] and granularity == Granularity.channel():
            above = take_number(tensors, "weight_scale").expand(shape[0], 1).contiguous()
            return self._integers(tensors, shape, specs[1], granularity, "_2", super_scale=above)
        kind = kinds[0]
        if len(specs) == 1 and kind in _FP8:
            scale = take_scale(tensors, "weight_scale", granularity, shape)
            weight = fp8_weight(tensors, shape, scale, granularity)
            if weight.scheme.format.name != kind:
                raise tensors.error(f"weight is {weight.scheme.format.name}, but its configuration says {kind}")
            return weight
        if len(specs) == 1 and kind in _SMALL_FLOATS and _has_exponents(specs[0]):
            if granularity != Granularity.group(32):
                raise tensors.error(f"scales of powers of two are for groups of 32, not per {granularity}")
            return mx_weight(tensors, shape, _SMALL_FLOATS[kind], "weight", "weight_scale")
        if len(specs) == 1 and kind in _INTEGERS:
            return self._integers(tensors, shape, specs[0], granularity, "")
        raise tensors.error(
            f"its weight is {shown(kinds)}; readable are {', '.join([*_FP8, *_INTEGERS])}, {', '.join(_SMALL_FLOATS)} "
            "with scale_format e8m0, fp4 with fp8_e4m3 scales, and int4 of fp8_e4m3"
        )

    def _integers(
        self,
        tensors: LayerTensors,
        shape: tuple[int, int],
        spec: _Spec,
        granularity: Granularity,
        stage: str,
        super_scale: Tensor | None = None,
    ) -> PackedWeight:
        """Codes, scales and zero points, all transposed where they are per group; of 4 bits in int32 words."""
        kind = str(spec["dtype"])
        bits, grouped = _INTEGERS[kind], granularity.is_group
        extents = granularity.scale_shape(shape)
        sign = 0 if kind.startswith("u") else 1 << (bits - 1)  # two's complement to offset binary
        symmetric = spec.get("symmetric") is True and sign != 0
        codes = self._codes(tensors, "weight", kind, shape[::-1] if grouped else shape) ^ sign
        codes = codes.t().contiguous() if grouped else codes
        suffix = f"weight_scale{stage}"
        if grouped:
            scale = check_scale(tensors, suffix, tensors.take(suffix, *FLOATS, shape=extents[::-1])).t().contiguous()
        else:
            scale = take_scale(tensors, suffix, granularity, shape, FLOATS)
        zero = f"weight_zero_point{stage}"
        zero_point = None
        if not symmetric or zero in tensors:
            stored = extents[::-1] if grouped else (() if granularity == Granularity.tensor() else (extents[0],))
            zeros = self._codes(tensors, zero, kind, stored) ^ sign
            zero_point = (zeros.t() if grouped else zeros.reshape(extents)).contiguous()
        if symmetric and zero_point is not None:
            if (zero_point != sign).any():
                raise tensors.error(f"{zero} is not zero, but the configuration calls the weight symmetric")
            zero_point = None
        fmt = get_format(f"{'int' if zero_point is None else 'uint'}{bits}")
        return packed(
            tensors,
            fmt,
            pack_bits(codes, bits),
            scale,
            granularity,
            shape,
            zero_point=zero_point,
            super_scale=super_scale,
        )

    def _codes(self, tensors: LayerTensors, suffix: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """uint8 of `shape`; of 4 bits, 8 along the last dimension in an int32 word."""
        if kind.endswith("8"):
            dtype = torch.uint8 if kind.startswith("u") else torch.int8
            return tensors.take(suffix, dtype, shape=shape).view(torch.uint8)
        if not shape:
            return (tensors.take(suffix, torch.int32, shape=()) & 15).to(torch.uint8)
        words = tensors.take(suffix, torch.int32, shape=(*shape[:-1], -(-shape[-1] // 8)))
        fields = unpack_words(words, 4)
        if self.reorder:
            fields = fields.unflatten(-1, (-1, 8))[..., _FIELDS].flatten(-2)
        return fields[..., : shape[-1]]

    def _activation(
        self, tensors: LayerTensors, specs: tuple[_Spec, ...], weight: PackedWeight
    ) -> tuple[ActivationScheme | None, Tensor | None]:
        tensors.ignore("input_scale", "input_scale_2")  # those of inputs that stay as they are
        shifted = False
        for suffix in ("input_zero_point", "input_zero_point_2"):
            if suffix in tensors:
                stored = tensors.take(suffix, torch.int8, torch.uint8, torch.int32, shape=tensors.info(suffix).shape)
                shifted |= bool(stored.any())
        if not specs:
            return None, None
        spec = specs[0]
        kind = spec.get("dtype")
        if len(specs) > 1 or kind not in ("fp8_e4m3", "fp8_e5m2", "int8"):
            return self._unquantized(f"inputs to {shown(kind)}")
        if shifted or spec.get("symmetric") is False:
            return self._unquantized("inputs with zero points")
        granularity = _granularity(f"quantization_config of {tensors.name}", spec)
        if spec.get("is_dynamic") is not True:
            if granularity != Granularity.tensor():
                return self._unquantized(f"inputs with fixed scales per {granularity}")
            return activation(kind, granularity, dynamic=False), take_number(tensors, "input_scale")
        if granularity.is_group and granularity.columns != weight.scheme.granularity.columns:
            return self._unquantized(f"inputs in groups of {granularity.columns}, which are not the weight's")
        return activation(kind, granularity, powers_of_two=_has_exponents(spec)), None

    def _unquantized(self, what: str) -> tuple[None, None]:
        """Say once a load that inputs stay as they are."""
        if what not in self._noted:
            self._noted.add(what)
            warnings.warn(
                f"the checkpoint quantizes {what}, which qcompile does not do; they stay in the model's dtype here",
                stacklevel=2,
            )
        return None, None
