"""What quantizing a layer means: formats, the blocks that share a scale, and the presets by their field names."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcompile.errors import ConfigError, LayerError, shown
from qcompile.formats import FORMATS, Format, IntegerFormat, get_format
from qcompile.methods import (
    ABSMAX,
    CHECKPOINT,
    HQQ,
    ROUND,
    Method,
    Observer,
    method_to_config,
    observer_to_config,
    parse_method,
    parse_observer,
)

FLOAT_SCALES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE_DTYPES = FLOAT_SCALES | {
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint8": torch.uint8,
    "int8": torch.int8,
}
WHOLE = -1


@dataclass(frozen=True)
class Granularity:
    """The block of a matrix that shares one scale, as (rows, columns); -1 is the whole extent.

    Rows are output features of a weight [N, K], or tokens of an activation [M, K].
    """

    rows: int
    columns: int

    @classmethod
    def tensor(cls) -> Granularity:
        """One scale for all."""
        return cls(WHOLE, WHOLE)

    @classmethod
    def channel(cls) -> Granularity:
        """A scale a row: per output channel of a weight, per token of an activation."""
        return cls(1, WHOLE)

    @classmethod
    def group(cls, size: int) -> Granularity:
        """A scale for each run of `size` columns of a row."""
        return cls(1, size)

    @classmethod
    def block(cls, rows: int, columns: int) -> Granularity:
        """A scale a tile, as in FP8 checkpoints with 128x128 blocks; edge tiles may be smaller."""
        return cls(rows, columns)

    @property
    def is_group(self) -> bool:
        return self.rows == 1 and self.columns != WHOLE

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The block's extent in a matrix of this shape."""
        rows, columns = shape
        return (rows if self.rows == WHOLE else self.rows, columns if self.columns == WHOLE else self.columns)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks a matrix of this shape has, in rows and in columns."""
        block = self.block_of(shape)
        return tuple(-(-extent // max(size, 1)) for extent, size in zip(shape, block, strict=True))  # type: ignore[return-value]

    def __str__(self) -> str:
        if self == Granularity.tensor():
            return "tensor"
        if self == Granularity.channel():
            return "channel"
        return f"group {self.columns}" if self.is_group else f"block {self.rows}x{self.columns}"


@dataclass(frozen=True, kw_only=True)
class SuperScale:
    """Scales of scales: NVFP4's global scale, the scales of a K-quant's super-blocks.

    Attributes:
        columns: of a row of the weight that share one; -1 is the whole row.
        dtype: "float32", "bfloat16" or "float16".
        bits: of the integers that the scales beneath are; 8 for others.
    """

    columns: int
    dtype: str
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ConfigError(f"super_scale bits must be an integer from 2 to 8, not {shown(self.bits)}")
        if self.dtype not in tuple(FLOAT_SCALES):
            raise ConfigError(f"super_scale dtype {shown(self.dtype)} is none of {', '.join(FLOAT_SCALES)}")

    def count(self, columns: int) -> int:
        """How many a row of so many columns has."""
        return 1 if self.columns == WHOLE else -(-columns // self.columns)


@dataclass(frozen=True, kw_only=True)
class WeightScheme:
    """How a weight [N, K] is stored; `PackedWeight` has the equations.

    Attributes:
        format: number format of the codes; zero points go with an unsigned integer one.
        granularity: which weights share a scale (and a zero point or offset).
        symmetric: whether there is neither zero point nor offset.
        offset: an asymmetric scheme adds an offset after the scale (GGUF calls it min) instead of subtracting an
            integer zero point before it.
        scale_dtype: of the stored scales and offsets, one of `SCALE_DTYPES`; integer ones need a `super_scale`.
        super_scale: what multiplies scales, and offsets likewise.
        act_order: the columns of the codes are sorted by group, as GPTQ with `desc_act` leaves them.
        flexible_group: the group comes from a preset, so it may shrink to fit K.
        sparsity: "2:4" if of each four neighbouring columns, from a multiple of four, at most two are not 0; None if
            any may be. For symmetric integers of 4 and 8 bits whose columns are in their own order.
    """

    format: Format
    granularity: Granularity
    symmetric: bool = True
    offset: bool = False
    scale_dtype: str = "float32"
    super_scale: SuperScale | None = None
    act_order: bool = False
    flexible_group: bool = False
    sparsity: str | None = None

    def __post_init__(self) -> None:
        if self.sparsity not in (None, "2:4"):
            raise ConfigError(f'sparsity {shown(self.sparsity)} is neither "2:4" nor null')
        if self.sparsity is not None and (self.format.name not in ("int4", "int8") or not self.symmetric):
            raise ConfigError(
                f"2:4 sparse weights are symmetric int4 or int8, not {self.format.name}"
                + (" with offsets" if self.offset else "")
            )
        if self.sparsity is not None and self.act_order:
            raise ConfigError("columns of 2:4 sparse weights are in their own order: leave act_order out")
        if self.scale_dtype not in tuple(SCALE_DTYPES):
            raise ConfigError(f"scale_dtype {shown(self.scale_dtype)} is none of {', '.join(SCALE_DTYPES)}")
        unsigned = isinstance(self.format, IntegerFormat) and not self.format.signed
        if self.offset and self.symmetric:
            raise ConfigError("a symmetric weight has no offset")
        if not self.symmetric and not self.offset and not unsigned:
            raise ConfigError(f"an asymmetric weight takes an unsigned integer format, not {self.format.name}")
        if self.symmetric and unsigned:
            raise ConfigError(f"a symmetric weight takes a signed format, not {self.format.name}")
        if self.has_super_blocks and self.super_scale is None:
            raise ConfigError(f"scales of dtype {self.scale_dtype} need a super_scale")
        if self.super_scale is not None and self.granularity.rows != 1:
            raise ConfigError(f"a super_scale goes with scales per channel or group, not per {self.granularity}")
        if self.super_scale is not None and self.super_scale.bits != 8 and not self.has_super_blocks:
            raise ConfigError(f"super_scale bits are of integer scales, not of {self.scale_dtype}")

    @property
    def has_super_blocks(self) -> bool:
        """Whether scales (and offsets) are integers, under others that runs of a row's blocks share."""
        return self.scale_dtype in ("uint8", "int8")

    @property
    def stored_bits(self) -> int:
        """Bits that a weight takes at least: of a sparse one half a code, and one that says whose it is."""
        return self.format.bits if self.sparsity is None else self.format.bits // 2 + 1

    @property
    def zero_code(self) -> int:
        """The code of 0 in a sparse weight."""
        return 1 << (self.format.bits - 1)

    @property
    def fields(self) -> tuple[str, ...]:
        """The tensors that a packed weight of this scheme has, in the order of `PackedWeight.tensors`."""
        present = {
            "codes": True,
            "scale": True,
            "zero_point": not self.symmetric and not self.offset,
            "offset": self.offset,
            "super_scale": self.super_scale is not None,
            "super_offset": self.offset and self.super_scale is not None,
            "perm": self.act_order,
        }
        return tuple(name for name, there in present.items() if there)

    def fit(self, layer: str, shape: tuple[int, int]) -> WeightScheme:
        """This scheme with a group that divides the K of a layer of shape (N, K).

        A preset's group becomes the largest power of two that divides K, a scale per channel where that is below 16.
        A preset's super-blocks, where they do not divide K, give way to the type that llama.cpp takes then
        (`SUBSTITUTES`).

        Raises:
            LayerError: an explicit group or super-block that does not divide K; names the layer and what does.
        """
        size = self.granularity.columns
        inner = shape[1]
        above = self.super_scale.columns if self.has_super_blocks and self.super_scale is not None else WHOLE
        if above != WHOLE and inner % above:
            if self.flexible_group and self.format.name in SUBSTITUTES:
                return PRESETS[SUBSTITUTES[self.format.name]].weight.fit(layer, shape)
            raise LayerError(
                f"{layer}: super-blocks of {above} do not divide its {inner} input features; presets of GGUF's K types "
                "give way to others then, or give it another scheme"
            )
        if not self.granularity.is_group or inner % size == 0:
            return self
        divisors = [g for g in (16, 32, 64, 128, 256, 512) if inner % g == 0]
        if not self.flexible_group:
            fitting = f"groups that do: {', '.join(map(str, divisors))}" if divisors else 'use "granularity": "channel"'
            raise LayerError(f"{layer}: group_size {size} does not divide its {inner} input features; {fitting}")
        fitting_sizes = [g for g in divisors if g <= size]
        granularity = Granularity.group(fitting_sizes[-1]) if fitting_sizes else Granularity.channel()
        return replace(self, granularity=granularity, flexible_group=False)

    def __str__(self) -> str:
        return f"{self.format.name} {self.granularity}" + (f" {self.sparsity} sparse" if self.sparsity else "")


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """How a layer's input [M, K] is quantized before the product.

    Attributes:
        format: int8, fp8_e4m3 or fp8_e5m2.
        granularity: per token (`channel`), per tensor, or per group of columns of a token.
        dynamic: scales are computed from each input; else one scale per tensor is fixed beforehand.
        scale: the fixed scale where the configuration states it; otherwise calibration finds it.
        scale_dtype: "float32", or "float8_e8m0fnu" for dynamic scales that are powers of two, as MX has them.
        observer: how calibration finds a static scale that is not stated.
        outlier_threshold: columns in which any token reaches this magnitude are multiplied unquantized (LLM.int8,
            Dettmers et al. 2022, arXiv:2208.07339); None quantizes all.
    """

    format: Format
    granularity: Granularity
    dynamic: bool = True
    scale: float | None = None
    scale_dtype: str = "float32"
    outlier_threshold: float | None = None
    observer: Observer = ABSMAX

    def __post_init__(self) -> None:
        if self.observer != ABSMAX and (self.dynamic or self.scale is not None):
            raise ConfigError("an observer finds static scales: it goes with dynamic: false and no stated scale")
        if self.scale_dtype not in ("float32", "float8_e8m0fnu") or (
            not self.dynamic and self.scale_dtype != "float32"
        ):
            raise ConfigError(f"activation scale_dtype {shown(self.scale_dtype)} is neither float32 nor float8_e8m0fnu")
        if self.outlier_threshold is not None and not 0 < self.outlier_threshold < float("inf"):
            raise ConfigError(f"outlier_threshold must be a positive number, not {shown(self.outlier_threshold)}")
        if self.format.native_dtype is None:
            names = ", ".join(f.name for f in FORMATS.values() if f.native_dtype is not None)
            raise ConfigError(f"activations cannot be {self.format.name}; they can be {names}")
        if not self.dynamic and self.granularity != Granularity.tensor():
            raise ConfigError("a static activation scale is per tensor")
        if self.granularity.rows not in (1, WHOLE) or (self.granularity.rows == WHOLE) != (
            self.granularity == Granularity.tensor()
        ):
            raise ConfigError("activations are quantized per tensor, per token, or per group of a token")
        limits = torch.finfo(torch.float32)
        if self.scale is not None and (self.dynamic or not limits.smallest_normal <= self.scale <= limits.max):
            raise ConfigError("activation scale: a positive float32 number, and only with dynamic: false")

    def __str__(self) -> str:
        per = {"channel": "token"}.get(str(self.granularity), str(self.granularity))
        return f"{self.format.name} {'dynamic' if self.dynamic else 'static'} per {per}"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A layer's quantization: its weight, its input (None: left as it is), and how the codes are chosen."""

    weight: WeightScheme
    activation: ActivationScheme | None = None
    method: Method = ROUND

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ConfigError(f"a scheme's method is a qcompile.methods.Method, not {shown(self.method)}")
        if isinstance(self.method.codes, HQQ) and self.weight.has_super_blocks:
            raise ConfigError(
                f"method hqq does not choose {self.weight.scale_dtype} scales and offsets; take gptq, or "
                '{"name": "rtn", "clip": "mse"}'
            )
        if isinstance(self.method.codes, HQQ) and self.weight.symmetric:
            raise ConfigError(
                f"method hqq moves zero points or offsets, and a symmetric {self.weight.format.name} has neither; take "
                'int4_asym or "offset": true, or {"name": "rtn", "clip": "mse"}'
            )
        if self.activation is not None and self.activation.granularity.is_group:
            block = self.weight.granularity
            if block.columns != self.activation.granularity.columns:
                raise ConfigError(
                    f"activations per group of {self.activation.granularity.columns} need weights with blocks of as "
                    f"many columns, not {block}"
                )

    @property
    def needs_scale(self) -> bool:
        """Whether the input's scale is static and not stated, so that calibration must find it."""
        return self.activation is not None and not self.activation.dynamic and self.activation.scale is None

    @property
    def needs_data(self) -> bool:
        """Whether inputs of the layer must be seen before it is quantized."""
        return self.needs_scale or self.method.needs_data

    def check_rounded(self, layer: str) -> None:
        """For where weights are rounded to nearest and nothing else.

        Raises:
            LayerError: another method.
        """
        if self.method not in (ROUND, CHECKPOINT):
            raise LayerError(
                f"{layer}: method {self.method} is for linear modules, by qcompile.quantize_(model, config, "
                "calibration=batches); here weights are rounded to nearest: leave the method out, or quantize first"
            )

    def fit(self, layer: str, shape: tuple[int, int]) -> Scheme:
        """See `WeightScheme.fit`."""
        weight, activation = self.weight.fit(layer, shape), self.activation
        if activation is not None and activation.granularity == self.weight.granularity:
            activation = replace(activation, granularity=weight.granularity)
        return replace(self, weight=weight, activation=activation)

    def __str__(self) -> str:
        return f"{self.weight}" + (f", activations {self.activation}" if self.activation else "")


