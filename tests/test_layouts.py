"""Layouts are bijections: what goes in comes back bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.formats import FORMATS
from qcompile.layouts import LAYOUTS, choose_layout, plane_widths, to_layout
from qcompile.packed import PackedWeight, concatenate
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme import Granularity, Scheme, WeightScheme
from tests.kernels.problems import random_weight, sparse_codes
from tests.kernels.test_gemm import GGUF_LIKE

SHAPES = [(64, 128), (1, 128), (65, 192), (130, 64), (3, 80)]
GRANULARITIES = [Granularity.tensor(), Granularity.channel(), Granularity.group(16), Granularity.group(32)]
GRANULARITIES += [Granularity.block(3, 32), Granularity.block(128, 128)]


def scheme_of(
    name: str, granularity: Granularity, scale_dtype: str = "bfloat16", sparsity: str | None = None
) -> Scheme:
    return Scheme(
        weight=WeightScheme(
            format=FORMATS[name],
            granularity=granularity,
            symmetric=not name.startswith("uint"),
            scale_dtype=scale_dtype,
            sparsity=sparsity,
        )
    )


def equal(a: PackedWeight, b: PackedWeight) -> bool:
    return (
        (a.shape, a.scheme, a.layout) == (b.shape, b.scheme, b.layout)
        and len(a.tensors) == len(b.tensors)
        and all(
            s.dtype == t.dtype and torch.equal(s.view(torch.uint8), t.view(torch.uint8))
            for s, t in zip(a.tensors, b.tensors, strict=True)
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(name, layout):
    taken = 0
    for granularity, shape in itertools.product(GRANULARITIES, SHAPES):
        sparse = layout.name == "fragment24" and name in ("int4", "int8")
        scheme = scheme_of(name, granularity, sparsity="2:4" if sparse else None)
        if layout.objection(scheme, shape) is not None:
            continue
        taken += 1
        packed = quantize_weight(torch.randn(shape), scheme.weight)
        there = to_layout(packed, layout)
        assert there.layout == layout.name
        assert to_layout(there, layout) is there
        assert equal(to_layout(there, LAYOUTS["logical"]), packed), (granularity, shape)
        if layout.objection(narrow := scheme_of(name, granularity, "float8_e8m0fnu"), shape) is None and not sparse:
            packed = quantize_weight(torch.randn(shape), narrow.weight)
            assert equal(to_layout(to_layout(packed, layout), LAYOUTS["logical"]), packed), (granularity, shape)
    expected = {
        "logical": True,
        "rows8": FORMATS[name].native_dtype is not None,
        "fragment": True,
        "fragment24": name in ("int4", "int8"),
        "rows16": True,
    }
    assert bool(taken) == expected[layout.name]


BYTES = {
    1: [[(0, slot)] for slot in range(8)],
    2: [[(slot // 4, 2 * (slot % 4) + i) for i in range(2)] for slot in range(8)],
    3: [
        *([(slot // 2, 3 * (slot % 2) + i) for i in range(3)] for slot in range(6)),
        [(2, 6), (2, 7), (1, 6)],
        [(1, 7), (0, 6), (0, 7)],
    ],
    4: [[(slot // 2, 4 * (slot % 2) + i) for i in range(4)] for slot in range(8)],
    5: [
        *([(slot, i) for i in range(5)] for slot in range(5)),
        [(3, 6), (3, 7), (0, 5), (0, 6), (0, 7)],
        [(4, 6), (4, 7), (1, 5), (1, 6), (1, 7)],
        [(4, 5), (3, 5), (2, 5), (2, 6), (2, 7)],
    ],
    6: [
        *([(slot, i) for i in range(6)] for slot in range(6)),
        [(2, 6), (2, 7), (1, 6), (1, 7), (0, 6), (0, 7)],
        [(5, 6), (5, 7), (4, 6), (4, 7), (3, 6), (3, 7)],
    ],
    7: [*([(slot, i) for i in range(7)] for slot in range(7)), [(6 - i, 7) for i in range(7)]],
}
"""By bits of a code, for each slot 2 v + r: in which word, and where in its bytes 2 b + s, the code's bits are."""


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int5", "int6", "int7", "int8"])
def test_fragment_puts_codes_where_its_docstring_says(name):
    bits = FORMATS[name].bits
    codes = torch.randint(0, 2**bits, (64, 64), dtype=torch.uint8)
    packed = PackedWeight.from_codes(
        codes, torch.ones(64, 1, dtype=torch.bfloat16), None, scheme_of(name, Granularity.channel()).weight
    )
    there = LAYOUTS["fragment"].pack(packed).codes
    assert there.shape == (1, 1, 128 * bits)
    planes = there.flatten().split([128 * width for width in plane_widths(bits)])
    words = torch.cat([plane.view(128, -1) for plane in planes], 1).tolist()
    for w, h, lane, v, s, r, b in itertools.product(range(4), range(8), range(4), range(4), *[range(2)] * 3):
        own = [word % 2**32 for word in words[32 * w + 4 * h + lane]]
        if bits == 8:
            found = own[2 * v + s] >> 8 * (2 * b + r) & 0xFF
        else:
            places = BYTES[bits][2 * v + r]
            found = sum((own[word] >> 8 * (2 * b + s) + place & 1) << i for i, (word, place) in enumerate(places))
        assert found == codes[16 * w + 8 * r + h, 16 * v + 8 * s + 2 * lane + b]


