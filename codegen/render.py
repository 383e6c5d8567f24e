"""A `KernelSpec` as the text of a Python file that needs Triton only: its template with the holes filled."""

from __future__ import annotations

import functools
import json
import re
import struct
from importlib import resources

import torch

from qcompile.codegen.attention_spec import AttentionKernelSpec
from qcompile.codegen.printers import HELPERS, operations, to_triton
from qcompile.codegen.spec import GroupedSpec, KernelSpec, native_fp8
from qcompile.expr import Expr, var
from qcompile.formats import FORMATS, FloatFormat, Format, IntegerFormat, TableFormat
from qcompile.linear_spec import ACTIVATIONS

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
    factor = 2.0 ** ((1 << (exponent - 1)) - (1 << (fmt.exponent - 1)))
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


def pair_decoder(fmt: Format, dtype: str) -> str:
    """A Triton function `decode_pair`: int32 with a code in each half to two tensors of `dtype`.

    Where a code fits in a type's mantissa, the code is put there with one `or` for both halves, and one exact
    subtraction leaves its value; floats' fields are moved for both halves at once. Otherwise the format's formula
    decodes one half after the other.
    """
    if isinstance(fmt, IntegerFormat) and dtype in _MAGIC:
        bits, number, room = _MAGIC[dtype]
        if fmt.bits <= room:
            offset = float(number + fmt.offset)
            return _MAGIC_PAIR.format(bits=bits, number=number, dtype=dtype, offset=offset)
        if fmt.signed:
            return _SIGNED_BYTE_PAIR
    if isinstance(fmt, FloatFormat) and dtype in _FIELDS:
        return _float_pair(fmt, dtype)
    return decode_formula(fmt) + "\n\n" + _PAIR.format(dtype=_DTYPES[dtype])


def _split_pair(dtype: str) -> str:
    """A Triton function `decode_pair` of pairs that are values already."""
    low, high = (f"{half}.to(tl.int16).to(tl.{dtype}, bitcast=True)" for half in ("pair", "(pair >> 16)"))
    return f"@triton.jit\ndef decode_pair(pair):\n    return {low}, {high}\n"


def lookup_assembly(fmt: TableFormat, dtype: str) -> str:
    """PTX that looks up the eight codes of word $4: field j of both halves becomes a pair of values of `dtype` in $j.

    A byte permutation whose selector is a word of 4-bit codes looks four of them up, in a table of eight bytes: so
    there is one for the low and one for the high bytes of either half of the table, and the codes' last bits choose.
    """
    values = [_bits(value, dtype) for value in fmt.values]

    def table(half: int, byte: int) -> str:
        entries = bytes(value >> (8 * byte) & 0xFF for value in values[8 * half : 8 * half + 8])
        return ", ".join(f"{word:#x}" for word in struct.unpack("<II", entries))

    lines = [".reg .b32 c, m, f, a, b, l0, h0, l1, h1, p, q", "and.b32 c, $4, 0x77777777"]
    lines += ["shr.b32 m, $4, 3", "and.b32 m, m, 0x11111111"]
    for position in (0, 1):
        if position == 1:
            lines += ["shr.b32 c, c, 16", "shr.b32 m, m, 16"]
        lines.append("prmt.b32 f, 0xff00, 0, m")  # 255 in each byte whose code's last bit is set
        for byte, name in enumerate("lh"):
            lines += [f"prmt.b32 a, {table(0, byte)}, c", f"prmt.b32 b, {table(1, byte)}, c"]
            lines.append(f"lop3.b32 {name}{position}, f, a, b, 0xac")  # f ? b : a
    for fields, order in (((0, 1), "0x5140"), ((2, 3), "0x7362")):
        lines += [f"prmt.b32 p, l0, h0, {order}", f"prmt.b32 q, l1, h1, {order}"]
        lines += [f"prmt.b32 ${fields[0]}, p, q, 0x5410", f"prmt.b32 ${fields[1]}, p, q, 0x7632"]
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
    for step in spec.epilogue:
        if step == "bias":
            lines.append("value = value + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)")
        elif step in ("mul", "add"):
            sign = "*" if step == "mul" else "+"
            loaded = f"tl.load(operand_{operand} + offsets, mask=mask, other=0.0)"
            lines.append(f"value = value {sign} {loaded}.to(tl.float32)")
            operand += 1
        else:
            formula = _formula(ACTIVATIONS[step](var("value")))
            formulas.append(formula)
            lines.append(f"value = {to_triton(formula)}")
    body = "".join(f"    {line}\n" for line in [*lines, "return value"])
    return f"{_helpers(*formulas)}@triton.jit\ndef epilogue(value, bias, operand_0, n, offsets, mask):\n{body}\n\n"


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
    apart = spec.super_columns == 0 or _super_last(spec)
    kept = {"bfloat16": 8, "float16": 11}.get(spec.compute, 0)
    if spec.compute == "float16" and spec.scale_dtype != "float8_e4m3fn":
        kept = 0  # its exponents are too few
    exact = spec.symmetric and apart and _significant_bits(FORMATS[spec.weight]) + digits <= kept
    return _DTYPES[spec.compute if exact else "float32"]


