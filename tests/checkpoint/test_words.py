"""Codes in words are numbers in base 2**bits; planes are streams of parts of codes. Packing undoes unpacking."""

from __future__ import annotations

import pytest
import torch

from qcompile.checkpoint.words import WORD_DTYPES, pack_words, unpack_planes, unpack_words
from tests.checkpoint.integer_files import stream


@pytest.mark.parametrize("word", WORD_DTYPES.values(), ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(4, 64), (3, 7), (1, 1), (1, 33)], ids=str)
def test_streams(shape, bits, word):
    codes = torch.randint(0, 2**bits, shape).to(torch.uint8)
    words = stream(codes, bits, word)
    assert torch.equal(pack_words(codes, bits, dtype=word), words)
    assert torch.equal(unpack_words(words, bits, count=shape[1]), codes)
    assert torch.equal(pack_words(codes.t(), bits, 0, word), words.t())
    assert torch.equal(unpack_words(words.t(), bits, 0, shape[1]), codes.t())


@pytest.mark.parametrize(("bits", "planes"), [(3, (2, 1)), (5, (4, 1)), (6, (4, 2)), (7, (4, 2, 1))])
def test_planes(bits, planes):
    codes = torch.randint(0, 2**bits, (5, 64)).to(torch.uint8)
    runs = []
    for run in codes.split(32, 1):
        for width in planes:
            runs.append(stream(run & (2**width - 1), width))
            run = run >> width
    words = torch.cat(runs, 1)
    assert torch.equal(unpack_planes(words, bits), codes)
    assert torch.equal(unpack_planes(words.t(), bits, 0), codes.t())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_plane_is_a_stream(bits):
    codes = torch.randint(0, 2**bits, (2, 32)).to(torch.uint8)
    assert torch.equal(unpack_planes(pack_words(codes, bits), bits), codes)
