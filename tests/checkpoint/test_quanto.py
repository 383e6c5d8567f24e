"""Layers that optimum-quanto saved, against the weights that it decodes in float32 (tests/fixtures/quanto)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile
from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.quanto import Quanto
from qcompile.checkpoint.store import open_store
from qcompile.errors import CheckpointError
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.reference import dequantize
from qcompile.scheme import Granularity
from tests.tolerance import rewrite_sqnr_floor, sqnr

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quanto"
TENSORS = load_file(FIXTURES / "layers.safetensors")
MAP = json.loads((FIXTURES / "quantization_map.json").read_text())
LAYERS = sorted(name.removesuffix(".expected") for name in TENSORS if name.endswith(".expected"))


def layer(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name + "."): t for key, t in TENSORS.items() if key.startswith(name + ".")}


def load(folder: Path, tensors: dict[str, Tensor], shape: tuple[int, ...], quantization: object) -> PackedLinear | None:
    save_file({f"x.{key}": tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "quantization_map.json").unlink(missing_ok=True)
    if quantization is not None:
        (folder / "quantization_map.json").write_text(json.dumps({"x": quantization}))
    store = open_store(folder)
    method = method_for(None, store)
    assert isinstance(method, Quanto)
    given = LayerTensors(store, "x")
    loaded = method.linear(given, (shape[0], shape[1]))
    assert set(store.names()) - given.taken <= {"x.bias"}
    return loaded


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_decode_as_quanto_does(tmp_path, name, mapped):
    tensors = layer(name)
    expected = tensors.pop("expected")
    loaded = load(tmp_path, tensors, expected.shape, MAP.get(name) if mapped else None)
    assert torch.equal(dequantize(loaded.weight), expected)
    activation = loaded.scheme.activation
    if mapped and name.endswith("_static"):
        assert activation.granularity == Granularity.tensor()
        assert not activation.dynamic
        assert torch.equal(loaded.input_scale, tensors["input_scale"])
    else:
        assert activation is None
        assert loaded.input_scale is None


DAMAGE = [
    ("qint4", {"weight._scale": torch.ones(31, 1)}, "weight._scale has 31 values, which do not divide"),
    ("qint4", {"weight._scale": torch.ones(0, 1)}, "weight._scale has 0 values"),
    ("qint4", {"weight._scale": torch.full((32, 1), float("nan"))}, "weight._scale holds NaN"),
    ("qint4", {"weight._shift": torch.ones(16, 1)}, "weight._shift is torch.float32 with 16 values"),
    ("qint4", {"weight._shift": torch.ones(32, 1).half()}, "weight._shift is torch.float16"),
    ("qint4", {"weight._data._data": torch.zeros(15, 128, dtype=torch.uint8)}, r"has shape \(15, 128\); 32 groups"),
    ("qint4", {"weight._data._data": torch.zeros(16, 128, dtype=torch.int8)}, "has dtype torch.int8"),
    (
        "qint2",
        {"weight._data._data": torch.zeros(16, 128, dtype=torch.uint8)},
        "in qint2, as the quantization",
    ),
    ("zero_point", {"weight._shift": torch.full((32, 1), -1, dtype=torch.int8)}, "no 32 integers from 0 to 255"),
    ("zero_point", {"weight._shift": torch.ones(31, 1, dtype=torch.uint8)}, "no 32 integers from 0 to 255"),
    ("qint8", {"weight._data": torch.zeros(64, 16, dtype=torch.int8)}, r"weight._data has shape \(64, 16\)"),
    ("qint8", {"weight._data": torch.zeros(16, 64, dtype=torch.int16)}, "weight._data is torch.int16; readable are"),
    ("qint8", {"weight._scale": torch.ones(15, 1)}, "weight._scale has 15 values for 16 rows"),
    ("qint8_static", {"input_scale": torch.tensor(0.0)}, "input_scale is 0.0"),
    ("qint8_static", {"input_scale": torch.ones(2)}, r"input_scale has shape \(2,\)"),
]


@pytest.mark.parametrize(("name", "changes", "message"), DAMAGE)
def test_damaged_layers_are_refused(tmp_path, name, changes, message):
    tensors = layer(name)
    shape = tensors.pop("expected").shape
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tmp_path, tensors | changes, shape, MAP.get(name))
    assert "model.safetensors: x: " in str(raised.value)


@pytest.mark.parametrize(
    "entry",
    [
        "qint8",
        {"weights": "qint8"},
        {"weights": "qint8", "activations": "qint3"},
        {"weights": 8, "activations": "none"},
    ],
)
def test_a_quantization_map_is_checked(tmp_path, entry):
    tensors = layer("qint8")
    shape = tensors.pop("expected").shape
    with pytest.raises(CheckpointError, match=r"quantization_map\.json: x is"):
        load(tmp_path, tensors, shape, entry)


def test_rows_that_could_be_of_either_width_need_the_map(tmp_path):
    tensors = {
        "weight._data._data": torch.zeros(1, 32, dtype=torch.uint8),
        "weight._scale": torch.ones(1, 1),
        "weight._shift": torch.ones(1, 1),
    }
    with pytest.raises(CheckpointError, match="either of qint2 and qint4"):
        load(tmp_path, tensors, (1, 32), None)
    assert load(tmp_path, tensors, (1, 32), {"weights": "qint2", "activations": "none"}).scheme.weight.format.bits == 2


def test_a_model_that_quanto_saved():
    reference = load_file(FIXTURES / "llama_logits.safetensors")
    model = qcompile.load(FIXTURES / "llama", dtype=torch.float32, progress=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 14
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert sqnr(reference["logits"], logits) >= rewrite_sqnr_floor(40, 128)
