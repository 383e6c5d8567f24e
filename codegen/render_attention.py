"""What fills the templates of attention."""

from __future__ import annotations

from qcompile.codegen.attention_spec import ATTENTION_TEMPLATE, AttentionKernelSpec
from qcompile.codegen.decoders import MAGIC, bits_of, decode_formula
from qcompile.codegen.holes import fill_hole, functions_of, print_constants, read_template
from qcompile.formats import FORMATS, IntegerFormat

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
    """The function `values_of` of `attention`.

    Of integers four bytes become two pairs of float16 in a few instructions; converting numbers one by one takes longer
    than reading them.
    """
    native = spec.constants()["NATIVE"]
    if native:
        return _VALUES.format(body="    return codes" if spec.in_fp8 else "    return codes.to(COMPUTE)")
    fmt = FORMATS[spec.number]
    if isinstance(fmt, IntegerFormat) and spec.compute == "float16" and spec.target.startswith("sm_"):
        number = MAGIC["float16"][1]
        negative = bits_of(-float(number + fmt.offset), "float16") * 0x10001
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


def _keys_in_fp8(convert: str) -> str:
    """PTX from a word of each of two tokens' keys to a first operand of `attention_lanes`."""
    words = (("$10", "a", "c"), ("$11", "b", "d"))
    return "".join(f"mov.b32 {{l, h}}, {word}; {convert} {a}, l; {convert} {c}, h; " for word, a, c in words)


def _values_in_fp8(convert: str) -> str:
    """The same of four tokens' values, of whose bytes SELECTOR chooses two."""
    pairs = (("$10, $11", "a", "b"), ("$12, $13", "c", "d"))
    return "".join(
        f"prmt.b32 p, {words}, SELECTOR; mov.b32 {{l, h}}, p; {convert} {a}, l; {convert} {b}, h; "
        for words, a, b in pairs
    )


def _halves(fmt: IntegerFormat, half: int) -> tuple[str, str]:
    """PTX from codes in lower or higher halves of bytes to first operands: of two words of keys, of four of values.

    A code's bits take the place of the last ones of a number whose units they count, of which that number, and what the
    format subtracts, is then subtracted: 1024, or 64 for the higher bits.
    """
    mask, bits, number = ("0x000f000f", "0x64006400", 1024) if half == 0 else ("0x00f000f0", "0x54005400", 64)
    less = f"mov.b32 z, {bits_of(-float(number + fmt.offset), 'float16') * 0x10001:#x}; "

    def both(word: str, first: str, second: str) -> str:
        """The lower and the higher bytes of a word's halves, in two registers."""
        return (
            f"shr.b32 s, {word}, 8; lop3.b32 {first}, {word}, {mask}, {bits}, 0xea; add.rn.f16x2 {first}, {first}, z; "
            f"lop3.b32 {second}, s, {mask}, {bits}, 0xea; add.rn.f16x2 {second}, {second}, z; "
        )

    keys = both("$10", "a", "c") + both("$11", "b", "d")
    values = "prmt.b32 p, $10, $11, SELECTOR; " + both("p", "a", "b")
    values += "prmt.b32 p, $12, $13, SELECTOR; " + both("p", "c", "d")
    return less + keys, less + values


def _lanes(spec: AttentionKernelSpec) -> str:
    """The functions of `attention_lanes`, for tiles that have them, and of what it stands on."""
    if not spec.tile.lanes:
        return ""
    text, words = functions_of("attention_lanes", "# <words>"), functions_of("attention_lane_words", "# <registers>")
    cores = read_template("sparse_cores")
    number = FORMATS[spec.number]
    if isinstance(number, IntegerFormat):
        pairs = "0x5410", "0x7632"
        lower, higher = _halves(number, 0), _halves(number, 1)
    else:
        convert = {"fp8_e4m3": "cvt.rn.f16x2.e4m3x2", "fp8_e5m2": "cvt.rn.f16x2.e5m2x2"}[spec.number]
        pairs = "0x5140", "0x7362"
        lower, higher = (_keys_in_fp8(convert), _values_in_fp8(convert)), ("", "")
    constants: dict[str, object] = {"STAGES": spec.tile.stages, "FIRST": pairs[0], "LAST": pairs[1]}
    constants |= {"LOWER_KEYS": lower[0], "HIGHER_KEYS": higher[0]}
    constants |= {"LOWER_VALUES": lower[1], "HIGHER_VALUES": higher[1]}
    shared = cores[cores.index("@triton.jit\ndef unjoined") : cores.index("@triton.jit\ndef block_ahead")]
    text = fill_hole(text, "words", fill_hole(words, "registers", shared))
    return fill_hole(text, "lanes", print_constants(constants))


def attention_holes(spec: AttentionKernelSpec) -> dict[str, str]:
    """Of `attention_decode` or `attention_prefill`."""
    found = {"attention": functions_of("attention"), "parts": functions_of("attention_parts", "STORED_ROWS")}
    found |= {"constants": print_constants(spec.constants()), "decode": _values(spec) + "\n\n"}
    return found | ({"lanes": _lanes(spec)} if spec.template == ATTENTION_TEMPLATE else {})
