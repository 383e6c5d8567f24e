"""FP8 checkpoints, against the weights that transformers decodes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from qcompile.checkpoint.fp8 import FBGEMM, FP8
from qcompile.errors import CheckpointError
from qcompile.scheme import Granularity
from tests.checkpoint.integer_files import write_llama
from tests.checkpoint.layer_files import check_model, decoded, load_layer

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPE = (300, 160)


def only_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def layer(scale: Tensor, suffix: str = "weight_scale_inv", dtype: torch.dtype = E4M3) -> dict[str, Tensor]:
    return {"weight": torch.randn(SHAPE).to(dtype), suffix: scale}


def spread(weight: Tensor, scale: Tensor, tile: list[int]) -> Tensor:
    """A weight times the scales of its tiles, the last of which may reach past it."""
    scale = scale.float().repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return weight.float() * scale[: weight.shape[0], : weight.shape[1]]


def config(**more: object) -> dict:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **more}


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_tiles(tmp_path, suffix, dtype):
    """Also where they do not fit: 300 rows and 160 columns are 3 by 2 tiles."""
    scale = torch.rand(3, 2) + 0.5
    tensors = layer(scale, suffix, dtype)
    found = load_layer(tmp_path, config(weight_block_size=[128, 128]), tensors, SHAPE)
    expected = spread(tensors["weight"], scale, [128, 128])
    assert torch.equal(decoded(found), expected)
    assert found.weight.scheme.format.name == ("fp8_e4m3" if dtype == E4M3 else "fp8_e5m2")
    assert str(found.scheme.activation) == "fp8_e4m3 dynamic per group 128"


@pytest.mark.parametrize("tile", [[64, 32], [1, 32], [100, 160]])
def test_other_tiles(tmp_path, tile):
    count = -(-SHAPE[0] // tile[0]), -(-SHAPE[1] // tile[1])
    tensors = layer(torch.rand(count) + 0.5)
    found = load_layer(tmp_path, config(weight_block_size=tile), tensors, SHAPE)
    expected = spread(tensors["weight"], tensors["weight_scale_inv"], tile)
    assert torch.equal(decoded(found), expected)


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_scales_that_are_powers_of_two(tmp_path, stored):
    exponents = torch.randint(100, 140, (3, 2), dtype=torch.uint8)
    tensors = layer(exponents.view(stored))
    found = load_layer(tmp_path, config(weight_block_size=[128, 128], scale_fmt="ue8m0"), tensors, SHAPE)
    scale = (exponents.float() - 127).exp2()
    assert torch.equal(decoded(found), spread(tensors["weight"], scale, [128, 128]))
    assert found.weight.scale.dtype == torch.float8_e8m0fnu


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("count", [(), (1,), (1, 1), (300,), (300, 1)], ids=str)
def test_what_shares_a_scale_is_read_off_its_shape(tmp_path, suffix, count):
    """Whatever the name, and whatever tiles the configuration speaks of."""
    scale = torch.rand(count) + 0.5
    tensors = layer(scale, suffix)
    found = load_layer(tmp_path, config(weight_block_size=[128, 128]), tensors, SHAPE)
    rows = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    assert torch.equal(decoded(found), tensors["weight"].float() * rows)
    assert found.weight.scheme.granularity == (Granularity.channel() if scale.numel() > 1 else Granularity.tensor())
    assert str(found.scheme.activation) == "fp8_e4m3 dynamic per token"


def test_a_small_layer_of_tiles_keeps_its_inputs_in_groups(tmp_path):
    tensors = {"weight": torch.zeros(64, 96).to(E4M3), "weight_scale_inv": torch.ones(1, 1)}
    found = load_layer(tmp_path, config(weight_block_size=[128, 128]), tensors, (64, 96))
    assert str(found.scheme.activation) == "fp8_e4m3 dynamic per group 128"


@pytest.mark.parametrize("suffix", ["input_scale", "activation_scale", "qscale_act"])
def test_fixed_scales_of_inputs(tmp_path, suffix):
    tensors = layer(torch.ones(())) | {suffix: torch.tensor(0.25)}
    found = load_layer(tmp_path, config(activation_scheme="static"), tensors, SHAPE)
    decoded(found)
    assert str(found.scheme.activation) == "fp8_e4m3 static per tensor"
    assert found.input_scale == 0.25
    found = load_layer(tmp_path, config(), tensors, SHAPE)
    assert found.scheme.activation.dynamic
    assert found.input_scale is None


def test_fp4_experts(tmp_path):
    """Of DeepSeek V4: two codes a byte, E8M0 scales for 32 columns."""
    codes = torch.randint(0, 256, (8, 48), dtype=torch.uint8)
    exponents = torch.randint(100, 140, (8, 3), dtype=torch.uint8)
    tensors = {"weight": codes.view(torch.int8), "scale": exponents.view(torch.float8_e8m0fnu)}
    found = load_layer(tmp_path, config(weight_block_size=[128, 128], expert_dtype="fp4"), tensors, (8, 96))
    expected = Fp8Dequantize(None)._dequantize_one(codes.view(torch.int8), exponents, torch.float32)
    assert torch.equal(decoded(found), expected)
    assert found.scheme.activation is None


def test_fbgemm(tmp_path):
    scale = torch.rand(300, 1)
    tensors = layer(scale, "weight_scale")
    found = load_layer(tmp_path, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, tensors, SHAPE)
    assert torch.equal(decoded(found), tensors["weight"].float() * scale)
    assert str(found.scheme.activation) == "fp8_e4m3 dynamic per token"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_plain_weight_is_not_quantized(tmp_path, dtype):
    assert load_layer(tmp_path, config(), {"weight": torch.zeros(SHAPE, dtype=dtype)}, SHAPE) is None


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_models_are_those_that_transformers_loads(tmp_path, key):
    """Tiles of 32 x 32; a layer of each kind is left out, under transformers' and under vLLM's name of the list."""
    tile = (32, 32)
    quantize = Fp8Quantize(
        SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=tile, scale_fmt="float"))
    )
    skipped = ["model.layers.0.mlp.down_proj", "lm_head"]

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        if name in skipped:
            return {}, torch.empty(0)
        stored = {
            suffix.rpartition(".")[2]: tensor
            for suffix, tensor in quantize._quantize_one(f"{name}.weight", torch.randn(shape) * 0.02).items()
        }
        return stored, spread(stored["weight"], stored["weight_scale_inv"], list(tile))

    settings = config(weight_block_size=list(tile)) | {key: skipped}
    write_llama(tmp_path, settings, pack)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = check_model(tmp_path, expected.eval())
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


# ---------------------------------------------------------------------------------------------------------------------
# Hostile input


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"weight": torch.full(SHAPE, float("nan")).to(E4M3)}, "weight holds NaN or infinity"),
        ({"weight": torch.full(SHAPE, float("nan")).to(E5M2)}, "weight holds NaN or infinity"),
        ({"weight": torch.full(SHAPE, -torch.inf).to(E5M2)}, "weight holds NaN or infinity"),
        ({"weight": torch.zeros(160, 300).to(E4M3)}, r"weight has shape \(160, 300\)"),
        ({"weight": torch.zeros(SHAPE, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"weight": torch.zeros(SHAPE, dtype=torch.int8)}, r"weight_scale_inv has shape \(3, 2\)"),
        ({"weight_scale_inv": torch.ones(2, 3)}, r"has shape \(2, 3\), but a weight"),
        ({"weight_scale_inv": torch.ones(160)}, r"has shape \(160,\), but a weight"),
        ({"weight_scale_inv": torch.ones(3, 2, dtype=torch.float64)}, "dtype torch.float64"),
        ({"weight_scale_inv": torch.full((3, 2), float("nan"))}, "scale that is nan"),
        ({"weight_scale_inv": torch.full((3, 2), float("inf"))}, "scale that is inf"),
        ({"weight_scale_inv": torch.zeros(3, 2)}, "scale that is 0"),
        ({"weight_scale_inv": -torch.ones(3, 2)}, "scale that is -1"),
        ({"weight_scale_inv": torch.full((3, 2), 255, dtype=torch.uint8)}, "scale that is nan"),
        ({"weight_scale": torch.ones(3, 2)}, "it has weight_scale_inv and weight_scale"),
    ],
    ids=only_text,
)
def test_broken_tensors(tmp_path, broken, match):
    with pytest.raises(CheckpointError, match=match) as error:
        load_layer(tmp_path, config(weight_block_size=[128, 128]), layer(torch.ones(3, 2)) | broken, SHAPE)
    assert "model.safetensors: x" in str(error.value)


def test_missing_tensors_and_broken_scales_of_inputs(tmp_path):
    with pytest.raises(CheckpointError, match="scale of the weight is needed once, and it has none of"):
        load_layer(tmp_path, config(), {"weight": torch.zeros(SHAPE).to(E4M3)}, SHAPE)
    with pytest.raises(CheckpointError, match="weight is missing"):
        load_layer(tmp_path, config(), {"weight_scale": torch.ones(())}, SHAPE)
    for scale, match in ((torch.tensor(-1.0), "input_scale holds a scale that is -1"), (torch.ones(3), "one number")):
        with pytest.raises(CheckpointError, match=match):
            load_layer(
                tmp_path, config(activation_scheme="static"), layer(torch.ones(())) | {"input_scale": scale}, SHAPE
            )
    with pytest.raises(CheckpointError, match="activation_scheme is static, but"):
        load_layer(tmp_path, config(activation_scheme="static"), layer(torch.ones(())), SHAPE)


@pytest.mark.parametrize("method", [FP8, FBGEMM])
@pytest.mark.parametrize(
    "given",
    [
        {"activation_scheme": "sometimes"},
        {"activation_scheme": 3},
        {"weight_block_size": 128},
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": [1e3, 128]},
        {"weight_block_size": [128, 2**40]},
        {"scale_fmt": "ue9m9"},
    ],
    ids=json.dumps,
)
def test_broken_configurations(method, given):
    with pytest.raises(CheckpointError, match=next(iter(given))):
        method(given, None)