def _integer(bits: int, group: int | None, *, symmetric: bool = True, sparsity: str | None = None) -> WeightScheme:
    return WeightScheme(
        format=get_format(f"{'int' if symmetric else 'uint'}{bits}"),
        granularity=Granularity.channel() if group is None else Granularity.group(group),
        symmetric=symmetric,
        scale_dtype="float32" if group is None else "bfloat16",
        flexible_group=group is not None,
        sparsity=sparsity,
    )


def _mx(name: str) -> WeightScheme:
    return WeightScheme(
        format=get_format(name), granularity=Granularity.group(32), scale_dtype="float8_e8m0fnu", flexible_group=True
    )


def _bnb(name: str) -> WeightScheme:
    return WeightScheme(format=get_format(name), granularity=Granularity.group(64), flexible_group=True)


def _gguf(name: str, *, offset: bool = False) -> WeightScheme:
    return WeightScheme(
        format=get_format(name),
        granularity=Granularity.group(32),
        symmetric=not offset,
        offset=offset,
        scale_dtype="float16",
        flexible_group=True,
    )


def _gguf_k(name: str, group: int, bits: int, *, offset: bool = False) -> WeightScheme:
    return WeightScheme(
        format=get_format(name),
        granularity=Granularity.group(group),
        symmetric=not offset,
        offset=offset,
        scale_dtype="uint8" if offset else "int8",
        super_scale=SuperScale(columns=256, dtype="float16", bits=bits),
        flexible_group=True,
    )


