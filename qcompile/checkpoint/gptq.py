"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323) of all versions, and AutoRound's (arXiv:2309.05516).

Layouts: `QuantLinear` of https://github.com/AutoGPTQ/AutoGPTQ, `gptqmodel.nn_modules.qlinear` and
`gptqmodel.utils.planar_packing` of https://github.com/ModelCloud/GPTQModel, `auto_round_extension` of
https://github.com/intel/auto-round. Which layers are quantized is read off the tensors; the configuration says how.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits, packed_width
from qcompile.checkpoint.awq import gemm_linear
from qcompile.checkpoint.compressed_tensors import CompressedTensors
from qcompile.checkpoint.fp8 import FP8
from qcompile.checkpoint.integers import (
    SCALES,
    bits_from_words,
    bits_setting,
    check_middle,
    granularity_of,
    group_from_scales,
    group_setting,
    loaded_integers,
    setting,
    take_finite,
)
from qcompile.checkpoint.marlin import marlin_24_weight, marlin_linear, qqq_linear
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.checkpoint.words import PLANES, WORD_DTYPES, stream_bytes, unpack_planes, unpack_words
from qcompile.errors import CheckpointError, shown
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear
from qcompile.scheme import Granularity, Scheme

_BITS = tuple(PLANES)
_PLANAR_BITS = (5, 6, 7)
_FORMATS = ("gptq", "gptq_v2", "gptq_p", "marlin", "marlin_24", "gptq_marlin_24", "qqq")
_LEAST_GROUP = 8
"""Columns that must share a scale where the groups of an activation order differ in size."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a layer's tensors are to be read.

    Attributes:
        group_size: None to have it from the scales.
        symmetric: zero points are the middle of the range; None if the configuration does not say.
        ordered: columns may belong to any group (`desc_act`).
        planar: bit planes instead of a bit stream.
        minus_one: zero points are stored less 1.
        words_minus_one: 1 was subtracted from the fields of a whole word at once, so that a zero point of 0 borrowed
            from the next field.
    """

    bits: int
    group_size: int | None
    symmetric: bool | None
    ordered: bool = False
    planar: bool = False
    minus_one: bool = False
    words_minus_one: bool = False


def _symmetric(config: Mapping[str, Any], default: bool | None) -> bool | None:
    if config.get("sym") is None and config.get("zero_point") is not None:
        return not setting(config, ("zero_point",), False, bool, "true or false")
    return setting(config, ("sym",), default, bool, "true or false")


