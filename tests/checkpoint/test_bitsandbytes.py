"""Layers that bitsandbytes saved, against the weights that it decodes (tests/fixtures/bitsandbytes)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.bitsandbytes import BitsAndBytes
from qcompile.checkpoint.flat_blocks import block_count, group_granularity, spread_blocks
from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import open_store
from qcompile.errors import CheckpointError
from qcompile.methods import CHECKPOINT
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.reference import dequantize, expand_blocks
from qcompile.scheme import Granularity
from tests.tolerance import (
    U32,
    assert_within,
    float_bound,
    product_sqnr_floor,
    rewrite_sqnr_floor,
    sqnr,
    uniform_sqnr_floor,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bitsandbytes"
TENSORS = load_file(FIXTURES / "layers.safetensors")
LAYERS = sorted(name.removesuffix(".expected") for name in TENSORS if name.endswith(".expected"))
STATE = "weight.quant_state.bitsandbytes__nf4"


def layer(name: str) -> dict[str, Tensor]:
    """Tensors of a layer, and what bitsandbytes makes of them: `expected`, and of int8 an `input` and `output`."""
    return {key.removeprefix(name + "."): t for key, t in TENSORS.items() if key.startswith(name + ".")}


def saved(name: str) -> dict[str, Tensor]:
    return {key: t for key, t in layer(name).items() if key not in ("expected", "input", "output")}


def load(folder: Path, tensors: dict[str, Tensor], shape: tuple[int, ...], **config: object) -> PackedLinear | None:
    save_file({f"x.{key}": tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    store = open_store(folder)
    rows, columns = shape
    return BitsAndBytes({"quant_method": "bitsandbytes", **config}, store).linear(
        LayerTensors(store, "x"), (rows, columns)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_layers_decode_as_bitsandbytes_does(tmp_path, name):
    tensors = saved(name)
    expected = layer(name)["expected"]
    loaded = load(tmp_path, tensors, tuple(expected.shape))
    weight = dequantize(loaded.weight)
    if name == "int8":  # q * SCB / 127 there, q * (SCB / 127) here
        assert_within(weight, expected, float_bound(expected, 3, torch.float32))
        assert torch.equal(loaded.weight.unpack_codes(), tensors["weight"].view(torch.uint8) ^ 0x80)
    else:
        assert torch.equal(weight, expected)
    assert loaded.scheme.method == CHECKPOINT


def test_every_tensor_is_used(tmp_path):
    for name in LAYERS:
        tensors, shape = saved(name), layer(name)["expected"].shape
        save_file({f"x.{key}": tensor for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
        store = open_store(tmp_path / f"{name}.safetensors")
        given = LayerTensors(store, "x")
        method = method_for(None, store)
        assert isinstance(method, BitsAndBytes)
        assert method.linear(given, (shape[0], shape[1])) is not None
        assert given.taken == set(store.names())


def test_tables_of_ones_own_are_honoured(tmp_path):
    tensors, expected = saved("nf4_across_rows"), layer("nf4_across_rows")["expected"]
    weight = load(tmp_path, tensors | {"weight.quant_map": 2 * tensors["weight.quant_map"]}, expected.shape)
    assert isinstance(weight, Tensor)
    assert torch.equal(weight, 2 * expected)


def test_outlying_columns_are_multiplied_as_they_are(tmp_path):
    """Less what the outlying columns give exactly, both outputs are that of the other columns in 8 bits."""
    tensors = saved("int8")
    x, theirs, expected = (layer("int8")[name].double() for name in ("input", "output", "expected"))
    outlying = (x.abs() >= 6).any(0)
    assert 0 < outlying.sum() < len(outlying)
    loaded = load(tmp_path, tensors, tuple(expected.shape))
    module = QuantizedLinear(loaded.weight, loaded.scheme)
    exact, outliers = x.masked_fill(outlying, 0) @ expected.T, x.masked_fill(~outlying, 0) @ expected.T
    for output in (module(x.float()).double(), theirs):
        assert sqnr(exact, output - outliers) >= product_sqnr_floor(math.inf, uniform_sqnr_floor(8, 64))


def test_plain_layers_are_left(tmp_path):
    assert load(tmp_path, {"weight": torch.randn(4, 8)}, (4, 8)) is None
    with pytest.raises(CheckpointError, match=r"neither a 4-bit quantization state .* nor SCB"):
        load(tmp_path, {"weight": torch.zeros(16, 1, dtype=torch.uint8)}, (4, 8))


def test_outliers_are_those_of_the_configuration(tmp_path):
    tensors, shape = saved("int8"), layer("int8")["expected"].shape

    def threshold(**config: object) -> float | None:
        return load(tmp_path, tensors, shape, **config).scheme.activation.outlier_threshold

    assert (threshold(), threshold(llm_int8_threshold=3), threshold(llm_int8_threshold=0.0)) == (6.0, 3.0, None)
    for value in (-1, True, "6", float("nan"), float("inf"), 10**400):
        with pytest.raises(CheckpointError, match="llm_int8_threshold is"):
            threshold(llm_int8_threshold=value)


@pytest.mark.parametrize(("block", "shape"), [(64, (4, 96)), (64, (5, 7)), (64, (6, 32)), (100, (3, 50)), (7, (2, 14))])
def test_blocks_of_a_flat_weight(block, shape):
    values = torch.arange(block_count(block, shape), dtype=torch.float32)
    flat = values.repeat_interleave(block)[: shape[0] * shape[1]].view(shape)
    spread = spread_blocks(values, block, shape)
    granularity = group_granularity(block, shape)
    assert torch.equal(expand_blocks(spread, granularity, shape), flat)
    assert spread.shape == granularity.scale_shape(shape)


def test_groups_are_as_large_as_can_be():
    assert group_granularity(64, (8, 128)) == Granularity.group(64)
    assert group_granularity(64, (8, 32)) == Granularity.channel()
    assert group_granularity(64, (8, 96)) == Granularity.group(32)


def state_of(tensors: dict[str, Tensor], **changes: object) -> Tensor:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGE = {
    "state is no JSON": ({STATE: torch.tensor([123, 1], dtype=torch.uint8)}, r"weight\.quant_state.* is no JSON"),
    "state is no text": ({STATE: torch.full((8,), 255, dtype=torch.uint8)}, "is no JSON"),
    "state nests": ({STATE: torch.full((9000,), 91, dtype=torch.uint8)}, "is no JSON"),
    "state is a list": ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "is a list in JSON"),
    "state is long": ({STATE: torch.zeros(1 << 15, dtype=torch.uint8)}, "at most 16384 bytes"),
    "state of another dtype": ({STATE: torch.zeros(8)}, "has dtype torch.float32"),
    "another shape": ({"shape": [128, 24]}, r"says shape \[128, 24\], but the model's layer is \[24, 128\]"),
    "a shape of strings": ({"shape": "24x128"}, "says shape '24x128'"),
    "block of 0": ({"blocksize": 0}, "says blocksize 0"),
    "block of true": ({"blocksize": True}, "says blocksize True"),
    "huge block": ({"blocksize": 1 << 40}, "says blocksize"),
    "another block": ({"blocksize": 128}, r"weight\.absmax has shape \(48,\), expected \(24\)"),
    "another type": ({"quant_type": "fp4"}, "says quant_type 'fp4'"),
    "weight too short": ({"weight": torch.zeros(100, 1, dtype=torch.uint8)}, r"\[24, 128\] in 4 bits are 1536 bytes"),
    "weight of another dtype": ({"weight": torch.zeros(384, 1, dtype=torch.int32)}, "weight has dtype torch.int32"),
    "NaN in absmax": ({"weight.absmax": torch.full((48,), float("nan"))}, "weight.absmax holds NaN"),
    "absmax of float16": ({"weight.absmax": torch.ones(48, dtype=torch.float16)}, "has dtype torch.float16"),
    "NaN in the table": ({"weight.quant_map": torch.full((16,), float("nan"))}, "weight.quant_map holds NaN"),
    "a short table": ({"weight.quant_map": torch.ones(15)}, r"weight\.quant_map has shape \(15,\)"),
    "two states": ({"weight.quant_state.bitsandbytes__fp4": torch.zeros(2, dtype=torch.uint8)}, "it has 2 quant"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_4_bit_layers_are_refused(tmp_path, what):
    tensors, shape = saved("nf4"), layer("nf4")["expected"].shape
    changes, message = DAMAGE[what]
    if not any(isinstance(value, Tensor) for value in changes.values()):
        changes = {STATE: state_of(tensors, **changes)}
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tmp_path, tensors | changes, shape)
    assert "model.safetensors: x: " in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight.nested_absmax": torch.ones(1)}, r"weight\.nested_absmax has shape \(1,\), expected \(2\)"),
        ({"weight.nested_absmax": torch.full((2,), float("inf"))}, "weight.absmax holds NaN or infinity"),
        ({"weight.nested_quant_map": torch.ones(255)}, r"nested_quant_map has shape \(255,\)"),
        ({"weight.absmax": torch.ones(288)}, "weight.absmax has dtype torch.float32, expected torch.uint8"),
        ({"nested_blocksize": None}, "says nested_blocksize None"),
        ({"nested_offset": "0"}, "says nested_offset '0'"),
        ({"nested_offset": float("nan")}, "says nested_offset nan"),
        ({"nested_offset": 10**400}, "says nested_offset an integer of 1329 bits"),
    ],
)
def test_damaged_double_quantization_is_refused(tmp_path, changes, message):
    tensors, shape = saved("nf4_nested"), layer("nf4_nested")["expected"].shape
    if not any(isinstance(value, Tensor) for value in changes.values()):
        changes = {STATE: state_of(tensors, **changes)}
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tensors | changes, shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is 2: int8 weights in the tile order"),
        ({"SCB": torch.full((32,), float("nan"))}, "SCB holds NaN"),
        ({"SCB": torch.ones(31)}, r"SCB has shape \(31,\)"),
        ({"weight": torch.zeros(64, 32, dtype=torch.int8)}, r"weight has shape \(64, 32\)"),
        ({"weight": torch.zeros(32, 64)}, "weight has dtype torch.float32"),
    ],
)
def test_damaged_int8_layers_are_refused(tmp_path, changes, message):
    tensors, shape = saved("int8"), layer("int8")["expected"].shape
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tensors | changes, shape)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4_in_bfloat16", "int8"])
def test_layers_are_written_as_bitsandbytes_does(tmp_path, name):
    """The very tensors, but for bytes that were declared to be another dtype, and SCBs that mean the same scale."""
    tensors = saved(name)
    loaded = load(tmp_path, tensors, tuple(layer(name)["expected"].shape))
    model = nn.Sequential(QuantizedLinear(loaded.weight, loaded.scheme))
    qcompile.save(model, tmp_path / "again", "bitsandbytes")
    written = load_file(tmp_path / "again" / "model.safetensors")
    if name == "nf4_in_bfloat16":
        assert torch.equal(written["0.weight"], tensors["weight"].view(torch.uint8).view(-1, 1))
        return
    assert written.keys() == {f"0.{key}" for key in tensors}
    for key, tensor in tensors.items():
        divisor = 127 if key == "SCB" else 1
        assert torch.equal(written[f"0.{key}"] / divisor, tensor / divisor), key


def test_scales_of_ones_own_may_need_rounding(tmp_path):
    """Dividing by 127 leaves out some float32 numbers."""
    model = qcompile.quantize_(nn.Sequential(nn.Linear(64, 512, bias=False)), "int8", progress=False)
    with pytest.raises(CheckpointError, match="its scales are not exact in float32"):
        qcompile.save(model, tmp_path / "model", "bitsandbytes")
    with pytest.warns(UserWarning, match="1 layers were rounded"):
        done = qcompile.save(model, tmp_path / "model", "bitsandbytes", allow_rounding=True)
    assert done.rounded[0].error <= 2 * U32


@pytest.mark.parametrize("name", ["llama_nf4", "llama_int8"])
def test_models_come_back(tmp_path, name):
    model = qcompile.load(FIXTURES / name, progress=False)
    qcompile.save(model, tmp_path / name, "bitsandbytes")
    again = qcompile.load(tmp_path / name, progress=False)
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    written, original = (json.loads((f / name / "config.json").read_text()) for f in (tmp_path, FIXTURES))
    differing = {k for k, v in written["quantization_config"].items() if original["quantization_config"][k] != v}
    assert differing <= {"bnb_4bit_use_double_quant", "llm_int8_skip_modules", "bnb_4bit_quant_type"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("int4", "it is int4 group 64, neither nf4 or fp4 in groups nor int8"),
        (
            {"rules": [{"layers": "0", "scheme": "nf4"}, {"layers": "1", "scheme": "fp4"}]},
            "it is fp4, 0 is nf4, and all layers are of one kind",
        ),
        ({"weight": {"format": "nf4", "group_size": 16}}, "its scales are per group 16; blocks are of 32"),
    ],
)
def test_other_layers_are_not_written(tmp_path, config, message):
    model = qcompile.quantize_(nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 32)), config, progress=False)
    with pytest.raises(CheckpointError, match=message):
        qcompile.save(model, tmp_path / "model", "bitsandbytes")


@pytest.mark.parametrize("name", ["llama_nf4", "llama_int8"])
def test_models_that_bitsandbytes_saved(name):
    """4-bit: decoded weights in float32. int8: linears round their inputs, as there, but to other scales."""
    reference = load_file(FIXTURES / f"{name}_logits.safetensors")
    model = qcompile.load(FIXTURES / name, dtype=torch.float32, progress=False)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 14
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    rounded = uniform_sqnr_floor(8, 128) - 10 * math.log10(2 * len(linears))
    floor = rounded if name == "llama_int8" else rewrite_sqnr_floor(40, 128)
    assert sqnr(reference["logits"], logits) >= floor