def _fp8(granularity: Granularity) -> WeightScheme:
    return WeightScheme(format=get_format("fp8_e4m3"), granularity=granularity)


def _activation(name: str, granularity: Granularity, *, dynamic: bool = True) -> ActivationScheme:
    return ActivationScheme(format=get_format(name), granularity=granularity, dynamic=dynamic)


_CHANNEL, _TENSOR = Granularity.channel(), Granularity.tensor()

PRESETS: dict[str, Scheme] = {
    "int2": Scheme(weight=_integer(2, 64)),
    "int3": Scheme(weight=_integer(3, 128)),
    "int4": Scheme(weight=_integer(4, 128)),
    "int4_asym": Scheme(weight=_integer(4, 128, symmetric=False)),
    "int5": Scheme(weight=_integer(5, 128)),
    "int6": Scheme(weight=_integer(6, 128)),
    "int7": Scheme(weight=_integer(7, 128)),
    "int8": Scheme(weight=_integer(8, None), activation=_activation("int8", _CHANNEL)),
    "int8_weight_only": Scheme(weight=_integer(8, None)),
    "fp8": Scheme(weight=_fp8(_CHANNEL), activation=_activation("fp8_e4m3", _CHANNEL)),
    "fp8_static": Scheme(weight=_fp8(_TENSOR), activation=_activation("fp8_e4m3", _TENSOR, dynamic=False)),
    "fp8_block": Scheme(
        weight=_fp8(Granularity.block(128, 128)), activation=_activation("fp8_e4m3", Granularity.group(128))
    ),
    "fp8_weight_only": Scheme(weight=_fp8(_CHANNEL)),
    "int4_fp8": Scheme(weight=_integer(4, 128), activation=_activation("fp8_e4m3", _CHANNEL)),
    "nf4": Scheme(weight=_bnb("nf4")),
    "fp4": Scheme(weight=_bnb("fp4")),
    "mxfp4": Scheme(weight=_mx("fp4_e2m1")),
    "mxfp8": Scheme(
        weight=_mx("fp8_e4m3"),
        activation=ActivationScheme(
            format=get_format("fp8_e4m3"), granularity=Granularity.group(32), scale_dtype="float8_e8m0fnu"
        ),
    ),
    "nvfp4": Scheme(
        weight=WeightScheme(
            format=get_format("fp4_e2m1"),
            granularity=Granularity.group(16),
            scale_dtype="float8_e4m3fn",
            super_scale=SuperScale(columns=WHOLE, dtype="float32"),
            flexible_group=True,
        )
    ),
    "q4_0": Scheme(weight=_gguf("int4")),
    "q4_1": Scheme(weight=_gguf("uint4", offset=True)),
    "q5_0": Scheme(weight=_gguf("int5")),
    "q5_1": Scheme(weight=_gguf("uint5", offset=True)),
    "q8_0": Scheme(weight=_gguf("int8")),
    "iq4_nl": Scheme(weight=_gguf("iq4_nl")),
    "q2_k": Scheme(weight=_gguf_k("uint2", 16, 4, offset=True)),
    "q3_k": Scheme(weight=_gguf_k("int3", 16, 6)),
    "q4_k": Scheme(weight=_gguf_k("uint4", 32, 6, offset=True)),
    "q5_k": Scheme(weight=_gguf_k("uint5", 32, 6, offset=True)),
    "q6_k": Scheme(weight=_gguf_k("int6", 16, 8)),
    "iq4_xs": Scheme(weight=_gguf_k("iq4_nl", 32, 6)),
    "int4_int8": Scheme(weight=_integer(4, 128), activation=_activation("int8", _CHANNEL)),
    "int4_24": Scheme(weight=_integer(4, 128, sparsity="2:4")),
    "int8_24": Scheme(weight=_integer(8, None, sparsity="2:4")),
}

