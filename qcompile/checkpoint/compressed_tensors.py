"""compressed-tensors: what llm-compressor writes (https://github.com/vllm-project/compressed-tensors).

How a layer is stored is read off its tensors; the first of the `config_groups` that targets it, by name before by
pattern before by class, says how many bits there are, what shares a scale, and how inputs are quantized.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits, unpack_bits
from qcompile.checkpoint.marlin import marlin_24_weight
from qcompile.checkpoint.method import LayerTensors, LoadedLinear, Method, register
from qcompile.checkpoint.scaled import (
    EXPONENTS,
    FLOATS,
    FP8_FORMATS,
    activation,
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
from qcompile.checkpoint.words import stream_bytes, unpack_words
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedWeight
from qcompile.scheme import ActivationScheme, Granularity, Scheme

_FORMATS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "marlin-24",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_SPARSE = ("dense", "sparse-24-bitmask", "sparse-bitmask")
_LONGEST_PATTERN = 1000
_DENSE_SINCE = (0, 17)
"""The version that packs codes of 3, 5, 6 and 7 bits without gaps."""


@dataclass(frozen=True, kw_only=True)
class _Args:
    """How some numbers are quantized: the `QuantizationArgs` of the library, checked.

    Attributes:
        group: columns that share a scale; of the strategies group and tensor_group alone.
        tile: (rows, columns) that share one; of the strategy block alone.
        dynamic: scales are computed from each input.
        exponents: scales are powers of two.
    """

    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int | None
    tile: tuple[int, int] | None
    dynamic: bool
    exponents: bool

    @property
    def granularity(self) -> Granularity:
        if self.strategy in ("group", "tensor_group"):
            assert self.group is not None
            return Granularity.group(self.group)
        if self.strategy == "block":
            assert self.tile is not None
            return Granularity.block(*self.tile)
        return Granularity.tensor() if self.strategy == "tensor" else Granularity.channel()


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One of the `config_groups`."""

    targets: tuple[str, ...]
    weights: _Args | None
    inputs: _Args | None


def _args(where: str, given: object) -> _Args | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} is {shown(given)}; it is an object with num_bits, type and strategy, or null")

    def get(key: str, default: object, valid: Callable[[Any], bool], meaning: str) -> Any:
        value = default if given.get(key) is None else given[key]
        if not valid(value):
            raise CheckpointError(f"{where}: {key} is {shown(value)}; it is {meaning}")
        return value

    bits = get("num_bits", 8, lambda v: type(v) is int and 1 <= v <= 16, "a number from 1 to 16")
    kind = get("type", "int", lambda v: v in ("int", "float"), "int or float")
    group = get("group_size", None, lambda v: v is None or (type(v) is int and -1 <= v < 2**31), "a positive number")
    inferred = "tensor" if group is None else "channel" if group <= 0 else "group"
    strategies = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
    strategy = get("strategy", inferred, lambda v: v in strategies, f"one of {', '.join(strategies)}")
    if strategy in ("group", "tensor_group") and (group is None or group <= 0):
        raise CheckpointError(f"{where}: strategy {strategy} needs a positive group_size, not {shown(group)}")
    tile = given.get("block_structure")
    if isinstance(tile, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", tile):
        tile = [int(part) for part in tile.split("x")]
    if strategy == "block" and not is_tile(tile):
        raise CheckpointError(f"{where}: block_structure is {shown(tile)}; it is [rows, columns], as [128, 128]")
    return _Args(
        bits=bits,
        floating=kind == "float",
        symmetric=get("symmetric", True, lambda v: isinstance(v, bool), "true or false"),
        strategy=strategy,
        group=group if strategy in ("group", "tensor_group") else None,
        tile=(tile[0], tile[1]) if strategy == "block" and is_tile(tile) else None,
        dynamic=get("dynamic", False, lambda v: isinstance(v, bool) or v == "local", 'true, false or "local"')
        is not False,
        exponents=given.get("scale_dtype") in ("torch.uint8", "uint8", "torch.float8_e8m0fnu"),
    )


def _preset_args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, **more}


