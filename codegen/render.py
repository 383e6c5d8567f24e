"""A `KernelSpec` as the text of a Python file that needs Triton only: its template with the holes filled."""

from __future__ import annotations

from qcompile.codegen.attention_spec import AttentionKernelSpec
from qcompile.codegen.columns_spec import ColumnsSpec
from qcompile.codegen.decoders import (
    DTYPES,
    FIELDS,
    MAGIC,
    bits_of,
    conversion,
    formula_of,
    helpers_of,
    holds,
    pair_decoder,
    scale_decoder,
    scale_word_decoder,
)
from qcompile.codegen.field_decoders import (
    codes_decoder,
    fields_assembly,
    offset_assembly,
    pair_assembly,
    quad_assembly,
    quad_decoder,
    quad_unit,
)
from qcompile.codegen.holes import fill_hole, functions_of, print_constants, read_template
from qcompile.codegen.nearest import nearest
from qcompile.codegen.norm_kernel_spec import NormKernelSpec
from qcompile.codegen.printers import to_triton
from qcompile.codegen.ranges_spec import RangesSpec
from qcompile.codegen.render_attention import attention_holes
from qcompile.codegen.spec import (
    AnySpec,
    GroupedSpec,
    KernelSpec,
    launches_early,
    scales_of,
    super_last,
    warp_columns,
    warps_multiply,
)
from qcompile.codegen.stream_spec import stream_scales
from qcompile.codegen.word_decoders import (
    byte_assembly,
    kept_assembly,
    pairs_decoder,
    sparse_product,
    spread_assembly,
    spread_tables,
    word_assembly,
    word_factor,
)
from qcompile.expr import var
from qcompile.formats import FORMATS, FloatFormat, Format, IntegerFormat
from qcompile.gates import ACTIVATIONS, gate
from qcompile.linear_spec import OPERAND_STEPS, STORES
from qcompile.powers import power_above
from qcompile.scheme import SCALE_DTYPES


def _epilogue(spec: KernelSpec) -> str:
    """The functions of an epilogue's formulas, and `epilogue`, which works in float32."""
    formulas = []
    lines = []
    operand = 0
    for step in spec.epilogue:
        if step == "bias":
            lines += _bias(spec)
        elif step in OPERAND_STEPS:
            sign = "*" if step == "mul" else "+"
            loaded = f"tl.load(operand_{operand} + offsets, mask=mask, other=0.0)"
            lines.append(f"value = value {sign} {loaded}.to(tl.float32)")
            operand += 1
        elif step in STORES:
            lines += _store(FORMATS[STORES[step]], f"operand_{operand}")
        else:
            value = var("value")
            formula = formula_of(ACTIVATIONS[step](value) if step in ACTIVATIONS else gate(step, value, var("second")))
            formulas.append(formula)
            lines.append(f"value = {to_triton(formula)}")
    body = "".join(f"    {line}\n" for line in [*lines, "return value"])
    head = "@triton.jit\ndef epilogue(value, second, bias, operand_0, n, offsets, mask):\n"
    return f"{helpers_of(*formulas)}{head}{body}\n\n"


def _bias(spec: KernelSpec) -> list[str]:
    """Lines that add the bias of each column."""
    places = {"value": "n"}
    if spec.gated:
        first, second = ("2 * n", "2 * n + 1") if spec.paired else ("n", f"{spec.width} + n")
        places = {"value": first, "second": second}
    return [
        f"{name} = {name} + tl.load(bias + {place}, mask=n < {spec.width}, other=0.0).to(tl.float32)"
        for name, place in places.items()
    ]


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
    return DTYPES[spec.compute if exact else "float32"]


def _negative(fmt: IntegerFormat, decoded: str) -> int:
    """What is added to zero points that decoders take."""
    return bits_of(-float(MAGIC[decoded][1] + fmt.offset), decoded) * 0x10001 - (1 << 32)