SUBSTITUTES = {
    "uint2": "iq4_nl",
    "int3": "iq4_nl",
    "iq4_nl": "iq4_nl",
    "uint4": "q5_0",
    "uint5": "q5_1",
    "int6": "q8_0",
}
"""What a preset with super-blocks becomes where K is no multiple of them, by its format: the choice of llama.cpp's
`llama_tensor_get_type` (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp)."""

ALIASES: dict[str, str] = {
    "W4A16": "int4",
    "W4A16_ASYM": "int4_asym",
    "W8A16": "int8_weight_only",
    "W8A8": "int8",
    "INT8": "int8",
    "FP8": "fp8_static",
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8_block",
    "W4A8": "int4_int8",
    "W4AFP8": "int4_fp8",
}

_WEIGHT_KEYS = (
    "format",
    "granularity",
    "group_size",
    "block_size",
    "symmetric",
    "offset",
    "scale_dtype",
    "super_scale",
    "act_order",
    "sparsity",
)
_ACTIVATION_KEYS = (
    "format",
    "granularity",
    "group_size",
    "dynamic",
    "scale",
    "scale_dtype",
    "outlier_threshold",
    "observer",
)
_SCHEME_KEYS = ("preset", "weight", "activation", "method")


def preset(name: str) -> Scheme:
    """The scheme of a preset's name or alias.

    Raises:
        ConfigError: unknown; the message lists the nearest names.
    """
    found = PRESETS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        names = [*PRESETS, *ALIASES]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) if isinstance(name, str) else []
        near = near or sorted(PRESETS)
        raise ConfigError(f"unknown scheme {shown(name)}; did you mean {', '.join(near)}?")
    return found