_TOKEN = {"strategy": "token", "dynamic": True}
_MX: dict[str, Any] = {"group_size": 32, "scale_dtype": "torch.uint8"}


def _presets() -> dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """The schemes that a group's name may stand for: weights, inputs."""
    presets: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {"UNQUANTIZED": (None, None)}
    for bits in range(2, 9):
        weights = _preset_args(bits, "int", "group", group_size=128)
        presets[f"W{bits}A16"] = (weights, None)
        for inputs in (4, 8):
            if bits <= inputs:
                presets[f"W{bits}A{inputs}"] = (weights, {"num_bits": inputs, "type": "int", **_TOKEN})
    int8 = (_preset_args(8, "int", "channel"), {"num_bits": 8, "type": "int", **_TOKEN})
    fp8_token = {"num_bits": 8, "type": "float", **_TOKEN}
    fp4 = _preset_args(4, "float", "tensor_group", group_size=16)
    mxfp4, mxfp6, mxfp8 = (_preset_args(bits, "float", "group", **_MX) for bits in (4, 6, 8))
    return presets | {
        "W8A8": int8,
        "INT8": int8,
        "INT8_W8A8": int8,
        "W4A16_ASYM": (_preset_args(4, "int", "group", group_size=128, symmetric=False), None),
        "W4AFP8": (_preset_args(4, "int", "group", group_size=128), fp8_token),
        "FP8": (_preset_args(8, "float", "tensor"), _preset_args(8, "float", "tensor")),
        "FP8_DYNAMIC": (_preset_args(8, "float", "channel"), fp8_token),
        "FP8_BLOCK": (
            _preset_args(8, "float", "block", block_structure=[128, 128]),
            _preset_args(8, "float", "group", group_size=128, dynamic=True),
        ),
        "NVFP4A16": (fp4, None),
        "NVFP4": (fp4, {**fp4, "dynamic": "local"}),
        "MXFP4A16": (mxfp4, None),
        "MXFP4XFP8": (mxfp4, _preset_args(8, "float", "group", group_size=128, dynamic=True)),
        "MXFP4": (mxfp4, {**mxfp4, "dynamic": True}),
        "MXFP6A16": (mxfp6, None),
        "MXFP6A8": (mxfp6, {**mxfp8, "dynamic": True}),
        "MXFP8A16": (mxfp8, None),
        "MXFP8": (mxfp8, {**mxfp8, "dynamic": True}),
    }


def _names(where: str, given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise CheckpointError(f"{where} is {shown(given)}; it is a list of names")
    for name in given:
        if name.startswith("re:"):
            try:
                re.compile(name[3 : 3 + _LONGEST_PATTERN])
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{where}: {shown(name)} is no regular expression: {error}") from None
            if len(name) > 3 + _LONGEST_PATTERN:
                raise CheckpointError(f"{where}: a pattern is longer than {_LONGEST_PATTERN} characters")
    return tuple(given)


def _group(name: str, given: object) -> _Group:
    where = f"quantization_config: config_groups: {name}"
    if isinstance(given, (list, tuple)):
        found = _presets().get(name.upper())
        if found is None:
            raise CheckpointError(f"{where} is a list, so its name is a preset's, and {shown(name)} is none")
        weights, inputs = found
        return _Group(
            targets=_names(where, given),
            weights=_args(f"{where}: weights", weights),
            inputs=_args(f"{where}: input_activations", inputs),
        )
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} is {shown(given)}; it is an object with targets and weights")
    _check_format(where, given.get("format"))
    return _Group(
        targets=_names(f"{where}: targets", given.get("targets")),
        weights=_args(f"{where}: weights", given.get("weights")),
        inputs=_args(f"{where}: input_activations", given.get("input_activations")),
    )


