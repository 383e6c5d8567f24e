"""Functions that templates decode whole words with, of codes and of scales, as PTX's or Triton's text."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import struct
from typing import TypeAlias

from qcompile.codegen.decoders import FIELDS, MAGIC, bias_factor, bits_of
from qcompile.codegen.spec import launches_early
from qcompile.formats import FloatFormat, Format, IntegerFormat, TableFormat
from qcompile.places import bit_places, moves, signed


def block(lines: list[str]) -> str:
    """PTX of these lines, whose registers are its own."""
    return "{ " + " ".join(line + ";" for line in lines) + " }"


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
    there is one for the low and one for the high bytes of either half of the table, and the codes' last bits choose;
    or these are signs.
    """
    bits = [bits_of(value, dtype) for value in values]
    signs = bits[8:] == [value | 0x8000 for value in bits[:8]]
    halves = (0,) if signs else (0, 1)
    # A zero that ptxas does not know: constants would be moved to registers anew before each lookup.
    lines = [".reg .b32 zero", "mov.u32 zero, %lanemask_lt", "shr.b32 zero, zero, 31"]
    for half, (byte, name) in itertools.product(halves, enumerate("lh")):
        entries = bytes(value >> (8 * byte) & 0xFF for value in bits[8 * half : 8 * half + 8])
        for i, word in enumerate(struct.unpack("<II", entries)):
            lines += [f".reg .b32 {name}{half}{i}", f"xor.b32 {name}{half}{i}, zero, {word:#x}"]
    lines += [".reg .b32 c, s, f, a, b, l, h", "and.b32 c, w, 0x77777777", "mov.b32 s, w"]
    for pair in (0, 2):
        if pair == 2:
            lines += ["shr.b32 c, c, 16", "shl.b32 s, w, 4"]
        if signs:
            lines += ["prmt.b32 l, l00, l01, c", "prmt.b32 h, h00, h01, c", "lop3.b32 h, s, 0x80808080, h, 0xea"]
        else:
            lines.append("prmt.b32 f, s, 0, 0xba98")  # 255 in each byte whose code's last bit is set
            for name in "lh":
                lines += [f"prmt.b32 a, {name}00, {name}01, c", f"prmt.b32 b, {name}10, {name}11, c"]
                lines.append(f"lop3.b32 {name}, f, a, b, 0xac")  # f ? b : a
        lines += [f"prmt.b32 t{pair}, l, h, 0x5140", f"prmt.b32 t{pair + 1}, l, h, 0x7362"]
    return lines


Parts: TypeAlias = list[dict[int, int]]
"""For each of four pairs of codes: by how much a word is rotated up, and which of the pair's bits are in place then."""


def _parts(fmt: FloatFormat, dtype: str) -> Parts:
    """How 4-bit floats come to where `dtype` has their fields."""
    mantissa = FIELDS[dtype][1]
    targets = [*range(mantissa - fmt.mantissa, mantissa + fmt.exponent), 15]
    places = bit_places(fmt)
    assert places is not None
    parts: Parts = [{} for _ in range(4)]
    for j, part in enumerate(parts):
        for place, target in zip(places[4 * j : 4 * j + 4], targets, strict=True):
            up = (target - place) % 32
            part[up] = part.get(up, 0) | 0x10001 << target
    return parts


def _rotations(parts: Parts) -> dict[int, str]:
    """All rotations of words in `parts`: "left" or "right" where a shift that way does too, else "around"."""
    found = {}
    for up in sorted({up for part in parts for up in part} - {0}):
        taken = functools.reduce(operator.or_, (part.get(up, 0) for part in parts))
        low = taken & (1 << up) - 1
        found[up] = "left" if not low else "right" if low == taken else "around"
    return found


def _move_fields(fmt: FloatFormat, dtype: str) -> list[str]:
    """PTX as that of `_look_up`, for floats: their fields are moved to where `dtype` has its own.

    What that gives is still to be multiplied by `bias_factor`. Codes whose exponent is zero are subnormal in `dtype`
    too, so that this makes them right as well.
    """
    parts = _parts(fmt, dtype)
    shifts = {
        "left": "shl.b32 r{0}, w, {0}",
        "right": "shr.b32 r{0}, w, {1}",
        "around": "shf.l.wrap.b32 r{0}, w, w, {0}",
    }
    lines = []
    for up, way in _rotations(parts).items():
        lines += [f".reg .b32 r{up}", shifts[way].format(up, 32 - up)]
    for j, part in enumerate(parts):
        (first, mask), *others = ((f"r{up}" if up else "w", mask) for up, mask in part.items())
        lines.append(f"and.b32 t{j}, {first}, {mask:#x}")
        lines += [f"lop3.b32 t{j}, {source}, {mask:#x}, t{j}, 0xea" for source, mask in others]
    return lines


