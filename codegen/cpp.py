"""A weight's decoding as the text of a C++ file that multiplies by it: the template with its holes filled."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from qcompile.codegen.holes import fill_hole
from qcompile.codegen.printers import cpp_constant, to_cpp
from qcompile.expr import Expr, var
from qcompile.formats import FORMATS, FloatFormat, IntegerFormat
from qcompile.formats.whole import whole_numbers
from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec
from qcompile.scheme import WHOLE

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", *_AVX2)
_AVX512_BF16 = (*_AVX512, "avx512_vnni", "avx512_bf16")

ISAS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8"),
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": (*_AVX512, "avx512_vnni"),
    "avx512": _AVX512,
    "avx_vnni": (*_AVX2, "avx_vnni"),
    "avx2": _AVX2,
    "i8mm": ("asimddp", "i8mm"),
    "dotprod": ("asimddp",),
    "portable": (),
}
"""Instruction sets from the best to the least, by the features of a processor (as Linux names them) that they need:
those of x86, those of Arm, and what any processor has that the compiler generates code for."""

_ARM_FEATURES = {"asimddp": "dotprod", "i8mm": "i8mm"}


def compiler_options(isa: str) -> tuple[str, ...]:
    """What GCC and Clang are told to generate code for one of `ISAS`."""
    features = ISAS[isa]
    if "asimddp" in features:
        return ("+".join(("-march=armv8.2-a", *(_ARM_FEATURES[feature] for feature in features))),)
    return tuple("-m" + feature.replace("amx_", "amx-").replace("_", "") for feature in features)


_SCALES = {
    "float32": "float",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float8_e8m0fnu": "float8_e8m0",
    "float8_e4m3fn": "float8_e4m3",
    "uint8": "std::uint8_t",
    "int8": "std::int8_t",
}
_ELEMENTS = {"float32": "float", "bfloat16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class CppSpec:
    """Everything that decides a kernel's source. N, K and the columns of a group are arguments of the kernel.

    Attributes:
        weight: name of the weights' format.
        zero_point, offset: what the scheme has.
        scale_dtype: of scales and offsets.
        super_dtype: of the scales of scales, or None.
        unit: 32 or 16, a divisor of a group's columns.
        element: "float32" or "bfloat16", of x, y and decoded weights.
        isa: one of `ISAS`.
        integers: None, or for the product of integers what x becomes: "row" or "group" is int8 with a scale for each,
            "limbs" three int8 for each number with a scale a group.
    """

    weight: str
    zero_point: bool
    offset: bool
    scale_dtype: str
    super_dtype: str | None
    unit: int
    element: str
    isa: str
    integers: str | None = None

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def cpp_spec(spec: LinearSpec, dtype: torch.dtype, isa: str, *, integers: bool = False, limbs: bool = False) -> CppSpec:
    """The kernel for a linear whose weight is in layout `rows16`, for x of float32 or bfloat16.

    Args:
        integers: whether it rounds x to int8 and multiplies integers (`layouts.multiplies_integers`).
        limbs: whether it multiplies integers that x is the sum of, with next to nothing lost.
    """
    weight, activation = spec.scheme.weight, spec.scheme.activation
    assert LAYOUTS["rows16"].objection(spec.scheme, spec.shape) is None
    grouped = integers and activation is not None and activation.granularity.is_group
    return CppSpec(
        weight=weight.format.name,
        zero_point=not weight.symmetric and not weight.offset,
        offset=weight.offset,
        scale_dtype=weight.scale_dtype,
        super_dtype=None if weight.super_scale is None else weight.super_scale.dtype,
        unit=32 if weight.granularity.columns == WHOLE or weight.granularity.columns % 32 == 0 else 16,
        element=str(dtype).removeprefix("torch."),
        isa=isa,
        integers="limbs" if limbs else None if not integers else "group" if grouped else "row",
    )


def _table(name: str, values: Tensor, entries: int) -> str:
    """A table whose index may have more bits than a code: the values repeat."""
    repeated = values.repeat(entries // len(values)).tolist()
    rows = [", ".join(map(cpp_constant, repeated[i : i + 8])) for i in range(0, entries, 8)]
    return f"constexpr {name} = {{{{\n" + "".join(f"    {row},\n" for row in rows) + "}};\n"


_LOOKUP = """static inline f32 decode(i32 code) {
  return lookup(code, VALUES);
}
"""
_FORMULA = """static inline f32 decode(i32 code) {{
  return {};
}}
"""
# Two codes, from bit FROM of the halves of each lane on, as bfloat16 there.
_PAIR = """template <int FROM = 0>
static inline u32 decode_pair(u32 codes) {{
{}
}}
"""
_LOOKUP_PAIR = "  return lookup(lowered<FROM>(codes), PAIRS);"
_LOOKUP_BYTES = "  return lookup<FROM>(codes, PAIRS);"
_ROUNDED_PAIR = """  codes >>= FROM;
  f32 low = decode((i32)(codes & 255)), high = decode((i32)(codes >> 16 & 255));
  return to_bfloat16(low) | to_bfloat16(high) << 16;"""
_FORMULA_PAIR = """  codes >>= FROM;
  u32 low = as_u32(decode((i32)(codes & 255))), high = as_u32(decode((i32)(codes >> 16 & 255)));
  return low >> 16 | (high & 0xffff0000u);"""
_PLACED_PAIR = "  return put<{}, FROM>(codes, {:#010x}u, 0x3f803f80u);"


def placed(name: str, element: str) -> IntegerFormat | None:
    """A format whose codes are put into the mantissa of a bfloat16 as they are: c of b bits makes 1 + c / 2^b."""
    fmt = FORMATS[name]
    return fmt if element == "bfloat16" and isinstance(fmt, IntegerFormat) and fmt.bits < 8 else None


def decode_functions(name: str, element: str, isa: str, *, place: bool = False) -> tuple[str, bool]:
    """The functions `decode` and `decode_pair` of a format, and whether they need the bits above a code to be 0.

    A format of few bits is a table of its values where the processor looks up 16 of them in one instruction; all others
    compute the format's formula. Pairs come from a table of bfloat16, for floats of 8 bits one of those without a sign,
    or are cut from float32 where that is exact.

    Args:
        place: whether pairs may be those of `placed`.
    """
    fmt = FORMATS[name]
    values = fmt.decode(torch.arange(1 << fmt.bits, dtype=torch.int32))
    assert isinstance(values, Tensor)
    wide = "avx512f" in ISAS[isa]
    by_table = fmt.bits <= 4 and (wide or (isa == "avx2" and not isinstance(fmt, IntegerFormat)))
    entries = (32 if fmt.bits <= 5 else 64 if fmt.bits == 6 else 128 if isinstance(fmt, FloatFormat) else 0) * wide
    if by_table:
        text = _table("Table VALUES", values, 16) + "\n" + _LOOKUP
    else:
        formula = fmt.decode(var("code"))
        assert isinstance(formula, Expr)
        text = _FORMULA.format(to_cpp(formula))
    rounded = values.to(torch.bfloat16)
    if place and placed(name, element):
        pair = _PLACED_PAIR.format(7 - fmt.bits, (128 - (128 >> fmt.bits)) * 0x10001)
    elif entries:
        bits = rounded[:entries].view(torch.int16).int() & 0xFFFF
        if entries == 128 and "avx512vbmi" in ISAS[isa]:
            text += "\n" + _table("BytesTable PAIRS", torch.cat([bits & 255, bits >> 8]), 256)
            pair = _LOOKUP_BYTES
        else:
            text += "\n" + _table(f"PairTable<{entries}> PAIRS", bits, entries)
            pair = _LOOKUP_PAIR
    else:
        exact = torch.equal(rounded.float().nan_to_num(), values.nan_to_num())
        pair = _FORMULA_PAIR if exact else _ROUNDED_PAIR
    text += "\n" + _PAIR.format(pair)
    unmasked = entries > 0 and element == "bfloat16"
    return text, not (by_table and (unmasked or element == "float32"))


_CODES = """extern "C" void decode_int8(const Weight* weight, i64 first, i64 count, std::int8_t* out, int threads) {
  decode_all(*weight, first, count, out, threads);
}
"""


_BYTES = """static inline u32 integers(u32 codes) {{
  return {};
}}
constexpr int WIDTH = {};
constexpr bool READY = {};
"""


def integer_functions(spec: CppSpec) -> str:
    """The function `integers` and what is known of its results."""
    found, bits = whole_numbers(spec.weight), FORMATS[spec.weight].bits
    assert found is not None
    if found.table is None:
        return _BYTES.format("codes", bits, str(bits == 8).lower())
    rows = [", ".join(map(str, found.table[i : i + 8])) for i in (0, 8)]
    table = "constexpr ByteTable VALUES = {{\n" + "".join(f"    {row},\n" for row in rows) + "}};\n\n"
    return table + _BYTES.format("lookup(codes, VALUES)", max(found.table).bit_length(), "false")


@functools.cache
def template_text(name: str) -> str:
    """A file of `templates/cpp`."""
    return resources.files("qcompile.codegen.templates").joinpath("cpp").joinpath(name).read_text(encoding="utf-8")


def operators_source() -> str:
    """The source of the operators that call kernels."""
    text = template_text("operators.cpp")
    for header in ("operators.h", "attention_operators.h"):
        text = text.replace(f'#include "{header}"\n', template_text(header))
    return text


def render_cpp(spec: CppSpec) -> str:
    """The kernel's source, one file without includes of its own.

    All that comes from a checkpoint is chosen from registries and tables: names of types, and the numbers of a format.
    """
    constants = (
        f"using Element = {_ELEMENTS[spec.element]};\n"
        f"using Scale = {_SCALES[spec.scale_dtype]};\n"
        f"using SuperScale = {_SCALES[spec.super_dtype or 'float32']};\n"
        f"constexpr bool ZERO_POINT = {str(spec.zero_point).lower()};\n"
        f"constexpr bool OFFSET = {str(spec.offset).lower()};\n"
        f"constexpr bool SUPER_SCALE = {str(spec.super_dtype is not None).lower()};\n"
        f"constexpr int BITS = {FORMATS[spec.weight].bits};\n"
        f"constexpr int UNIT = {int(spec.unit)};\n"
    )
    name = "gemm.cpp" if spec.integers is None else "gemm_int8.cpp"
    text = template_text(name)
    if spec.integers is None:
        decode, masked = decode_functions(spec.weight, spec.element, spec.isa, place=True)
        integer = placed(spec.weight, spec.element)
        steps = 1 if integer is None else 1 << integer.bits
        more = 0.0 if integer is None else 1 + integer.offset / steps
        constants += (
            f"constexpr bool MASKED = {str(masked).lower()};\n"
            f"constexpr float PAIR_UNIT = {cpp_constant(1 / steps)};\n"
            f"constexpr float PAIR_MORE = {cpp_constant(more)};\n"
        )
        text = fill_hole(text, "decode", decode, comment="//")
        native = FORMATS[spec.weight].native_dtype == torch.int8
        text = fill_hole(text, "codes", _CODES if native else "", comment="//")
    else:
        found = whole_numbers(spec.weight)
        assert found is not None
        constants += (
            "constexpr bool MASKED = true;\n"
            f"constexpr int BIAS = {found.bias};\n"
            f"constexpr float STEP = {cpp_constant(found.step)};\n"
            f"constexpr bool GROUPED = {str(spec.integers != 'row').lower()};\n"
            f"constexpr int LIMBS = {3 if spec.integers == 'limbs' else 1};\n"
        )
        text = fill_hole(text, "integers", integer_functions(spec), comment="//")
    text = fill_hole(text, "constants", constants, comment="//")
    for header in ("vector.h", "weight.h", "integers.h", "gemm_squares.h", "gemm_int8_squares.h"):
        text = text.replace(f'#include "{header}"\n', template_text(header))
    encoded = spec.encode()
    assert encoded.isprintable()
    return f"// Generated by qcompile from codegen/templates/cpp/{name} for {encoded}\n{text}"