def _check_format(where: str, given: object) -> None:
    if given is not None and given not in _FORMATS:
        raise CheckpointError(f"{where}: format is {shown(given)}; readable are {', '.join(_FORMATS)}")


def _matches(kind: str, names: Collection[str], layer: str) -> bool:
    """Whether one of `names`, of a kind (exact, pattern, class), means the layer, which is a linear."""
    if kind == "exact":
        return any(spelled in names for spelled in spellings(layer))
    if kind == "class":
        return not {"Linear", "LinearBase", "Module"}.isdisjoint(names)
    patterns = [name[3:] for name in names if name.startswith("re:")]
    return any(re.match(pattern, spelled) for pattern in patterns for spelled in spellings(layer))


_KINDS = ("exact", "pattern", "class")


@register
class CompressedTensors(Method):
    """Every format of the library since 0.3, and its sparse ones, alone or on top of a quantized one."""

    name = "compressed-tensors"
    aliases = ("compressed_tensors",)
    activation_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        _check_format("quantization_config", config.get("format"))
        groups = config.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not all(isinstance(name, str) for name in groups):
            raise CheckpointError(f"quantization_config: config_groups is {shown(groups)}; it is an object of groups")
        self.groups = [_group(name, given) for name, given in groups.items()]
        self.ignore = _names("quantization_config: ignore", config.get("ignore"))
        if config.get("transform_config"):
            raise CheckpointError(
                "quantization_config: transform_config asks for rotations of inputs while the model runs, which "
                "qcompile does not have; quantize the model without online transforms"
            )
        sparsity = config.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") not in _SPARSE:
            raise CheckpointError(f"quantization_config: sparsity_config is {shown(sparsity)}; readable are {_SPARSE}")
        self.version = _version(config.get("version"))
        self._noted: set[str] = set()

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> LoadedLinear | Tensor | None:
        if is_plain(tensors):
            return None
        dense = _expand(tensors, shape)
        if dense is not None and dense.dtype in FLOATS:
            return dense
        group = self._group_of(tensors)
        args = group.weights
        if args is None:
            raise tensors.error("its tensors are quantized, but the group of the configuration has no weights")
        if args.floating and not args.symmetric:
            raise tensors.error("the configuration asks for floats with zero points, which the library never wrote")
        weight = self._weight(tensors, shape, args, dense)
        self._symmetric(tensors, args)
        scheme, input_scale = self._activation(tensors, group.inputs, weight)
        return LoadedLinear(
            weight=weight,
            scheme=Scheme(weight=weight.scheme, activation=scheme, method=CHECKPOINT),
            input_scale=input_scale,
        )

    def _group_of(self, tensors: LayerTensors) -> _Group:
        if any(_matches(kind, self.ignore, tensors.name) for kind in _KINDS):
            raise tensors.error("it is in the configuration's ignore, but its tensors are quantized")
        for kind in _KINDS:
            for group in self.groups:
                if _matches(kind, group.targets, tensors.name):
                    return group
        targets = ", ".join(shown(target) for group in self.groups for target in group.targets)
        raise tensors.error(
            f"its tensors are quantized, but no config group targets it; targets are {targets or 'none'}"
        )

    def _weight(
        self, tensors: LayerTensors, shape: tuple[int, int], args: _Args, weight: Tensor | None
    ) -> PackedWeight:
        if "scale_packed" in tensors:
            _expect(tensors, args, not args.floating and args.bits in (4, 8), "marlin-24 holds integers of 4 or 8 bits")
            return marlin_24_weight(
                tensors, shape, bits=args.bits, codes="weight_packed", meta="meta", scales="scale_packed"
            )
        if "weight_packed" in tensors:
            if tensors.info("weight_packed").dtype == torch.int32:
                _expect(tensors, args, not args.floating and 2 <= args.bits <= 8, "int32 words hold integers")
                return self._words(tensors, shape, args)
            _expect(tensors, args, args.floating and args.bits in (4, 6), "packed bytes hold floats of 4 or 6 bits")
            if "weight_global_scale" in tensors:
                _expect(tensors, args, args.bits == 4, "weight_global_scale belongs to floats of 4 bits")
                divisor = take_number(tensors, "weight_global_scale")
                if not torch.isfinite(1 / divisor):
                    raise tensors.error(f"weight_global_scale is {divisor.item()}, so small that its inverse overflows")
                return nvfp4_weight(tensors, shape, "weight_packed", "weight_scale", 1 / divisor)
            return mx_weight(tensors, shape, {4: "fp4_e2m1", 6: "fp6_e2m3"}[args.bits], "weight_packed", "weight_scale")
        if (tensors.info("weight").dtype if weight is None else weight.dtype) in FP8_FORMATS:
            _expect(tensors, args, args.floating and args.bits == 8, "weight is FP8")
            dtypes = EXPONENTS if args.exponents else FLOATS
            scale = take_scale(tensors, "weight_scale", args.granularity, shape, dtypes)
            return fp8_weight(tensors, shape, scale, args.granularity, codes=weight)
        _expect(tensors, args, not args.floating and 2 <= args.bits <= 8, "weight holds integers")
        return _bytes(tensors, shape, args, weight)

    def _words(self, tensors: LayerTensors, shape: tuple[int, int], args: _Args) -> PackedWeight:
        """Offset codes in int32 words along K; zero points likewise along N."""
        rows, columns = shape
        declared = tensors.take("weight_shape", torch.int64, torch.int32, shape=(2,)).tolist()
        if declared != [rows, columns]:
            raise tensors.error(f"weight_shape says {declared}, but the model's layer is {[rows, columns]}")
        stored = tensors.info("weight_packed").shape
        padded = self._has_gaps(tensors, stored, columns, args.bits)
        words = tensors.take("weight_packed", torch.int32, shape=(rows, stored[-1]))
        if padded:
            codes = pack_bits(_unpack_padded(words, args.bits, columns), args.bits)
        elif columns * args.bits % 8:
            codes = pack_bits(unpack_words(words, args.bits, count=columns), args.bits)
        else:
            codes = stream_bytes(words, -1)[:, : columns * args.bits // 8]
        scale = take_scale(tensors, "weight_scale", args.granularity, shape, FLOATS)
        perm = self._order(tensors, args, columns, scale.shape[1])
        if perm is not None:
            codes = pack_bits(unpack_bits(codes, args.bits, columns)[:, perm], args.bits)
        zero_point = None
        if not args.symmetric:
            blocks = scale.shape
            if args.strategy == "tensor":
                zero_point = _zero_bytes(tensors, args, blocks)
            else:
                width = -(-blocks[0] // (32 // args.bits)) if padded else -(-blocks[0] * args.bits // 32)
                zeros = tensors.take("weight_zero_point", torch.int32, shape=(width, blocks[1])).t().contiguous()
                unpack = _unpack_padded if padded else lambda w, bits, count: unpack_words(w, bits, count=count)
                zero_point = unpack(zeros, args.bits, blocks[0]).t().contiguous()
        fmt = get_format(f"{'int' if args.symmetric else 'uint'}{args.bits}")
        return packed(tensors, fmt, codes, scale, args.granularity, shape, zero_point=zero_point, perm=perm)

    def _has_gaps(self, tensors: LayerTensors, stored: tuple[int, ...], count: int, bits: int) -> bool:
        """Whether words hold 32 // bits codes each and leave bits over, as they did until 0.16."""
        dense, padded = -(-count * bits // 32), -(-count // (32 // bits))
        if not stored or stored[-1] not in (dense, padded):
            raise tensors.error(
                f"weight_packed has shape {tuple(stored)}; {count} codes of {bits} bits take {dense} words, or "
                f"{padded} as versions before 0.17 packed them"
            )
        if dense == padded:
            return self.version is not None and self.version < _DENSE_SINCE
        return stored[-1] == padded

    def _order(self, tensors: LayerTensors, args: _Args, columns: int, groups: int) -> Tensor | None:
        """The columns in the order of their groups, where `weight_g_idx` gives each its group."""
        if "weight_g_idx" not in tensors:
            return None
        index = tensors.take("weight_g_idx", torch.int32, torch.int64, shape=(columns,)).to(torch.int64)
        if (index == -1).all():  # never set: activation ordering was not used
            return None
        if args.strategy != "group" or index.min() < 0 or index.max() >= groups:
            raise tensors.error(f"weight_g_idx names groups outside 0 to {groups - 1}")
        counts = torch.bincount(index, minlength=groups)
        assert args.group is not None
        if not torch.equal(counts, torch.full_like(counts, args.group)):
            raise tensors.error(f"weight_g_idx gives groups other than {args.group} columns each")
        return index.argsort(stable=True).to(torch.int32)

    def _symmetric(self, tensors: LayerTensors, args: _Args) -> None:
        """Old versions wrote zero points of symmetric weights, all zero."""
        if args.symmetric and "weight_zero_point" in tensors:
            shape = tensors.info("weight_zero_point").shape
            stored = tensors.take("weight_zero_point", torch.int8, *FP8_FORMATS, torch.int32, *FLOATS, shape=shape)
            if stored.to(torch.float32).any():
                raise tensors.error("weight_zero_point is not zero, but the configuration calls the weight symmetric")

    def _activation(
        self, tensors: LayerTensors, args: _Args | None, weight: PackedWeight
    ) -> tuple[ActivationScheme | None, Tensor | None]:
        tensors.ignore("input_scale", "input_global_scale")  # those of inputs that stay as they are
        shifted = _input_zero_point(tensors)
        if args is None or args.bits >= 16:
            return None, None
        kind = f"{'float' if args.floating else 'integer'} inputs of {args.bits} bits"
        if args.bits != 8 and (args.floating or not 2 <= args.bits < 8):
            return self._unquantized(f"{kind}, which no device of qcompile multiplies")
        if shifted or (not args.symmetric and (args.bits == 8 or not args.dynamic or args.exponents)):
            return self._unquantized(f"{kind} with zero points, which qcompile has for dynamic scales of up to 7 bits")
        name = "fp8_e4m3" if args.floating else f"{'int' if args.symmetric else 'uint'}{args.bits}"
        if not args.dynamic:
            if args.strategy != "tensor":
                return self._unquantized(f"{kind} with fixed scales per {args.strategy}, not per tensor")
            return activation(name, Granularity.tensor(), dynamic=False), take_number(tensors, "input_scale")
        granularity = Granularity.channel() if args.strategy == "token" else args.granularity
        if granularity.is_group and granularity.columns != weight.scheme.granularity.columns:
            return self._unquantized(f"{kind} in groups of {granularity.columns}, which are not the weight's groups")
        return activation(name, granularity, powers_of_two=args.exponents), None

    def _unquantized(self, what: str) -> tuple[None, None]:
        """Say once a load that inputs stay as they are."""
        if what not in self._noted:
            self._noted.add(what)
            warnings.warn(f"the checkpoint quantizes {what}; they stay in the model's dtype here", stacklevel=2)
        return None, None


def _version(given: object) -> tuple[int, int] | None:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", given) if isinstance(given, str) else None
    return None if found is None else (int(found[1]), int(found[2]))


def _expect(tensors: LayerTensors, args: _Args, fits: bool, what: str) -> None:
    if not fits:
        kind = "float" if args.floating else "int"
        raise tensors.error(f"{what}, but the configuration says {kind} of {args.bits} bits")


def _unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [..., count] codes, 32 // bits a word from its lowest bits up, the rest of a word left empty."""
    per_word = unpack_bits(stream_bytes(words, -1).unflatten(-1, (-1, 4)), bits, 32 // bits)
    return per_word.flatten(-2)[..., :count]


def _bytes(tensors: LayerTensors, shape: tuple[int, int], args: _Args, weight: Tensor | None) -> PackedWeight:
    """One signed code a byte."""
    if weight is None:
        weight = tensors.take("weight", torch.int8, shape=shape)
    half = 1 << (args.bits - 1)
    if int(weight.amin()) < -half or int(weight.amax()) >= half:
        raise tensors.error(f"weight has codes outside {-half} to {half - 1}, the integers of {args.bits} bits")
    codes = pack_bits((weight.view(torch.uint8) + half).contiguous(), args.bits)
    scale = take_scale(tensors, "weight_scale", args.granularity, shape, FLOATS)
    zero_point = None if args.symmetric else _zero_bytes(tensors, args, scale.shape)
    fmt = get_format(f"{'int' if args.symmetric else 'uint'}{args.bits}")
    return packed(tensors, fmt, codes, scale, args.granularity, shape, zero_point=zero_point)


def _zero_bytes(tensors: LayerTensors, args: _Args, blocks: torch.Size) -> Tensor:
    stored = tensors.info("weight_zero_point").shape
    zero = tensors.take("weight_zero_point", torch.int8, shape=stored)
    half = 1 << (args.bits - 1)
    if zero.numel() != blocks.numel() or int(zero.amin()) < -half or int(zero.amax()) >= half:
        raise tensors.error(
            f"weight_zero_point is not one integer of {args.bits} bits for each of {blocks.numel()} scales"
        )
    return (zero.view(torch.uint8) + half).reshape(blocks)


def _input_zero_point(tensors: LayerTensors) -> bool:
    """Whether there is a zero point of the inputs that is not 0."""
    if "input_zero_point" not in tensors:
        return False
    shape = tensors.info("input_zero_point").shape
    stored = tensors.take("input_zero_point", torch.int8, *FP8_FORMATS, torch.int32, *FLOATS, shape=shape)
    return bool(stored.to(torch.float32).any())


def _expand(tensors: LayerTensors, shape: tuple[int, int]) -> Tensor | None:
    """The weight [N, K] of a sparse one: nonzero codes in order, and a bit for each place, lowest first."""
    prefix = next((p for p in ("", "weight.") if f"{p}compressed" in tensors), None)
    if prefix is None:
        return None
    rows, columns = shape
    stored = tensors.info(f"{prefix}compressed")
    values = tensors.take(f"{prefix}compressed", torch.int8, *FP8_FORMATS, *FLOATS, shape=stored.shape)
    bits = tensors.take(f"{prefix}bitmask", torch.uint8, shape=(rows, -(-columns // 8)))
    declared = tensors.info(f"{prefix}shape").shape
    if declared not in ((2,), (2, 1)):
        raise tensors.error(f"{prefix}shape has shape {tuple(declared)}; it is two numbers")
    if tensors.take(f"{prefix}shape", torch.int64, torch.int32, shape=declared).flatten().tolist() != [rows, columns]:
        raise tensors.error(f"{prefix}shape is not that of the model's layer, {[rows, columns]}")
    places = unpack_bits(bits, 1, columns).bool()
    if int(places.sum()) != values.numel():
        raise tensors.error(f"{prefix}bitmask marks {int(places.sum())} weights, but {values.numel()} are stored")
    if f"{prefix}row_offsets" in tensors:
        starts = tensors.take(f"{prefix}row_offsets", torch.int64, torch.int32, shape=(rows,))
        if not torch.equal(starts.long(), places.sum(1).cumsum(0) - places.sum(1)):
            raise tensors.error(f"{prefix}row_offsets are not those of the bitmask")
    if values.dtype in FLOATS:
        return torch.zeros(shape, dtype=values.dtype).masked_scatter_(places, values)
    return torch.zeros(shape, dtype=torch.uint8).masked_scatter_(places, values.view(torch.uint8)).view(values.dtype)
