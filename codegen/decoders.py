"""Functions that templates decode with, as Triton's or PTX's text: of codes, scales and activations."""

from __future__ import annotations

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


_PLACED_PAIR = """@triton.jit
def decode_pair(pair):
    \"\"\"Fields of codes where bfloat16 has them, in both halves of an int32, as values: low half, high half.\"\"\"
    low = pair.to(tl.int16).to(tl.bfloat16, bitcast=True) * {factor!r}
    high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) * {factor!r}
    return low.to({dtype}), high.to({dtype})
"""


FIELDS = {"bfloat16": (8, 7), "float16": (5, 10)}
"""Exponent and mantissa bits."""


def bias_factor(fmt: FloatFormat, dtype: str) -> float:
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
    factor = bias_factor(fmt, dtype)
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
    subtraction leaves its value; floats' fields are moved for both halves at once, those of 4 bits by `four_bits`
    already. Otherwise the format's formula
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
    if isinstance(fmt, FloatFormat) and fmt.bits == 4:
        return _PLACED_PAIR.format(factor=bias_factor(fmt, "bfloat16"), dtype=DTYPES[dtype])
    if isinstance(fmt, FloatFormat) and dtype in FIELDS:
        return _float_pair(fmt, dtype)
    return decode_formula(fmt) + "\n\n" + _PAIR.format(dtype=DTYPES[dtype])


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


def holds(dtype: str, fmt: Format) -> bool:
    """Whether a floating-point type holds a format's values exactly."""
    if dtype not in FIELDS or not isinstance(fmt, TableFormat):
        return True
    if dtype == "bfloat16":
        return all(struct.unpack("<f", struct.pack("<HH", 0, bits_of(v, dtype)))[0] == v for v in fmt.values)
    return all(struct.unpack("<e", struct.pack("<e", value))[0] == value for value in fmt.values)


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
    if scale_dtype in ("int8", "uint8"):
        above = 128 if scale_dtype == "int8" else 0
        return head + (
            "    # The last bits of 2**23 and more count units; conversions are slow.\n"
            f"    bits = (value.to(tl.{scale_dtype}, bitcast=True).to(tl.int32) + {above}) | 0x4B000000\n"
            f"    return bits.to(tl.float32, bitcast=True) - {float((1 << 23) + above)}\n"
        )
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
