"""Functions that templates decode codes of a thread's 64 columns with, and scales that lie in fours, by their bytes."""

from __future__ import annotations

from qcompile.codegen.decoders import FIELDS, MAGIC, bits_of, jit_function
from qcompile.codegen.spec import native_fp8
from qcompile.codegen.word_decoders import block
from qcompile.formats import Format, IntegerFormat
from qcompile.places import gathered, signed, slots


def _bytes(bits: int) -> tuple[list[str], list[str]]:
    """PTX that gathers bytes from the words from $32 on, and the names of all bytes that `places.slots` has."""
    names, lines = [f"${32 + i}" for i in range(bits)], []
    for number, parts in enumerate(gathered(bits), bits):
        (first, _, filled), *others = parts
        found = f"${32 + first}"
        lines.append(f".reg .b32 g{number}")
        for word, down, taken in others:
            lines.append(f"shr.b32 s, ${32 + word}, {down}")
            lines.append(
                f"lop3.b32 g{number}, {found}, s, {filled * 0x1010101:#x}, 0xe4"
            )  # (found & mask) | (s & ~mask)
            found, filled = f"g{number}", filled | taken
        names.append(found)
    return lines, names


def integer_quads(scale_dtype: str, dtype: str, word: str, names: list[str], mask: str = "") -> list[str]:
    """PTX that makes of a word of four scales those of two rows, each of two groups, `quad_unit` times less.

    Integers are numbers where they lie in bfloat16, as codes are, or the last bits of 1024 and more in float16. Those
    that the mask leaves out are 0.
    """
    wide, above = dtype == "bfloat16", 128 if scale_dtype == "int8" else 0
    times, less = (2.0**127, above / 64) if wide else (1.0, above + 1024.0)
    numbers = f"{above * 0x1010101:#x}"
    lines = [f"xor.b32 s, {word}, {numbers}"]
    if mask:
        lines = [f"lop3.b32 s, {word}, {mask}, {numbers}, 0x6a"]  # (word & mask) ^ numbers
    lines += [f"mov.b32 {name}, {bits_of(v, dtype) * 0x10001:#x}" for name, v in (("c", times), ("d", -less))]
    for r, name in enumerate(names):
        lines.append(f"prmt.b32 {name}, s, {0 if wide else 0x64646464:#x}, {(0x4240, 0x4341)[r]:#x}")
        lines.append(f"fma.rn.{'bf16x2' if wide else 'f16x2'} {name}, {name}, c, d")
    return lines