@register
class GPTQ(Method):
    """Integers of 2 to 8 bits, in the columns' order or in that of activations, also in Marlin's layouts."""

    name = "gptq"
    aliases = ("gptq_marlin", "gptq_marlin_24", "marlin", "qqq")
    activation_dtypes = tuple(SCALES)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        names = ("checkpoint_format", "format", "version")
        given = setting(config, names, "gptq", str, "a string").lower()
        if given not in _FORMATS:
            raise CheckpointError(
                f"quantization_config: checkpoint_format is {shown(given)}; readable are {', '.join(_FORMATS)}: "
                "quantize the original model to one of those"
            )
        self.format = given
        self.bits = bits_setting(config, None, _BITS)
        self.group_size = group_setting(config)
        self.symmetric = _symmetric(config, None)
        self.ordered = setting(config, ("desc_act",), False, bool, "true or false")
        if setting(config, ("static_groups",), False, bool, "true or false"):
            self.ordered = False
        meta = config.get("meta")
        writer = meta.get("quantizer", ()) if isinstance(meta, Mapping) else ()
        writers = [writer] if isinstance(writer, str) else writer if isinstance(writer, (list, tuple)) else ()
        self.by_gptqmodel = any(isinstance(w, str) and w.startswith("gptqmodel") for w in writers)
        self.rules = _rules(config.get("dynamic"))

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        if "B_24" in tensors:
            bits = self.bits or bits_from_words(tensors, "B_24", math.prod(shape) // 2, (4, 8))
            if bits not in (4, 8):
                raise tensors.error(f"it has {bits} bits, but sparse Marlin weights have 4 or 8")
            weight = marlin_24_weight(tensors, shape, bits=bits, codes="B_24", meta="B_meta", scales="s")
            return PackedLinear(weight=weight, scheme=Scheme(weight=weight.scheme, method=CHECKPOINT))
        if "s_channel" in tensors:
            return qqq_linear(tensors, shape)
        if "B" in tensors:
            return marlin_linear(tensors, shape, codes="B", scales="s")
        if "qweight" not in tensors:
            return None
        return _read(tensors, shape, self._layout(tensors, shape))

    def _layout(self, tensors: LayerTensors, shape: tuple[int, int]) -> _Layout:
        """The first rule whose pattern matches the layer's name changes what holds for all."""
        changes = next((change for pattern, change in self.rules if pattern.match(tensors.name)), {})
        bits = bits_setting(changes, self.bits, _BITS) or bits_from_words(tensors, "qweight", math.prod(shape), _BITS)
        return _Layout(
            bits=bits,
            group_size=group_setting(changes, self.group_size),
            symmetric=_symmetric(changes, self.symmetric),
            ordered=setting(changes, ("desc_act",), self.ordered, bool, "true or false"),
            planar=self.format == "gptq_p" or bits in _PLANAR_BITS,
            minus_one=self.format == "gptq",
            words_minus_one=self.by_gptqmodel and bits in (2, 4, 8),
        )


def _rules(dynamic: object) -> list[tuple[re.Pattern[str], Mapping[str, Any]]]:
    """GPTQModel's `dynamic`: patterns of names and what differs for them.

    Those that exclude layers ("-:") say nothing about how to read one, so they are left out.

    Raises:
        CheckpointError: no mapping of patterns to mappings; a pattern that is no regular expression.
    """
    if dynamic is None:
        return []
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(
            f"quantization_config: dynamic is {shown(dynamic)}; it maps patterns of names to settings"
        )
    rules = []
    for name, changes in dynamic.items():
        if name.startswith("-:"):
            continue
        if not isinstance(changes, Mapping):
            raise CheckpointError(f"quantization_config: dynamic[{shown(name)}] is {shown(changes)}; it is an object")
        rules.append((_pattern("dynamic", name.removeprefix("+:")), changes))
    return rules


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"quantization_config: {key}: {shown(text)} is no regular expression: {error}") from None


@register
class AutoRound(Method):
    """What auto-round packs: integers of 2 to 8 bits in GPTQ's layout or AWQ's, floats in compressed-tensors'."""

    name = "auto-round"
    aliases = ("intel/auto-round", "auto_round")
    activation_dtypes = tuple(SCALES)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        self.config = config
        if config.get("rotation_config") or config.get("spinquant_config"):
            raise CheckpointError(
                "quantization_config: rotation_config asks for rotations of inputs while the model runs, which "
                "qcompile does not have; quantize the original model without them"
            )
        self.packing = setting(config, ("packing_format",), "auto_round:auto_gptq", str, "a string").lower()
        changes = config.get("extra_config") or {}
        if not isinstance(changes, Mapping) or not all(isinstance(change, Mapping) for change in changes.values()):
            raise CheckpointError(f"quantization_config: extra_config is {shown(changes)}; it maps layers to settings")
        self.changes = changes
        self.rules = [(_pattern("extra_config", name), change) for name, change in changes.items()]
        self.floats = _floats(config, changes, store)
        if self.floats is None:
            bits_setting(config, None, _BITS)
            group_setting(config)

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | Tensor | None:
        if "qweight" not in tensors:
            return None if self.floats is None else self.floats.linear(tensors, shape)
        changes = self.changes.get(tensors.name)  # a layer's own name goes before patterns
        if changes is None:
            changes = next((change for pattern, change in self.rules if pattern.search(tensors.name)), {})
        config = {**self.config, **{key: value for key, value in changes.items() if value is not None}}
        if _kind(config)[0] != "int":
            raise tensors.error(f"its data_type is {shown(config['data_type'])}, but its tensors are packed integers")
        bits = bits_setting(config, None, _BITS) or bits_from_words(tensors, "qweight", math.prod(shape), _BITS)
        group_size = group_setting(config)
        symmetric = _symmetric(config, None)
        if "awq" in self.packing:
            if bits not in range(4, 8):
                raise tensors.error(f"it has {bits} bits, but auto-round's AWQ layout is for 4 to 7")
            return gemm_linear(tensors, shape, bits, group_size, not symmetric)
        minus_one = self.packing == "auto" or ("gptq" in self.packing and "gptqmodel" not in self.packing)
        layout = _Layout(bits=bits, group_size=group_size, symmetric=symmetric, minus_one=minus_one)
        return _read(tensors, shape, layout)