def word_factor(fmt: Format, dtype: str, target: str, *, scaled: bool, at_once: bool = False) -> float:
    """By how much weights may be more than what `word_assembly` or `pair_decoder` makes of codes: a power of two, or 1.

    Args:
        scaled: whether they are multiplied by scales too, of which those up to 2**33 leave all factors finite then.
        at_once: whether `fields_assembly` makes them, which does for all NVIDIA's what `word_assembly` does from sm_90.
    """
    if dtype != "bfloat16":
        return 1.0
    if isinstance(fmt, FloatFormat):
        return 2.0**40 if fmt.bits == 4 and scaled and target.startswith("sm_") else 1.0
    if not isinstance(fmt, IntegerFormat) or not (at_once or launches_early(target)):
        return 1.0
    return 2.0**40 if scaled else 2.0**6


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
            lines.append(f"mov.b32 z{r}, {word(-fmt.offset / factor)}")
            lines += [f"mul.rn.bf16x2 z{r}, ${9 + r}, z{r}"] if fmt.offset else []
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


def word_assembly(
    fmt: Format,
    dtype: str,
    target: str,
    *,
    zero_points: bool,
    scaled: bool,
    factor: float = 1.0,
    pairs: bool = False,
) -> str:
    """PTX that decodes word $8 of eight 4-bit codes: field j of the low half to $<2j>, of the high half to $<2j+1>.

    Fields 0 and 2 are of one row of weights, 1 and 3 of another. $9 and $10 are minus both rows' zero points, less the
    number of `MAGIC`, twice in a word each; the next two operands both rows' scales. Results are `factor` times less:
    `word_factor`, or 1. With `pairs` $9 and $10 are the pair of `field_decoders.pair_assembly` that is the first row's
    scale, and the next two the other's; only integers have zero points.
    """
    packed = "bf16x2" if dtype == "bfloat16" else "f16x2"
    fused = packed == "bf16x2" and int(target[3:]) < 90  # has no addition and multiplication of its own

    def calculate(operation: str, name: str, by: str) -> str:
        if fused:
            return f"fma.rn.{packed} {name}, {name}, " + (f"one, {by}" if operation == "add" else f"{by}, none")
        return f"{operation}.rn.{packed} {name}, {name}, {by}"

    lines = [".reg .b32 w, t0, t1, t2, t3", "mov.b32 w, $8"]
    if fused:
        lines += [".reg .b32 one, none", "mov.b32 one, 0x3f803f80", "mov.b32 none, 0x80008000"]
    values = word_values(fmt)
    if isinstance(fmt, FloatFormat):
        lines += _move_fields(fmt, dtype)
        lines += [".reg .b32 f", f"mov.b32 f, {bits_of(bias_factor(fmt, dtype) / factor, dtype) * 0x10001:#x}"]
        if factor != 1.0:  # scales are multiplied by it, of which there are less
            assert scaled
            for r in range(2):
                lines += [f".reg .b32 s{r}", f"mov.b32 s{r}, ${9 + r}", calculate("mul", f"s{r}", "f")]
            lines += [calculate("mul", f"t{j}", f"s{j % 2}") for j in range(4)]
            scaled = False
        else:
            lines += [calculate("mul", f"t{j}", "f") for j in range(4)]
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
            lines.append(calculate("add", f"t{j}", ("$9", "$10")[j % 2] if zero_points else "z"))
    if scaled:
        first = 11 if zero_points else 9
        lines += [calculate("mul", f"t{j}", f"${first + j % 2}") for j in range(4)]
    if pairs:
        assert not scaled
        assert not fused
        lines.append(".reg .b32 d")
        for j in range(4):
            high = 9 + 2 * (j % 2)
            lines += [f"mul.rn.{packed} d, t{j}, ${high + 1}", f"fma.rn.{packed} t{j}, t{j}, ${high}, d"]
    lines += [f"mov.b32 {{$%d, $%d}}, t{j}" % (2 * j, 2 * j + 1) for j in range(4)]
    return block(lines)


