"""GPTQ and AutoRound layers decode to what was packed, whoever packed them; damaged ones are told apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qcompile
from qcompile.errors import CheckpointError
from qcompile.modules import QuantizedLinear
from tests.checkpoint.integer_files import (
    FIXTURES,
    LLAMA_FLOOR,
    Problem,
    check_llama,
    decoded,
    fixture_layers,
    fixture_tensors,
    gptq_tensors,
    problem,
    read_layer,
    write_llama,
)
from tests.tolerance import sqnr

LAYERS = fixture_layers("gptq", "gptqmodel", "autoround")
V1 = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
SHAPE = (32, 64)


@pytest.mark.parametrize(("file", "name", "config"), LAYERS, ids=[name for _, name, _ in LAYERS])
def test_layers_of_the_producers(file, name, config):
    stored = fixture_tensors(file, name)
    rows, columns = stored["codes"].shape
    count = stored["scales"].shape[0]
    group = columns if config["group_size"] == -1 else config["group_size"]
    index = stored["g_idx"].long() % count if "g_idx" in stored else torch.arange(columns) // group
    expected = Problem(stored["codes"], stored["zeros"], stored["scales"].t(), index).weight
    layer = read_layer(FIXTURES / file, config, (rows, columns), name=name)
    assert torch.equal(decoded(layer), expected)
    assert layer.weight.scheme.symmetric == config["sym"]
    assert layer.weight.scheme.act_order == config.get("desc_act", False)


def config_with(**changes: Any) -> dict[str, Any]:
    merged = {**V1, **changes}
    return {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize("word", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_every_width(tmp_path, word, bits):
    p = problem(bits, *SHAPE, 32)
    layer = read_layer(tmp_path / "x.safetensors", config_with(bits=bits), SHAPE, gptq_tensors(p, bits, word=word))
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_0_wrap_around(tmp_path, bits):
    p = problem(bits, *SHAPE, 32)
    p.zeros[::2] = 0
    layer = read_layer(tmp_path / "x.safetensors", config_with(bits=bits), SHAPE, gptq_tensors(p, bits))
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize(("rows", "columns"), [(8, 36), (5, 100), (3, 7)])
@pytest.mark.parametrize("bits", [3, 4])
def test_streams_that_do_not_fill_words(tmp_path, bits, rows, columns):
    p = problem(bits, rows, columns, 32)
    layer = read_layer(tmp_path / "x.safetensors", config_with(bits=bits), (rows, columns), gptq_tensors(p, bits))
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize("minus", [0, 1])
def test_symmetric_layers_need_no_zero_points(tmp_path, minus):
    p = problem(4, *SHAPE, 32, symmetric=True)
    tensors = gptq_tensors(p, 4, minus=minus)
    config = config_with(sym=True)
    assert torch.equal(decoded(read_layer(tmp_path / "x.safetensors", config, SHAPE, tensors)), p.weight)
    del tensors["qzeros"]
    layer = read_layer(tmp_path / "y.safetensors", config, SHAPE, tensors)
    assert torch.equal(decoded(layer), p.weight)
    assert str(layer.weight.scheme) == "int4 group 32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_keep_their_dtype(tmp_path, dtype):
    p = problem(4, *SHAPE, 32)
    p.scales = p.scales.to(dtype)
    layer = read_layer(tmp_path / "x.safetensors", V1, SHAPE, gptq_tensors(p, 4))
    assert layer.weight.scale.dtype == dtype
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize("change", [None, 0], ids=["missing", "all zero"])
def test_columns_in_order_without_an_index(tmp_path, change):
    p = problem(4, *SHAPE, 32)
    tensors = gptq_tensors(p, 4)
    if change is None:
        del tensors["g_idx"]
    else:
        tensors["g_idx"].zero_()
    layer = read_layer(tmp_path / "x.safetensors", V1, SHAPE, tensors)
    assert torch.equal(decoded(layer), p.weight)
    assert not layer.weight.scheme.act_order


@pytest.mark.parametrize(
    ("sizes", "group"),
    [((48, 32, 16), 16), ((16, 32, 48), 16), ((96, 0, 0), -1), ((0, 64, 32), 64), ((40, 24, 32), 8), ((32,) * 3, 32)],
    ids=str,
)
def test_groups_of_several_sizes(tmp_path, sizes, group):
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[torch.randperm(96)]
    p = problem(4, 32, 96, 32, groups=index)
    layer = read_layer(tmp_path / "x.safetensors", config_with(desc_act=True), (32, 96), gptq_tensors(p, 4))
    assert torch.equal(decoded(layer), p.weight)
    assert layer.weight.scheme.granularity.columns == group


def test_groups_that_have_no_size_in_common(tmp_path):
    index = torch.repeat_interleave(torch.arange(3), torch.tensor([31, 33, 32]))
    p = problem(4, 32, 96, 32, groups=index)
    with pytest.raises(CheckpointError, match=r"m\.l: g_idx makes groups of 31 to 33 columns"):
        read_layer(tmp_path / "x.safetensors", config_with(desc_act=True), (32, 96), gptq_tensors(p, 4))


def test_a_short_group_goes_last(tmp_path):
    index = torch.tensor([1] * 32 + [0] * 8 + [2] * 32)
    p = problem(4, 32, 72, 32, groups=index)
    layer = read_layer(tmp_path / "x.safetensors", config_with(desc_act=True), (32, 72), gptq_tensors(p, 4))
    assert torch.equal(decoded(layer), p.weight)
    assert str(layer.weight.scheme.granularity) == "group 32"
    assert layer.weight.scale.shape == (32, 3)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "format": "gptq"},
        {"quant_method": "gptq", "wbits": 4, "q_group_size": 32, "version": "GPTQ"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:gptq"},
        {"quant_method": "auto-round", "bits": 4, "group_size": 32},
        {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32, "packing_format": "auto"},
    ],
    ids=str,
)
def test_spellings_of_the_configuration(tmp_path, config):
    p = problem(4, *SHAPE, 32)
    layer = read_layer(tmp_path / "x.safetensors", config, SHAPE, gptq_tensors(p, 4))
    assert torch.equal(decoded(layer), p.weight)


def test_what_a_configuration_leaves_out_is_read_off_the_shapes(tmp_path):
    p = problem(8, *SHAPE, 16)
    layer = read_layer(tmp_path / "x.safetensors", {"quant_method": "gptq"}, SHAPE, gptq_tensors(p, 8))
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize("packing", ["auto_round:exllamav2", "auto_round:triton", "auto_round:gptqmodel", "auto_round"])
def test_auto_round_formats_with_exact_zero_points(tmp_path, packing):
    p = problem(4, *SHAPE, 32)
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": packing}
    layer = read_layer(tmp_path / "x.safetensors", config, SHAPE, gptq_tensors(p, 4, minus=0))
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize(
    "rules",
    [
        {"dynamic": {"-:.*other": {}, "+:m\\.l": {"bits": 8, "group_size": 16}, ".*": {"bits": 2}}},
        {"dynamic": {"l": {"bits": 2}, "m": {"bits": 8, "group_size": 16}}},
        {"extra_config": {".*": {"bits": 2}, "m.l": {"bits": 8, "group_size": 16, "sym": None}}},
        {"extra_config": {"l$": {"bits": 8, "group_size": 16}, "m": {"bits": 2}}},
    ],
    ids=["first match", "match at the start", "exact name first", "search"],
)
def test_rules_for_some_layers(tmp_path, rules):
    p = problem(8, *SHAPE, 16)
    method = "auto-round" if "extra_config" in rules else "gptq"
    config = config_with(quant_method=method, packing_format="auto_round:auto_gptq", **rules)
    layer = read_layer(tmp_path / "x.safetensors", config, SHAPE, gptq_tensors(p, 8))
    assert torch.equal(decoded(layer), p.weight)


@pytest.mark.parametrize("method", ["gptq", "auto-round"])
def test_a_plain_layer_is_not_quantized(tmp_path, method):
    config = config_with(quant_method=method)
    assert read_layer(tmp_path / "x.safetensors", config, SHAPE, {"weight": torch.zeros(SHAPE)}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits is 1; readable are 2"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 2**40}, "group_size is"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"checkpoint_format": "exl3"}, "checkpoint_format is 'exl3'"),
        ({"dynamic": []}, "dynamic is"),
        ({"dynamic": {"+:(": {}}}, "no regular expression"),
        ({"dynamic": {"+:m": 3}}, "it is an object"),
        ({"quant_method": "auto-round", "extra_config": {"m": 3}}, "extra_config is"),
        ({"quant_method": "auto-round", "act_bits": 8}, "not readable"),
        ({"quant_method": "auto-round", "rotation_config": {"kind": "hadamard"}}, "rotations"),
        ({"quant_method": "auto-round", "data_type": "int_asym_dq", "act_bits": 8}, "not readable"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(tmp_path, change, message):
    tensors = gptq_tensors(problem(4, *SHAPE, 32), 4)
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path / "x.safetensors", config_with(**change), SHAPE, tensors)


def spoilt(key: str, value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].contiguous().clone()
        tensors[key].view(-1)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (spoilt("g_idx", 2), V1, "g_idx names groups other than 0 to 1"),
        (spoilt("g_idx", -3), V1, "g_idx names groups other than 0 to 1"),
        (spoilt("scales", float("nan")), V1, "scales holds NaN"),
        (spoilt("scales", float("inf")), V1, "scales holds NaN"),
        (spoilt("qzeros", 3), config_with(sym=True), "sym: true"),
        (lambda t: t.pop("qzeros"), V1, "no qzeros"),
        (lambda t: t.pop("scales"), V1, "scales"),
        (lambda t: t.pop("g_idx"), config_with(desc_act=True), "it has no g_idx"),
        (lambda t: t.update(qweight=t["qweight"].float()), V1, "qweight"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), V1, "qweight"),
        (lambda t: t.update(qzeros=t["qzeros"].to(torch.int64)), V1, "qzeros"),
        (lambda t: t.update(scales=t["scales"].int()), V1, "scales"),
        (lambda t: t.update(scales=t["scales"].flatten()), V1, "scales"),
        (lambda t: t.update(g_idx=t["g_idx"].float()), V1, "g_idx"),
        (lambda t: t.update(g_idx=t["g_idx"][:-1]), V1, "g_idx"),
        (lambda t: None, config_with(group_size=16), "qzeros|scales"),
        (lambda t: None, config_with(bits=8), "qweight"),
        (lambda t: t.update(qweight=t["qweight"].to(torch.int64)), config_with(checkpoint_format="gptq_p"), "int32"),
    ],
)
def test_layers_that_are_refused(tmp_path, change, config, message):
    tensors = gptq_tensors(problem(4, *SHAPE, 32), 4)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        read_layer(tmp_path / "x.safetensors", config, SHAPE, tensors)
    assert "m.l" in str(error.value)


FLOAT_LAYERS = fixture_layers("gptq", "autoround_floats")


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes float inputs")
@pytest.mark.parametrize(("file", "name", "config"), FLOAT_LAYERS, ids=[name for _, name, _ in FLOAT_LAYERS])
def test_auto_round_floats(file, name, config):
    dense = fixture_tensors(file, name)["dense"]
    layer = read_layer(FIXTURES / file, config, tuple(dense.shape), name=name)
    assert torch.equal(decoded(layer), dense)
    activation = layer.scheme.activation
    assert (activation is None) == (name in ("nvfp4", "mxfp4", "fp8_channel"))
    assert (layer.input_scale is not None) == (name == "fp8_static")


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes float inputs")
@pytest.mark.parametrize("pattern", ["mxfp8", "^mx.*8$", "xfp8"])
def test_auto_round_floats_of_several_types(pattern):
    configs = {name: config for _, name, config in FLOAT_LAYERS}
    config = {**configs["mxfp4"], "extra_config": {pattern: {"bits": 8, "act_bits": 8}, "lm_head": {"bits": 16}}}
    for name in ("mxfp4", "mxfp8"):
        dense = fixture_tensors(FLOAT_LAYERS[0][0], name)["dense"]
        layer = read_layer(FIXTURES / FLOAT_LAYERS[0][0], config, tuple(dense.shape), name=name)
        assert torch.equal(decoded(layer), dense)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_model(tmp_path, act_order):
    """With layers of 8 bits, and one that is not quantized, as rules say."""
    pytest.importorskip("transformers")
    dynamic = {"-:.*1\\.mlp\\.up_proj": {}, "+:.*down_proj": {"bits": 8, "group_size": 64}}

    def pack(name, shape):
        if name.endswith("1.mlp.up_proj"):
            return {}, None
        bits, group = (8, 64) if name.endswith("down_proj") else (4, 32)
        groups = torch.arange(shape[1]) // group
        p = problem(bits, *shape, group, groups=groups[torch.randperm(shape[1])] if act_order else groups)
        return gptq_tensors(p, bits), p.weight

    expected = write_llama(tmp_path, config_with(dynamic=dynamic, desc_act=act_order), pack)
    check_llama(tmp_path, expected)


def test_a_model_whose_configuration_lies_beside(tmp_path):
    pytest.importorskip("transformers")

    def pack(name, shape):
        p = problem(4, *shape, 32)
        return gptq_tensors(p, 4), p.weight

    expected = write_llama(tmp_path, {}, pack)
    settings = {key: value for key, value in V1.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    check_llama(tmp_path, expected)


def test_a_model_that_auto_round_wrote():
    pytest.importorskip("transformers")
    model = qcompile.load(FIXTURES / "gptq" / "llama_autoround", progress=False)
    schemes = {n: str(m.scheme.weight) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(schemes) == 13
    assert schemes.pop("model.layers.0.mlp.down_proj") == "int8 group 32"
    assert set(schemes.values()) == {"uint4 group 32"}
    reference = load_file(FIXTURES / "gptq" / "llama_autoround_logits.safetensors")
    assert sqnr(reference["logits"], model(reference["tokens"]).logits) >= LLAMA_FLOOR


def test_auto_round_integers_among_floats(tmp_path):
    p = problem(4, *SHAPE, 32)
    configs = {name: config for _, name, config in FLOAT_LAYERS}
    change = {"data_type": "int", "sym": False, "act_bits": 16}
    config = {**configs["mxfp4"], "extra_config": {"m.l": change}, "packing_format": "auto_round:auto_gptq"}
    layer = read_layer(tmp_path / "x.safetensors", config, SHAPE, gptq_tensors(p, 4))
    assert torch.equal(decoded(layer), p.weight)