def _kind(config: Mapping[str, Any]) -> tuple[str, int]:
    """auto-round's `data_type` without its variants, and the bits of inputs.

    Raises:
        CheckpointError: a type that is not readable.
    """
    given = setting(config, ("data_type",), "int", str, "a string")
    inputs = setting(config, ("act_bits",), 16, int, "a number of bits")
    kinds = {"nvfp4_v2": None, "int": "int", "nv_fp": "NVFP", "mx_fp": "MXFP", "fp": "FP"}
    kind = next((kind for prefix, kind in kinds.items() if given.startswith(prefix)), None)
    if kind is None or (kind == "int" and inputs < 16):
        raise CheckpointError(
            f"quantization_config: data_type {shown(given)} with act_bits {inputs} is not readable; quantize the "
            "original model with auto-round's format llm_compressor, or leave its inputs at 16 bits"
        )
    return kind, inputs


def _floats(config: Mapping[str, Any], changes: Mapping[str, Any], store: TensorStore) -> Method | None:
    """Who reads auto-round's NVFP4, MXFP4, MXFP8 and FP8 weights: they are compressed-tensors', or FP8's if tiled."""
    if _kind(config)[0] == "int":
        return None
    tile = config.get("group_size")
    if _kind(config)[0] == "FP" and isinstance(tile, (list, tuple)):
        return FP8({"weight_block_size": list(tile), "activation_scheme": "dynamic"}, store)
    groups = {"default": {**_scheme(config), "targets": ["Linear"]}}
    for name, change in changes.items():
        changed = {**config, **{key: value for key, value in change.items() if value is not None}}
        if setting(changed, ("bits",), 16, int, "a number of bits") < 16 and _kind(changed)[0] != "int":
            groups[name] = {**_scheme(changed), "targets": [name, f"re:.*(?:{name})"]}
    return CompressedTensors({"config_groups": groups}, store)


