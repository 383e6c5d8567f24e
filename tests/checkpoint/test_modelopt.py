"""Checkpoints that NVIDIA Model Optimizer exported, against what its own decoders make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qcompile.checkpoint.kv_scales import kv_scales
from qcompile.checkpoint.modelopt import ModelOpt
from qcompile.checkpoint.store import open_store
from qcompile.errors import CheckpointError
from tests.checkpoint.layer_files import check_fixture, decoded, load_layer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "modelopt"
INPUTS = {
    "fp8_kv": "fp8_e4m3 static per tensor",
    "fp8_pb_wo": None,
    "fp8_pc_pt": "fp8_e4m3 dynamic per token",
    "int4_awq": None,
    "int8_sq": "int8 static per tensor",
    "int8_wo": None,
    "mxfp8": "fp8_e4m3 dynamic per group 32",
    "nvfp4": None,
    "w4a16_nvfp4": None,
    "w4a8_awq": "fp8_e4m3 static per tensor",
    "w4a8_mxfp4_fp8": "fp8_e4m3 dynamic per token",
    "w4a8_nvfp4_fp8": "fp8_e4m3 static per tensor",
}


def only_text(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes inputs to FP4")
@pytest.mark.parametrize("name", INPUTS)
def test_models_that_model_optimizer_saved(name):
    for layer in check_fixture(FIXTURES / name):
        activation = layer.scheme.activation
        assert (None if activation is None else str(activation)) == INPUTS[name]


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes inputs to FP4")
@pytest.mark.parametrize("name", INPUTS)
def test_the_configuration_beside_the_model(name):
    """hf_quant_config.json says the same as what config.json embeds."""
    beside = json.loads((FIXTURES / name / "hf_quant_config.json").read_text())
    check_fixture(FIXTURES / name, quantization_config={"quant_method": "modelopt", **beside})


def test_scales_of_awq_multiply_inputs(tmp_path):
    layers = check_fixture(FIXTURES / "int4_awq")
    assert any(layer.pre_quant_scale is not None for layer in layers)


def test_fp4_inputs_are_told_once(tmp_path):
    layer, shape = nvfp4_layer(), (8, 32)
    with pytest.warns(UserWarning, match="quantizes inputs to FP4") as told:
        load_layer(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, layer, shape)
    assert len(told) == 1


def test_scales_of_the_kv_cache():
    scales = kv_scales(open_store(FIXTURES / "fp8_kv"))
    tensors = load_file(FIXTURES / "fp8_kv" / "model.safetensors")
    assert sorted(scales) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for module, found in scales.items():
        assert torch.equal(found.k_scale, tensors[f"{module}.k_proj.k_scale"])
        assert torch.equal(found.v_scale, tensors[f"{module}.v_proj.v_scale"])


def nvfp4_layer(**more: Tensor) -> dict[str, Tensor]:
    return {
        "weight": torch.randint(0, 256, (8, 16), dtype=torch.uint8),
        "weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(0.25),
        **more,
    }


def test_one_algorithm_for_each_layer(tmp_path):
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"model.language_model.a": {"quant_algo": "W4A16_NVFP4"}, "b": {"quant_algo": "fp8"}},
    }
    for name in ("model.language_model.a", "language_model.model.a"):  # before and since transformers 5
        assert load_layer(tmp_path, config, nvfp4_layer(), (8, 32), name).weight.scheme.format.bits == 4
    fp8 = {"weight": torch.ones(8, 32).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(2.0)}
    assert (decoded(load_layer(tmp_path, config, fp8, (8, 32), "b")) == 2).all()
    with pytest.raises(CheckpointError, match="quantized_layers does not name it"):
        load_layer(tmp_path, config, fp8, (8, 32), "c")


@pytest.mark.parametrize("shape", [(3, 1, 2, 1), (3, 2)])
@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_tiles_of_fp8(tmp_path, shape, suffix):
    scale = torch.rand(shape) + 0.5
    weight = torch.randn(300, 256).to(torch.float8_e4m3fn)
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    found = load_layer(tmp_path, config, {"weight": weight, suffix: scale}, (300, 256))
    repeated = scale.reshape(3, 2).repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)
    assert torch.equal(decoded(found), weight.float() * repeated)


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes inputs to FP4")
def test_a_file_without_configuration_is_nvfp4(tmp_path):
    assert load_layer(tmp_path, None, nvfp4_layer(), (8, 32)).weight.scheme.format.name == "fp4_e2m1"


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes inputs to FP4")
@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_scales_of_inputs_that_nobody_uses_may_be_anything(tmp_path, scale):
    """Calibration leaves them so in experts that saw no token."""
    layer = nvfp4_layer(input_scale=torch.tensor(scale))
    found = load_layer(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, layer, (8, 32))
    assert found.scheme.activation is None
    with pytest.raises(CheckpointError, match="input_scale holds a scale that is"):
        load_layer(tmp_path, {"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"}, layer, (8, 32))


def test_small_blocks_may_have_scale_zero(tmp_path):
    layer = nvfp4_layer(weight_scale=torch.zeros(8, 2).to(torch.float8_e4m3fn))
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    assert (decoded(load_layer(tmp_path, config, layer, (8, 32))) == 0).all()


def test_a_plain_weight_is_not_quantized(tmp_path):
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["x"]}
    assert load_layer(tmp_path, config, {"weight": torch.zeros(8, 32, dtype=torch.bfloat16)}, (8, 32)) is None


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"weight": torch.zeros(8, 15, dtype=torch.uint8)}, r"weight has shape \(8, 15\)"),
        ({"weight": torch.zeros(8, 16, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"weight_scale": torch.ones(8, 3).to(torch.float8_e4m3fn)}, "groups that divide 32"),
        ({"weight_scale": torch.ones(7, 2).to(torch.float8_e4m3fn)}, r"weight_scale has shape \(7, 2\)"),
        ({"weight_scale": torch.ones(8, 2)}, "weight_scale has dtype torch.float32"),
        ({"weight_scale": torch.full((8, 2), float("nan")).to(torch.float8_e4m3fn)}, "scale that is nan"),
        ({"weight_scale": (-torch.ones(8, 2)).to(torch.float8_e4m3fn)}, "scale that is -1"),
        ({"weight_scale_2": torch.tensor(0.0)}, "weight_scale_2 holds a scale that is 0"),
        ({"weight_scale_2": torch.tensor(float("inf"))}, "weight_scale_2 holds a scale that is inf"),
        ({"weight_scale_2": torch.ones(3)}, "it is one number"),
        ({"pre_quant_scale": torch.zeros(32)}, "pre_quant_scale holds a scale that is 0"),
        ({"pre_quant_scale": torch.ones(31)}, r"pre_quant_scale has shape \(31,\)"),
        ({"weight_quantizer.svdquant_lora_a": torch.ones(1)}, "low-rank part"),
    ],
    ids=only_text,
)
def test_broken_tensors(tmp_path, broken, match):
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, config, nvfp4_layer() | broken, (8, 32))


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W4A8_AWQ"])
@pytest.mark.parametrize(
    ("rows", "count", "match"), [(7, 2, "an odd number"), (8, 3, "groups that divide"), (8, 0, "groups that divide")]
)
def test_broken_int4(tmp_path, algorithm, rows, count, match):
    layer = {"weight": torch.zeros(4, 32, dtype=torch.uint8), "weight_scale": torch.ones(rows, count)}
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, {"quant_method": "modelopt", "quant_algo": algorithm}, layer, (rows, 32))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_algo": "FP3"}, "quant_algo is 'FP3'; readable are"),
        ({"quant_algo": None}, "quant_algo is None"),
        ({"quant_algo": ["FP8"]}, "quant_algo is"),
        ({"quant_algo": "NVFP4_SVD"}, "low-rank part"),
        ({"quantization": 3}, "object with quant_algo"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers is None"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"x": "FP8"}}, "quantized_layers"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"x": {"quant_algo": "FP3"}}}, "x: quant_algo is 'FP3'"),
    ],
    ids=only_text,
)
def test_broken_configurations(config, match):
    with pytest.raises(CheckpointError, match=match):
        ModelOpt(config, None)
