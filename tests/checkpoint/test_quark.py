"""Checkpoints that AMD Quark exported, against the weights that it computes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qcompile.checkpoint.kv_scales import kv_scales
from qcompile.checkpoint.quark import Quark
from qcompile.checkpoint.store import open_store
from qcompile.errors import CheckpointError
from tests.checkpoint.layer_files import check_fixture, decoded, linears, load_layer
from tests.tolerance import assert_within, float_bound

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quark"
INPUTS = {
    "fp8_channel": "fp8_e4m3 dynamic per token",
    "fp8_tensor_kv": "fp8_e4m3 static per tensor",
    "int4": None,
    "int4_channel": None,
    "int4_order": None,
    "int8": "int8 static per tensor",
    "int8_group": None,
    "mxfp4": None,
    "mxfp4_fp8": "fp8_e4m3 static per tensor",
    "mxfp6_e2m3": None,
    "mxfp6_e3m2": None,
    "nvfp4": None,
    "uint4": None,
}


def only_text(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes inputs to 'fp4'")
@pytest.mark.parametrize("name", INPUTS)
def test_models_that_quark_saved(name):
    for layer in check_fixture(FIXTURES / name):
        activation = layer.scheme.activation
        assert (None if activation is None else str(activation)) == INPUTS[name]


def test_int4_of_fp8_decodes_within_its_rounding():
    """Quark multiplies codes with one scale and then the other, qcompile with their product."""
    folder = FIXTURES / "w4a8"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for name, expected in load_file(folder / "expected.safetensors").items():
        (layer,) = linears(folder, config, {name: tuple(expected.shape)}).values()
        assert_within(decoded(layer), expected, float_bound(expected, 3, torch.float32))
        assert str(layer.scheme.activation) == "fp8_e4m3 static per tensor"


def test_scales_of_the_kv_cache():
    scales = kv_scales(open_store(FIXTURES / "fp8_tensor_kv"))
    tensors = load_file(FIXTURES / "fp8_tensor_kv" / "model.safetensors")
    assert sorted(scales) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for module, found in scales.items():
        assert torch.equal(found.k_scale, tensors[f"{module}.k_proj.output_scale"])
        assert torch.equal(found.v_scale, tensors[f"{module}.v_proj.output_scale"])


def spec(dtype: str, qscheme: str = "per_tensor", **more: object) -> dict:
    return {"dtype": dtype, "qscheme": qscheme, "symmetric": True, "is_dynamic": False, **more}


def config(weight: object, inputs: object = None, **more: object) -> dict:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs}, **more}


def fp8_layer(**more: Tensor) -> dict[str, Tensor]:
    weight = torch.ones(8, 32).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": torch.tensor(2.0), "input_scale": torch.tensor(0.5), **more}


def test_the_first_pattern_that_fits_decides(tmp_path):
    """Then the class, then the global configuration."""
    given = config(
        spec("fp8_e4m3"),
        layer_quant_config={
            "*.k_proj": {"weight": spec("fp8_e4m3", "per_channel")},
            "a.*": {"weight": spec("fp8_e4m3", "per_block", block_size=[8, 16])},
        },
    )
    for name, count in (("a.k_proj", (8,)), ("a.v_proj", (1, 2)), ("b.v_proj", ())):
        layer = fp8_layer(weight_scale=torch.ones(count))
        assert load_layer(tmp_path, given, layer, (8, 32), name).weight.scale.numel() == torch.Size(count).numel()
    by_class = given | {"layer_type_quant_config": {"Linear": {"weight": spec("fp8_e4m3", "per_channel")}}}
    assert load_layer(tmp_path, by_class, fp8_layer(weight_scale=torch.ones(8)), (8, 32), "b").weight.scale.shape == (
        8,
        1,
    )


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (spec("fp8_e4m3"), "fp8_e4m3 static per tensor"),
        ([spec("fp8_e4m3", is_dynamic=True)], "fp8_e4m3 dynamic per tensor"),
        (spec("int8", "per_channel", is_dynamic=True), "int8 dynamic per token"),
        (spec("fp8_e4m3", "per_group", group_size=16, is_dynamic=True), "fp8_e4m3 dynamic per group 16"),
    ],
    ids=str,
)
def test_inputs(tmp_path, inputs, expected):
    layer = fp8_layer(weight_scale=torch.ones(8, 2))
    found = load_layer(tmp_path, config(spec("fp8_e4m3", "per_group", group_size=16), inputs), layer, (8, 32))
    assert str(found.scheme.activation) == expected
    decoded(found)


@pytest.mark.parametrize(
    "inputs",
    [
        spec("fp4", "per_group", group_size=32, is_dynamic=True),
        [spec("fp4", "per_group", group_size=16, is_dynamic=True), spec("fp8_e4m3")],
        spec("int8", "per_channel", is_dynamic=True, symmetric=False),
        spec("fp8_e4m3", "per_channel"),
        spec("fp8_e4m3", "per_group", group_size=16, is_dynamic=True),
    ],
    ids=str,
)
def test_inputs_that_stay_are_told_once(tmp_path, inputs):
    with pytest.warns(UserWarning, match="stay in the model's dtype") as told:
        found = load_layer(tmp_path, config(spec("fp8_e4m3"), inputs), fp8_layer(), (8, 32))
    assert len(told) == 1
    assert found.scheme.activation is None


def test_a_plain_weight_is_not_quantized(tmp_path):
    given = config(spec("fp8_e4m3"), exclude=["x"])
    assert load_layer(tmp_path, given, {"weight": torch.zeros(8, 32, dtype=torch.bfloat16)}, (8, 32)) is None


INT4 = spec("int4", "per_group", group_size=16)
UINT4 = spec("uint4", "per_group", group_size=16, symmetric=False)


def int4_layer(**more: Tensor) -> dict[str, Tensor]:
    words = {"weight": torch.zeros(32, 2, dtype=torch.int32), "weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}
    return {**words, "weight_scale": torch.ones(2, 16), **more}


@pytest.mark.parametrize(
    ("weight", "broken", "match"),
    [
        (INT4, {"weight": torch.zeros(32, 3, dtype=torch.int32)}, r"weight has shape \(32, 3\)"),
        (INT4, {"weight": torch.zeros(32, 2, dtype=torch.int64)}, "weight has dtype torch.int64"),
        (INT4, {"weight_scale": torch.ones(16, 2)}, r"weight_scale has shape \(16, 2\)"),
        (INT4, {"weight_scale": torch.zeros(2, 16)}, "scale that is 0"),
        (INT4, {"weight_scale": torch.full((2, 16), torch.nan)}, "scale that is nan"),
        (INT4, {"weight_zero_point": torch.ones(2, 2, dtype=torch.int32)}, "calls the weight symmetric"),
        (UINT4, {"weight_zero_point": torch.ones(3, 2, dtype=torch.int32)}, "weight_zero_point has shape"),
        (spec("fp8_e4m3"), {"weight_scale": torch.ones(())}, "weight has dtype torch.int32"),
        (spec("int8"), {}, "weight has dtype torch.int32"),
    ],
    ids=only_text,
)
def test_broken_tensors(tmp_path, weight, broken, match):
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, config(weight), int4_layer(weight_scale=torch.ones(2, 16)) | broken, (16, 32))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (config(None), "its configuration has no weight"),
        (config(3), "it is an object with dtype"),
        (config([1, 2, 3]), "it is an object with dtype"),
        (config(spec("fp8_e4m3", "per_row")), "qscheme is 'per_row'"),
        (config(spec("fp8_e4m3", "per_group", group_size=-1)), "group_size -1"),
        (config(spec("fp8_e4m3", "per_block", block_size=128)), "block_size 128"),
        (config(spec("mx9")), "readable are"),
        (config(spec("fp4", "per_group", group_size=32)), "readable are"),
        (config(spec("fp4", "per_group", group_size=16, scale_format="e8m0")), "groups of 32"),
        (config(spec("fp8_e5m2")), "configuration says fp8_e5m2"),
        (config(spec("fp8_e4m3"), spec("fp8_e4m3"), layer_quant_config={"*": 3}), "it is an object"),
    ],
    ids=only_text,
)
def test_configurations_that_make_no_sense(tmp_path, given, match):
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, given, fp8_layer(), (8, 32))


def test_missing_scale_of_inputs(tmp_path):
    layer = fp8_layer()
    del layer["input_scale"]
    with pytest.raises(CheckpointError, match="input_scale is missing"):
        load_layer(tmp_path, config(spec("fp8_e4m3"), spec("fp8_e4m3")), layer, (8, 32))


@pytest.mark.parametrize(
    "given",
    [{"global_quant_config": 3}, {"layer_quant_config": [1]}, {"export": "x"}, {"export": {"pack_method": "random"}}],
    ids=json.dumps,
)
def test_broken_configurations(given):
    with pytest.raises(CheckpointError, match=next(iter(given))):
        Quark(given, None)
