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


def _lanes(spec: AttentionKernelSpec) -> str:
    """The functions of `attention_lanes`, for tiles that have them, and those that it shares with `sparse_cores`."""
    if not spec.tile.lanes:
        return ""
    text, cores = functions_of("attention_lanes", "# <lanes>"), read_template("sparse_cores")
    convert = {"fp8_e4m3": "cvt.rn.f16x2.e4m3x2", "fp8_e5m2": "cvt.rn.f16x2.e5m2x2"}[spec.number]
    text = fill_hole(text, "lanes", print_constants({"STAGES": spec.tile.stages, "CONVERT": convert}))
    shared = cores[cores.index("@triton.jit\ndef unjoined") : cores.index("@triton.jit\ndef block_ahead")]
    return fill_hole(text, "registers", shared)


def attention_holes(spec: AttentionKernelSpec) -> dict[str, str]:
    """Of `attention_decode` or `attention_prefill`."""
    found = {"attention": functions_of("attention"), "parts": functions_of("attention_parts", "STORED_ROWS")}
    found |= {"constants": print_constants(spec.constants()), "decode": _values(spec) + "\n\n"}
    return found | ({"lanes": _lanes(spec)} if spec.template == ATTENTION_TEMPLATE else {})
