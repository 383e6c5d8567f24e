"""What quantizing a layer means: formats, the blocks that share a scale, and how the codes are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from qcompile.errors import ConfigError, LayerError, shown, suggestion
from qcompile.formats import FORMATS, Format, IntegerFormat, get_format
from qcompile.methods import ABSMAX, CHECKPOINT, HQQ, ROUND, Method, Observer

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
        """Whether a block is a part of one row."""
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
            hint = suggestion(self.dtype, FLOAT_SCALES)
            raise ConfigError(f"super_scale dtype {shown(self.dtype)} is unknown; {hint}")

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
        rotated: the columns of the codes are turned by a Hadamard transform (`qcompile.hadamard`), and inputs are when
            the layer runs.
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
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.rotated:
            raise ConfigError("turning the columns of 2:4 sparse weights makes them dense: leave rotated out")
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
            hint = suggestion(self.scale_dtype, SCALE_DTYPES)
            raise ConfigError(f"scale_dtype {shown(self.scale_dtype)} is unknown; {hint}")
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
    def arranges_inputs(self) -> bool:
        """Whether inputs are turned or put in another order before all else."""
        return self.act_order or self.rotated

    @property
    def column_units(self) -> dict[str, int]:
        """What a cut between two columns must not divide, by what it is called, and how many columns that is."""
        above = WHOLE if self.super_scale is None else self.super_scale.columns
        found = {"super-blocks": above, "groups": self.granularity.columns}
        found = {name: columns for name, columns in found.items() if columns != WHOLE}
        whole_bytes = {"bytes of codes": 8 // math.gcd(8, self.format.bits)}
        return found | ({"2:4 sparse fours": 4} if self.sparsity else {}) | whole_bytes

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
                return SUBSTITUTES[self.format.name].fit(layer, shape)
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
        return (
            f"{self.format.name} {self.granularity}"
            + (f" {self.sparsity} sparse" if self.sparsity else "")
            + (" rotated" if self.rotated else "")
        )


def blocks_of_32(name: str, *, offset: bool = False) -> WeightScheme:
    """GGUF's blocks of 32 weights with a scale, and an offset where asked for, in float16; `name` is the format's."""
    return WeightScheme(
        format=get_format(name),
        granularity=Granularity.group(32),
        symmetric=not offset,
        offset=offset,
        scale_dtype="float16",
        flexible_group=True,
    )


SUBSTITUTES: dict[str, WeightScheme] = {
    "uint2": blocks_of_32("iq4_nl"),  # Q2_K: IQ4_NL
    "int3": blocks_of_32("iq4_nl"),  # Q3_K: IQ4_NL
    "iq4_nl": blocks_of_32("iq4_nl"),  # IQ4_XS: IQ4_NL
    "uint4": blocks_of_32("int5"),  # Q4_K: Q5_0
    "uint5": blocks_of_32("uint5", offset=True),  # Q5_K: Q5_1
    "int6": blocks_of_32("int8"),  # Q6_K: Q8_0
}
"""What a preset with super-blocks becomes where K is no multiple of them, by its format: the choice of llama.cpp's
`llama_tensor_get_type` (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp)."""


_HELD: dict[str, Format] = {
    fmt.name: get_format("int8") if isinstance(fmt, IntegerFormat) else fmt
    for fmt in FORMATS.values()
    if fmt.native_dtype is not None or (isinstance(fmt, IntegerFormat) and (fmt.signed or fmt.bits < 8))
}
"""Formats of activations, and in what codes of each are held."""


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """How a layer's input [M, K] is quantized before the product.

    Codes of integers are held as int8, unsigned ones less their token's zero point, which is an integer: what is
    multiplied is symmetric, and its product needs no correction.

    Attributes:
        format: fp8_e4m3, fp8_e5m2, a signed integer, or, with dynamic scales alone, an unsigned one of up to 7 bits,
            which has a zero point beside each scale.
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
        if self.format.name not in _HELD:
            raise ConfigError(f"activations cannot be {self.format.name}; they can be {', '.join(_HELD)}")
        if not self.symmetric and (not self.dynamic or self.scale_dtype != "float32"):
            raise ConfigError(
                f"{self.format.name} activations have zero points, which go with dynamic scales in float32: choose a "
                "signed format"
            )
        if not self.symmetric and self.outlier_threshold is not None:
            raise ConfigError(f"outlier_threshold goes with symmetric activations, not with {self.format.name}")
        if not self.dynamic and self.granularity != Granularity.tensor():
            raise ConfigError("a static activation scale is per tensor")
        if self.granularity.rows not in (1, WHOLE) or (self.granularity.rows == WHOLE) != (
            self.granularity == Granularity.tensor()
        ):
            raise ConfigError("activations are quantized per tensor, per token, or per group of a token")
        limits = torch.finfo(torch.float32)
        if self.scale is not None and (self.dynamic or not limits.smallest_normal <= self.scale <= limits.max):
            raise ConfigError("activation scale: a positive float32 number, and only with dynamic: false")

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return not isinstance(self.format, IntegerFormat) or self.format.signed

    @property
    def held(self) -> Format:
        """The 8-bit format that codes are held in, which kernels multiply."""
        return _HELD[self.format.name]

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: int8 or one of torch's 8-bit floats."""
        found = self.held.native_dtype
        assert found is not None
        return found

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
        if self.weight.rotated and self.activation is not None and not self.activation.dynamic:
            raise ConfigError("inputs that are turned when the layer runs (rotated) take dynamic activation scales")
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
