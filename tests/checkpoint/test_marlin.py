"""Weights in Marlin's order decode to what AutoGPTQ, AutoAWQ and compressed-tensors packed."""

from __future__ import annotations

import json

import pytest
import torch

from qcompile.checkpoint.marlin import marlin_24_weight
from qcompile.checkpoint.method import LayerTensors
from qcompile.checkpoint.store import open_store
from qcompile.codegen.spec import Tile
from qcompile.errors import CheckpointError
from qcompile.flags import override
from qcompile.layouts import choose_layout
from qcompile.linear_spec import LinearSpec
from qcompile.reference import dequantize
from tests.checkpoint.integer_files import (
    FIXTURES,
    check_llama,
    decoded,
    fixture_layers,
    fixture_tensors,
    problem,
    read_layer,
    stream,
    write_llama,
)
from tests.kernels.problems import Problem as Product

CONFIGS = json.loads((FIXTURES / "marlin" / "marlin.json").read_text())
SPARSE_NAMES = {"weight_packed": "B_24", "meta": "B_meta", "scale_packed": "s"}


def packed(name):
    """The tensors of a layer, with the names that GPTQ checkpoints have for them; and the weight."""
    stored = fixture_tensors(f"marlin/{name.split('_')[0]}.safetensors", name)
    codes, scales = stored.pop("codes"), stored.pop("plain_scales")
    middle = 2 ** (CONFIGS[name]["bits"] - 1)
    repeated = scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    tensors = {SPARSE_NAMES.get(suffix, suffix): tensor for suffix, tensor in stored.items()}
    return tensors, (codes.float() - middle) * repeated


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_the_producers(tmp_path, name):
    tensors, weight = packed(name)
    tensors["workspace"] = torch.zeros(16, dtype=torch.int32)
    shape = tuple(weight.shape)
    layer = read_layer(tmp_path / "x.safetensors", CONFIGS[name], shape, tensors)
    assert torch.equal(decoded(layer), weight)
    assert layer.weight.scheme.symmetric
    assert layer.weight.scheme.sparsity == ("2:4" if name.startswith("sparse") else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_old_configurations_without_bits(tmp_path, name):
    tensors, weight = packed(name)
    config = {"quant_method": "gptq", "is_marlin_format": True}
    layer = read_layer(tmp_path / "x.safetensors", config, tuple(weight.shape), tensors)
    assert torch.equal(decoded(layer), weight)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("sparse")])
def test_names_of_compressed_tensors(name):
    weight = packed(name)[1]
    store = open_store(FIXTURES / "marlin" / "sparse.safetensors")
    bits = CONFIGS[name]["bits"]
    suffixes = {"codes": "weight_packed", "meta": "meta", "scales": "scale_packed"}
    assert torch.equal(
        dequantize(marlin_24_weight(LayerTensors(store, name), tuple(weight.shape), bits=bits, **suffixes)), weight
    )


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("sparse")])
def test_sparse_weights_stay_sparse_on_gpus(tmp_path, name):
    """3 bits a weight of 4, 5 of 8; the kernel multiplies by what compressed-tensors packed."""
    tensors, weight = packed(name)
    layer = read_layer(tmp_path / "x.safetensors", CONFIGS[name], tuple(weight.shape), tensors)
    layout = choose_layout(layer.scheme, tuple(weight.shape), "cuda")
    laid_out = layout.pack(layer.weight)
    assert layout.name == "fragment24"
    assert laid_out.codes.numel() * 32 == weight.numel() * (CONFIGS[name]["bits"] // 2 + 1)
    n, k = weight.shape
    x = torch.randn(5, k).to(torch.bfloat16)
    spec = LinearSpec(in_features=k, out_features=n, scheme=layer.scheme, layout=layout.name)
    product = Product(spec, x, None, laid_out, None, [], torch.bfloat16, x.double(), weight.double())
    with override(cache_dir=tmp_path / "cache"):
        y = product.interpret("sm_90", Tile(m=16, n=64, k=128, split=1, warps=4, stages=2))
    product.check(y, torch.bfloat16)


DENSE, SPARSE = "dense_group_128", "sparse_4bit_group_128"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (DENSE, lambda t: t.pop("s"), "s is missing"),
        (DENSE, lambda t: t.update(B=t["B"].short()), "B has dtype"),
        (DENSE, lambda t: t.update(B=t["B"][1:]), "B has shape"),
        (DENSE, lambda t: t.update(s=t["s"] * torch.nan), "s holds NaN"),
        (DENSE, lambda t: t.update(s=torch.zeros(3, 256).half()), "s has shape"),
        (DENSE, lambda t: t.update(s=torch.zeros(0, 256).half()), "s has shape"),
        (DENSE, lambda t: t.update(s=torch.zeros(256).half()), "s has shape"),
        (SPARSE, lambda t: t.pop("B_meta"), "B_meta is missing"),
        (SPARSE, lambda t: t.update(B_meta=torch.zeros_like(t["B_meta"])), "two different columns"),
        (SPARSE, lambda t: t.update(B_meta=t["B_meta"].int()), "B_meta has dtype"),
        (SPARSE, lambda t: t.update(B_24=t["B_24"][:, 1:]), "B_24 has shape"),
    ],
)
def test_layers_that_are_refused(tmp_path, name, change, message):
    tensors, weight = packed(name)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        read_layer(tmp_path / "x.safetensors", CONFIGS[name], tuple(weight.shape), tensors)
    assert "m.l" in str(error.value)


