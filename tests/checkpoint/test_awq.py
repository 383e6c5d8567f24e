"""AWQ layers of every version decode to what AutoAWQ packed; damaged ones are told apart."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import CheckpointError
from tests.checkpoint.integer_files import (
    FIXTURES,
    Problem,
    awq_tensors,
    check_llama,
    decoded,
    fixture_layers,
    fixture_tensors,
    problem,
    read_layer,
    write_llama,
)

LAYERS = fixture_layers("awq", "autoawq")
GEMM = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
SHAPE = (32, 64)


def original(name):
    """The codes and zero points that were packed, and a layer's tensors."""
    stored = fixture_tensors("awq/autoawq.safetensors", name)
    codes, zeros = stored.pop("codes"), stored.pop("zero_points")
    return codes, zeros, stored


@pytest.mark.parametrize(("file", "name", "config"), LAYERS, ids=[name for _, name, _ in LAYERS])
def test_layers_of_the_producer(file, name, config):
    codes, zeros, stored = original(name)
    groups = torch.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])
    layer = read_layer(FIXTURES / file, config, tuple(codes.shape), name=name)
    version = config["version"]
    if version == "gemv_fast":
        scales, offsets = (stored[suffix][: zeros.shape[1]].t().float() for suffix in ("scales", "qzeros"))
        assert torch.equal(decoded(layer), codes * scales[:, groups] + offsets[:, groups])
    else:
        scales = layer.weight.scale  # marlin's are permuted; test_marlin has them
        plain = {"gemm": lambda s: s.t(), "gemv": lambda s: s[:, : zeros.shape[1]]}
        assert version == "marlin" or torch.equal(scales, plain[version](stored["scales"]))
        assert torch.equal(decoded(layer), Problem(codes, zeros, scales, groups).weight)
    assert layer.weight.scheme.symmetric == (version == "marlin")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "awq"},
        {"quant_method": "awq", "method": "awq", "bits": 4, "group_size": 32, "checkpoint_format": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:awq", "bits": 4, "group_size": 32, "sym": False},
    ],
    ids=str,
)
def test_spellings_of_the_configuration(tmp_path, config):
    p = problem(4, *SHAPE, 32)
    layer = read_layer(tmp_path / "x.safetensors", config, SHAPE, awq_tensors(p))
    assert torch.equal(decoded(layer), p.weight)


def test_without_zero_points(tmp_path):
    p = problem(4, *SHAPE, 32, symmetric=True)
    tensors, config = awq_tensors(p), {**GEMM, "zero_point": False}
    assert torch.equal(decoded(read_layer(tmp_path / "x.safetensors", config, SHAPE, tensors)), p.weight)
    del tensors["qzeros"]
    layer = read_layer(tmp_path / "y.safetensors", config, SHAPE, tensors)
    assert torch.equal(decoded(layer), p.weight)
    assert str(layer.weight.scheme) == "int4 group 32"


@pytest.mark.parametrize("version", ["llm-awq", "llm_awq", "gemm"])
def test_names_of_llm_awq(tmp_path, version):
    name = "gemv_fast_group_64"
    codes, _, stored = original(name)
    expected = read_layer(FIXTURES / LAYERS[0][0], {**GEMM, "group_size": 64}, tuple(codes.shape), name=name)
    stored["scaled_zeros"] = stored.pop("qzeros")
    config = {**GEMM, "group_size": 64, "version": version}
    layer = read_layer(tmp_path / "x.safetensors", config, tuple(codes.shape), stored)
    assert torch.equal(decoded(layer), decoded(expected))


def test_a_plain_layer_is_not_quantized(tmp_path):
    config = {**GEMM, "modules_to_not_convert": ["other"]}
    assert read_layer(tmp_path / "x.safetensors", config, SHAPE, {"weight": torch.zeros(SHAPE)}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits is 8; readable are 4"),
        ({"group_size": -2}, "group_size is -2"),
        ({"version": "exllama"}, "version is 'exllama'"),
        ({"version": 2}, "version is 2"),
        ({"zero_point": 1}, "zero_point is 1"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path / "x.safetensors", {**GEMM, **change}, SHAPE, awq_tensors(problem(4, *SHAPE, 32)))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop("qzeros"), {}, "qzeros is missing"),
        (lambda t: t.pop("scales"), {}, "scales is missing"),
        (lambda t: t.update(scales=t["scales"] * torch.nan), {}, "scales holds NaN"),
        (lambda t: t.update(scales=t["scales"][:1]), {}, "scales has shape"),
        (lambda t: t.update(qzeros=t["qzeros"].float()), {}, "qzeros has dtype"),
        (lambda t: t.update(qweight=t["qweight"].long()), {}, "qweight has dtype"),
        (lambda t: t.update(qweight=t["qweight"][1:]), {}, "qweight has shape"),
        (lambda t: None, {"zero_point": False}, "zero_point: false"),
        (lambda t: None, {"group_size": 16}, "scales has shape"),
        (lambda t: None, {"version": "gemv"}, "qweight has shape"),
        (lambda t: t.update(qweight=t["qweight"].short()), {}, "qweight has shape"),
    ],
)
def test_layers_that_are_refused(tmp_path, change, config, message):
    tensors = awq_tensors(problem(4, *SHAPE, 32))
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        read_layer(tmp_path / "x.safetensors", {**GEMM, **config}, SHAPE, tensors)
    assert "m.l" in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("gemm_group_32", (12, 128), "fill words"), ("gemv_group_32", (16, 68), "fill words"),
     ("gemv_fast_group_32", (16, 96), "tiles"), ("gemv_fast_group_32", (18, 128), "tiles")],
)  # fmt: skip
def test_shapes_that_do_not_fill_words(name, shape, message):
    config = next(config for _, layer, config in LAYERS if layer == name)
    with pytest.raises(CheckpointError, match=message):
        read_layer(FIXTURES / "awq" / "autoawq.safetensors", config, shape, name=name)


def test_a_model(tmp_path):
    """With layers that are not quantized and not named as such."""
    pytest.importorskip("transformers")

    def pack(name, shape):
        if name.endswith("v_proj"):
            return {}, None
        p = problem(4, *shape, 32)
        return awq_tensors(p), p.weight

    config = {key: value for key, value in GEMM.items() if key != "modules_to_not_convert"}
    check_llama(tmp_path, write_llama(tmp_path, config, pack))