def _scheme(config: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's settings in compressed-tensors' words."""
    kind, input_bits = _kind(config)
    bits = bits_setting(config, 8 if kind == "FP" else 4, (4, 8))
    numbers: dict[str, Any] = {"num_bits": bits, "type": "float"}
    dynamic: dict[str, Any] = {"dynamic": setting(config, ("act_dynamic",), True, bool, "true or false")}
    if kind == "FP":
        weights = {**numbers, "strategy": "tensor" if config.get("group_size") == 0 else "channel"}
        inputs = {**numbers, **dynamic, "strategy": "token" if dynamic["dynamic"] else "tensor"}
    else:
        weights = {**numbers, "strategy": "group", "group_size": group_setting(config, 16 if kind == "NVFP" else 32)}
        inputs = {**weights, "num_bits": input_bits, "dynamic": True}
        if kind == "MXFP":
            weights["scale_dtype"] = inputs["scale_dtype"] = "torch.uint8"
    return {"weights": weights, "input_activations": inputs if input_bits < 16 else None}


def _read(tensors: LayerTensors, shape: tuple[int, int], layout: _Layout) -> PackedLinear:
    """`qweight` [K * bits / 32, N], `qzeros` [groups, N * bits / 32], `scales` [groups, N], `g_idx` [K]."""
    rows, columns = shape
    word = tensors.info("qweight").dtype
    if word not in WORD_DTYPES.values() or (layout.planar and word != torch.int32):
        readable = "int32" if layout.planar else ", ".join(WORD_DTYPES)
        raise tensors.error(f"qweight is {word}; codes are packed in {readable}")
    if layout.planar and (columns % 32 or rows % 32):
        raise tensors.error(f"its shape {shape} is no multiple of 32 by 32, which bit planes are packed in")
    group = group_from_scales(tensors, "scales", shape) if layout.group_size is None else layout.group_size
    stored = granularity_of(group, columns)
    groups = stored.scale_shape(shape)[1]
    granularity, perm, sources = _column_order(tensors, columns, groups, stored, layout.ordered)

    words = tensors.take("qweight", word, shape=(_words(columns, layout.bits, word), rows))
    if layout.planar or perm is not None:
        unpacked = _unpack(words, layout, 0, columns).t()
        codes = pack_bits(unpacked if perm is None else unpacked[:, perm], layout.bits)
    else:
        codes = stream_bytes(words, 0)[:, : packed_width(columns, layout.bits)]
    scale = take_finite(tensors, "scales", (groups, rows)).t()
    zeros = _zero_points(tensors, layout, word, groups, rows)
    if sources is not None:
        scale = scale[:, sources]
        zeros = None if zeros is None else zeros[:, sources]
    return loaded_integers(tensors, codes, layout.bits, shape, granularity, scale, zero_point=zeros, perm=perm)


def _words(count: int, bits: int, word: torch.dtype) -> int:
    return -(-count * bits // (8 * word.itemsize))


def _unpack(words: Tensor, layout: _Layout, dim: int, count: int) -> Tensor:
    return unpack_planes(words, layout.bits, dim) if layout.planar else unpack_words(words, layout.bits, dim, count)


def _zero_points(tensors: LayerTensors, layout: _Layout, word: torch.dtype, groups: int, rows: int) -> Tensor | None:
    """Zero points uint8 [N, groups]; None where all are the middle of the range."""
    if "qzeros" not in tensors:
        if not layout.symmetric:
            raise tensors.error("it has no qzeros; a weight without zero points needs sym: true in its configuration")
        return None
    words = tensors.take("qzeros", word, shape=(groups, _words(rows, layout.bits, word)))
    middle = 1 << (layout.bits - 1)
    if layout.symmetric:  # stored either way, whichever the configuration says
        check_middle(tensors, "qzeros", _unpack(words, layout, 1, rows), (middle - 1, middle), "sym: true")
        return None
    if layout.minus_one and layout.words_minus_one:
        ones = sum(1 << shift for shift in range(0, 8 * word.itemsize - 1, layout.bits))
        zeros = _unpack(words + ones, layout, 1, rows)
    else:
        zeros = (_unpack(words, layout, 1, rows) + int(layout.minus_one)) & ((1 << layout.bits) - 1)
    return zeros.t()


def _column_order(
    tensors: LayerTensors, columns: int, groups: int, stored: Granularity, ordered: bool
) -> tuple[Granularity, Tensor | None, Tensor | None]:
    """How the columns are sorted by group.

    Groups of one size stay, where one shorter one may be the last; groups of several sizes become smaller ones that
    repeat scales.

    Returns:
        what shares a scale after that; the input feature of each sorted column, int32 [K], or None where they are in
        order; the stored group of each group, or None where they are the same.
    """
    if "g_idx" not in tensors:
        if ordered and groups > 1:
            raise tensors.error(
                "desc_act is true, but it has no g_idx; if its columns are in order, set desc_act to false"
            )
        return stored, None, None
    index = tensors.take("g_idx", torch.int32, torch.int64, shape=(columns,)).to(torch.int64)
    index = torch.where(index < 0, index + groups, index)
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise tensors.error(
            f"g_idx names groups other than 0 to {groups - 1}: the file is damaged, or group_size is wrong in the "
            "configuration"
        )
    in_order = torch.arange(columns) // stored.block_of((1, columns))[1]
    if torch.equal(index, in_order) or (not ordered and not index.any()):
        return stored, None, None
    sizes = torch.bincount(index, minlength=groups)
    used = sizes.nonzero().flatten()
    size = int(sizes.max())
    shorter = used[sizes[used] < size]
    if len(shorter) <= 1:
        order = sources = torch.cat([used[sizes[used] == size], shorter])
    else:
        size = math.gcd(*sizes[used].tolist())
        if size < _LEAST_GROUP:
            raise tensors.error(
                f"g_idx makes groups of {int(sizes[used].min())} to {int(sizes.max())} columns, whose greatest common "
                f"divisor {size} is less than {_LEAST_GROUP}; quantize the original model with static_groups, or "
                "without desc_act"
            )
        order, sources = used, used.repeat_interleave(sizes[used] // size)
    rank = torch.zeros(groups, dtype=torch.int64)
    rank[order] = torch.arange(len(order))
    perm = rank[index].argsort(stable=True).to(torch.int32)
    in_place = torch.equal(perm, torch.arange(columns, dtype=torch.int32))
    return granularity_of(size, columns), None if in_place else perm, sources
