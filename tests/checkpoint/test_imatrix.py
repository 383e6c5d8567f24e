"""llama.cpp's importance matrices: files as `llama-imatrix` writes them, and what is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.calibrate.codes import choose_codes
from qcompile.checkpoint.imatrix import read_imatrix
from qcompile.errors import CheckpointError, ConfigError, LayerError
from qcompile.reference import dequantize
from qcompile.scheme_config import parse_scheme

gguf = pytest.importorskip("gguf")

LLAMA = SimpleNamespace(model_type="llama", num_attention_heads=2, num_key_value_heads=2)
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def write(path: Path, tensors: dict[str, Any], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(name: str, mean: Tensor, count: float = 1536.0) -> dict[str, Any]:
    sums = (mean * count)[None].numpy().astype(np.float32)
    return {f"{name}.in_sum2": sums, f"{name}.counts": np.full((1, 1), count, np.float32)}


def test_mean_squares_by_the_model_s_names(tmp_path: Path) -> None:
    one, two, head = torch.arange(1.0, 9), torch.arange(4.0), torch.ones(8)
    stored = entry("blk.1.attn_q.weight", one) | entry("blk.0.ffn_down.weight", two) | entry("token_embd.weight", head)
    file = write(tmp_path / "imatrix.gguf", stored)
    found = read_imatrix(file, LLAMA, [Q, DOWN, "lm_head", "model.layers.0.self_attn.k_proj"])
    assert found.keys() == {Q, DOWN, "lm_head"}
    assert torch.equal(found[Q], one)
    assert torch.equal(found[DOWN], two)
    never = write(tmp_path / "never.gguf", entry("blk.1.attn_q.weight", 0 * one, 0.0))
    assert torch.equal(read_imatrix(never, LLAMA, [Q])[Q], torch.ones(8))


BROKEN = {
    "kind": ({}, "not an importance matrix"),
    "nothing": ({}, "knows none of the model's layers"),
    "no counts": ({"blk.1.attn_q.weight.in_sum2": np.ones((1, 8), np.float32)}, "counts is missing or not float32"),
    "half": (
        {
            "blk.1.attn_q.weight.in_sum2": np.ones((1, 8), np.float16),
            "blk.1.attn_q.weight.counts": np.ones((1, 1), np.float32),
        },
        "in_sum2 is missing or not float32",
    ),
    "experts": (
        {
            "blk.1.attn_q.weight.in_sum2": np.ones((2, 8), np.float32),
            "blk.1.attn_q.weight.counts": np.ones((2, 1), np.float32),
        },
        "of one matrix",
    ),
    "negative": (entry("blk.1.attn_q.weight", -torch.ones(8)), "negative or not finite"),
    "nan": (entry("blk.1.attn_q.weight", torch.full((8,), torch.nan)), "negative or not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_importance_matrix(name: str, tmp_path: Path) -> None:
    tensors, message = BROKEN[name]
    other = {"blk.7.attn_q.weight.in_sum2": np.ones((1, 8), np.float32)}
    file = write(tmp_path / "file.gguf", tensors or other, "model" if name == "kind" else "imatrix")
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(file, LLAMA, [Q])
    with pytest.raises(CheckpointError, match="read for models of llama"):
        read_imatrix(file, SimpleNamespace(model_type="bert"), [Q])


def test_importance_chooses_codes() -> None:
    torch.manual_seed(0)
    scheme = parse_scheme({"preset": "q4_0", "method": "importance"})
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 8)).requires_grad_(False)
    weight, known = model[0].weight.clone(), torch.rand(64) ** 4
    rules = {"rules": [{"layers": "0", "scheme": scheme}]}
    qcompile.quantize_(model, rules, importance={"0": known}, progress=False)
    chosen = choose_codes(weight, scheme.fit("0", (16, 64)), torch.diag(known), "0")
    assert torch.equal(model[0].weight, dequantize(chosen))
    plain = choose_codes(weight, parse_scheme("q4_0").fit("0", (16, 64)), None, "0")

    def error(packed: Tensor) -> float:
        return float(((packed - weight).square() * known).sum())

    assert error(model[0].weight) < 0.9 * error(dequantize(plain))


def test_what_importance_cannot_do() -> None:
    def quantize(method: str, importance: dict[str, Tensor], **more: Any) -> None:
        model = nn.Sequential(nn.Linear(64, 16)).requires_grad_(False)
        scheme = {"preset": "q4_0", "method": method}
        qcompile.quantize_(model, {"rules": [{"layers": "0", "scheme": scheme}]}, importance=importance, **more)

    with pytest.raises(LayerError, match="0: no importance is known of its inputs"):
        quantize("importance", {})
    with pytest.raises(LayerError, match=r"0: .*method gptq looks at the layer's inputs"):
        quantize("gptq", {"0": torch.ones(64)})
    with pytest.raises(LayerError, match="0: has 64 inputs, and importance"):
        quantize("importance", {"0": torch.ones(32)})
    with pytest.raises(ConfigError, match="takes the place of calibration"):
        quantize("importance", {"0": torch.ones(64)}, calibration=[torch.ones(1, 64)])
