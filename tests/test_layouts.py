"""Layouts are bijections: what goes in comes back bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from qcompile.formats import FORMATS
from qcompile.layouts import LAYOUTS, choose_layout, plane_widths, to_layout
from qcompile.packed import PackedWeight, concatenate
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme import PRESETS, Granularity, Scheme, WeightScheme

SHAPES = [(64, 128), (1, 128), (65, 192), (130, 64), (3, 80)]
GRANULARITIES = [Granularity.tensor(), Granularity.channel(), Granularity.group(16), Granularity.group(32)]
GRANULARITIES += [Granularity.block(3, 32), Granularity.block(128, 128)]


def scheme_of(name: str, granularity: Granularity, scale_dtype: str = "bfloat16") -> Scheme:
    return Scheme(
        weight=WeightScheme(
            format=FORMATS[name],
            granularity=granularity,
            symmetric=not name.startswith("uint"),
            scale_dtype=scale_dtype,
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
        scheme = scheme_of(name, granularity)
        if layout.objection(scheme, shape) is not None:
            continue
        taken += 1
        packed = quantize_weight(torch.randn(shape), scheme.weight)
        there = to_layout(packed, layout)
        assert there.layout == layout.name
        assert to_layout(there, layout) is there
        assert equal(to_layout(there, LAYOUTS["logical"]), packed), (granularity, shape)
    expected = {
        "logical": True,
        "rows8": FORMATS[name].native_dtype is not None,
        "fragment": True,
        "rows16": True,
    }
    assert bool(taken) == expected[layout.name]


def test_fragment_puts_codes_where_its_docstring_says():
    codes = torch.randint(0, 8, (64, 64), dtype=torch.uint8)
    scheme = scheme_of("int3", Granularity.channel()).weight
    packed = PackedWeight.from_codes(codes, torch.ones(64, 1, dtype=torch.bfloat16), None, scheme)
    words = LAYOUTS["fragment"].pack(packed).codes
    assert words.shape == (1, 1, 128 * 3)
    plain = [w % 2**32 for w in words.flatten().tolist()]
    for w, h, lane, v, s, r, b in itertools.product(range(4), range(8), range(4), range(4), *[range(2)] * 3):
        n, k = 16 * w + 8 * r + h, 16 * v + 8 * s + 2 * lane + b
        thread, j = 32 * w + 4 * h + lane, 4 * v + 2 * s + r
        value, start, weight_of_plane = 0, 0, 1
        for width in (2, 1):
            per_word = 16 // width
            word = plain[start + thread * width + j // per_word]
            value += word // 2 ** (16 * b + width * (j % per_word)) % 2**width * weight_of_plane
            start += 128 * width
            weight_of_plane *= 2**width
        assert value == codes[n, k]


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
    weight = scheme_of("int8", Granularity.group(32)).weight
    parts = [quantize_weight(torch.randn(n, 64), weight) for n in (64, 128)]
    joined = layout.pack(concatenate(parts))
    for index, tensor in enumerate(joined.tensors):
        assert torch.equal(tensor, torch.cat([layout.pack(p).tensors[index] for p in parts]))


@pytest.mark.parametrize(
    ("layout", "scheme", "shape", "reason"),
    [
        ("rows8", scheme_of("int4", Granularity.channel()), (64, 64), "int4 is no 8-bit type"),
        ("fragment", scheme_of("int4", Granularity.block(4, 24)), (64, 48), "blocks of 24 columns"),
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


@pytest.mark.parametrize("layout", ["fragment", "rows16"])
@pytest.mark.parametrize(
    "granularity", [Granularity.tensor(), Granularity.group(32), Granularity.block(96, 32)], ids=str
)
def test_large_weights_are_laid_out_in_parts(layout, granularity, monkeypatch):
    packed = quantize_weight(torch.randn(700, 64), scheme_of("fp8_e4m3", granularity).weight)
    whole = to_layout(packed, LAYOUTS[layout])
    decoded = dequantize(packed)
    monkeypatch.setattr("qcompile.layouts._CHUNK", 64 * 130)
    monkeypatch.setattr("qcompile.reference._CHUNK", 64 * 130)
    assert equal(to_layout(packed, LAYOUTS[layout]), whole)
    assert torch.equal(dequantize(packed), decoded)
