"""`qcompile inspect` says of each layer what its file holds."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

import qcompile
from qcompile.checkpoint.inspection import inspect
from qcompile.checkpoint.kv_scales import KVScales
from qcompile.checkpoint.store import SafetensorsStore
from qcompile.cli import app
from tests.checkpoint.tiny_models import llama, quantized


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    rules = [
        {"layers": "*.0.mlp.down_proj", "scheme": "int8"},
        {"layers": "lm_head", "scheme": None},
        {"layers": "*", "scheme": "int4_asym"},
    ]
    model = qcompile.quantize_(llama(), {"rules": rules}, progress=False)
    model.model.layers[0].self_attn.kv_scales = KVScales(torch.tensor(0.5), torch.tensor(2.0))
    qcompile.save(model, tmp_path)
    return tmp_path


def test_layers(folder):
    found = json.loads(run(folder, "--json").stdout)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 15
    assert layers["model.layers.0.mlp.down_proj"] | {"nbytes": 0} == {
        "name": "model.layers.0.mlp.down_proj",
        "shape": [128, 256],
        "format": "int8",
        "bits": 8,
        "scales": "channel",
        "scale_dtype": "float32",
        "zero_points": None,
        "act_order": False,
        "activations": "int8 dynamic per token",
        "nbytes": 0,
    }
    other = layers["model.layers.1.mlp.down_proj"]
    assert (other["format"], other["scales"], other["zero_points"]) == ("uint4", "group 128", "zero points")
    assert (layers["lm_head"]["format"], layers["lm_head"]["bits"]) == (None, 32)
    assert (found["model"], found["method"]) == ("llama", "compressed-tensors")
    assert found["kv_scales"] == {"model.layers.0.self_attn": [[0.5], [2.0]]}
    assert found["metadata"]["format"] == "mixed-precision"
    bytes_in_file = (folder / "model.safetensors").stat().st_size
    assert 0 <= bytes_in_file - found["nbytes"] < 20_000  # the header


def test_the_table(folder):
    result = run(folder)
    assert result.exit_code == 0, result.output
    for word in ("uint4", "zero points", "dynamic", "group 128", "KV cache", "llama", "mixed-precision"):
        assert word in " ".join(result.stdout.split()), word


def test_only_one_layer_of_a_kind_is_read(tmp_path, monkeypatch):
    qcompile.save(quantized("int4"), tmp_path)
    read = []
    original = SafetensorsStore.read
    monkeypatch.setattr(SafetensorsStore, "read", lambda self, name: (read.append(name), original(self, name))[1])
    assert len(inspect(tmp_path).layers) == 15
    assert not any(name.startswith("model.layers.1.") for name in read)


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    qcompile.save(quantized("q5_1", tie_word_embeddings=True), tmp_path, "gguf")
    path = tmp_path / "model.gguf"
    found = inspect(path)
    assert {layer.format for layer in found.layers} == {"uint5"}
    assert {layer.zero_points for layer in found.layers} == {"offsets"}
    assert found.metadata["llama.block_count"] == 2
    assert 0 <= path.stat().st_size - found.nbytes < 5000


def test_a_bare_file(folder, tmp_path):
    found = inspect(folder / "model.safetensors")
    assert found.layers == ()
    assert found.method == "compressed-tensors"
    assert found.other["int32"][0] > 13


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: None, ["no such file"]),
        (lambda p: p.write_bytes(b"x" * 100), ["damaged"]),
        (lambda p: p.mkdir(), ["no *.safetensors"]),
    ],
)
def test_mistakes(tmp_path, write, words):
    path = tmp_path / "model"
    write(path)
    result = run(path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    for word in [str(path), *words]:
        assert word in result.stderr
