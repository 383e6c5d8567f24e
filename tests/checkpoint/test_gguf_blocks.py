"""Blocks of every type, taken apart and decoded, are what the gguf package decodes: bit for bit."""

from __future__ import annotations

import ctypes
import math

import pytest

gguf = pytest.importorskip("gguf")

import numpy as np
import torch

from qcompile.checkpoint import gguf_blocks
from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES, OTHER_TYPES, PLAIN_TYPES, pack_rows
from qcompile.checkpoint.gguf_file import open_gguf
from qcompile.reference import dequantize
from tests.checkpoint.gguf_files import HALVES, Q, random_blocks, write


def same(actual, expected):
    """Equal bits, except that a zero may lose its sign: d * q - m of ggml is d * q + (-m) here."""
    actual, expected = actual.contiguous(), torch.as_tensor(np.ascontiguousarray(expected))
    return bool(((actual.view(torch.int32) == expected.view(torch.int32)) | ((actual == 0) & (expected == 0))).all())


def test_every_type_has_a_name_and_a_size():
    assert {i: (t.name, (t.columns, t.nbytes)) for i, t in BLOCK_TYPES.items()} == {
        int(kind): (kind.name, gguf.GGML_QUANT_SIZES[kind]) for kind in HALVES
    }
    known = set(BLOCK_TYPES) | set(PLAIN_TYPES) | set(OTHER_TYPES)
    assert {int(kind) for kind in Q} <= known
    assert all(OTHER_TYPES[int(kind)] == kind.name for kind in Q if int(kind) in OTHER_TYPES)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [1 << 22, 1024])
def test_random_blocks(kind, chunk, monkeypatch):
    monkeypatch.setattr(gguf_blocks, "_CHUNK", chunk)
    shape = (37, 512)
    blocks = random_blocks(kind, shape)
    weight = pack_rows(lambda start, stop: torch.from_numpy(blocks[start:stop]), shape, BLOCK_TYPES[int(kind)])
    weight.check()
    assert weight.nbytes <= blocks.nbytes * 1.2  # scales of 4 or 6 bits take 8, most for Q2_K
    with np.errstate(over="ignore", invalid="ignore"):
        expected = gguf.quants.dequantize(blocks, kind)
    assert np.isfinite(expected).mean() > 0.9
    assert same(dequantize(weight), expected)


KINDS = {
    "Q2_K": {"Q2_K", "Q3_K"},
    "Q3_K_M": {"Q3_K"},
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "IQ4_NL": {"IQ4_NL"},
    "IQ4_XS": {"IQ4_XS"},
}


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A Llama of one layer whose rows are whole super-blocks, in float32."""
    hidden, inner, generator = 256, 512, np.random.default_rng(0)
    shapes = {"token_embd": (64, hidden), "output_norm": (hidden,), "output": (64, hidden)}
    shapes |= {f"blk.0.{name}_norm": (hidden,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    tensors = {f"{n}.weight": generator.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    metadata = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 64,
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": 64,
    }
    return write(tmp_path_factory.mktemp("llama") / "floats.gguf", "llama", metadata, tensors), tensors


@pytest.mark.parametrize("name", KINDS)
def test_files_that_llama_cpp_quantized(floats, tmp_path, name):
    """Its own quantizers fill fields that random bytes fill only by chance: the largest scales, the exact zeros."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source, originals = floats
    target = tmp_path / f"{name}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    options.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0
    file, seen = open_gguf(target), set()
    for theirs in gguf.GGUFReader(target).tensors:
        tensor = file.tensors[theirs.name]
        if tensor.kind in PLAIN_TYPES:
            continue
        seen.add(BLOCK_TYPES[tensor.kind].name)
        n, k = tensor.shape
        weight = dequantize(pack_rows(tensor.rows, (n, k), BLOCK_TYPES[tensor.kind]))
        assert same(weight, gguf.quants.dequantize(theirs.data, theirs.tensor_type))
        original = torch.from_numpy(originals[theirs.name])
        assert float((weight - original).norm() / original.norm()) < 0.5  # not a scrambled order
    assert seen >= KINDS[name], seen


def test_mxfp4_of_the_gguf_package():
    values = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(values, Q.MXFP4)
    weight = pack_rows(lambda start, stop: torch.from_numpy(blocks[start:stop]), (8, 64), BLOCK_TYPES[39])
    assert same(dequantize(weight), gguf.quants.dequantize(blocks, Q.MXFP4))
    assert weight.scale.dtype == torch.float8_e8m0fnu


def test_memory_of_packing():
    """No more than the result and one chunk's codes, at any size."""
    kind, shape = BLOCK_TYPES[14], (1 << 13, 1 << 11)
    row = random_blocks(Q.Q6_K, (1, shape[1]))
    chunk = max(1, gguf_blocks._CHUNK // shape[1])
    largest = 0

    def read(start, stop):
        nonlocal largest
        largest = max(largest, stop - start)
        return torch.from_numpy(np.repeat(row, stop - start, 0))

    weight = pack_rows(read, shape, kind)
    assert largest == chunk
    assert math.prod(weight.codes.shape) == shape[0] * shape[1] * 6 // 8
