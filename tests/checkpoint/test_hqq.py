"""Layers that hqq saved, against the weights that it decodes in float32 (tests/fixtures/hqq)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile
from qcompile.checkpoint.hqq import HQQ
from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import open_store
from qcompile.errors import CheckpointError
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.reference import dequantize, expand_blocks
from tests.tolerance import assert_within, float_bound, rewrite_sqnr_floor, sqnr

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hqq"
TENSORS = load_file(FIXTURES / "layers.safetensors")
LAYERS = sorted(name.removesuffix(".expected") for name in TENSORS if name.endswith(".expected"))


def layer(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name + "."): t for key, t in TENSORS.items() if key.startswith(name + ".")}


def load(folder: Path, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> PackedLinear | None:
    save_file({f"x.{key}": tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    store = open_store(folder)
    method = method_for(None, store)
    assert isinstance(method, HQQ)
    given = LayerTensors(store, "x")
    loaded = method.linear(given, (shape[0], shape[1]))
    assert set(store.names()) - given.taken <= {"x.bias"}
    return loaded


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "axis0"])
def test_layers_decode_as_hqq_does(tmp_path, name):
    """Bit for bit where scale and zero are 16-bit; else q * scale and scale * zero round where hqq rounds q - zero."""
    tensors = layer(name)
    expected = tensors.pop("expected")
    shape = (expected.shape[0], expected.shape[1])
    packed = load(tmp_path, tensors, shape).weight
    weight = dequantize(packed)
    if tensors["scale"].dtype == torch.float32:
        magnitude = (weight.double() - expand(packed.offset, packed, shape)).abs() + expand(
            packed.offset, packed, shape
        ).abs()
        assert_within(weight, expected, float_bound(expected, 3, torch.float32, magnitude))
    else:
        assert torch.equal(weight, expected)


def expand(values: Tensor, packed, shape: tuple[int, int]) -> Tensor:
    return expand_blocks(values, packed.scheme.granularity, shape).double()


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": torch.tensor([128, 16])}, r"says shape \[128, 16\], but the model's layer is \[16, 128\]"),
        ({"shape": torch.tensor([16, 128, 1])}, r"shape has shape \(3,\)"),
        ({"axis": torch.tensor(2)}, "says axis 2"),
        ({"nbits": torch.tensor(float("nan"))}, "says nbits 0, but packing 4bit_u8"),
        ({"axis": torch.tensor(1.0)}, "axis has dtype torch.float32"),
        ({"group_size": torch.tensor(0)}, "says group_size 0"),
        ({"group_size": torch.tensor(-64)}, "says group_size -64"),
        ({"group_size": torch.tensor(48)}, "group_size 48 does not divide its 16 x 128 weights"),
        ({"group_size": torch.tensor(32)}, r"W_q is torch.uint8 \(16, 64\)|scale has shape"),
        ({"packing": text("5bit_u8")}, "says packing '5bit_u8'; known are 8bit_u8"),
        ({"packing": text("x" * 65)}, "packing has shape"),
        ({"packing": text("3bit_32")}, "says nbits 4, but packing 3bit_32"),
        ({"W_q": torch.zeros(15, 64, dtype=torch.uint8)}, "32 x 64 codes in packing 4bit_u8 are 1024 bytes"),
        ({"W_q": torch.zeros(1024, dtype=torch.int8)}, "W_q has dtype torch.int8"),
        ({"scale": torch.full((32, 1), float("nan"))}, "scale holds NaN"),
        ({"zero": torch.full((32, 1), float("inf"))}, "zero holds NaN or infinity"),
        ({"zero": torch.ones(16, 1)}, r"zero has shape \(16, 1\) for 32 groups"),
        ({"zero": torch.ones(32, 1, dtype=torch.uint8)}, "zero has dtype torch.uint8"),
    ],
)
def test_damaged_layers_are_refused(tmp_path, changes, message):
    tensors = layer("bits4")
    shape = tensors.pop("expected").shape
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tmp_path, tensors | changes, shape)
    assert "model.safetensors: x: " in str(raised.value)


def test_codes_that_are_too_wide_are_refused(tmp_path):
    tensors = layer("bits6")
    shape = tensors.pop("expected").shape
    with pytest.raises(CheckpointError, match="codes of more than 6 bits"):
        load(tmp_path, tensors | {"W_q": torch.full((16, 64), 64, dtype=torch.uint8)}, shape)
    with pytest.raises(CheckpointError, match="says nbits 7, but packing 8bit_u8"):
        load(tmp_path, tensors | {"nbits": torch.tensor(7)}, shape)


def test_groups_of_columns_are_decoded(tmp_path):
    tensors = layer("axis0")
    expected = tensors.pop("expected")
    weight = load(tmp_path, tensors, expected.shape)
    assert isinstance(weight, Tensor)
    assert torch.equal(weight, expected)


def test_quantized_scales_are_refused(tmp_path):
    tensors = layer("bits4")
    shape = tensors.pop("expected").shape
    del tensors["zero"]
    with pytest.raises(CheckpointError, match="quant_zero=False"):
        load(tmp_path, tensors, shape)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "qmodel.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="pickle"):
        open_store(tmp_path)


def test_a_model_that_hqq_saved():
    reference = load_file(FIXTURES / "llama_logits.safetensors")
    model = qcompile.load(FIXTURES / "llama", dtype=torch.float32, progress=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 14
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert sqnr(reference["logits"], logits) >= rewrite_sqnr_floor(40, 128)