def fields_assembly(
    fmt: IntegerFormat,
    dtype: str,
    target: str,
    *,
    zero_points: bool,
    scales: str,
    quads: int,
    factor: float,
    pairs: int = 0,
    masked: bool = False,
    offsets: bool = False,
) -> str:
    """PTX that decodes the codes of a thread's 64 columns, less than 8 bits each, from as many words from $32 on.

    The code with v, r, s and b of `FragmentLayout` goes to $<8 v + 4 r + 2 s + b>. Behind the words are both rows' zero
    points as for `word_assembly`; then the scales of both rows, twice in a word each, or with `quads`, as `load_quads`
    has them, that many words of four. Results are `factor` times less.

    As in `_multiply_in_place`, fields of the lower byte of a half are numbers where they lie; in float16, which has
    less room, they are the last bits of 1024 and more.

    Args:
        scales: the type of scales that multiply weights, "int8" or "uint8" in quads; "" if none do.
        pairs: groups of the 64 columns whose scales multiply weights as `pair_assembly` makes them, of bfloat16 from
            sm_90 on: zero points, if there are, are of group g and row r number 2 g + r, and so are pairs, in two words
            each, behind them. The product is rounded once, but for 2**-15 of it. 0 if scales are not pairs.
        masked: whether behind quads is a mask of their words: scales that it leaves out are 0.
        offsets: whether behind these are as many pairs of offsets, `factor` times less, which are added: products with
            the greater numbers are rounded, and their sums with the rest. With `quads` two groups' are in one word, as
            `offset_assembly` makes them, and also `quad_unit` times less.
    """
    wide = dtype == "bfloat16"
    packed, number = ("bf16x2", 0) if wide else ("f16x2", 1024)
    fused = wide and int(target[3:]) < 90  # has no multiplication of its own

    def word(value: float, high: float | None = None) -> str:
        return f"{bits_of(value, dtype) | bits_of(value if high is None else high, dtype) << 16:#x}"

    def multiply(name: str, a: str, b: str) -> str:
        return f"fma.rn.{packed} {name}, {a}, {b}, none" if fused else f"mul.rn.{packed} {name}, {a}, {b}"

    gathering, names = _bytes(fmt.bits)
    lows = [low for _, low in slots(fmt.bits)]
    units = [2.0 ** (127 - low) * (2.0**6 / factor) if wide else 2.0**-low for low in lows]
    beside = 32 + fmt.bits
    at_once = wide and scales and not zero_points
    lines = [".reg .b32 s, t, c, d, m, z, none", ".reg .b16 l, h", f"mov.b32 none, {word(-0.0)}", *gathering]
    for q in range(quads):
        lines.append(f".reg .b32 q{q}0, q{q}1")
        kept = f"${beside + quads}" if masked else ""
        lines += integer_quads(scales, dtype, f"${beside + q}", [f"q{q}0", f"q{q}1"], kept)
    for slot, (number_of_byte, low) in enumerate(slots(fmt.bits)):
        v, r = divmod(slot, 2)
        scale, half, lower, upper = f"${beside + 2 * zero_points + r}", "", slot, slot
        row = 2 * (v * pairs // 4) + r
        if quads:  # a word of which has the scales of runs v and v + apart
            apart = 2 // quads
            q, group = divmod(v // apart, 2) if quads == 2 else (0, v // apart)
            scale, half = f"q{q}{r}", "lh"[group]
            lower = slot - 2 * apart * group
            upper = lower + 2 * apart
        less = -fmt.offset / factor - number * units[slot]
        lines += [f"mov.b32 m, {word(units[lower], units[upper])}", f"mov.b32 z, {word(less)}"]

        def alone(name: str, half: str = half) -> list[str]:
            return [f"mov.b32 {{l, h}}, {name}", f"mov.b32 {name}, {{{half}, {half}}}"] if half else []

        if at_once:
            lines += [multiply("m", scale, "m"), *alone("m")]
            lines += [multiply("z", scale, "z"), *alone("z")] if fmt.offset else []
        elif scales:
            lines += [f"mov.b32 m, {word(units[slot])}", f"mov.b32 d, {scale}", *alone("d")]
        if zero_points:  # which are given less a number
            lines += [f"mov.b32 c, {word(1 / factor)}", f"mov.b32 z, {word(MAGIC[dtype][1] / factor + less)}"]
            lines.append(f"fma.rn.{packed} z, ${beside + row}, c, z")
        for s in range(2):
            field, mask = names[number_of_byte], ((1 << fmt.bits) - 1 << low) * 0x10001
            if s:
                lines.append(f"shr.b32 s, {field}, 8")
                field = "s"
            if wide:
                lines.append(f"and.b32 t, {field}, {mask:#x}")
            else:
                lines.append(f"lop3.b32 t, {field}, {mask:#x}, {MAGIC[dtype][0]:#x}, 0xea")  # (field & mask) | magic
            if quads and offsets:
                for name, place in (("c", 0), ("d", 1)):
                    word_of_both = beside + quads + masked + 4 * q + 2 * r + place
                    lines += [f"mov.b32 {{l, h}}, ${word_of_both}", f"mov.b32 {name}, {{{half}, {half}}}"]
                lines += [f"fma.rn.{packed} t, t, m, c", f"add.rn.{packed} t, t, d"]
                lines.append(f"mov.b32 {{${4 * slot + 2 * s}, ${4 * slot + 2 * s + 1}}}, t")
                continue
            exact = wide and not fmt.offset and not zero_points
            lines.append(multiply("t", "t", "m") if exact else f"fma.rn.{packed} t, t, m, z")
            if scales and not at_once:
                lines.append(multiply("t", "t", "d"))
            if pairs:
                high = beside + 2 * pairs * zero_points + 2 * row
                added = high + 4 * pairs
                if offsets:
                    lines += [f"fma.rn.{packed} {to}, t, ${high + i}, ${added + i}" for i, to in ((1, "d"), (0, "t"))]
                    lines.append(f"add.rn.{packed} t, t, d")
                else:
                    lines += [multiply("d", "t", f"${high + 1}"), f"fma.rn.{packed} t, t, ${high}, d"]
            lines.append(f"mov.b32 {{${4 * slot + 2 * s}, ${4 * slot + 2 * s + 1}}}, t")
    return block(lines)


def pair_assembly(scale_dtype: str, unit: float = 1.0) -> str:
    """PTX that makes of a scale a pair of bfloat16, whose sum is the scale times `unit`, but for 2**-16 of it at most.

    Both are twice in a word. That of the scale in $2 goes to $0 and the rest to $1.
    """
    lines = [".reg .b32 f, g, h, u", f"mov.b32 u, {bits_of(unit, 'bfloat16') << 16:#x}"]
    if scale_dtype == "bfloat16":
        lines += ["mov.b32 f, {$2, $2}", "and.b32 f, f, 0xffff0000"]
    else:
        lines.append("cvt.f32.f16 f, $2" if scale_dtype == "float16" else "mov.b32 f, $2")
    if unit != 1.0:
        lines.append("mul.rn.f32 f, f, u")
    lines += ["cvt.rn.bf16x2.f32 h, f, f", "mov.b32 $0, h", "shl.b32 h, h, 16"]
    lines += ["sub.rn.f32 g, f, h", "cvt.rn.bf16x2.f32 $1, g, g"]
    return block(lines)


def offset_assembly(scale_dtype: str) -> str:
    """PTX that makes pairs as `pair_assembly` does of a word $4 of four integers: both groups' of row r in one word.

    The greater numbers go to $<2r> and the rests to $<2r + 1>. Integers are multiplied by their row's $<5 + r>, which
    are float32.
    """
    biased = scale_dtype == "int8"
    lines = [".reg .b32 s, c, d, f0, f1, h, l", f"xor.b32 s, $4, {0x80808080 * biased:#x}"]
    lines.append(f"mov.b32 c, {0x4B000000 + 128 * biased if biased else 0xCB000000:#x}")
    for r in range(2):
        lines += [f"mul.rn.f32 d, ${5 + r}, c"] * (not biased)
        for group in range(2):  # the lowest bits of 2**23 and more, which count units
            name = f"f{group}"
            lines.append(f"prmt.b32 {name}, s, 0x4b000000, {0x7440 + 2 * group + r:#x}")
            if biased:
                lines += [f"sub.rn.f32 {name}, {name}, c", f"mul.rn.f32 {name}, {name}, ${5 + r}"]
            else:
                lines.append(f"fma.rn.f32 {name}, {name}, ${5 + r}, d")  # exact but for one rounding: -2**23 times it
        lines += ["cvt.rn.bf16x2.f32 h, f1, f0", f"mov.b32 ${2 * r}, h"]
        lines += ["shl.b32 l, h, 16", "sub.rn.f32 f0, f0, l", "and.b32 h, h, 0xffff0000", "sub.rn.f32 f1, f1, h"]
        lines.append(f"cvt.rn.bf16x2.f32 ${2 * r + 1}, f1, f0")
    return block(lines)


_CODES = """@triton.jit
def codes_of(words):
    \"\"\"Codes of 64 columns from a thread's words, as `decode_pair` takes them: [.., 128 threads, 16].\"\"\"
"""


def codes_decoder(fmt: Format) -> str:
    """A Triton function `codes_of`, which takes codes of other than 4 and 8 bits out of a thread's words."""
    lines, sources = [], [f"words[{i}]" for i in range(fmt.bits)]
    for number, parts in enumerate(gathered(fmt.bits)):
        terms = (f"(words[{word}] >> {down} & {signed(taken * 0x1010101)})" for word, down, taken in parts)
        lines.append(f"g{number} = " + " | ".join(terms))
        sources.append(f"g{number}")
    names = {}
    for slot, (byte, low) in enumerate(slots(fmt.bits)):
        for s in range(2):
            v, r = divmod(slot, 2)
            names[v, s, r] = name = f"c{v}{s}{r}"
            lines.append(f"{name} = {sources[byte]} >> {low + 8 * s} & {((1 << fmt.bits) - 1) * 0x10001:#x}")

    def joined(*, r: int, s: int) -> str:
        a, b, c, d = (names[v, s, r] for v in range(4))
        return f"tl.join(tl.join({a}, {c}), tl.join({b}, {d}))"

    rows = [f"tl.join({joined(r=r, s=0)}, {joined(r=r, s=1)})" for r in range(2)]
    lines += [f"r{r} = {row}" for r, row in enumerate(rows)]
    lines.append("return tl.reshape(tl.join(r0, r1), (KT, NT, 128, 16))")
    return _CODES + "".join(f"    {line}\n" for line in lines)


_QUADS = """@triton.jit
def quad_words(quads):
    \"\"\"What `scale_words` makes of the four bytes of words, UNIT times less.\"\"\"
    return tl.inline_asm_elementwise(
        {assembly!r},
        "=r,=r,=r,=r,r",
        [quads],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
"""


def quad_unit(scale_dtype: str, compute: str, target: str) -> float:
    """By how much scales are more than what `quad_decoder` makes of them: a power of two."""
    return 64.0 if scale_dtype in ("int8", "uint8") and compute == "bfloat16" and target.startswith("sm_") else 1.0


def quad_assembly(scale_dtype: str, compute: str, target: str, *, masked: bool = False) -> str:
    """PTX that makes $<i> what `scale_words` makes of byte i of word $4, `quad_unit` times less, or "".

    masked: whether $5 is a mask of the word, of integers: those that it leaves out are 0.
    """
    lines: list[str] = []
    if scale_dtype in ("int8", "uint8") and compute in FIELDS and target.startswith("sm_"):
        lines += [
            ".reg .b32 s, c, d, q0, q1",
            *integer_quads(scale_dtype, compute, "$4", ["q0", "q1"], "$5" if masked else ""),
        ]
        lines += [f"prmt.b32 ${i}, q{i % 2}, 0, {(0x1010, 0x3232)[i // 2]:#x}" for i in range(4)]
        return block(lines)
    if scale_dtype == "float8_e8m0fnu" and compute == "bfloat16" and target.startswith("sm_"):
        # As in `decode_scale`: bytes 0 and 2, then 1 and 3.
        lines += [".reg .b32 a, m, z", "mov.b32 m, 0x400040", "mov.b32 z, 0"]
        for i, place in enumerate(("shl.b32 a, $4, 7", "shr.b32 a, $4, 1")):
            lines += [place, "and.b32 a, a, 0x7f807f80", "max.bf16x2 a, a, m", "fma.rn.bf16x2 a, a, z, a"]
            lines += [f"prmt.b32 ${i}, a, 0, 0x1010", f"prmt.b32 ${i + 2}, a, 0, 0x3232"]
    elif scale_dtype == "float8_e4m3fn" and compute in FIELDS and target.startswith("sm_") and native_fp8(target):
        lines += [".reg .b16 l, h, x, y", ".reg .b32 a", ".reg .f32 f", "mov.b32 {l, h}, $4"]
        for i, pair in enumerate("lh"):
            lines.append(f"cvt.rn.f16x2.e4m3x2 a, {pair}")
            if compute == "float16":
                lines += [f"prmt.b32 ${2 * i}, a, 0, 0x1010", f"prmt.b32 ${2 * i + 1}, a, 0, 0x3232"]
                continue
            lines.append("mov.b32 {x, y}, a")
            for j, half in enumerate("xy"):
                lines += [f"cvt.f32.f16 f, {half}", f"cvt.rn.bf16x2.f32 ${2 * i + j}, f, f"]
    return block(lines) if lines else ""


def quad_decoder(scale_dtype: str, compute: str, target: str) -> str:
    """A Triton function `quad_words`: what `scale_words` makes of the bytes of words, `quad_unit` times less."""
    if assembly := quad_assembly(scale_dtype, compute, target):
        return _QUADS.format(assembly=assembly)
    body = ", ".join(f"scale_words((quads >> {8 * i} & 0xFF).to(tl.uint8))" for i in range(4))
    return jit_function("quad_words(quads):", f"({body})")
