"""Attention over a cache as the text of a C++ file: the template with its holes filled."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.cpp import ISAS, decode_functions, template_text
from qcompile.codegen.holes import fill_hole
from qcompile.codegen.printers import cpp_constant
from qcompile.formats import FORMATS, FloatFormat, IntegerFormat
from qcompile.kv_cache import AttentionSpec, NumberFormat, PlainFormat

_NUMBERS = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}
_DECLARED = "static inline f32 decode(i32 code);\nstatic inline Pairs decode_four(u32 codes);\n"
_PARTS = ("call", "decode", "places", "squares")
_FOUR = """static inline Pairs decode_four(u32 codes) {{
  return {};
}}
"""


@dataclass(frozen=True, kw_only=True)
class CppAttentionSpec:
    """Everything that decides a kernel's source. Shapes, strides, mask, scale and soft cap are arguments of the kernel.

    Attributes:
        number: name of the number format of keys and values, of 8 or 4 bits; or the dtype of a cache that is not
            quantized.
        query: "float32" or "bfloat16", of queries and results.
        isa: one of `ISAS`.
        compact, group, offsets: see `KVScheme`; numbers are then scaled as they are decoded, to float32.
    """

    number: str
    query: str
    isa: str
    compact: bool = False
    group: int = 0
    offsets: bool = False

    @property
    def pairs(self) -> bool:
        """Whether pairs of bfloat16 are multiplied: where queries, keys and the processor have them."""
        exact = self.number not in ("float32", "float16") and not self.compact
        return self.query == "bfloat16" and exact and _has_pairs(self.isa)

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def _has_pairs(isa: str) -> bool:
    return "avx512_bf16" in ISAS[isa]


def cpp_attention_spec(spec: AttentionSpec, query: torch.dtype, isa: str) -> CppAttentionSpec | None:
    """The kernel for a cache and queries of float32 or bfloat16; None for schemes that it cannot decode."""
    fmt = spec.scheme.format
    if not isinstance(fmt, (NumberFormat, PlainFormat)):
        return None
    number = fmt.name if isinstance(fmt, PlainFormat) else fmt.number.name
    return CppAttentionSpec(
        number=number,
        query=str(query).removeprefix("torch."),
        isa=isa,
        compact=spec.scheme.compact,
        group=spec.scheme.group,
        offsets=not spec.scheme.symmetric,
    )


def _decode_four(spec: CppAttentionSpec) -> str:
    """The function that decodes the codes in the bytes of each lane to bfloat16.

    Bytes of bfloat16 come from tables where the processor looks up 64 in one instruction, for floats of 8 bits of the
    codes without a sign.
    """
    fmt = FORMATS[spec.number]
    if isinstance(fmt, IntegerFormat) and fmt.bits == 8:
        return _FOUR.format(f"integers_of(codes, {cpp_constant(float(fmt.offset))})")
    signs = isinstance(fmt, FloatFormat) and fmt.bits == 8
    if "avx512vbmi" not in ISAS[spec.isa] or not (signs or fmt.bits == 4):
        return _FOUR.format("{decode_pair(codes & 0x00ff00ffu), decode_pair(codes >> 8 & 0x00ff00ffu)}")
    entries = 128 if signs else 64
    values = fmt.decode(torch.arange(entries, dtype=torch.int32) % (1 << fmt.bits))
    assert isinstance(values, Tensor)
    words = values.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    parts = [", ".join(map(str, part.tolist())) for part in (words & 255, words >> 8 & 255)]
    return f"constexpr ByteTables<{entries}> BYTES = {{{{{parts[0]}}},\n{{{parts[1]}}}}};\n" + _FOUR.format(
        "lookup(codes, BYTES)"
    )


def render_attention(spec: CppAttentionSpec) -> str:
    """The kernel's source, one file without includes of its own."""
    plain = spec.number in _NUMBERS
    decode, masked = (_DECLARED, False)
    if not plain:
        decode, masked = decode_functions(spec.number, "bfloat16" if spec.pairs else "float32", spec.isa)
        decode += "\n" + _decode_four(spec)
    constants = (
        f"using Query = {_NUMBERS[spec.query]};\n"
        f"using Stored = {_NUMBERS[spec.number] if plain else 'std::uint8_t'};\n"
        f"constexpr bool PAIRED = {str(spec.pairs).lower()};\n"
        f"constexpr int BITS = {0 if plain else FORMATS[spec.number].bits};\n"
        f"constexpr bool MASKED = {str(masked).lower()};\n"
        f"constexpr bool COMPACT = {str(spec.compact).lower()};\n"
        f"constexpr int GROUP_SIZE = {int(spec.group)};\n"
        f"constexpr bool OFFSETS = {str(spec.offsets).lower()};\n"
    )
    text = fill_hole(template_text("attention.cpp"), "constants", constants, comment="//")
    text = fill_hole(text, "decode", decode, comment="//")
    for header in ("vector.h", "functions.h", *(f"attention_{part}.h" for part in _PARTS)):
        text = text.replace(f'#include "{header}"\n', template_text(header))
    encoded = spec.encode()
    assert encoded.isprintable()
    return f"// Generated by qcompile from codegen/templates/cpp/attention.cpp for {encoded}\n{text}"
