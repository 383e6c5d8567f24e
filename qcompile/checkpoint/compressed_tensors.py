"""compressed-tensors: what llm-compressor writes (https://github.com/vllm-project/compressed-tensors).

How a layer is stored is read off its tensors; the first of the `config_groups` that targets it, by name before by
pattern before by class, says how many bits there are, what shares a scale, and how inputs are quantized.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits, unpack_bits
from qcompile.checkpoint.compressed_tensors_config import (
    KINDS,
    Args,
    Group,
    check_format,
    matches,
    read_group,
    read_names,
    read_version,
)
from qcompile.checkpoint.marlin import marlin_24_weight
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.scaled import (
    EXPONENTS,
    FLOATS,
    FP8_FORMATS,
    activation,
    fp8_weight,
    is_plain,
    mx_weight,
    nvfp4_weight,
    packed,
    take_number,
    take_scale,
)
from qcompile.checkpoint.store import TensorStore
from qcompile.checkpoint.words import stream_bytes, unpack_words
from qcompile.errors import CheckpointError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import ActivationScheme, Granularity, Scheme

_SPARSE = ("dense", "sparse-24-bitmask", "sparse-bitmask")
_DENSE_SINCE = (0, 17)
"""The version that packs codes of 3, 5, 6 and 7 bits without gaps."""


@register
class CompressedTensors(Method):
    """Every format of the library since 0.3, and its sparse ones, alone or on top of a quantized one."""

    name = "compressed-tensors"
    aliases = ("compressed_tensors",)
    activation_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    min_capability = 80

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        check_format("quantization_config", config.get("format"))
        groups = config.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not all(isinstance(name, str) for name in groups):
            raise CheckpointError(f"quantization_config: config_groups is {shown(groups)}; it is an object of groups")
        self.groups = [read_group(name, given) for name, given in groups.items()]
        self.ignore = read_names("quantization_config: ignore", config.get("ignore"))
        if config.get("transform_config"):
            raise CheckpointError(
                "quantization_config: transform_config asks for rotations of inputs while the model runs, which "
                "qcompile does not have; quantize the model without online transforms"
            )
        sparsity = config.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") not in _SPARSE:
            raise CheckpointError(f"quantization_config: sparsity_config is {shown(sparsity)}; readable are {_SPARSE}")
        self.version = read_version(config.get("version"))
        self._noted: set[str] = set()

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | Tensor | None:
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
        return PackedLinear(
            weight=weight,
            scheme=Scheme(weight=weight.scheme, activation=scheme, method=CHECKPOINT),
            input_scale=input_scale,
        )

    def _group_of(self, tensors: LayerTensors) -> Group:
        if any(matches(kind, self.ignore, tensors.name) for kind in KINDS):
            raise tensors.error("it is in the configuration's ignore, but its tensors are quantized")
        for kind in KINDS:
            for group in self.groups:
                if matches(kind, group.targets, tensors.name):
                    return group
        targets = ", ".join(shown(target) for group in self.groups for target in group.targets)
        raise tensors.error(
            f"its tensors are quantized, but no config group targets it; targets are {targets or 'none'}"
        )

    def _weight(self, tensors: LayerTensors, shape: tuple[int, int], args: Args, weight: Tensor | None) -> PackedWeight:
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

    def _words(self, tensors: LayerTensors, shape: tuple[int, int], args: Args) -> PackedWeight:
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

    def _order(self, tensors: LayerTensors, args: Args, columns: int, groups: int) -> Tensor | None:
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

    def _symmetric(self, tensors: LayerTensors, args: Args) -> None:
        """Old versions wrote zero points of symmetric weights, all zero."""
        if args.symmetric and "weight_zero_point" in tensors:
            shape = tensors.info("weight_zero_point").shape
            stored = tensors.take("weight_zero_point", torch.int8, *FP8_FORMATS, torch.int32, *FLOATS, shape=shape)
            if stored.to(torch.float32).any():
                raise tensors.error("weight_zero_point is not zero, but the configuration calls the weight symmetric")

    def _activation(
        self, tensors: LayerTensors, args: Args | None, weight: PackedWeight
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


def _expect(tensors: LayerTensors, args: Args, fits: bool, what: str) -> None:
    if not fits:
        kind = "float" if args.floating else "int"
        raise tensors.error(f"{what}, but the configuration says {kind} of {args.bits} bits")


def _unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [..., count] codes, 32 // bits a word from its lowest bits up, the rest of a word left empty."""
    per_word = unpack_bits(stream_bytes(words, -1).unflatten(-1, (-1, 4)), bits, 32 // bits)
    return per_word.flatten(-2)[..., :count]


def _bytes(tensors: LayerTensors, shape: tuple[int, int], args: Args, weight: Tensor | None) -> PackedWeight:
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


def _zero_bytes(tensors: LayerTensors, args: Args, blocks: torch.Size) -> Tensor:
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
