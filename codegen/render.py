"""A `KernelSpec` as the text of a Python file that needs Triton only: its template with the holes filled."""

from __future__ import annotations

import functools
import json
import re
from importlib import resources

from qcompile.codegen.printers import HELPERS, operations, to_triton
from qcompile.codegen.spec import GroupedSpec, KernelSpec, native_fp8
from qcompile.expr import Expr, var
from qcompile.formats import FORMATS, Format, IntegerFormat
from qcompile.linear_spec import ACTIVATIONS

_DTYPES = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}

_MAGIC = {"bfloat16": (0x43004300, 128, 7), "float16": (0x64006400, 1024, 8)}
"""For a type: the bits, twice in a word, of a number whose lowest bits count units; the number; how many bits do."""

_PAIR = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half.\"\"\"
    return decode(pair & 0xFFFF).to(COMPUTE), decode((pair >> 16) & 0xFFFF).to(COMPUTE)
"""

_MAGIC_PAIR = """@triton.jit
def decode_pair(pair):
    \"\"\"Codes in the two halves of an int32, as values: low half, high half.\"\"\"
    biased = pair | {bits:#x}  # {number} + code in {dtype}
    low = biased.to(tl.int16).to(tl.{dtype}, bitcast=True) - {offset}
    high = (biased >> 16).to(tl.int16).to(tl.{dtype}, bitcast=True) - {offset}
    return low, high
"""


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
    subtraction leaves its value; otherwise the format's formula decodes one half after the other.
    """
    if isinstance(fmt, IntegerFormat) and dtype in _MAGIC:
        bits, number, room = _MAGIC[dtype]
        if fmt.bits <= room:
            offset = float(number + fmt.offset)
            return _MAGIC_PAIR.format(bits=bits, number=number, dtype=dtype, offset=offset)
    return decode_formula(fmt) + "\n\n" + _PAIR


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


def _fragment(spec: KernelSpec) -> dict[str, str]:
    chunk = spec.tile.k
    if spec.groups > 1:
        aligned = spec.columns & -spec.columns  # the largest power of two that divides a block's columns
        chunk = min(chunk, aligned) if aligned >= 64 else min(chunk, 128)
    if spec.compute == "float32":
        chunk = 64
    fmt = FORMATS[spec.weight]
    constants: dict[str, object] = {
        "N": spec.n,
        "K": spec.k,
        "BITS": fmt.bits,
        "SYMMETRIC": spec.symmetric,
        "COLUMNS": spec.columns,
        "X_SCALE": spec.activation_scale,
        "COMPUTE": _DTYPES[spec.compute],
        "PRECISION": spec.precision,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
        "BLOCK_K": spec.tile.k,
        "CHUNK": chunk,
        "SPLIT": spec.tile.split,
    }
    decode = pair_decoder(fmt, spec.compute) + "\n\n" + _convert("decode_x", spec.activation, spec)
    return {"constants": _constants(constants), "decode": decode + "\n\n"}


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
    decode = _convert("decode_weight", spec.weight, spec) + "\n\n" + _convert("decode_x", spec.activation, spec)
    return {"constants": _constants(constants), "decode": decode + "\n\n"}


def _scale_decoder(scale_dtype: str, target: str) -> str:
    """A Triton function `decode_scale` from the stored type of scales; 8-bit floats come as bytes where they must."""
    head = "@triton.jit\ndef decode_scale(value):\n"
    if scale_dtype == "float8_e8m0fnu":
        return head + (
            "    code = value.to(tl.int32)\n"
            "    bits = tl.where(code == 0, 0x400000, code << 23)  # the least power of two is no normal number\n"
            "    return bits.to(tl.float32, bitcast=True)\n"
        )
    if scale_dtype == "float8_e4m3fn" and not native_fp8(target):
        formula = to_triton(_formula(FORMATS["fp8_e4m3"].decode(var("code"))))
        return head + f"    code = value.to(tl.int32)\n    return {formula}\n"
    return head + "    return value.to(tl.float32)\n"


def _grouped(spec: KernelSpec) -> dict[str, str]:
    assert isinstance(spec, GroupedSpec)
    fragment = _template("gemm_fragment")
    shared = fragment[fragment.index("# <constants>") : fragment.index("@triton.jit(do_not_specialize")]
    experts: dict[str, object] = {
        "EXPERTS": spec.experts,
        "EXPERTS_POWER": 1 << (spec.experts - 1).bit_length(),
        "OFFSET": spec.offset,
        "SUPER_COLUMNS": spec.super_columns,
    }
    scales = _scale_decoder(spec.scale_dtype, spec.target) + "\n\n"
    return {"fragment": shared, **_fragment(spec), "experts": _constants(experts), "scales": scales}


_FILL = {"gemm_fragment": _fragment, "gemm_rows8": _rows8, "gemm_grouped": _grouped}


@functools.cache
def _template(name: str) -> str:
    return resources.files("qcompile.codegen.templates").joinpath(f"{name}.py").read_text(encoding="utf-8")


def render(spec: KernelSpec) -> str:
    """The kernel's source, which begins with the spec and how to make the file again.

    All that a user's configuration contributes is numbers and names of registries, and the header's JSON is one comment
    line.
    """
    text = _template(spec.template)
    for name, content in _FILL[spec.template](spec).items():
        text = fill_hole(text, name, content)
    text = fill_hole(text, "epilogue", _epilogue(spec))
    operands = ", ".join(f"operand_{i}" for i in range(max(1, spec.operand_count)))
    text = text.replace("operand_0,", f"{operands},")
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