E2M1_BITS = {"00": (6, 7, 8, 15), "01": (0, 1, 2, 9), "10": (10, 11, 12, 19), "11": (4, 5, 14, 13)}
"""By s and r: where the lowest to the highest bit of the code with b = 0 lies in its word; with b = 1, 16 further."""


@pytest.mark.parametrize("name", ["fp4_e2m1", "nf4", "fp4", "iq4_nl"])
def test_fragment_puts_bits_where_decoders_want_them(name):
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    scheme = scheme_of(name, Granularity.channel()).weight
    packed = PackedWeight.from_codes(codes, torch.ones(64, 1, dtype=torch.bfloat16), None, scheme)
    plain = [w % 2**32 for w in LAYOUTS["fragment"].pack(packed).codes.flatten().tolist()]
    for w, h, lane, v, s, r, b in itertools.product(range(4), range(8), range(4), range(4), *[range(2)] * 3):
        word = plain[4 * (32 * w + 4 * h + lane) + v]
        if name == "fp4_e2m1":
            bits = [(place + 16 * b) % 32 for place in E2M1_BITS[f"{s}{r}"]]
        else:  # the four codes of a half s in nibbles, three bits each, their last bits in bytes
            quad = 2 * r + b
            bits = [*range(16 * s + 4 * quad, 16 * s + 4 * quad + 3), 8 * quad + (3 if s else 7)]
        code = sum(word // 2**place % 2 * 2**bit for bit, place in enumerate(bits))
        assert code == codes[16 * w + 8 * r + h, 16 * v + 8 * s + 2 * lane + b]


@pytest.mark.parametrize("columns", [16, 32])
def test_narrow_scales_of_a_byte_lie_in_fours(columns):
    scheme = scheme_of("fp4_e2m1", Granularity.group(columns), "float8_e4m3fn").weight
    groups = 160 // columns
    scale = torch.arange(70 * groups).remainder(120).to(torch.uint8).view(70, groups)
    packed = PackedWeight.from_codes(
        torch.zeros(70, 160, dtype=torch.uint8), scale.view(torch.float8_e4m3fn), None, scheme
    )
    there = LAYOUTS["fragment"].pack(packed).scale.view(torch.uint8)
    quads = 32 // columns
    assert there.shape == (2, 3, 128 * quads)
    for n, group in itertools.product(range(70), range(groups)):
        tile, w, r, h = n // 64, n % 64 // 16, n % 16 // 8, n % 8
        place = (8 * w + h) * 4 * quads + group % (2 * quads) * 2 + r
        assert there[tile, group // (2 * quads), place] == scale[n, group]


@given(st.sampled_from(sorted(GGUF_LIKE)), st.integers(1, 140), st.integers(1, 600), st.integers(0, 99))
def test_integer_scales_come_back(name, n, k, seed):
    torch.manual_seed(seed)
    packed = random_weight(GGUF_LIKE[name], n, k)
    there = LAYOUTS["fragment"].pack(packed)
    columns = GGUF_LIKE[name].granularity.columns
    if columns < k:
        assert there.scale.shape == (-(-n // 64), -(-k // 64), 4096 // columns)
    assert equal(LAYOUTS["fragment"].unpack(there), packed)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_fragment24_puts_codes_where_its_docstring_says(name):
    scheme = scheme_of(name, Granularity.channel(), sparsity="2:4").weight
    bits, zero = scheme.format.bits, 2 ** (scheme.format.bits - 1)
    codes = sparse_codes(torch.randint(0, 2**bits, (64, 64), dtype=torch.uint8), zero)
    packed = PackedWeight.from_codes(codes, torch.ones(64, 1, dtype=torch.bfloat16), None, scheme)
    words = LAYOUTS["fragment24"].pack(packed).codes
    assert words.shape == (1, 1, 64 * (bits + 2))
    plain = [w % 2**32 for w in words.flatten().tolist()]
    per_half = 16 // bits

    for w, h, p, u, t, s, r in itertools.product(range(4), range(8), *[range(2)] * 5):
        n, first = 16 * w + 8 * r + h, 32 * u + 16 * t + 8 * s + 4 * p
        quad, j = 4 * (8 * w + h), 4 * u + 2 * t + r
        places = plain[64 * bits + quad + 2 * u + t] // 2 ** (16 * r + 8 * s + 4 * p) % 16
        kept = [first + i for i in range(4) if places // 2**i % 2]
        assert len(kept) == 2
        word = plain[bits // 2 * (quad + 2 * p + s) + j // per_half]
        for half, k in enumerate(kept):
            assert word // 2 ** (16 * half + bits * (j % per_half)) % 2**bits == codes[n, k]
        assert {first + i for i in range(4) if codes[n, first + i] != zero} <= set(kept)


@given(st.sampled_from(["int4", "int8"]), st.integers(1, 140), st.integers(1, 200), st.integers(0, 99))
def test_sparse_codes_come_back(name, n, k, seed):
    """Bits for half the codes, and one a weight; groups of four have two, one or none that are not 0."""
    torch.manual_seed(seed)
    scheme = scheme_of(name, Granularity.channel(), sparsity="2:4").weight
    bits = scheme.format.bits
    codes = sparse_codes(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), 2 ** (bits - 1))
    packed = PackedWeight.from_codes(codes, torch.ones(n, 1, dtype=torch.bfloat16), None, scheme)
    there = LAYOUTS["fragment24"].pack(packed)
    assert there.codes.numel() * 32 == -(-n // 64) * -(-k // 64) * 64 * 64 * (bits // 2 + 1)
    assert equal(LAYOUTS["fragment24"].unpack(there), packed)


def test_rows16_puts_codes_where_its_docstring_says():
    codes = torch.randint(0, 8, (20, 48), dtype=torch.uint8)
    scheme = scheme_of("int3", Granularity.channel()).weight
    packed = PackedWeight.from_codes(codes, torch.ones(20, 1, dtype=torch.bfloat16), None, scheme)
    words = LAYOUTS["rows16"].pack(packed).codes
    assert words.shape == (2, 2, 3, 16)
    for n, k in itertools.product(range(20), range(48)):
        mine = [w % 2**32 for w in words[n // 16, k // 32, :, n % 16].tolist()]
        t, c, h = k % 32 // 4, k % 4 // 2, k % 2
        low = mine[t // 4] // 2 ** (8 * (2 * h + c) + 2 * (t % 4)) % 4
        high = mine[2] // 2 ** (8 * (2 * h + c) + t) % 2
        assert low + 4 * high == codes[n, k]


def test_planes_of_powers_of_two_add_up():
    for bits in range(2, 9):
        assert sum(plane_widths(bits)) == bits
    assert plane_widths(3) == (2, 1)
    assert plane_widths(7) == (4, 2, 1)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS.values() if layout.mergeable], ids=lambda x: x.name)
def test_mergeable_layouts_join_by_concatenation(layout):
    weight = scheme_of("int8", Granularity.group(32), sparsity="2:4" if layout.name == "fragment24" else None).weight
    parts = [quantize_weight(torch.randn(n, 64), weight) for n in (64, 128)]
    joined = layout.pack(concatenate(parts))
    for index, tensor in enumerate(joined.tensors):
        assert torch.equal(tensor, torch.cat([layout.pack(p).tensors[index] for p in parts]))


@pytest.mark.parametrize(
    ("layout", "scheme", "shape", "reason"),
    [
        ("rows8", scheme_of("int4", Granularity.channel()), (64, 64), "int4 is no 8-bit type"),
        ("fragment", scheme_of("int4", Granularity.block(4, 24)), (64, 48), "blocks of 24 columns"),
        ("fragment24", scheme_of("int4", Granularity.group(32)), (64, 64), "not 2:4 sparse"),
        ("fragment24", scheme_of("int4", Granularity.group(24), sparsity="2:4"), (64, 48), "blocks of 24 columns"),
        ("rows16", scheme_of("int4", Granularity.group(24)), (64, 48), "blocks of 24 columns"),
    ],
)
def test_objections(layout, scheme, shape, reason):
    assert reason in LAYOUTS[layout].objection(scheme, shape)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_layout(name, device):
    layout = choose_layout(PRESETS[name], (96, 256), device)
    assert layout.objection(PRESETS[name], (96, 256)) is None


def test_sparse_weights_are_kept_sparse_on_gpus():
    assert choose_layout(PRESETS["int4_24"], (96, 256), "cuda").name == "fragment24"
    assert choose_layout(PRESETS["int4_24"], (96, 256), "cpu").name == "rows16"
    both = replace(PRESETS["int8_24"], activation=PRESETS["int8"].activation)
    assert choose_layout(both, (96, 256), "cuda").name == "rows8"


@pytest.mark.parametrize("layout", ["fragment", "fragment24", "rows16"])
@pytest.mark.parametrize(
    "granularity", [Granularity.tensor(), Granularity.group(32), Granularity.block(96, 32)], ids=str
)
def test_large_weights_are_laid_out_in_parts(layout, granularity, monkeypatch):
    scheme = (
        scheme_of("int8", granularity, sparsity="2:4") if layout == "fragment24" else scheme_of("fp8_e4m3", granularity)
    )
    packed = quantize_weight(torch.randn(700, 64), scheme.weight)
    whole = to_layout(packed, LAYOUTS[layout])
    decoded = dequantize(packed)
    monkeypatch.setattr("qcompile.layouts._CHUNK", 64 * 130)
    monkeypatch.setattr("qcompile.reference._CHUNK", 64 * 130)
    assert equal(to_layout(packed, LAYOUTS[layout]), whole)
    assert equal(to_layout(whole, LAYOUTS["logical"]), packed)
    assert torch.equal(dequantize(packed), decoded)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_there_and_back_in_parts(name, device, monkeypatch):
    scheme = PRESETS[name].fit("layer", (200, 512))
    packed = quantize_weight(torch.randn(200, 512), scheme.weight)
    layout = choose_layout(scheme, packed.shape, device)
    whole = to_layout(packed, layout)
    monkeypatch.setattr("qcompile.layouts._CHUNK", 512 * 70)
    assert equal(to_layout(packed, layout), whole)
    assert equal(to_layout(whole, LAYOUTS["logical"]), packed)