def _fragment_constants(spec: KernelSpec, decoded: str) -> dict[str, object]:
    """Those of `gemm_fragment`; `decoded` is the type that codes become."""
    aligned = spec.aligned or spec.tile.k
    scales = stream_scales(spec) if spec.streams else scales_of(spec, spec.tile.scales)
    # With overlap a turn of the loop has two chunks at least.
    widest = min(spec.tile.k // (2 if spec.tile.overlap else 1), 64 if spec.compute == "float32" else 128)
    chunk = widest if scales in ("total", "sums") or (scales == "weights" and aligned < 64) else min(widest, aligned)
    if scales == "fragments" and spec.quads:
        above = spec.super_columns if spec.super_columns < spec.k else 0
        chunk = min(widest, above & -above or widest)
    if spec.tile.form == "cores":
        chunk = min(aligned, warp_columns(spec.tile))
    run = min(aligned, chunk)
    fmt = FORMATS[spec.weight]
    words, negative, factor = "", 0, 1.0
    zero_points = not spec.symmetric and not spec.offset and scales != "weights"
    scaled = scales == "fragments"
    changed = scales != "weights" and spec.tile.form != "cores"
    integers = spec.quads > 0 and spec.scale_dtype in ("int8", "uint8")
    nvidia = decoded in FIELDS and spec.target.startswith("sm_")
    # Codes of 64 columns at once, which 4 bits need for scales of integers only.
    at_once = integers if scaled and spec.quads else fmt.bits != 4
    at_once = at_once and nvidia and changed and isinstance(fmt, IntegerFormat) and fmt.bits < 8
    if changed and (at_once or fmt.bits == 4 or not zero_points):  # else something is added to weights after
        multiplied = (at_once or fmt.bits == 4) and scaled and not zero_points
        factor = word_factor(fmt, decoded, spec.target, scaled=multiplied, at_once=at_once)
    if at_once:
        assert isinstance(fmt, IntegerFormat)
        of = spec.scale_dtype if scaled else ""
        quads = spec.quads if scaled else 0
        words = fields_assembly(
            fmt,
            decoded,
            spec.target,
            zero_points=zero_points,
            scales=of,
            quads=quads,
            factor=factor,
            masked=spec.streams and quads > 0 and not super_last(spec),
            offsets=spec.streams and spec.offset,
        )
    elif fmt.bits == 4 and nvidia:
        words = word_assembly(fmt, decoded, spec.target, zero_points=zero_points, scaled=scaled, factor=factor)
    if words and isinstance(fmt, IntegerFormat):
        negative = _negative(fmt, decoded)
    unit = quad_unit(spec.scale_dtype, spec.compute, spec.target) if scaled and spec.quads else 1.0
    return {
        "N": spec.n,
        "K": spec.k,
        "BITS": fmt.bits,
        "SPARSE": spec.sparse,
        "SYMMETRIC": spec.symmetric,
        "OFFSET": spec.offset,
        "COLUMNS": spec.columns,
        "QUADS": spec.quads,
        "SUPER_COLUMNS": spec.super_columns,
        "X_SCALE": spec.activation_scale,
        "COMPUTE": DTYPES[spec.compute],
        "PRECISION": spec.precision,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
        "BLOCK_K": spec.tile.k,
        "CHUNK": chunk,
        "RUN": run,
        "SCALES": scales,
        "SCALE_TYPE": _scale_type(spec),
        "SUPER_LAST": scales != "total" and super_last(spec),
        "WORDS": words,
        "NEGATIVE": negative,
        "FACTOR": factor * (unit if words else 1.0),
        "UNIT": unit,
        "BYTES": at_once or fmt.bits not in (4, 8),
        "GATED": spec.gated,
        "PAIRED": spec.paired,
        "SPLIT": spec.tile.split,
        "SLAB": spec.tile.form == "slab" and scales != "weights",
        "CORES": spec.tile.form == "cores",
        "OVERLAP": spec.tile.overlap and scales in ("total", "fragments") and spec.target == "sm_90",
        "EARLY": launches_early(spec.target) and not isinstance(spec, GroupedSpec),
        "HOPPER": spec.target == "sm_90",
        "MMA_SYNC": warps_multiply(spec) and spec.compute != "float32" and fmt.bits < 8,
    }


def _fragment_holes(spec: KernelSpec, decoded: str, **changed: object) -> dict[str, str]:
    """What fills `fragment_weights`, some of its constants changed, and what decodes weights."""
    constants = _fragment_constants(spec, decoded) | changed
    factor = 1.0 if constants["WORDS"] else float(str(constants["FACTOR"]))
    decoders = (
        scale_decoder(spec.scale_dtype, spec.target),
        scale_word_decoder(spec.scale_dtype, spec.compute, spec.target),
        quad_decoder(spec.scale_dtype, spec.compute, spec.target),
        pairs_decoder(FORMATS[spec.weight]),
        *([codes_decoder(FORMATS[spec.weight])] if FORMATS[spec.weight].bits not in (4, 8) else []),
        pair_decoder(FORMATS[spec.weight], decoded, spec.target, factor),
        conversion("decode_x", spec.activation, spec),
    )
    return {
        "weights": functions_of("fragment_weights") + functions_of("fragment_scales", "@triton.jit"),
        "constants": print_constants(constants),
        "decode": "\n\n".join(decoders) + "\n\n",
    }


def _fragment(spec: KernelSpec) -> dict[str, str]:
    # Values that are scaled before their products are summed are not rounded before.
    exactly = scales_of(spec, spec.tile.scales) == "weights" and not holds(spec.compute, FORMATS[spec.weight])
    holes = _fragment_holes(spec, "float32" if exactly else spec.compute) | _end(spec)
    return holes | {"sparse": _sparse_cores(spec) if spec.tile.form == "cores" else ""}


def _sparse_cores(spec: KernelSpec) -> str:
    """The functions of `sparse_cores`."""
    constants: dict[str, object] = {
        "WARPS": spec.tile.warps,
        "STAGES": spec.tile.stages,
        "KEPT": kept_assembly(FORMATS[spec.weight], spec.compute),
        "MULTIPLY": sparse_product(spec.compute),
    }
    return fill_hole(functions_of("sparse_cores", "# <cores>"), "cores", print_constants(constants))


def _stream(spec: KernelSpec) -> dict[str, str]:
    fmt, constants = FORMATS[spec.weight], _fragment_constants(spec, spec.compute)
    spread, pairs, above = "", 0, spec.super_columns > 0 and not super_last(spec)
    constants["SCALE_WORDS"] = constants["OFFSET_WORDS"] = ""
    if spec.quads:
        constants["SCALE_WORDS"] = quad_assembly(spec.scale_dtype, spec.compute, spec.target, masked=above)
        constants["OFFSET_WORDS"] = offset_assembly(spec.scale_dtype) if spec.offset else ""
    if (scales := stream_scales(spec)) == "pairs":
        pairs, zero_points = max(1, 64 // spec.columns), not (spec.symmetric or spec.offset)
        factor = word_factor(fmt, spec.compute, spec.target, scaled=False, at_once=True)
        if isinstance(fmt, IntegerFormat):
            words = fields_assembly(
                fmt,
                spec.compute,
                spec.target,
                zero_points=zero_points,
                scales="",
                quads=0,
                factor=factor,
                pairs=pairs,
                offsets=spec.offset,
            )
            constants["NEGATIVE"] = _negative(fmt, spec.compute)
        else:
            words = word_assembly(fmt, spec.compute, spec.target, zero_points=False, scaled=False, pairs=True)
        at_once = isinstance(fmt, IntegerFormat)
        constants |= {"SCALES": scales, "BYTES": at_once, "WORDS": words, "FACTOR": factor}
        for name, unit in (("SCALE_WORDS", 1.0), ("OFFSET_WORDS", 1 / factor)):
            constants[name] = pair_assembly(spec.scale_dtype, unit)
    elif spec.sparse:
        assert isinstance(fmt, IntegerFormat)
        scaled = constants["SCALES"] == "fragments"
        constants["FACTOR"] = factor = word_factor(fmt, spec.compute, spec.target, scaled=scaled)
        constants["WORDS"] = spread_assembly(fmt, spec.compute, scaled=scaled, factor=factor)
        spread = _spread()
    elif fmt.bits == 8:
        constants["WORDS"] = byte_assembly(fmt, spec.compute, float(str(constants["FACTOR"])))
    constants["SUPER_COLUMNS"] = spec.super_columns if above else 0
    constants |= {"PAIRS": pairs, "SYMMETRIC": spec.symmetric or spec.offset}
    constants["SCALE_BITS"] = 8 * SCALE_DTYPES[spec.scale_dtype].itemsize
    constants |= {"STAGES": spec.tile.stages, "SHARED": spec.tile.split != 1, "OPERANDS": spec.operand_count > 0}
    names = [
        "N",
        "K",
        "BITS",
        "SPARSE",
        "BYTES",
        "COLUMNS",
        "QUADS",
        "SCALES",
        "PAIRS",
        "OFFSET",
        "SCALE_BITS",
        "SUPER_COLUMNS",
        "SUPER_LAST",
        "SYMMETRIC",
        "COMPUTE",
        "BLOCK_M",
        "BLOCK_N",
        "STAGES",
        "WORDS",
        "SCALE_WORDS",
        "OFFSET_WORDS",
        "NEGATIVE",
        "FACTOR",
        "SHARED",
        "GATED",
        "OPERANDS",
    ]
    holes = {"constants": print_constants({name: constants[name] for name in names}), "spread": spread}
    rows = read_template("stream_rows")
    holes["rows"] = rows[rows.index("GROUPED = ") :].rstrip() + "\n\n"
    return holes | _stream_tiles(spec)


def _spread() -> str:
    """The functions of `stream_spread`."""
    text = read_template("stream_spread")
    (a, b), (c, d) = spread_tables()
    return fill_hole(text[text.index("# <decoding>") :], "decoding", print_constants({"TABLES": (a, b, c, d)})) + "\n\n"


def _stream_rows8(spec: KernelSpec) -> dict[str, str]:
    constants: dict[str, object] = {
        "N": spec.n,
        "K": spec.k,
        "SCALE_ROWS": spec.rows,
        "X_SCALE": spec.activation_scale,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
        "STAGES": spec.tile.stages,
        "SHARED": spec.tile.split != 1,
        "GATED": spec.gated,
        "OPERANDS": spec.operand_count > 0,
    }
    return {"constants": print_constants(constants)} | _stream_tiles(spec)


def _stream_tiles(spec: KernelSpec) -> dict[str, str]:
    """The constants and functions of `stream_tiles`, and the epilogue."""
    text = read_template("stream_tiles")
    return {"tiles": text[text.index("STEPS = ") :].rstrip() + "\n\n", "epilogue": _epilogue(spec)}


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
        "PAIRED": spec.paired,
        "SPLIT": spec.tile.split,
        "EARLY": launches_early(spec.target) and not isinstance(spec, GroupedSpec),
        "NVIDIA": spec.target.startswith("sm_"),
    }
    decoders = (
        scale_decoder(spec.scale_dtype, spec.target),
        conversion("decode_weight", spec.weight, spec),
        conversion("decode_x", spec.activation, spec),
    )
    return {"constants": print_constants(constants), "decode": "\n\n".join(decoders) + "\n\n"} | _end(spec)


def _end(spec: KernelSpec) -> dict[str, str]:
    """The epilogue, and the function of `gemm_ending`."""
    text = read_template("gemm_ending")
    return {"epilogue": _epilogue(spec), "ending": text[text.index("@triton.jit\ndef finish_parts") :] + "\n\n"}


def _grouped(spec: KernelSpec) -> dict[str, str]:
    return {"fragment": functions_of("gemm_fragment"), **_fragment(spec), "experts": _experts(spec)}


def _grouped_rows8(spec: KernelSpec) -> dict[str, str]:
    return {"rows8": functions_of("gemm_rows8"), **_rows8(spec), "experts": _experts(spec)}


def _experts(spec: KernelSpec) -> str:
    """How many experts there are, and the function of `gemm_grouped` that finds a program's."""
    assert isinstance(spec, GroupedSpec)
    constants: dict[str, object] = {
        "EXPERTS": spec.experts,
        "EXPERTS_POWER": power_above(spec.experts),
    }
    text = read_template("gemm_grouped")
    functions = text[text.index("@triton.jit\ndef find_tile") : text.index("# </experts>")]
    return print_constants(constants) + "\n\n" + functions


def _decode(spec: KernelSpec) -> dict[str, str]:
    # As `reference.dequantize` has it: all in float32, and the scale above applied to the scale.
    return _fragment_holes(
        spec,
        spec.compute if holds(spec.compute, FORMATS[spec.weight]) else "float32",
        CHUNK=spec.tile.k,
        RUN=min(spec.aligned or spec.tile.k, spec.tile.k),
        SCALE_TYPE="tl.float32",
        SUPER_LAST=False,
        SCALES="weights",
        WORDS="",
        FACTOR=1.0,
        EARLY=False,
    )


def _finish(spec: KernelSpec) -> dict[str, str]:
    constants: dict[str, object] = {
        "N": spec.n,
        "X_SCALE": spec.activation_scale,
        "SCALED": spec.rows == 1,
        "GATED": spec.gated,
        "PAIRED": spec.paired,
        "BLOCK_M": spec.tile.m,
        "BLOCK_N": spec.tile.n,
    }
    return {"constants": print_constants(constants), "epilogue": _epilogue(spec)}


def _choosing(spec: ColumnsSpec | RangesSpec) -> dict[str, str]:
    return {"constants": print_constants(spec.constants()), "nearest": nearest(FORMATS[spec.number]) + "\n\n"}


def _holes(spec: AnySpec) -> dict[str, str]:
    """What fills a template."""
    if isinstance(spec, AttentionKernelSpec):
        return attention_holes(spec)
    if isinstance(spec, NormKernelSpec):
        return {"constants": print_constants(spec.constants())}
    return _choosing(spec) if isinstance(spec, (ColumnsSpec, RangesSpec)) else _FILL[spec.source](spec)


_FILL = {
    "gemm_fragment": _fragment,
    "gemm_stream": _stream,
    "gemm_stream_rows8": _stream_rows8,
    "gemm_rows8": _rows8,
    "gemm_grouped": _grouped,
    "gemm_grouped_rows8": _grouped_rows8,
    "decode_fragment": _decode,
    "finish_product": _finish,
}


def render(spec: AnySpec) -> str:
    """The kernel's source, which begins with the spec and how to make the file again.

    All that a user's configuration contributes is numbers and names of registries, and the header's JSON is one comment
    line.
    """
    template = spec.source if isinstance(spec, KernelSpec) else spec.template
    text = read_template(template)
    for name, content in _holes(spec).items():
        text = fill_hole(text, name, content)
    if isinstance(spec, KernelSpec):
        operands = ", ".join(f"operand_{i}" for i in range(max(1, spec.operand_count)))
        text = text.replace("operand_0,", f"{operands},")
    # Profilers and Inductor show the function's own name.
    name = f"qcompile_{template}"
    text = text.replace("\ndef kernel(", f"\ndef {name}(") + f"\n\nkernel = {name}\n"
    encoded = spec.encode()
    assert encoded.isprintable()
    header = (
        f"# Generated by qcompile from codegen/templates/{template}.py. To make it again:\n"
        "#   from qcompile.codegen.render import render\n"
        "#   from qcompile.codegen.spec import decode_kernel_spec\n"
        "#   render(decode_kernel_spec(line))   with the text of this line:\n"
        f"# {encoded}\n"
    )
    return header + text