def byte_assembly(fmt: Format, dtype: str, factor: float) -> str:
    """PTX as that of `word_assembly`, of word $4 of four 8-bit codes, integers in bfloat16 or floats: rows in turn."""
    if isinstance(fmt, FloatFormat):
        lines = [".reg .b16 l, h, x, y", ".reg .b32 t0", ".reg .f32 f, g"]
        lines += ["prmt.b32 t0, $4, 0, 0x3120", "mov.b32 {l, h}, t0"]
        for r, pair in enumerate("lh"):
            lines.append(f"cvt.rn.f16x2.e{fmt.exponent}m{fmt.mantissa}x2 t0, {pair}")
            if dtype == "bfloat16":
                lines += ["mov.b32 {x, y}, t0", "cvt.f32.f16 f, x", "cvt.f32.f16 g, y", "cvt.rn.bf16x2.f32 t0, g, f"]
            lines.append(f"mov.b32 {{${2 * r}, ${2 * r + 1}}}, t0")
        return block(lines)
    assert isinstance(fmt, IntegerFormat)
    assert dtype == "bfloat16"
    unit, negative = (bits_of(value, "bfloat16") * 0x10001 for value in (2.0**133 / factor, -fmt.offset / factor))
    lines = [".reg .b32 w, s, z, t0, t1", f"mov.b32 s, {unit:#x}", f"mov.b32 z, {negative:#x}", "shr.b32 w, $4, 8"]
    for r, word in enumerate(("$4", "w")):
        lines += [f"and.b32 t{r}, {word}, 0xff00ff", f"fma.rn.bf16x2 t{r}, t{r}, s, z"]
        lines.append(f"mov.b32 {{${2 * r}, ${2 * r + 1}}}, t{r}")
    return block(lines)


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
    return block(lines)


def spread_tables() -> tuple[tuple[int, int], tuple[int, int]]:
    """For the threads that have the first and the last two of four columns: two words of selectors, as bytes.

    Byte m selects what the thread's columns are where bits of m say which of them are kept: the lower four bits for the
    first, the higher ones for the second. Of four bytes to select from, those for the first word are 0 and 2, the codes
    that four columns keep, and for the second 1 and 3; byte 4 is the code of 0.
    """
    # A code alone is the first of both if its column is one of the first two, else the second.
    tables = []
    for alone in (0, 2):
        pairs = ((4, 4), (alone, 4), (4, alone), (0, 2))
        words = [[tuple(place + (place < 4) * of for place in pair) for pair in pairs] for of in (0, 1)]
        tables.append(tuple(int.from_bytes(bytes(low | high << 4 for low, high in word), "little") for word in words))
    (a, b), (c, d) = tables
    return (a, b), (c, d)


def spread_assembly(fmt: IntegerFormat, dtype: str, *, scaled: bool, factor: float) -> str:
    """PTX that decodes 2:4 sparse codes to dense weights, as `stream_spread` takes them: word i to $<2i> and $<2i+1>.

    Inputs are two words of codes, s = 0 and 1, one or for 4 bits two of places; by how much these are rotated; the two
    words of `spread_tables`; and with `scaled` both rows' scales. For 8 bits word 2 s + r is of row r; for 4 bits word
    4 s + 2 t + r, of which t is in the second word of places. Results are `factor` times less.

    Two fours of columns have their codes in four bytes, or in half of each, first both first ones. Tables give each
    four a byte, two such bytes select codes for their columns, and then each pair of codes is set apart, as a word.
    """
    four = fmt.bits == 4
    inputs = [f"${i}" for i in range(16 if four else 8, 32)]
    codes, places, scales = inputs[:2], inputs[2 : 3 + four], inputs[7 + four :]
    near, far, even, odd = inputs[3 + four : 7 + four]
    lines = [".reg .b32 x, y, zero, l0, l1, t0, t1", f"mov.b32 zero, {0x88888888 if four else 0x80808080:#x}"]
    lines += [f"shf.r.wrap.b32 x, {places[0]}, {places[0]}, {near}"]
    lines += [f"shf.r.wrap.b32 y, {places[-1]}, {places[-1]}, {far}"]
    # (x & mask) | (y & ~mask), then (x & mask) | 4 for each second four, which has the second table
    lines += ["lop3.b32 x, x, y, 0xf0f0f0f, 0xe4", "lop3.b32 x, x, 0x33333333, 0x40404040, 0xea"]
    lines.append(f"prmt.b32 l0, {even}, {odd}, x")
    if four:
        lines += ["shr.b32 x, x, 16", f"prmt.b32 l1, {even}, {odd}, x"]
    lines += _row_values(fmt, dtype, scales[: 2 * scaled], factor)
    for s in range(2):
        for half in range(1 + four):
            lines += [f"shr.b32 l{half}, l{half}, 16"] * s
            lines.append(f"prmt.b32 x, {codes[s]}, zero, l{half}")
            if four:
                lines.append(f"and.b32 x, x, {0xF0F0F0F << 4 * half:#x}")
            for i, selector in enumerate(("0x4140", "0x4342")):
                word, r = (4 * s + 2 * i + half, half) if four else (2 * s + i, i)
                apart = "0" if dtype == "bfloat16" else "0x64646464"
                lines += [f"prmt.b32 t{i}, x, {apart}, {selector}"]
                if dtype == "bfloat16":
                    lines.append(f"fma.rn.bf16x2 t{i}, t{i}, s{r}, z{r}")
                else:
                    lines.append(f"fma.rn.f16x2 t{i}, t{i}, u{r}, z{r}")
                    lines += [f"mul.rn.f16x2 t{i}, t{i}, {scales[r]}"] * scaled
                lines.append(f"mov.b32 {{${2 * word}, ${2 * word + 1}}}, t{i}")
    return block(lines)