@pytest.mark.parametrize("shape", [(32, 128), (64, 24)])
@pytest.mark.parametrize("name", [DENSE, SPARSE])
def test_shapes_that_are_no_multiple_of_tiles(tmp_path, name, shape):
    with pytest.raises(CheckpointError, match="tiles"):
        read_layer(tmp_path / "x.safetensors", CONFIGS[name], shape, packed(name)[0])


def test_sparse_weights_of_3_bits_do_not_exist(tmp_path):
    tensors, weight = packed(SPARSE)
    with pytest.raises(CheckpointError, match="4 or 8"):
        read_layer(tmp_path / "x.safetensors", {**CONFIGS[SPARSE], "bits": 3}, tuple(weight.shape), tensors)


def marlin_order():
    """The description's gather index of a run of 1024 codes."""
    order = []
    for t in range(32):
        rows = (2 * (t % 4), 2 * (t % 4) + 1, 2 * (t % 4) + 8, 2 * (t % 4) + 9)
        base = [16 * row + t // 4 + 8 * half for half in (0, 1) for row in rows]
        order += [b + 256 * tile for tile in range(4) for b in base]
    return [order[8 * run + i] for run in range(128) for i in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_a_model(tmp_path):
    pytest.importorskip("transformers")
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]

    def pack(name, shape):
        p = problem(4, *shape, shape[1], symmetric=True)
        tiles = p.codes.t().reshape(shape[1] // 16, 16, shape[0] // 16, 16).transpose(1, 2)
        runs = tiles.reshape(-1, 1024)[:, marlin_order()].reshape(shape[1] // 16, -1)
        return {"B": stream(runs, 4), "s": p.scales.t().reshape(-1, 32)[:, single].reshape(1, -1)}, p.weight

    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "marlin", "sym": True}
    check_llama(tmp_path, write_llama(tmp_path, config, pack))


QQQ_LAYERS = fixture_layers("marlin", "qqq")


@pytest.mark.parametrize(("file", "name", "config"), QQQ_LAYERS, ids=[name for _, name, _ in QQQ_LAYERS])
def test_qqq(file, name, config):
    stored = fixture_tensors(file, name)
    layer = read_layer(FIXTURES / file, config, tuple(stored["dense"].shape), name=name)
    assert torch.equal(decoded(layer), stored["dense"])
    assert str(layer.scheme) == f"int{8 if name == 'group_128' else 4} channel, activations int8 dynamic per token"


def test_qqq_of_several_channel_scales(tmp_path):
    file, name, config = QQQ_LAYERS[0]
    stored = fixture_tensors(file, name)
    shape = tuple(stored.pop("dense").shape)
    stored["s_channel"] = stored["s_channel"].repeat(2, 1)
    with pytest.raises(CheckpointError, match="s_channel has 2 rows"):
        read_layer(tmp_path / "x.safetensors", config, shape, stored)
