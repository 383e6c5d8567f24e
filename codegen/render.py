"""A `KernelSpec` as the text of a Python file that needs Triton only: its template with the holes filled."""

from __future__ import annotations

import functools
import json
import math
import re
import struct
from importlib import resources

import torch

from qcompile.codegen.attention_spec import ATTENTION_TEMPLATE, AttentionKernelSpec
from qcompile.codegen.columns_spec import ColumnsSpec
from qcompile.codegen.nearest import nearest
from qcompile.codegen.printers import HELPERS, operations, to_triton
from qcompile.codegen.ranges_spec import RangesSpec
from qcompile.codegen.spec import AnySpec, GroupedSpec, KernelSpec, launches_early, native_fp8, scales_of, super_last
from qcompile.expr import Expr, var
from qcompile.formats import FORMATS, FloatFormat, Format, IntegerFormat, TableFormat
from qcompile.linear_spec import ACTIVATIONS, GATES, OPERAND_STEPS, STORES

_DTYPES = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}

_MAGIC = {"bfloat16": (0x43004300, 128, 7), "float16": (0x64006400, 1024, 8)}
"""For a type: the bits, twice in a word, of a number whose lowest bits count units; the number; how many bits do."""

_PAIR = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half.\"\"\"
    return decode(pair & 0xFFFF).to({dtype}), decode((pair >> 16) & 0xFFFF).to({dtype})
"""

_MAGIC_PAIR = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half.\"\"\"
    biased = pair | {bits:#x}  # {number} + code in {dtype}
    low = biased.to(tl.int16).to(tl.{dtype}, bitcast=True) - {offset}
    high = (biased >> 16).to(tl.int16).to(tl.{dtype}, bitcast=True) - {offset}
    return low, high
"""

