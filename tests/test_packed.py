"""Bit streams, the invariants of a packed weight, and joining weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.bitpack import pack_bits, packed_width, unpack_bits
from qcompile.errors import LayerError
from qcompile.formats import FORMATS
from qcompile.packed import PackedWeight, concatenate
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme import Granularity, WeightScheme


@given(bits=st.integers(1, 8), shape=st.lists(st.integers(1, 35), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_pack_then_unpack_gives_the_codes(bits, shape, seed):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_is_little_endian(bits):
    codes = torch.randint(0, 2**bits, (2, 13), dtype=torch.uint8)
    for row, packed in zip(codes.tolist(), pack_bits(codes, bits).tolist(), strict=True):
        number = sum(code * 2 ** (bits * i) for i, code in enumerate(row))
        assert bytes(packed) == number.to_bytes(packed_width(13, bits), "little")


def test_packing_no_codes():
    for bits in (3, 4, 8):
        assert unpack_bits(pack_bits(torch.zeros(0, 16, dtype=torch.uint8), bits), bits, 16).shape == (0, 16)


def test_more_than_two_of_four_are_refused():
    codes = torch.full((3, 10), 8, dtype=torch.uint8)
    codes[1, 4:6] = 0
    scheme = WeightScheme(format=FORMATS["int4"], granularity=Granularity.channel(), sparsity="2:4")
    PackedWeight.from_codes(codes, torch.ones(3, 1), None, scheme)
    codes[1, 7] = 9
    with pytest.raises(LayerError, match=r"layer: more than two of four columns"):
        PackedWeight.from_codes(codes, torch.ones(3, 1), None, scheme, "layer")


def make(name: str = "int4", granularity: Granularity | None = None, shape: tuple[int, int] = (6, 32)) -> PackedWeight:
    granularity = granularity or Granularity.group(16)
    scheme = WeightScheme(format=FORMATS[name], granularity=granularity, symmetric=not name.startswith("uint"))
    return quantize_weight(torch.randn(shape), scheme)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.ones(6, 2, dtype=torch.float16)}, "scale is torch.float16"),
        ({"scale": torch.ones(6, 3)}, r"expected torch.float32 \(6, 2\)"),
        ({"codes": torch.zeros(6, 17, dtype=torch.uint8)}, r"codes is torch.uint8 \(6, 17\)"),
        ({"codes": torch.zeros(6, 16, dtype=torch.int8)}, "codes is torch.int8"),
        ({"zero_point": torch.zeros(6, 2, dtype=torch.uint8)}, "has zero_point"),
        ({"scale": torch.ones(6, 2, device="meta")}, "scale is on meta"),
    ],
)
def test_check_names_the_layer_and_the_fault(changes, message):
    with pytest.raises(LayerError, match=f"model.fc: .*{message}"):
        replace(make(), **changes).check("model.fc")


def test_check_of_zero_points():
    with pytest.raises(LayerError, match="lacks zero_point"):
        replace(make("uint4"), zero_point=None).check()
    with pytest.raises(LayerError, match=r"zero_point is torch\.int32"):
        replace(make("uint4"), zero_point=torch.zeros(6, 2, dtype=torch.int32)).check()


def test_nbytes_counts_every_tensor():
    packed = make("uint4")
    assert packed.nbytes == 6 * 16 + 6 * 2 * 4 + 6 * 2
    assert packed.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    "granularity",
    [Granularity.tensor(), Granularity.channel(), Granularity.group(16), Granularity.block(3, 16)],
    ids=str,
)
@pytest.mark.parametrize("name", ["int3", "uint4", "fp8_e4m3"])
def test_concatenation_is_exact(name, granularity):
    parts = [make(name, granularity, (n, 32)) for n in (6, 3, 9)]
    joined = concatenate(parts)
    joined.check()
    assert joined.shape == (18, 32)
    assert torch.equal(dequantize(joined), torch.cat([dequantize(p) for p in parts]))


def test_concatenation_refuses_blocks_across_weights():
    parts = [make("fp8_e4m3", Granularity.block(4, 16), (n, 32)) for n in (6, 4)]
    with pytest.raises(ValueError, match="blocks that span two weights"):
        concatenate(parts)
