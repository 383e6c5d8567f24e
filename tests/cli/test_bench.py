"""`qcompile bench` on small shapes, and what it says about mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from qcompile.cli import app
from qcompile.cli import bench as command
from qcompile.evaluate import timing
from qcompile.evaluate.linear import floor
from qcompile.presets import PRESETS
from qcompile.reference import quantize_weight

RATES = {"memory": 1e10, "16-bit": 1e11, "8-bit": 2e11}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ceilings", lambda device: RATES)
    monkeypatch.setattr(timing, "COLD_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])


def test_a_shape_is_measured_beside_torch(tmp_path):
    path = tmp_path / "found.json"
    result = run(
        "--shape", "128x256", "--scheme", "int4,int8_weight_only", "--tokens", "1", "--tokens", "5", "--json", str(path)
    )
    assert result.exit_code == 0, result.output
    assert "128 x 256" in result.stdout
    assert "limits, measured: 10 GB/s" in result.stdout
    found = json.loads(path.read_text())
    assert found["ceilings"] == RATES
    assert {row["M"] for row in found["rows"]} == {1, 5}
    measured = {(row["impl"], row["scheme"]) for row in found["rows"]}
    assert {("F.linear", "bfloat16"), ("qcompile", "int4"), ("qcompile", "int8_weight_only")} <= measured
    assert ("_weight_int4pack_mm", "int4") in measured
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in found["rows"])


def test_a_models_shapes_are_taken(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {shape: len(names) for shape, names in command.model_shapes(tmp_path).items()}
    assert shapes == {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2, (256, 64): 1}
    assert shapes.keys() == command.model_shapes(tmp_path / "config.json").keys()
    result = run("--model", str(tmp_path), "--scheme", "int4", "--tokens", "1")
    assert result.exit_code == 0, result.output
    assert "64 x 64: 4 layers, such as model.layers.0.self_attn.q_proj" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "4096"), ("'4096'", "such as 4096x14336")),
        (("--shape", "0x64"), ("from 1 to",)),
        (("--shape", "64x64", "--tokens", "1,many"), ("'many'", "whole")),
        (("--shape", "64x64", "--scheme", "int99"), ("int99",)),
        (("--shape", "64x64", "--scheme", "unquantized"), ("measured always",)),
        (("--shape", "64x64", "--json", "/no/folder/x.json"), ("there is no folder",)),
        ((), ("--shape", "--model")),
        (("--shape", "64x64", "--model", "."), ("either --shape",)),
        (("--model", "/no/model"), ("there is no config.json",)),
        (("--shape", ","), ("no shape is named", "4096x14336")),
        (("--shape", "64x64", "--tokens", ","), ("--tokens names nothing",)),
    ],
)
def test_mistakes(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_is_no_configuration(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff")
    result = run("--model", str(path))
    assert result.exit_code == 1
    assert "name a model's folder, its config.json, or a GGUF file" in result.stderr


def test_a_configuration_that_is_no_language_model_is_told(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    result = run("--model", str(tmp_path))
    assert result.exit_code == 1
    assert "transformers makes no language model of it" in result.stderr


def test_the_limit_is_the_longer_of_moving_and_multiplying():
    n, k = 512, 1024
    scheme = PRESETS["int4"].fit("layer", (n, k))
    packed = quantize_weight(torch.randn(n, k), scheme.weight)
    moved = n * k * (4 + 16 / scheme.weight.granularity.columns) / 8 + 2 * (n + k)
    assert floor(scheme, packed, n, k, 1, RATES) == pytest.approx(1e6 * moved / RATES["memory"])
    assert floor(None, None, n, k, 4096, RATES) == pytest.approx(1e6 * 2 * 4096 * n * k / RATES["16-bit"])


@pytest.mark.parametrize("name", PRESETS)
def test_the_limit_moves_what_is_stored(name):
    n, k = 96, 512
    scheme = PRESETS[name].fit("layer", (n, k))
    packed = quantize_weight(torch.randn(n, k), scheme.weight)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors)
    if scheme.weight.sparsity is not None:  # half the codes, and a bit for each column
        stored += n * k * (1 - scheme.weight.format.bits // 2) // 8
    slow = {"memory": 1e6, "16-bit": 1e15, "8-bit": 1e15}
    assert floor(scheme, packed, n, k, 1, slow) == pytest.approx(stored + 2 * (n + k))


def test_copies_together_exceed_the_caches():
    weight = torch.zeros(1 << 16, dtype=torch.uint8)
    assert sum(t.nbytes for (t,) in timing.copies(CPU, weight)) >= timing.COLD_BYTES["cpu"]
    assert len(timing.copies(CPU, torch.zeros(1 << 22, dtype=torch.uint8))) == 2