def check_keys(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse keys that are not among `known`, naming the nearest.

    Raises:
        ConfigError: an unknown key, or something that is no mapping.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must be a mapping, not {type(given).__name__} {shown(given)}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4) if isinstance(key, str) else []
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {shown(key)} in {what}; {hint}")


def _size(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{what} must be an integer from 1 to 2**31 - 1, not {shown(value)}")
    return value


def _boolean(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false, not {shown(value)}")
    return value


def _granularity(
    what: str, given: Mapping[str, Any], default: Granularity, names: dict[str, Granularity]
) -> Granularity:
    sized = [key for key in ("granularity", "group_size", "block_size") if given.get(key) is not None]
    if len(sized) > 1:
        raise ConfigError(f"{what}: give one of {' and '.join(sized)}, not both")
    if not sized:
        return default
    value = given[sized[0]]
    if sized[0] == "group_size":
        if value == WHOLE:
            return Granularity.channel()
        size = _size(f"{what}: group_size", value)
        if size < 16 or size & (size - 1):
            raise ConfigError(f"{what}: group_size must be -1 (per channel) or a power of two from 16 up, not {size}")
        return Granularity.group(size)
    if sized[0] == "block_size":
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ConfigError(f"{what}: block_size must be [rows, columns], not {shown(value)}")
        rows, columns = (_size(f"{what}: block_size", v) for v in value)
        if rows == 1:
            raise ConfigError(f"{what}: block_size of one row is a group; write group_size {columns}")
        return Granularity.block(rows, columns)
    if value not in tuple(names):
        raise ConfigError(f"{what}: granularity {shown(value)} is none of {', '.join(names)}")
    return names[value]


def _default_granularity(fmt: Format) -> Granularity:
    return Granularity.group(128) if fmt.bits < 8 else Granularity.channel()


def _parse_weight(given: Mapping[str, Any]) -> WeightScheme:
    check_keys("weight", given, _WEIGHT_KEYS)
    if "format" not in given:
        raise ConfigError(f"weight needs a format: one of {', '.join(FORMATS)}")
    fmt = get_format(given["format"])
    offset = _boolean("weight: offset", given.get("offset", False))
    symmetric = _boolean("weight: symmetric", given.get("symmetric", not fmt.name.startswith("uint") and not offset))
    if isinstance(fmt, IntegerFormat) and not offset:  # "int4" with symmetric: false is what people write
        fmt = get_format(f"{'int' if symmetric else 'uint'}{fmt.bits}")
    names = {"tensor": Granularity.tensor(), "channel": Granularity.channel()}
    granularity = _granularity("weight", given, _default_granularity(fmt), names)
    sized = any(given.get(key) is not None for key in ("group_size", "granularity", "block_size"))
    default_dtype = "bfloat16" if granularity.is_group else "float32"
    return WeightScheme(
        format=fmt,
        granularity=granularity,
        symmetric=symmetric,
        offset=offset,
        scale_dtype=given.get("scale_dtype", default_dtype),
        super_scale=_parse_super_scale(given.get("super_scale")),
        act_order=_boolean("weight: act_order", given.get("act_order", False)),
        flexible_group=granularity.is_group and not sized,
        sparsity=given.get("sparsity"),
    )


def _parse_super_scale(given: Mapping[str, Any] | None) -> SuperScale | None:
    if given is None:
        return None
    check_keys("super_scale", given, ("group_size", "dtype", "bits"))
    columns = given.get("group_size", WHOLE)
    if columns != WHOLE:
        columns = _size("super_scale: group_size", columns)
    bits = _size("super_scale: bits", given.get("bits", 8))
    return SuperScale(columns=columns, dtype=given.get("dtype", "float32"), bits=bits)


def _positive(what: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        raise ConfigError(f"{what} must be a finite number, not {shown(value)}")
    return float(value)


def _parse_activation(given: Mapping[str, Any]) -> ActivationScheme:
    check_keys("activation", given, _ACTIVATION_KEYS)
    if "format" not in given:
        raise ConfigError("activation needs a format: int8, fp8_e4m3 or fp8_e5m2")
    dynamic = _boolean("activation: dynamic", given.get("dynamic", True))
    names = {"tensor": Granularity.tensor(), "token": Granularity.channel()}
    default = Granularity.channel() if dynamic else Granularity.tensor()
    return ActivationScheme(
        format=get_format(given["format"]),
        granularity=_granularity("activation", given, default, names),
        dynamic=dynamic,
        scale=_positive("activation: scale", given.get("scale")),
        scale_dtype=given.get("scale_dtype", "float32"),
        outlier_threshold=_positive("activation: outlier_threshold", given.get("outlier_threshold")),
        observer=parse_observer(given.get("observer", ABSMAX)),
    )


def parse_scheme(given: str | Mapping[str, Any] | Scheme) -> Scheme:
    """A scheme from a preset's name, or from a dict with `weight` and `activation`, or `preset`, and `method`.

    Raises:
        ConfigError: an unknown name or key, or values that do not go together.
    """
    if isinstance(given, Scheme):
        return given
    if isinstance(given, str):
        return preset(given)
    check_keys("scheme", given, _SCHEME_KEYS)
    method = parse_method(given["method"]) if "method" in given else ROUND
    if "preset" in given:
        if "weight" in given or "activation" in given:
            raise ConfigError("a scheme has either a preset, or a weight and perhaps an activation")
        return replace(preset(given["preset"]), method=method)
    if "weight" not in given:
        raise ConfigError("scheme needs a weight")
    activation = given.get("activation")
    return Scheme(
        weight=_parse_weight(given["weight"]),
        activation=None if activation is None else _parse_activation(activation),
        method=method,
    )


def _granularity_dict(granularity: Granularity, row_name: str) -> dict[str, Any]:
    if granularity == Granularity.tensor():
        return {"granularity": "tensor"}
    if granularity == Granularity.channel():
        return {"granularity": row_name}
    if granularity.is_group:
        return {"group_size": granularity.columns}
    return {"block_size": [granularity.rows, granularity.columns]}


def scheme_to_dict(scheme: Scheme) -> str | dict[str, Any]:
    """The inverse of `parse_scheme`: a preset's name where it is one, else a dict of plain values."""
    for name, known in PRESETS.items():
        if known == scheme:
            return name
        if (known.weight, known.activation) == (scheme.weight, scheme.activation):
            return {"preset": name, "method": method_to_config(scheme.method)}
    weight = scheme.weight
    given: dict[str, Any] = {"weight": {"format": weight.format.name, "symmetric": weight.symmetric}}
    if not (weight.flexible_group and weight.granularity == _default_granularity(weight.format)):
        given["weight"] |= _granularity_dict(weight.granularity, "channel")
    given["weight"]["scale_dtype"] = weight.scale_dtype
    if weight.offset:
        given["weight"]["offset"] = True
    if weight.super_scale is not None:
        given["weight"]["super_scale"] = {"group_size": weight.super_scale.columns, "dtype": weight.super_scale.dtype}
        if weight.super_scale.bits != 8:
            given["weight"]["super_scale"]["bits"] = weight.super_scale.bits
    if weight.act_order:
        given["weight"]["act_order"] = True
    if weight.sparsity is not None:
        given["weight"]["sparsity"] = weight.sparsity
    if scheme.activation is not None:
        activation = scheme.activation
        given["activation"] = {"format": activation.format.name, "dynamic": activation.dynamic}
        given["activation"] |= _granularity_dict(activation.granularity, "token")
        if activation.scale is not None:
            given["activation"]["scale"] = activation.scale
        if activation.scale_dtype != "float32":
            given["activation"]["scale_dtype"] = activation.scale_dtype
        if activation.outlier_threshold is not None:
            given["activation"]["outlier_threshold"] = activation.outlier_threshold
        if activation.observer != ABSMAX:
            given["activation"]["observer"] = observer_to_config(activation.observer)
    if scheme.method != ROUND:
        given["method"] = method_to_config(scheme.method)
    return given