def _row_values(fmt: IntegerFormat, dtype: str, scales: list[str], factor: float) -> list[str]:
    """PTX of what codes of row r, as numbers where they lie, are multiplied by, s<r> or u<r>, and what is added, z<r>.

    Of 4 bits those of the second row lie 4 bits higher. In float16, where they are less than 1024 in numbers from
    there, scales come after.
    """
    lines = [".reg .b32 s0, s1, u0, u1, z0, z1"]
    for r in range(2):
        unit, negative = 2.0 ** (-4 * r if fmt.bits == 4 else 0), -float(fmt.offset)
        if dtype == "float16":
            negative -= MAGIC[dtype][1] * unit
        else:
            unit, negative = unit * 2.0**133 / factor, negative / factor
        lines += [f"mov.b32 {name}{r}, {bits_of(v, dtype) * 0x10001:#x}" for name, v in (("u", unit), ("z", negative))]
        if dtype == "bfloat16" and scales:
            lines += [f"mul.rn.bf16x2 s{r}, {scales[r]}, u{r}", f"mul.rn.bf16x2 z{r}, {scales[r]}, z{r}"]
        elif dtype == "bfloat16":
            lines.append(f"mov.b32 s{r}, u{r}")
    return lines


def sparse_product(dtype: str) -> str:
    """PTX of one product of sparse tensor cores, as `sparse_cores` takes it."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    registers = [", ".join(f"${i}" for i in range(first, first + 4)) for first in (0, 4, 8, 12)]
    operands = "".join(f"{{{four}}}, " for four in registers)
    return f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 {operands}$16, "


_FOUR_BITS = """@triton.jit
def four_bits(words):
    \"\"\"The codes of words of 4-bit ones, as `decode_pair` takes them: [K tiles, N tiles, 128 threads, pairs].\"\"\"
"""


def pairs_decoder(fmt: Format) -> str:
    """A Triton function `four_bits`, which takes 4-bit codes out of words; floats' fields as bfloat16 has its own."""
    places = bit_places(fmt)
    if places is None:
        return _FOUR_BITS + "    return extract(words, 4)\n"
    if isinstance(fmt, FloatFormat):
        parts = _parts(fmt, "bfloat16")
        shifts = {"left": "words << {0}", "right": "words >> {1}", "around": "(words << {0}) | (words >> {1} & {2:#x})"}
        lines = ["r0 = words"]
        lines += [f"r{u} = {shifts[way].format(u, 32 - u, (1 << u) - 1)}" for u, way in _rotations(parts).items()]
        for j, part in enumerate(parts):
            lines.append(f"t{j} = " + " | ".join(f"(r{up} & {signed(mask)})" for up, mask in part.items()))
        lines.append("pairs = tl.join(tl.join(t0, t2), tl.join(t1, t3))")
        lines.append("return tl.reshape(pairs, (words.shape[0], words.shape[1], words.shape[2], words.shape[3] * 4))")
    else:
        ups = moves(places, back=True)
        terms = [f"((words & {signed(mask)}) << {up})" for up, mask in ups.items() if up >= 0]
        terms += [f"((words >> {-up}) & {signed(mask >> -up)})" for up, mask in ups.items() if up < 0]
        lines = ["return extract(" + " | ".join(terms) + ", 4)"]
    return _FOUR_BITS + "".join(f"    {line}\n" for line in lines)
