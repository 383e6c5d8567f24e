"""Everything that decides a kernel's source, as one hashable value."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from qcompile.formats import FORMATS, Format
from qcompile.gates import PAIRS
from qcompile.linear_spec import OPERAND_STEPS, STORES, LinearSpec, gate_of, stored_by
from qcompile.places import quads_of
from qcompile.scheme import WHOLE, Granularity

if TYPE_CHECKING:
    from qcompile.codegen.attention_spec import AttentionKernelSpec
    from qcompile.codegen.columns_spec import ColumnsSpec
    from qcompile.codegen.norm_kernel_spec import NormKernelSpec
    from qcompile.codegen.ranges_spec import RangesSpec

AnySpec: TypeAlias = "KernelSpec | AttentionKernelSpec | ColumnsSpec | NormKernelSpec | RangesSpec"

TEMPLATES = {"fragment": "gemm_fragment", "fragment24": "gemm_fragment", "rows8": "gemm_rows8"}
"""The template that multiplies weights of a layout."""

DECODE_TEMPLATE = "decode_fragment"
"""The template that writes the weight out in a 16-bit type, for torch to multiply by."""

FINISH_TEMPLATE = "finish_product"
"""The template that does what is left to do after a product of torch's."""

STREAM_TEMPLATES = {"gemm_fragment": "gemm_stream", "gemm_rows8": "gemm_stream_rows8"}
"""The template, in Gluon, of tiles of the form "stream", which multiplies as another does."""

GROUPED_TEMPLATES = {"gemm_fragment": "gemm_grouped", "gemm_rows8": "gemm_grouped_rows8"}
"""The template that multiplies stacks of experts as another multiplies one weight."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How the work is cut: a program computes `n` x `m` outputs over a `split`-th of K, `k` columns at a time.

    Attributes:
        warps, stages: of a program; of its pipeline.
        form: "loop"; "slab": all weights of a program are in registers before it multiplies; "cores": 2:4 sparse
            weights on sparse tensor cores (the template `sparse_cores`); or "stream": see `stream_tiles`, where split
            may be 0: as many programs as multiprocessors share the work evenly; or 1: they take whole tiles.
        scales: where scales of groups go if several ways serve: "sums", "products" or "fragments" (`gemm_fragment`).
        overlap: whether weights are decoded while products are under way (`gemm_fragment`); needs scales a row or in
            fragments.
    """

    m: int
    n: int
    k: int
    split: int
    warps: int
    stages: int
    form: str = "loop"
    scales: str = "products"
    overlap: bool = False


