"""Which products the templates of streams multiply (`gemm_stream`, `gemm_stream_rows8`), and where their scales go."""

from __future__ import annotations

import functools
import importlib.metadata

from qcompile.codegen.decoders import holds
from qcompile.codegen.spec import STREAM_TEMPLATES, KernelSpec, scales_of, super_last
from qcompile.formats import FORMATS, IntegerFormat

_FLOATS = ("float32", "bfloat16", "float16")


@functools.cache
def has_gluon() -> bool:
    """Whether a Triton is installed whose Gluon, an experimental language, the templates in it were compiled by."""
    try:
        return importlib.metadata.version("triton").startswith(("3.6.", "3.7.", "3.8.", "3.9."))
    except importlib.metadata.PackageNotFoundError:
        return False


def stream_scales(spec: KernelSpec) -> str:
    """Where streams of `gemm_stream` apply scales: as `scales_of` says, but for `_in_fragments` and `_in_pairs`."""
    found = scales_of(spec, "fragments")
    if found == "total" or not _narrow(spec):
        return found
    return "fragments" if _in_fragments(spec) else "pairs" if _in_pairs(spec, found) else found


def _narrow(spec: KernelSpec) -> bool:
    """Whether weights are of less than 8 bits that bfloat16 holds, and scales of groups; tables have no more."""
    fmt = FORMATS[spec.weight]
    if fmt.bits == 8 or spec.sparse or spec.compute != "bfloat16" or not holds(spec.compute, fmt):
        return False
    if not isinstance(fmt, IntegerFormat) and (fmt.bits != 4 or spec.offset or not spec.symmetric):
        return False
    return spec.k % 64 == 0 and spec.groups > 1 and (spec.columns in (16, 32, 64) or spec.columns % 128 == 0)


def _in_fragments(spec: KernelSpec) -> bool:
    """Whether weights are multiplied by their scales, integers of 8 bits, and sums by those above when these change."""
    fmt, above = FORMATS[spec.weight], spec.super_columns
    plain = spec.symmetric or (spec.offset and isinstance(fmt, IntegerFormat) and not fmt.offset)
    whole = above % 128 == 0 or above >= spec.k
    return spec.quads > 0 and spec.scale_dtype in ("int8", "uint8") and plain and above > 0 and whole


def _in_pairs(spec: KernelSpec, otherwise: str) -> bool:
    """Whether weights are multiplied by pairs of bfloat16 that are their scales, and rounded once.

    Where 64 columns have more than one scale, or there are offsets.
    """
    narrow = spec.columns < 64 or spec.offset or otherwise == "weights"
    return spec.scale_dtype in _FLOATS and narrow and (spec.super_columns == 0 or super_last(spec))


def stream_objection(spec: KernelSpec) -> str | None:
    """Why no template of `STREAM_TEMPLATES` multiplies as `spec` says, whatever the tile; None if one does."""
    if spec.target != "sm_90":
        return "it is for Hopper's tensor cores"
    if not has_gluon():
        return "it is in Triton's experimental language Gluon, as versions 3.6 to 3.9 have it"
    if spec.template not in STREAM_TEMPLATES:
        return "its weights are one linear's"
    if spec.paired or (spec.gated and spec.n % 128):
        return "it takes a gate's columns from the halves of the weight, in tiles of 64"
    if spec.in_rows:
        return _rows_stream_objection(spec)
    fmt, scales = FORMATS[spec.weight], stream_scales(spec)
    if spec.activation is not None or spec.compute == "float32":
        return "its activations are of 16 bits"
    if fmt.bits not in (4, 8) and not isinstance(fmt, IntegerFormat):
        return "its weights of other than 4 or 8 bits are integers"
    if fmt.bits == 8 and not spec.sparse and scales != "total":
        return "its dense weights of 8 bits have a scale a row"
    if fmt.bits == 8 and not spec.sparse and isinstance(fmt, IntegerFormat) and spec.compute != "bfloat16":
        return "its activations are bfloat16 where dense weights are integers of 8 bits"
    if scales == "pairs" or (scales == "fragments" and _narrow(spec) and _in_fragments(spec)):
        return None
    if spec.offset:
        return "it adds offsets to integers of less than 8 bits only, with bfloat16 activations"
    if spec.super_columns and (scales == "total" or not super_last(spec)):
        return "it takes scales above scales of groups, one for all of a row"
    if scales == "total" and not spec.symmetric:
        return "it takes zero points of groups only"
    floats = spec.scale_dtype in _FLOATS or (spec.quads and spec.scale_dtype.startswith("float8"))
    if scales == "weights" or not floats or (spec.quads and scales != "fragments"):
        return "its scales are of floating-point types of 16 or 32 bits, or of 8 where weights hold their products"
    if spec.quads and (spec.sparse or fmt.bits not in (4, 8)):
        return "its sparse weights, and those of other than 4 or 8 bits, have no scales of 16 or 32 columns"
    if spec.k % 64 or (scales != "total" and not spec.quads and spec.columns != 64 and spec.columns % 128):
        return "64 columns have more than one scale"
    return None


def _rows_stream_objection(spec: KernelSpec) -> str | None:
    if spec.compute != "int8" or spec.activation_scale not in ("token", "tensor"):
        return "its weights of 8 bits in rows are int8, and so are its activations, with a scale a token or a tensor"
    if spec.groups > 1 or spec.scale_dtype not in _FLOATS:
        return "its weights have scales of rows or of all, which are floating-point numbers"
    if spec.k % 16:
        return "rows do not begin at multiples of 16 bytes"
    return "sums of products may not fit int32" if spec.k >= 2**17 else None
