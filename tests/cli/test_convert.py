"""`qcompile convert` keeps codes, says what is not exact, and refuses what would be lost silently."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")

import qcompile
from qcompile.cli import app
from tests.checkpoint.tiny_models import llama, quantized, same


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def refused(result, target, *words):
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert not target.exists() or list(target.iterdir()) == []


def load(path):
    return qcompile.load(path, dtype=torch.float32, progress=False)


@pytest.mark.parametrize("format", ["gptq", "awq", "gguf"])
def test_codes_stay(format, tmp_path):
    model = quantized("int4", num_hidden_layers=1)
    qcompile.save(model, tmp_path / "a")
    result = run(tmp_path / "a", tmp_path / "b", "--to", format)
    assert result.exit_code == 0, result.output
    assert "7 of 7 quantized layers are exact" in result.stdout
    assert "float32" in result.stdout
    made = tmp_path / "b" / ("model.gguf" if format == "gguf" else "")
    same(model, load(made))
    result = run(made, tmp_path / "c", "--to", "compressed-tensors")
    assert result.exit_code == 0, result.output
    same(model, load(tmp_path / "c"))


def test_rounding_is_refused_and_then_told(tmp_path):
    qcompile.save(quantized("int8_weight_only", num_hidden_layers=1), tmp_path / "a")
    result = run(tmp_path / "a", tmp_path / "b", "--to", "gptq")
    refused(result, tmp_path / "b", "not exact in float16", "allow_rounding", "--allow-rounding", "compressed-tensors")
    result = run(tmp_path / "a", tmp_path / "b", "--to", "gptq", "--allow-rounding")
    assert result.exit_code == 0, result.output
    assert "0 of 7 quantized layers are exact" in result.stdout
    assert "scales" in result.stdout
    assert "float16" in result.stdout


def test_what_is_not_quantized_keeps_its_precision(tmp_path):
    model = quantized("int4", num_hidden_layers=1)
    model.model.embed_tokens.to(torch.float16)  # exact neither in float16 nor in bfloat16, with float32 norms
    qcompile.save(model, tmp_path / "a")
    result = run(tmp_path / "a", tmp_path / "b", "--to", "gptq")
    assert "what is not quantized is float32" in result.stdout
    assert "rounded" not in result.stdout
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"
    result = run(tmp_path / "a", tmp_path / "c", "--to", "gptq", "--dtype", "bfloat16")
    assert "bfloat16; " in result.stdout
    assert "tensors were rounded" in result.stdout


def test_models_that_are_not_quantized(tmp_path):
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "a")
    refused(run(tmp_path / "a", tmp_path / "b", "--to", "gptq"), tmp_path / "b", "not quantized", "--config")
    result = run(tmp_path / "a", tmp_path / "b", "--to", "gptq", "--config", "int4")
    assert result.exit_code == 0, result.output
    refused(run(tmp_path / "b", tmp_path / "c", "--to", "awq", "--config", "int4"), tmp_path / "c", "quantized already")


def test_mistakes(tmp_path):
    qcompile.save(quantized("nf4", num_hidden_layers=1), tmp_path / "a", "bitsandbytes")
    result = run(tmp_path / "a", tmp_path / "b", "--to", "awq")
    refused(result, tmp_path / "b", "model.layers.0", "nf4", "bitsandbytes", "7 of 7 layers do not fit")
    refused(run(tmp_path / "a", tmp_path / "b", "--to", "gtpq"), tmp_path / "b", "'gtpq'", "gptq")
    refused(run(tmp_path / "a", tmp_path / "b", "--to", "gptq", "--dtype", "fp16"), tmp_path / "b", "float16")
    refused(run(tmp_path / "a", tmp_path / "b", "--to", "gptq", "--max-shard-size", "x"), tmp_path / "b", "5GB")
    refused(run(tmp_path / "no", tmp_path / "b", "--to", "gptq"), tmp_path / "b", "no such file")