def _super_last(spec: KernelSpec) -> bool:
    """Whether the scale above all scales of a row may multiply sums, and weights not yet scaled by it fit."""
    small = spec.compute != "float16" or spec.scale_dtype in ("float8_e4m3fn", "int8", "uint8")
    return spec.super_columns >= spec.k and not spec.offset and small


def _fragment(spec: KernelSpec) -> dict[str, str]:
    # The largest power of two that divides the columns that share everything.
    aligned = spec.unit & -spec.unit or spec.tile.k
    chunk = 64 if spec.compute == "float32" else min(spec.tile.k, aligned if aligned >= 64 else 128)
    run = min(aligned, chunk)
    fmt = FORMATS[spec.weight]
    # Values that are scaled before their products are summed are not rounded before.
    decoded = "float32" if (spec.offset or run < 64) and not _holds(spec.compute, fmt) else spec.compute
    table = ""
    if isinstance(fmt, TableFormat) and decoded != "float32" and spec.target.startswith("sm_"):
        table = lookup_assembly(fmt, decoded)
    constants: dict[str, object] = {
        "N": spec.n,
        "K": spec.k,
        "BITS": fmt.bits,
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
        "SCALE_TYPE": _scale_type(spec),
        "SUPER_LAST": run < 64 and _super_last(spec),
        "LOOKUP": table,
        "SPLIT": spec.tile.split,
    }
    decoders = (
        _scale_decoder(spec.scale_dtype, spec.target),
        _split_pair(decoded) if table else pair_decoder(fmt, decoded),
        _convert("decode_x", spec.activation, spec),
    )
    return {"constants": _constants(constants), "decode": "\n\n".join(decoders) + "\n\n"}


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
        "SPLIT": spec.tile.split,
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
    assert isinstance(spec, GroupedSpec)
    fragment = _template("gemm_fragment")
    shared = fragment[fragment.index("# <constants>") : fragment.index("@triton.jit(do_not_specialize")]
    experts: dict[str, object] = {
        "EXPERTS": spec.experts,
        "EXPERTS_POWER": 1 << (spec.experts - 1).bit_length(),
    }
    return {"fragment": shared, **_fragment(spec), "experts": _constants(experts)}


def _attention(spec: AttentionKernelSpec) -> dict[str, str]:
    decoder = _function("decode(code):", "code") if spec.plain else decode_formula(FORMATS[spec.number])
    return {"constants": _constants(spec.constants()), "decode": decoder + "\n\n"}


_FILL = {"gemm_fragment": _fragment, "gemm_rows8": _rows8, "gemm_grouped": _grouped}


@functools.cache
def _template(name: str) -> str:
    return resources.files("qcompile.codegen.templates").joinpath(f"{name}.py").read_text(encoding="utf-8")


def render(spec: KernelSpec | AttentionKernelSpec) -> str:
    """The kernel's source, which begins with the spec and how to make the file again.

    All that a user's configuration contributes is numbers and names of registries, and the header's JSON is one comment
    line.
    """
    text = _template(spec.template)
    holes = _attention(spec) if isinstance(spec, AttentionKernelSpec) else _FILL[spec.template](spec)
    for name, content in holes.items():
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
