"""Functions that templates decode with, as Triton's or PTX's text: of codes, scales and activations."""

from __future__ import annotations

import math
import struct

import torch

from qcompile.codegen.printers import HELPERS, operations, to_triton
from qcompile.codegen.spec import KernelSpec, launches_early, native_fp8
from qcompile.expr import Expr, var
from qcompile.formats import FORMATS, FloatFormat, Format, IntegerFormat, TableFormat

DTYPES = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}


MAGIC = {"bfloat16": (0x43004300, 128, 7), "float16": (0x64006400, 1024, 8)}
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


_PAIR_IN_PLACE = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half; {factor} times less.\"\"\"
    # 2**-133 times the code in bfloat16, times 2**133, less what the format subtracts
    low, high = tl.inline_asm_elementwise(
        "{{ .reg .b32 t, s, z; mov.b32 s, {unit:#x}; mov.b32 z, {negative:#x}; "
        "fma.rn.bf16x2 t, $2, s, z; mov.b32 {{$0, $1}}, t; }}",
        "=h,=h,r",
        [pair],
        dtype=(tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)
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


FIELDS = {"bfloat16": (8, 7), "float16": (5, 10)}
"""Exponent and mantissa bits."""


def _bias_factor(fmt: FloatFormat, dtype: str) -> float:
    """By how much a format's fields are worth more than in those places of `dtype`: the biases' power of two."""
    return 2.0 ** ((1 << (FIELDS[dtype][0] - 1)) - (1 << (fmt.exponent - 1)))


def _float_pair(fmt: FloatFormat, dtype: str) -> str:
    """A Triton function `decode_pair` that works as `FloatFormat.decode` does, on both halves at once."""
    exponent, mantissa = FIELDS[dtype]
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


def formula_of(value: object) -> Expr:
    assert isinstance(value, Expr)
    return value


def jit_function(name: str, body: str) -> str:
    return f"@triton.jit\ndef {name}\n    return {body}\n"


def helpers_of(*formulas: Expr) -> str:
    """The functions that printed formulas call."""
    needed = set().union(*map(operations, formulas)) if formulas else set()
    return "".join(HELPERS[name] + "\n\n" for name in HELPERS if name in needed)


def decode_formula(fmt: Format) -> str:
    """A Triton function `decode`: int32 codes to float32 values."""
    formula = formula_of(fmt.decode(var("code")))
    return helpers_of(formula) + jit_function("decode(code):", to_triton(formula))


def pair_decoder(fmt: Format, dtype: str, target: str = "", factor: float = 1.0) -> str:
    """A Triton function `decode_pair`: int32 with a code in each half to two tensors of `dtype`.

    Where a code fits in a type's mantissa, the code is put there with one `or` for both halves, and one exact
    subtraction leaves its value; floats' fields are moved for both halves at once. Otherwise the format's formula
    decodes one half after the other. Integers that may be `factor` times less (`word_factor`) take one instruction.
    """
    if factor != 1.0:
        assert isinstance(fmt, IntegerFormat)
        values = 2.0**127 * (2.0**6 / factor), -fmt.offset / factor
        unit, negative = (bits_of(value, dtype) * 0x10001 for value in values)
        return _PAIR_IN_PLACE.format(unit=unit, negative=negative, factor=factor)
    if isinstance(fmt, IntegerFormat) and dtype in MAGIC:
        bits, number, room = MAGIC[dtype]
        if fmt.bits <= room:
            offset = float(number + fmt.offset)
            if launches_early(target):  # has 16-bit additions of both types
                negative = bits_of(-offset, dtype) * 0x10001
                packed = "bf16x2" if dtype == "bfloat16" else "f16x2"
                return _MAGIC_ASSEMBLY.format(bits=bits, number=number, dtype=dtype, negative=negative, packed=packed)
            return _MAGIC_PAIR.format(bits=bits, number=number, dtype=dtype, offset=offset)
        if fmt.signed:
            return _SIGNED_BYTE_PAIR
    if isinstance(fmt, FloatFormat) and dtype in FIELDS:
        return _float_pair(fmt, dtype)
    return decode_formula(fmt) + "\n\n" + _PAIR.format(dtype=DTYPES[dtype])


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
    bits = [bits_of(value, dtype) for value in values]

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
    _, mantissa = FIELDS[dtype]
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


def word_factor(fmt: Format, dtype: str, target: str, *, at_once: bool) -> float:
    """By how much weights may be more than what `word_assembly` or `pair_decoder` makes of codes: a power of two, or 1.

    Args:
        at_once: whether they are multiplied by scales too, of which those up to 2**33 leave all factors finite then.
    """
    if not isinstance(fmt, IntegerFormat) or dtype != "bfloat16" or not launches_early(target):
        return 1.0
    return 2.0**40 if at_once else 2.0**6


def _multiply_in_place(fmt: IntegerFormat, factor: float, *, zero_points: bool, at_once: bool) -> list[str]:
    """PTX as that of `_look_up`, for integers in bfloat16, `factor` times less; at_once: times the scales $9 and $10.

    The lowest 8 bits of a bfloat16 count units of 2**-133 up to twice its first normal number. So two fields of each
    half are numbers where they lie, 2**-133 and 2**-129 times their codes, and one multiplication and addition, which
    rounds once, makes weights of them.
    """

    def word(value: float) -> str:
        return f"{bits_of(value, 'bfloat16') * 0x10001:#x}"

    lines = [".reg .b32 v, c, d, s0, s1, z0, z1", "shr.b32 v, w, 8"]
    for r in range(2):
        unit = 2.0 ** (127 - 4 * r) * (2.0**6 / factor)
        if at_once:
            lines += [f"mov.b32 c, {word(unit)}", f"mul.rn.bf16x2 s{r}, ${9 + r}, c"]
            lines += [f"mov.b32 c, {word(-fmt.offset / factor)}", f"mul.rn.bf16x2 z{r}, ${9 + r}, c"]
            continue
        lines.append(f"mov.b32 s{r}, {word(unit)}")
        if zero_points:
            number = MAGIC["bfloat16"][1]
            lines += [f"mov.b32 c, {word(1 / factor)}", f"mov.b32 d, {word(number / factor)}"]
            lines.append(f"fma.rn.bf16x2 z{r}, ${9 + r}, c, d")
        else:
            lines.append(f"mov.b32 z{r}, {word(-fmt.offset / factor)}")
    for j in range(4):
        r = j % 2
        lines += [f"and.b32 t{j}, {'wv'[j // 2]}, {0xF000F << 4 * r:#x}", f"fma.rn.bf16x2 t{j}, t{j}, s{r}, z{r}"]
    return lines


def word_assembly(fmt: Format, dtype: str, target: str, *, zero_points: bool, scaled: bool, factor: float = 1.0) -> str:
    """PTX that decodes word $8 of eight 4-bit codes: field j of the low half to $<2j>, of the high half to $<2j+1>.

    Fields 0 and 2 are of one row of weights, 1 and 3 of another. $9 and $10 are minus both rows' zero points, less the
    number of `MAGIC`, twice in a word each; the next two operands both rows' scales. Results are `factor` times less:
    `word_factor`, or 1.
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
        lines.append(f".reg .b32 f; mov.b32 f, {bits_of(_bias_factor(fmt, dtype), dtype) * 0x10001:#x}")
        lines += [calculate("mul", j, "f") for j in range(4)]
    elif values is not None:
        lines += _look_up(values, dtype)
    elif factor != 1.0:
        assert isinstance(fmt, IntegerFormat)
        at_once = scaled and not zero_points
        lines += _multiply_in_place(fmt, factor, zero_points=zero_points, at_once=at_once)
        scaled = scaled and not at_once
    else:
        assert isinstance(fmt, IntegerFormat)
        magic, number, _ = MAGIC[dtype]
        lines += [".reg .b32 s, z"]
        if not zero_points:
            lines.append(f"mov.b32 z, {bits_of(-float(number + fmt.offset), dtype) * 0x10001:#x}")
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


def kept_assembly(fmt: Format, dtype: str) -> str:
    """PTX that decodes the kept weights of a thread in 32 columns, as `sparse_cores` takes them: field j to $<j>.

    They are in word $4, or for 8 bits in $4 and $5.
    """
    assert isinstance(fmt, IntegerFormat)
    packed = "bf16x2" if dtype == "bfloat16" else "f16x2"
    magic, number, room = MAGIC[dtype]
    mask = ((1 << fmt.bits) - 1) * 0x10001
    lines = [".reg .b32 s, o, z", f"mov.b32 o, {bits_of(1.0, dtype) * 0x10001:#x}"]
    lines.append(f"mov.b32 z, {bits_of(-float(number + fmt.offset), dtype) * 0x10001:#x}")
    for j in range(4):
        word, low = divmod(fmt.bits * j, 16)
        source, base = f"${4 + word}", "z"
        if low:
            lines.append(f"shr.b32 s, {source}, {low}")
            source = "s"
        if fmt.bits > room:  # 128 + seven bits, less 128 if the eighth is set, else 256
            mask, base = 0x7F007F, "s"
        lines.append(f"lop3.b32 ${j}, {source}, {mask:#x}, {magic:#x}, 0xea")  # (word & mask) | magic
        if fmt.bits > room:
            lines.append(f"lop3.b32 s, {source}, 0x800080, {magic ^ 0x80808080:#x}, 0x6a")  # (word & mask) ^ numbers
        lines.append(f"fma.rn.{packed} ${j}, ${j}, o, {base}")
    return "{ " + " ".join(line + ";" for line in lines) + " }"


def sparse_product(dtype: str) -> str:
    """PTX of one product of sparse tensor cores, as `sparse_cores` takes it."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    registers = [", ".join(f"${i}" for i in range(first, first + 4)) for first in (0, 4, 8, 12)]
    operands = "".join(f"{{{four}}}, " for four in registers)
    return f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 {operands}$16, "


def byte_assembly(fmt: IntegerFormat, factor: float) -> str:
    """PTX as that of `word_assembly`, of word $4 of four 8-bit codes, for integers in bfloat16: rows in turn."""
    unit, negative = (bits_of(value, "bfloat16") * 0x10001 for value in (2.0**133 / factor, -fmt.offset / factor))
    lines = [".reg .b32 w, s, z, t0, t1", f"mov.b32 s, {unit:#x}", f"mov.b32 z, {negative:#x}", "shr.b32 w, $4, 8"]
    for r, word in enumerate(("$4", "w")):
        lines += [f"and.b32 t{r}, {word}, 0xff00ff", f"fma.rn.bf16x2 t{r}, t{r}, s, z"]
        lines.append(f"mov.b32 {{${2 * r}, ${2 * r + 1}}}, t{r}")
    return "{ " + " ".join(line + ";" for line in lines) + " }"


def conversion(name: str, source: str | None, spec: KernelSpec) -> str:
    """A Triton function from stored 8-bit values (or activations as they are) to `spec.compute`."""
    if source is None or spec.compute in ("int8", "fp8"):
        return jit_function(f"{name}(x):", "x")
    dtype = DTYPES[spec.compute]
    if source.startswith("fp8") and not native_fp8(spec.target):
        formula = to_triton(formula_of(FORMATS[source].decode(var("code"))))
        return f"@triton.jit\ndef {name}(x):\n    code = x.to(tl.int32)\n    return {formula}.to({dtype})\n"
    return jit_function(f"{name}(x):", f"x.to({dtype})")


def bits_of(value: float, dtype: str) -> int:
    """The 16 bits of a finite number in bfloat16 or float16. Tracing makes fakes of tensors, so this uses none."""
    if dtype == "float16":
        return int.from_bytes(struct.pack("<e", value), "little")
    bits = int.from_bytes(struct.pack("<f", value), "little")
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def scale_decoder(scale_dtype: str, target: str) -> str:
    """A Triton function `decode_scale` from the stored type of scales, or bytes where that is an 8-bit float."""
    head = "@triton.jit\ndef decode_scale(value):\n"
    if scale_dtype == "float8_e8m0fnu":
        return head + (
            "    # Code 0 is 2**-127, which is no normal number; of code 255, infinity here, the sum makes NaN.\n"
            "    power = tl.maximum(value.to(tl.int32) << 23, 0x400000).to(tl.float32, bitcast=True)\n"
            "    return tl.fma(power, 0.0, power)\n"
        )
    if scale_dtype == "float8_e4m3fn" and not native_fp8(target):
        formula = to_triton(formula_of(FORMATS["fp8_e4m3"].decode(var("code"))))
        return head + f"    code = value.to(tl.int32)\n    return {formula}\n"
    if scale_dtype == "float8_e4m3fn":
        return head + "    return value.to(tl.float8e4nv, bitcast=True).to(tl.float32)\n"
    return head + "    return value.to(tl.float32)\n"


def scale_word_decoder(scale_dtype: str, compute: str, target: str) -> str:
    """A Triton function `scale_words`: from the stored type of scales to `compute`, in both halves of words."""
    head = "@triton.jit\ndef scale_words(value):\n"
    if scale_dtype == "float8_e8m0fnu" and compute == "bfloat16" and target.startswith("sm_"):
        return head + (
            "    # As in `decode_scale`, both halves at once.\n"
            "    powers = tl.maximum(value.to(tl.int32) * 0x800080, 0x400040)\n"
            '    SUM: tl.constexpr = "{ .reg .b32 z; mov.b32 z, 0; fma.rn.bf16x2 $0, $1, z, $1; }"\n'
            '    return tl.inline_asm_elementwise(SUM, "=r,r", [powers], dtype=tl.int32, is_pure=True, pack=1)\n'
        )
    return head + "    return half_words(decode_scale(value).to(COMPUTE))\n"