_MAGIC_ASSEMBLY = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half.\"\"\"
    # {number} + code in {dtype}, less that number and what the format subtracts
    low, high = tl.inline_asm_elementwise(
        "{{ .reg .b32 t, z; or.b32 t, $2, {bits:#x}; mov.b32 z, {negative:#x}; "
        "add.rn.{packed} t, t, z; mov.b32 {{$0, $1}}, t; }}",
        "=h,=h,r",
        [pair],
        dtype=(tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    return low.to(tl.{dtype}, bitcast=True), high.to(tl.{dtype}, bitcast=True)
"""


_SIGNED_BYTE_PAIR = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half.\"\"\"
    biased = (pair & 0x7F007F) | 0x43004300  # 128 + seven bits in bfloat16
    base = ((pair & 0x800080) ^ 0x800080) | 0x43004300  # 128 if the eighth is set, else 256
    low = biased.to(tl.int16).to(tl.bfloat16, bitcast=True) - base.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (biased >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, high - (base >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
"""

_FIELDS = {"bfloat16": (8, 7), "float16": (5, 10)}
"""Exponent and mantissa bits."""


def _bias_factor(fmt: FloatFormat, dtype: str) -> float:
    """By how much a format's fields are worth more than in those places of `dtype`: the biases' power of two."""
    return 2.0 ** ((1 << (_FIELDS[dtype][0] - 1)) - (1 << (fmt.exponent - 1)))


def _float_pair(fmt: FloatFormat, dtype: str) -> str:
    """A Triton function `decode_pair` that works as `FloatFormat.decode` does, on both halves at once."""
    exponent, mantissa = _FIELDS[dtype]
    sign = 1 << (fmt.bits - 1)
    lines = [
        f"bits = (pair & {(sign - 1) * 0x10001:#x}) << {mantissa - fmt.mantissa}",
        f"bits |= (pair & {sign * 0x10001:#x}) << {16 - fmt.bits}",
    ]
    if fmt.dtype is not None and fmt.exponent < exponent:
        # Of codes that are not finite, adding the last place that all of them share carries into the sign's bit.
        ones = 0x7F if fmt.dtype == torch.float8_e4m3fn else 0x7C
        lines.append(f"special = ((pair & {ones * 0x10001:#x}) + {(0x80 - ones) * 0x10001:#x}) & 0x800080")
        lines.append(f"bits |= special * {((1 << exponent) - 1 << mantissa) // 0x80:#x}  # all bits of the exponent")
    factor = _bias_factor(fmt, dtype)
    for name, half in (("low", "bits"), ("high", "(bits >> 16)")):
        lines.append(f"{name} = {half}.to(tl.int16).to(tl.{dtype}, bitcast=True) * {factor!r}")
    body = "".join(f"    {line}\n" for line in [*lines, "return low, high"])
    text = "Codes in the two halves of an int32, as values: low half, high half."
    return f'@triton.jit\ndef decode_pair(pair):\n    """{text}"""\n{body}'


def fill_hole(text: str, name: str, content: str, comment: str = "#") -> str:
    """A template's text with other content between the lines `# <name>` and `# </name>`."""
    pattern = re.compile(rf"(^{comment} <{name}>\n).*?(^{comment} </{name}>$)", re.MULTILINE | re.DOTALL)
    filled, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    assert count == 1, f"a template has one hole named {name}, not {count}"
    return filled


def _formula(value: object) -> Expr:
    assert isinstance(value, Expr)
    return value


def _function(name: str, body: str) -> str:
    return f"@triton.jit\ndef {name}\n    return {body}\n"


def _helpers(*formulas: Expr) -> str:
    """The functions that printed formulas call."""
    needed = set().union(*map(operations, formulas)) if formulas else set()
    return "".join(HELPERS[name] + "\n\n" for name in HELPERS if name in needed)


def decode_formula(fmt: Format) -> str:
    """A Triton function `decode`: int32 codes to float32 values."""
    formula = _formula(fmt.decode(var("code")))
    return _helpers(formula) + _function("decode(code):", to_triton(formula))


def pair_decoder(fmt: Format, dtype: str, target: str = "") -> str:
    """A Triton function `decode_pair`: int32 with a code in each half to two tensors of `dtype`.

    Where a code fits in a type's mantissa, the code is put there with one `or` for both halves, and one exact
    subtraction leaves its value; floats' fields are moved for both halves at once. Otherwise the format's formula
    decodes one half after the other.
    """
    if isinstance(fmt, IntegerFormat) and dtype in _MAGIC:
        bits, number, room = _MAGIC[dtype]
        if fmt.bits <= room:
            offset = float(number + fmt.offset)
            if launches_early(target):  # has 16-bit additions of both types
                negative = _bits(-offset, dtype) * 0x10001
                packed = "bf16x2" if dtype == "bfloat16" else "f16x2"
                return _MAGIC_ASSEMBLY.format(bits=bits, number=number, dtype=dtype, negative=negative, packed=packed)
            return _MAGIC_PAIR.format(bits=bits, number=number, dtype=dtype, offset=offset)
        if fmt.signed:
            return _SIGNED_BYTE_PAIR
    if isinstance(fmt, FloatFormat) and dtype in _FIELDS:
        return _float_pair(fmt, dtype)
    return decode_formula(fmt) + "\n\n" + _PAIR.format(dtype=_DTYPES[dtype])


def word_values(fmt: Format) -> tuple[float, ...] | None:
    """The values of a 4-bit format's sixteen codes; None for integers, which need no table."""
    if isinstance(fmt, TableFormat):
        return fmt.values
    if isinstance(fmt, FloatFormat):
        bias, ones = (1 << (fmt.exponent - 1)) - 1, 1 << fmt.mantissa
        fields = [divmod(code, ones) for code in range(1 << (fmt.bits - 1))]
        positive = [math.ldexp(m + (ones if e else 0), max(e, 1) - bias - fmt.mantissa) for e, m in fields]
        return (*positive, *(-value for value in positive))
    return None


def _look_up(values: tuple[float, ...], dtype: str) -> list[str]:
    """PTX that puts field j of both halves of word w, as values of `dtype`, into t<j>.

    A byte permutation whose selector is a word of 4-bit codes looks four of them up, in a table of eight bytes: so
    there is one for the low and one for the high bytes of either half of the table, and the codes' last bits choose.
    """
    bits = [_bits(value, dtype) for value in values]

    def table(half: int, byte: int) -> str:
        entries = bytes(value >> (8 * byte) & 0xFF for value in bits[8 * half : 8 * half + 8])
        return ", ".join(f"{word:#x}" for word in struct.unpack("<II", entries))

    lines = [".reg .b32 c, m, f, a, b, l0, h0, l1, h1, p, q", "and.b32 c, w, 0x77777777"]
    lines += ["shr.b32 m, w, 3", "and.b32 m, m, 0x11111111"]
    for position in (0, 1):
        if position == 1:
            lines += ["shr.b32 c, c, 16", "shr.b32 m, m, 16"]
        lines.append("prmt.b32 f, 0xff00, 0, m")  # 255 in each byte whose code's last bit is set
        for byte, name in enumerate("lh"):
            lines += [f"prmt.b32 a, {table(0, byte)}, c", f"prmt.b32 b, {table(1, byte)}, c"]
            lines.append(f"lop3.b32 {name}{position}, f, a, b, 0xac")  # f ? b : a
    for fields, order in (((0, 1), "0x5140"), ((2, 3), "0x7362")):
        lines += [f"prmt.b32 p, l0, h0, {order}", f"prmt.b32 q, l1, h1, {order}"]
        lines += [f"prmt.b32 t{fields[0]}, p, q, 0x5410", f"prmt.b32 t{fields[1]}, p, q, 0x7632"]
    return lines


def _move_fields(fmt: FloatFormat, dtype: str) -> list[str]:
    """PTX as that of `_look_up`, for floats: their fields are moved to where `dtype` has its own.

    What that gives is still to be multiplied by `_bias_factor`. Codes whose exponent is zero are subnormal in `dtype`
    too, so that this makes them right as well.
    """
    _, mantissa = _FIELDS[dtype]
    lines = [".reg .b32 s, m"]
    for j in range(4):
        low = fmt.bits * j  # where the code begins in a half
        sources = []
        for name, up in (("s", mantissa - fmt.mantissa - low), ("m", 16 - fmt.bits - low)):
            sources.append(name if up else "w")
            if up:
                lines.append(f"sh{'l' if up > 0 else 'r'}.b32 {name}, w, {abs(up)}")
        fields = ((1 << (fmt.bits - 1)) - 1 << mantissa - fmt.mantissa) * 0x10001
        lines += [f"and.b32 m, {sources[1]}, 0x80008000", f"lop3.b32 t{j}, {sources[0]}, {fields:#x}, m, 0xea"]
    return lines


def word_assembly(fmt: Format, dtype: str, target: str, *, zero_points: bool, scaled: bool) -> str:
    """PTX that decodes word $8 of eight 4-bit codes: field j of the low half to $<2j>, of the high half to $<2j+1>.

    Fields 0 and 2 are of one row of weights, 1 and 3 of another. $9 and $10 are minus both rows' zero points, less the
    number of `_MAGIC`, twice in a word each; the next two operands both rows' scales.
    """
    packed = "bf16x2" if dtype == "bfloat16" else "f16x2"
    fused = packed == "bf16x2" and int(target[3:]) < 90  # has no addition and multiplication of its own

    def calculate(operation: str, j: int, by: str) -> str:
        if fused:
            return f"fma.rn.{packed} t{j}, t{j}, " + (f"one, {by}" if operation == "add" else f"{by}, none")
        return f"{operation}.rn.{packed} t{j}, t{j}, {by}"

    lines = [".reg .b32 w, t0, t1, t2, t3", "mov.b32 w, $8"]
    if fused:
        lines += [".reg .b32 one, none", "mov.b32 one, 0x3f803f80", "mov.b32 none, 0x80008000"]
    values = word_values(fmt)
    if isinstance(fmt, FloatFormat) and int(target[3:]) >= 90:  # others' kernels have no registers left for the factor
        lines += _move_fields(fmt, dtype)
        lines.append(f".reg .b32 f; mov.b32 f, {_bits(_bias_factor(fmt, dtype), dtype) * 0x10001:#x}")
        lines += [calculate("mul", j, "f") for j in range(4)]
    elif values is not None:
        lines += _look_up(values, dtype)
    else:
        assert isinstance(fmt, IntegerFormat)
        magic, number, _ = _MAGIC[dtype]
        lines += [".reg .b32 s, z"]
        if not zero_points:
            lines.append(f"mov.b32 z, {_bits(-float(number + fmt.offset), dtype) * 0x10001:#x}")
        for j in range(4):
            source = "w"
            if j:
                lines.append(f"shr.b32 s, w, {4 * j}")
                source = "s"
            lines.append(f"lop3.b32 t{j}, {source}, 0xf000f, {magic:#x}, 0xea")  # (word & mask) | magic
            lines.append(calculate("add", j, ("$9", "$10")[j % 2] if zero_points else "z"))
    if scaled:
        first = 11 if zero_points else 9
        lines += [calculate("mul", j, f"${first + j % 2}") for j in range(4)]
    lines += [f"mov.b32 {{$%d, $%d}}, t{j}" % (2 * j, 2 * j + 1) for j in range(4)]
    return "{ " + " ".join(line + ";" for line in lines) + " }"


def _convert(name: str, source: str | None, spec: KernelSpec) -> str:
    """A Triton function from stored 8-bit values (or activations as they are) to `spec.compute`."""
    if source is None or spec.compute in ("int8", "fp8"):
        return _function(f"{name}(x):", "x")
    dtype = _DTYPES[spec.compute]
    if source.startswith("fp8") and not native_fp8(spec.target):
        formula = to_triton(_formula(FORMATS[source].decode(var("code"))))
        return f"@triton.jit\ndef {name}(x):\n    code = x.to(tl.int32)\n    return {formula}.to({dtype})\n"
    return _function(f"{name}(x):", f"x.to({dtype})")


def _epilogue(spec: KernelSpec) -> str:
    """The functions of an epilogue's formulas, and `epilogue`, which works in float32."""
    formulas = []
    lines = []
    operand = 0

    def apply(step: str, name: str) -> None:
        formula = _formula(ACTIVATIONS[step](var(name)))
        formulas.append(formula)
        lines.append(f"{name} = {to_triton(formula)}")

    for step in spec.epilogue:
        if step == "bias":
            mask = f"n < {spec.width}"
            lines.append(f"value = value + tl.load(bias + n, mask={mask}, other=0.0).to(tl.float32)")
            if spec.gated:
                loaded = f"tl.load(bias + {spec.width} + n, mask={mask}, other=0.0)"
                lines.append(f"second = second + {loaded}.to(tl.float32)")
        elif step in OPERAND_STEPS:
            sign = "*" if step == "mul" else "+"
            loaded = f"tl.load(operand_{operand} + offsets, mask=mask, other=0.0)"
            lines.append(f"value = value {sign} {loaded}.to(tl.float32)")
            operand += 1
        elif step in GATES:
            for name, function in zip(("value", "second"), GATES[step], strict=True):
                if function is not None:
                    apply(function, name)
            lines.append("value = value * second")
        elif step in STORES:
            lines += _store(FORMATS[STORES[step]], f"operand_{operand}")
        else:
            apply(step, "value")
    body = "".join(f"    {line}\n" for line in [*lines, "return value"])
    head = "@triton.jit\ndef epilogue(value, second, bias, operand_0, n, offsets, mask):\n"
    return f"{_helpers(*formulas)}{head}{body}\n\n"


def _store(fmt: Format, scale: str) -> list[str]:
    """Lines that make `value` what a conversion to the format's own type stores as the nearest code; NaN stays."""
    least = -fmt.absmax if isinstance(fmt, FloatFormat) else -(2.0 ** (fmt.bits - 1))
    most = fmt.absmax if isinstance(fmt, FloatFormat) else 2.0 ** (fmt.bits - 1) - 1
    lines = [f"value = value / tl.load({scale})"]
    lines.append(f"value = tl.clamp(value, {least!r}, {most!r}, propagate_nan=tl.PropagateNan.ALL)")
    if isinstance(fmt, IntegerFormat):
        # The sum's last place is 1, so it is rounded to an integer, half to even.
        lines.append("value = (value + 12582912.0) - 12582912.0")
    return lines


def _constants(values: dict[str, object]) -> str:
    lines = []
    for name, value in values.items():
        literal = str(value) if str(value).startswith("tl.") or not isinstance(value, str) else json.dumps(value)
        lines.append(f"{name} = tl.constexpr({literal})\n")
    return "".join(lines)


def _holds(dtype: str, fmt: Format) -> bool:
    """Whether a floating-point type holds a format's values exactly."""
    if dtype not in _FIELDS or not isinstance(fmt, TableFormat):
        return True
    if dtype == "bfloat16":
        return all(struct.unpack("<f", struct.pack("<HH", 0, _bits(v, dtype)))[0] == v for v in fmt.values)
    return all(struct.unpack("<e", struct.pack("<e", value))[0] == value for value in fmt.values)


def _bits(value: float, dtype: str) -> int:
    """The 16 bits of a finite number in bfloat16 or float16. Tracing makes fakes of tensors, so this uses none."""
    if dtype == "float16":
        return int.from_bytes(struct.pack("<e", value), "little")
    bits = int.from_bytes(struct.pack("<f", value), "little")
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _significant_bits(fmt: Format) -> int:
    """Binary digits of a format's values that a type must keep to hold them; those of float32 for tables."""
    if isinstance(fmt, FloatFormat):
        return fmt.mantissa + 1
    return fmt.bits if isinstance(fmt, IntegerFormat) else 24


def _scale_type(spec: KernelSpec) -> str:
    """The type in which scales multiply weights: `spec.compute` where all products are exact in it, else float32."""
    digits = {"float8_e4m3fn": 4, "float8_e8m0fnu": 1}.get(spec.scale_dtype, 24)
    apart = spec.super_columns == 0 or super_last(spec)
    kept = {"bfloat16": 8, "float16": 11}.get(spec.compute, 0)
    if spec.compute == "float16" and spec.scale_dtype != "float8_e4m3fn":
        kept = 0  # its exponents are too few
    exact = spec.symmetric and apart and _significant_bits(FORMATS[spec.weight]) + digits <= kept
    return _DTYPES[spec.compute if exact else "float32"]


def _fragment_constants(spec: KernelSpec, decoded: str) -> dict[str, object]:
    """Those of `gemm_fragment`; `decoded` is the type that codes become."""
    aligned = spec.aligned or spec.tile.k
    scales = scales_of(spec, spec.tile.scales)
    # With overlap a turn of the loop has two chunks at least.
    widest = min(spec.tile.k // (2 if spec.tile.overlap else 1), 64 if spec.compute == "float32" else 128)
    chunk = widest if scales == "total" or (scales == "weights" and aligned < 64) else min(widest, aligned)
    run = min(aligned, chunk)
    fmt = FORMATS[spec.weight]
    words, negative = "", 0
    if fmt.bits == 4 and decoded in _FIELDS and spec.target.startswith("sm_"):
        zero_points = not spec.symmetric and not spec.offset and scales != "weights"
        scaled = scales == "fragments"
        words = word_assembly(fmt, decoded, spec.target, zero_points=zero_points, scaled=scaled)
        if isinstance(fmt, IntegerFormat):
            negative = _bits(-float(_MAGIC[decoded][1] + fmt.offset), decoded) * 0x10001 - (1 << 32)
    return {
        "N": spec.n,
        "K": spec.k,
        "BITS": fmt.bits,
        "SPARSE": spec.sparse,
        "SYMMETRIC": spec.symmetric,
        "OFFSET": spec.offset,
        "COLUMNS": spec.columns,
        "SUPER_COLUMNS": spec.super_columns,
        "X_SCALE": spec.activation_scale,
        "COMPUTE": _DTYPES[spec.compute],
        "PRECISION": spec.precision,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
        "BLOCK_K": spec.tile.k,
        "CHUNK": chunk,
        "RUN": run,
        "SCALES": scales,
        "SCALE_TYPE": _scale_type(spec),
        "SUPER_LAST": scales in ("weights", "fragments") and super_last(spec),
        "WORDS": words,
        "NEGATIVE": negative,
        "GATED": spec.gated,
        "SPLIT": spec.tile.split,
        "SLAB": spec.tile.form == "slab" and scales != "weights",
        "OVERLAP": spec.tile.overlap and scales in ("total", "fragments") and spec.target == "sm_90",
        "EARLY": launches_early(spec.target) and not isinstance(spec, GroupedSpec),
        "HOPPER": spec.target == "sm_90",
    }


def _fragment_holes(spec: KernelSpec, decoded: str, **changed: object) -> dict[str, str]:
    """What fills `gemm_fragment`, some of its constants changed."""
    decoders = (
        _scale_decoder(spec.scale_dtype, spec.target),
        pair_decoder(FORMATS[spec.weight], decoded, spec.target),
        _convert("decode_x", spec.activation, spec),
    )
    constants = _constants(_fragment_constants(spec, decoded) | changed)
    return {"constants": constants, "decode": "\n\n".join(decoders) + "\n\n"}


def _fragment(spec: KernelSpec) -> dict[str, str]:
    # Values that are scaled before their products are summed are not rounded before.
    exactly = scales_of(spec, spec.tile.scales) == "weights" and not _holds(spec.compute, FORMATS[spec.weight])
    return _fragment_holes(spec, "float32" if exactly else spec.compute)


def _rows8(spec: KernelSpec) -> dict[str, str]:
    constants: dict[str, object] = {
        "N": spec.n,
        "K": spec.k,
        "ROWS": spec.rows,
        "COLUMNS": spec.columns,
        "X_SCALE": spec.activation_scale,
        # Products of codes are at most 2**14, so that sums of less than 2**17 fit.
        "INTEGER": spec.compute == "int8" and spec.groups == 1 and spec.k < 2**17,
        "PRECISION": spec.precision,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
        "BLOCK_K": spec.tile.k,
        "GATED": spec.gated,
        "SPLIT": spec.tile.split,
        "EARLY": launches_early(spec.target) and not isinstance(spec, GroupedSpec),
        "NVIDIA": spec.target.startswith("sm_"),
    }
    decoders = (
        _scale_decoder(spec.scale_dtype, spec.target),
        _convert("decode_weight", spec.weight, spec),
        _convert("decode_x", spec.activation, spec),
    )
    return {"constants": _constants(constants), "decode": "\n\n".join(decoders) + "\n\n"}


def _scale_decoder(scale_dtype: str, target: str) -> str:
    """A Triton function `decode_scale` from the stored type of scales, or bytes where that is an 8-bit float."""
    head = "@triton.jit\ndef decode_scale(value):\n"
    if scale_dtype == "float8_e8m0fnu":
        return head + (
            "    code = value.to(tl.int32)\n"
            "    special = (code == 0) | (code == 255)  # the least power of two, which is no normal number, and NaN\n"
            "    bits = (code << 23) | tl.where(special, 0x400000, 0)\n"
            "    return bits.to(tl.float32, bitcast=True)\n"
        )
    if scale_dtype == "float8_e4m3fn" and not native_fp8(target):
        formula = to_triton(_formula(FORMATS["fp8_e4m3"].decode(var("code"))))
        return head + f"    code = value.to(tl.int32)\n    return {formula}\n"
    if scale_dtype == "float8_e4m3fn":
        return head + "    return value.to(tl.float8e4nv, bitcast=True).to(tl.float32)\n"
    return head + "    return value.to(tl.float32)\n"


def _grouped(spec: KernelSpec) -> dict[str, str]:
    return {"fragment": _functions_of("gemm_fragment"), **_fragment(spec), "experts": _experts(spec)}


def _grouped_rows8(spec: KernelSpec) -> dict[str, str]:
    return {"rows8": _functions_of("gemm_rows8"), **_rows8(spec), "experts": _experts(spec)}


def _experts(spec: KernelSpec) -> str:
    """How many experts there are, and the function of `gemm_grouped` that finds a program's."""
    assert isinstance(spec, GroupedSpec)
    constants: dict[str, object] = {
        "EXPERTS": spec.experts,
        "EXPERTS_POWER": 1 << (spec.experts - 1).bit_length(),
    }
    text = _template("gemm_grouped")
    return _constants(constants) + "\n\n" + text[text.index("@triton.jit\ndef find_tile") : text.index("# </experts>")]


def _decode(spec: KernelSpec) -> dict[str, str]:
    # As `reference.dequantize` has it: all in float32, and the scale above applied to the scale.
    holes = _fragment_holes(
        spec,
        spec.compute if _holds(spec.compute, FORMATS[spec.weight]) else "float32",
        CHUNK=spec.tile.k,
        RUN=min(spec.aligned or spec.tile.k, spec.tile.k),
        SCALE_TYPE="tl.float32",
        SUPER_LAST=False,
        SCALES="weights",
        WORDS="",
        EARLY=False,
    )
    return {"fragment": _functions_of("gemm_fragment"), **holes}


def _functions_of(template: str) -> str:
    """The constants and functions of a template, with its holes."""
    text = _template(template)
    kernel = text.rindex("@triton.jit", 0, text.index("\ndef kernel("))
    return text[text.index("# <constants>") : kernel]


def _finish(spec: KernelSpec) -> dict[str, str]:
    constants: dict[str, object] = {
        "N": spec.n,
        "X_SCALE": spec.activation_scale,
        "SCALED": spec.rows == 1,
        "GATED": spec.gated,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
    }
    return {"constants": _constants(constants)}


_VALUES = """@triton.jit
def values_of(codes, HALF: tl.constexpr):
    \"\"\"Bytes' values in COMPUTE: of their lower (HALF 0) or higher (1) four bits, or of all eight.\"\"\"
{body}
"""

_BYTES_TO_FLOAT16 = """    # {number} + code in float16, less that number and what the format subtracts
    return tl.inline_asm_elementwise(
        "{{ .reg .b32 t, z; {part}mov.b32 z, 0x64646464; prmt.b32 $0, t, z, 0x4140; prmt.b32 $1, t, z, 0x4342; "
        "mov.b32 z, {negative:#x}; add.rn.f16x2 $0, $0, z; add.rn.f16x2 $1, $1, z; }}",
        "=r,=r,r",
        [codes],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )"""


def _values(spec: AttentionKernelSpec) -> str:
    """The function `values_of` of `attention_decode`.

    Of integers four bytes become two pairs of float16 in a few instructions; converting numbers one by one takes longer
    than reading them.
    """
    native = spec.constants()["NATIVE"]
    if native:
        return _VALUES.format(body="    return codes.to(COMPUTE)")
    fmt = FORMATS[spec.number]
    if isinstance(fmt, IntegerFormat) and spec.compute == "float16" and spec.target.startswith("sm_"):
        number = _MAGIC["float16"][1]
        negative = _bits(-float(number + fmt.offset), "float16") * 0x10001
        if fmt.bits == 8:
            parts = ["mov.b32 t, $2; "]
        else:
            parts = [f"{how} t, t, 0x0F0F0F0F; " for how in ("mov.b32 t, $2; and.b32", "shr.b32 t, $2, 4; and.b32")]
        bodies = [_BYTES_TO_FLOAT16.format(part=part, number=number, negative=negative) for part in parts]
        if fmt.bits == 8:
            return _VALUES.format(body=bodies[0])
        low, high = (body.replace("\n    ", "\n        ").replace("    ", "        ", 1) for body in bodies)
        return _VALUES.format(body=f"    if HALF == 0:\n{low}\n    else:\n{high}")
    code = "codes.to(tl.int32)" if spec.bits == 8 else "(codes.to(tl.int32) >> (4 * HALF)) & 15"
    return decode_formula(fmt) + "\n\n" + _VALUES.format(body=f"    return decode({code}).to(COMPUTE)")


def _attention(spec: AttentionKernelSpec) -> dict[str, str]:
    holes = {"constants": _constants(spec.constants()), "decode": _values(spec) + "\n\n"}
    if spec.template == ATTENTION_TEMPLATE:
        return holes
    return {"attention": _functions_of(ATTENTION_TEMPLATE), **holes}


def _choosing(spec: ColumnsSpec | RangesSpec) -> dict[str, str]:
    return {"constants": _constants(spec.constants()), "nearest": nearest(FORMATS[spec.number]) + "\n\n"}


def _holes(spec: AnySpec) -> dict[str, str]:
    """What fills a template."""
    if isinstance(spec, AttentionKernelSpec):
        return _attention(spec)
    return _choosing(spec) if isinstance(spec, (ColumnsSpec, RangesSpec)) else _FILL[spec.template](spec)


_FILL = {
    "gemm_fragment": _fragment,
    "gemm_rows8": _rows8,
    "gemm_grouped": _grouped,
    "gemm_grouped_rows8": _grouped_rows8,
    "decode_fragment": _decode,
    "finish_product": _finish,
}


@functools.cache
def _template(name: str) -> str:
    return resources.files("qcompile.codegen.templates").joinpath(f"{name}.py").read_text(encoding="utf-8")


def render(spec: AnySpec) -> str:
    """The kernel's source, which begins with the spec and how to make the file again.

    All that a user's configuration contributes is numbers and names of registries, and the header's JSON is one comment
    line.
    """
    text = _template(spec.template)
    for name, content in _holes(spec).items():
        text = fill_hole(text, name, content)
    if isinstance(spec, KernelSpec):
        text = fill_hole(text, "epilogue", _epilogue(spec))
        operands = ", ".join(f"operand_{i}" for i in range(max(1, spec.operand_count)))
        text = text.replace("operand_0,", f"{operands},")
    # Profilers and Inductor show the function's own name.
    name = f"qcompile_{spec.template}"
    text = text.replace("\ndef kernel(", f"\ndef {name}(") + f"\n\nkernel = {name}\n"
    encoded = spec.encode()
    assert encoded.isprintable()
    header = (
        f"# Generated by qcompile from codegen/templates/{spec.template}.py. To make it again:\n"
        "#   from qcompile.codegen.render import render\n"
        "#   from qcompile.codegen.spec import decode_kernel_spec\n"
        "#   render(decode_kernel_spec(line))   with the text of this line:\n"
        f"# {encoded}\n"
    )
    return header + text