def warp_columns(tile: Tile) -> int:
    """Columns that a warp of the form "cores" has in a turn, of 64 rows."""
    return tile.k // (tile.warps // (tile.n // 64))


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A kernel for one linear, one kind of device and a range of M.

    Attributes:
        template: name of a module in `codegen/templates`; see `source`.
        n, k: out and in features.
        weight: name of the weights' format.
        symmetric: whether there are no zero points.
        offset: whether offsets are added after the scale.
        scale_dtype: see `WeightScheme`.
        rows, columns: the block of weights that shares a scale, in elements.
        super_columns: columns that share a scale of scales; 0 if there are none.
        activation: name of the activations' format, or None if they are floating point.
        activation_scale: "tensor", "token" or "group" (of `columns`); "" if there is none.
        x_dtype, out_dtype: torch's names of the input's type, and of the output's unless that is stored as codes.
        epilogue: see `LinearSpec`.
        target: "sm_90" and the like for NVIDIA, "gfx942" and the like for AMD.
        tile: see `Tile`.
        sparse: whether codes are stored 2:4 sparse.
    """

    template: str
    n: int
    k: int
    weight: str
    symmetric: bool
    offset: bool
    scale_dtype: str
    rows: int
    columns: int
    super_columns: int
    activation: str | None
    activation_scale: str
    x_dtype: str
    out_dtype: str
    epilogue: tuple[str, ...]
    target: str
    tile: Tile
    sparse: bool = False

    @property
    def source(self) -> str:
        """The module in `codegen/templates` that the kernel is made from: `template`, or that of the tile's form."""
        return STREAM_TEMPLATES[self.template] if self.streams else self.template

    @property
    def streams(self) -> bool:
        """Whether the kernel is in Gluon, of one of `STREAM_TEMPLATES`."""
        return self.template in STREAM_TEMPLATES and self.tile.form == "stream"

    @property
    def stored_bits(self) -> int:
        """Bits that a weight takes in memory: if sparse, those of half a code, and one that says where it is."""
        return FORMATS[self.weight].bits // (2 if self.sparse else 1) + self.sparse

    @property
    def loaded_bits(self) -> int:
        """Bits that threads hold of a weight before it is decoded; of sparse ones neighbours hold the same."""
        return FORMATS[self.weight].bits + (4 if self.sparse else 0)

    @property
    def groups(self) -> int:
        """Scales in a row of weights."""
        return -(-self.k // self.columns)

    @property
    def quads(self) -> int:
        """How many words of four scales a row of threads has for 64 columns; 0 if scales do not lie in fours."""
        return 0 if self.in_rows else quads_of(self.scale_dtype, self.columns, self.k)

    @property
    def unit(self) -> int:
        """The runs of columns, counted from the first, that share their scale and the scale above; 0 if all do."""
        above = self.super_columns if 0 < self.super_columns < self.k else 0
        return math.gcd(self.columns if self.groups > 1 else 0, above)

    @property
    def aligned(self) -> int:
        """The largest power of two that divides `unit`: as many columns, from a multiple of it, share everything."""
        return self.unit & -self.unit

    @property
    def operand_count(self) -> int:
        """Tensors that the epilogue takes beside the bias."""
        return sum(step in OPERAND_STEPS or step in STORES for step in self.epilogue)

    @property
    def gated(self) -> bool:
        """Whether two of a product's columns make one of the output."""
        return gate_of(self.epilogue) is not None

    @property
    def paired(self) -> bool:
        """Whether these are neighbours; else they are one of the first half and one of the second."""
        return (gate_of(self.epilogue) or "").startswith(PAIRS)

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.n // 2 if self.gated else self.n

    @property
    def stored(self) -> Format | None:
        """The format in which the output is stored as codes; None if it is of `out_dtype`."""
        return stored_by(self.epilogue)

    @property
    def compute(self) -> str:
        """The type in which the tensor cores multiply: "int8", "fp8", "bfloat16", "float16" or "float32".

        8-bit types multiply as they are in the layout `rows8` where both sides are of one kind and the target can;
        otherwise 8-bit values become bfloat16, which holds each exactly. float32 activations stay float32
        (`precision`).
        """
        if self.activation is None:
            return self.x_dtype
        if self.in_rows:
            kinds = {name[:3] for name in (self.weight, self.activation)}
            if kinds == {"int"}:
                return "int8"
            if kinds == {"fp8"} and native_fp8(self.target):
                return "fp8"
        return "bfloat16"

    @property
    def in_rows(self) -> bool:
        """Whether weights are in the layout `rows8`."""
        return self.template in ("gemm_rows8", "gemm_grouped_rows8")

    @property
    def precision(self) -> str:
        """How float32 multiplies: by three TF32 products on NVIDIA (each errs by less than 2**-20), else exactly."""
        return "tf32x3" if self.target.startswith("sm_") else "ieee"

    def describe(self) -> dict[str, object]:
        """Plain values, from which `from_description` makes the spec again."""
        return dataclasses.asdict(self)

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(self.describe())


@dataclass(frozen=True, kw_only=True)
class GroupedSpec(KernelSpec):
    """A kernel for a stack of `experts` experts; `n`, `k` and the rest are one expert's."""

    experts: int


def decode_kernel_spec(text: str) -> AnySpec:
    """The inverse of `encode` of each kind of spec."""
    from qcompile.codegen.attention_spec import ATTENTION_TEMPLATE, PREFILL_TEMPLATE, decode_attention_kernel_spec
    from qcompile.codegen.columns_spec import COLUMNS_TEMPLATE, decode_columns_spec
    from qcompile.codegen.norm_kernel_spec import NORM_TEMPLATE, decode_norm_kernel_spec
    from qcompile.codegen.ranges_spec import RANGES_TEMPLATE, decode_ranges_spec

    given = json.loads(text)
    if given["template"] == NORM_TEMPLATE:
        return decode_norm_kernel_spec(text)
    if given["template"] == COLUMNS_TEMPLATE:
        return decode_columns_spec(text)
    if given["template"] == RANGES_TEMPLATE:
        return decode_ranges_spec(text)
    if given["template"] in (ATTENTION_TEMPLATE, PREFILL_TEMPLATE):
        return decode_attention_kernel_spec(text)
    kind = GroupedSpec if given["template"] in GROUPED_TEMPLATES.values() else KernelSpec
    return kind(**{**given, "tile": Tile(**given["tile"]), "epilogue": tuple(given["epilogue"])})


def native_fp8(target: str) -> bool:
    """Whether a target converts and multiplies OCP fp8: NVIDIA from sm_89, AMD gfx950 and gfx12."""
    return int(target[3:]) >= 89 if target.startswith("sm_") else target.startswith(("gfx950", "gfx12"))


def sparse_cores(target: str) -> bool:
    """Whether a target's tensor cores multiply 2:4 sparse matrices as `sparse_cores` has it: NVIDIA's from sm_80."""
    return target.startswith("sm_") and int(target[3:]) >= 80


def warps_multiply(spec: KernelSpec) -> bool:
    """Whether each warp multiplies what is in its registers: NVIDIA's, but tiles from 16 rows on sm_90 and sm_100."""
    return spec.target.startswith("sm_") and (spec.tile.m < 16 or not 90 <= int(spec.target[3:]) < 120)


def super_last(spec: KernelSpec) -> bool:
    """Whether the scale above all scales of a row may multiply sums, and weights not yet scaled by it fit."""
    small = spec.compute != "float16" or spec.scale_dtype in ("float8_e4m3fn", "int8", "uint8")
    return spec.super_columns >= spec.k and not spec.offset and small


_EXACT_SCALES = {
    "bfloat16": ("bfloat16", "float8_e8m0fnu", "float8_e4m3fn"),
    "float16": ("float16", "float8_e4m3fn"),
}
"""Types of scales that a type of tensor cores holds; both hold integers of 8 bits too."""


FEW_ROWS = 32
"""Rows of a tile up to which it costs less to add offsets to products than to weights."""


def _in_fragments(spec: KernelSpec) -> bool:
    """Whether weights may be multiplied by their scales as the tensor cores' operands.

    What is above scales, and offsets, multiply products then, for which scales must lie in fours and rows be few.
    """
    integers = spec.scale_dtype in ("int8", "uint8")
    if spec.groups == 1 or not (integers or spec.scale_dtype in _EXACT_SCALES.get(spec.compute, ())):
        return False
    if not spec.quads:
        return not integers and not spec.offset and (spec.super_columns == 0 or super_last(spec))
    if spec.compute not in _EXACT_SCALES or not (spec.symmetric or spec.offset):
        return False
    if integers and spec.compute == "float16" and FORMATS[spec.weight].absmax * 255 > 65504:
        return False
    few = spec.tile.m <= FEW_ROWS
    if spec.super_columns and not super_last(spec):
        return few and (spec.super_columns >= spec.k or spec.super_columns % 64 == 0)
    return few or not spec.offset


def _sums_apart(spec: KernelSpec) -> bool:
    """Whether one row of x may be multiplied in columns of a group each: eight of 128 of its elements at most."""
    one = spec.tile.m == 8 and not isinstance(spec, GroupedSpec) and spec.activation is None
    above = spec.super_columns % 128 == 0 or spec.super_columns >= spec.k
    return one and above and spec.groups > 1 and spec.columns in (16, 32) and (spec.symmetric or spec.offset)


def scales_of(spec: KernelSpec, preferred: str) -> str:
    """Where a kernel of `gemm_fragment` applies scales; see the template.

    Args:
        preferred: "sums", "products" or "fragments", for where several serve.
    """
    divisible = spec.aligned >= 64 or (spec.aligned >= 16 and FORMATS[spec.weight].bits in (4, 8)) or not spec.aligned
    if preferred == "fragments" and (divisible or spec.quads) and _in_fragments(spec):
        return "fragments"
    if preferred == "sums" and _sums_apart(spec):
        return "sums"
    if not divisible:
        return "weights"
    if spec.offset:
        return "products" if spec.tile.m <= FEW_ROWS else "weights"
    whole = spec.groups == 1 and (spec.super_columns == 0 or spec.super_columns >= spec.k)
    return "total" if whole else "products"


def launches_early(target: str) -> bool:
    """Whether a kernel may begin before the one before it has ended: programmatic dependent launch, from sm_90."""
    return target.startswith("sm_") and int(target[3:]) >= 90


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel_spec(spec: LinearSpec, x_dtype: torch.dtype, out_dtype: torch.dtype, target: str, tile: Tile) -> KernelSpec:
    """The kernel for a linear.

    Args:
        x_dtype: of the activations as the kernel receives them: 8-bit if the scheme quantizes them.

    Raises:
        KeyError: a layout that no template takes.
    """
    weight, activation = spec.scheme.weight, spec.scheme.activation
    rows, columns = weight.granularity.block_of(spec.shape)
    per = ""
    if activation is not None:
        per = "group" if activation.granularity.is_group else "token"
        if activation.granularity == Granularity.tensor() or activation.granularity.rows == WHOLE:
            per = "tensor"
    above = 0
    if weight.super_scale is not None:
        above = spec.in_features if weight.super_scale.columns == WHOLE else weight.super_scale.columns
    return KernelSpec(
        template=TEMPLATES[spec.layout],
        n=spec.out_features,
        k=spec.in_features,
        weight=weight.format.name,
        symmetric=weight.symmetric,
        offset=weight.offset,
        scale_dtype=weight.scale_dtype,
        rows=min(rows, spec.out_features),
        columns=min(columns, spec.in_features),
        super_columns=above,
        activation=None if activation is None else activation.held.name,
        activation_scale=per,
        x_dtype=dtype_name(x_dtype),
        out_dtype=dtype_name(out_dtype),
        epilogue=spec.epilogue,
        target=target,
        tile=tile,
        sparse=spec.layout == "fragment24",
    )


def decoding_spec(kernel: KernelSpec) -> KernelSpec:
    """The kernel that writes out the weight of `kernel`, of `gemm_fragment`, in the type that this computes in."""
    return dataclasses.replace(
        kernel,
        template=DECODE_TEMPLATE,
        activation=None,
        activation_scale="",
        x_dtype=kernel.compute,
        out_dtype=kernel.compute,
        epilogue=(),
        tile=dataclasses.replace(kernel.tile, m=16, n=64, k=128, split=1, warps=4, stages=1),
    )


def finishing_spec(kernel: KernelSpec, product: torch.dtype, *, x_scale: bool, scale: bool) -> KernelSpec:
    """The kernel that multiplies a product of torch's, in place of `kernel`, by its scales, and applies the epilogue.

    Args:
        product: the product's type.
        x_scale: whether the activations' scales are still to be applied.
        scale: whether those of the weight's rows are; the result's `rows` is 1 then, else 0.
    """
    return dataclasses.replace(
        kernel,
        template=FINISH_TEMPLATE,
        rows=int(scale),
        activation=None,
        activation_scale=kernel.activation_scale if x_scale else "",
        x_dtype=dtype_name(product),
        tile=dataclasses.replace(kernel.tile, m=8, n=256, k=64, split=1, warps=4, stages=1),
    )


def grouped_spec(kernel: KernelSpec, experts: int) -> GroupedSpec:
    """The kernel for a stack of experts that is tiled as `kernel`, a kernel for one of them."""
    given = {field.name: getattr(kernel, field.name) for field in dataclasses.fields(KernelSpec)}
    return GroupedSpec(**{**given, "template": GROUPED_TEMPLATES[kernel.template]}, experts=experts)


def one_expert(kernel: GroupedSpec) -> KernelSpec:
    """The kernel for one expert of a stack, the inverse of `grouped_spec`."""
    given = {field.name: getattr(kernel, field.name) for field in dataclasses.fields(KernelSpec)}
    template = next(alone for alone, grouped in GROUPED_TEMPLATES.items() if grouped == kernel.template)
    return KernelSpec(**{**given, "template": template})
