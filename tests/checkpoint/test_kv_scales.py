"""Scales of KV caches under the names of their producers."""

from __future__ import annotations

import pytest
import torch

from qcompile.checkpoint.kv_scales import is_kv_scale, kv_scales
from qcompile.errors import CheckpointError
from tests.checkpoint.layer_files import store_of

ATTENTION = "model.layers.3.self_attn"
SPELLINGS = [
    (ATTENTION, "k_scale", "v_scale"),
    (ATTENTION, "attn.k_scale", "attn.v_scale"),
    (ATTENTION, "k_proj.k_scale", "v_proj.v_scale"),
    (ATTENTION, "qkv_proj.k_scale", "qkv_proj.v_scale"),
    (ATTENTION, "qkqkv_proj.k_scale", "qkqkv_proj.v_scale"),
    (ATTENTION, "k_proj.output_scale", "v_proj.output_scale"),
    (ATTENTION, "k_cache.scale", "v_cache.scale"),
    ("backbone.layers.0.mixer", "k_proj.k_scale", "v_proj.v_scale"),
    ("transformer.h.0.attn", "k_scale", "v_scale"),
]


@pytest.mark.parametrize(("module", "key", "value"), SPELLINGS)
def test_every_spelling(tmp_path, module, key, value):
    store = store_of(tmp_path, {f"{module}.{key}": torch.tensor(0.5), f"{module}.{value}": torch.tensor([0.25])})
    assert all(map(is_kv_scale, store.names()))
    (found,) = kv_scales(store).values()
    assert list(kv_scales(store)) == [module]
    assert torch.equal(found.k_scale, torch.tensor(0.5))
    assert torch.equal(found.v_scale, torch.tensor(0.25))


def test_one_scale_for_both(tmp_path):
    found = kv_scales(store_of(tmp_path, {f"{ATTENTION}.kv_scale": torch.tensor(0.5)}))[ATTENTION]
    assert found.k_scale == found.v_scale == 0.5


def test_a_missing_scale_is_one(tmp_path):
    found = kv_scales(store_of(tmp_path, {f"{ATTENTION}.k_scale": torch.tensor(0.5)}))[ATTENTION]
    assert found.k_scale == 0.5
    assert found.v_scale == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scale_for_each_head(tmp_path, dtype):
    """As compressed-tensors' strategy attn_head stores them."""
    scale = torch.tensor([0.5, 0.25]).to(dtype).view(2, 1, 1)
    found = kv_scales(store_of(tmp_path, {f"{ATTENTION}.k_scale": scale, f"{ATTENTION}.v_scale": scale}))[ATTENTION]
    assert torch.equal(found.k_scale, torch.tensor([0.5, 0.25]))


def test_queries_and_probabilities_are_known_and_left(tmp_path):
    names = ("q_scale", "q_proj.output_scale", "q.scale", "prob_scale", "prob_output_scale", "q_zero_point")
    store = store_of(tmp_path, {f"{ATTENTION}.{name}": torch.tensor(0.5) for name in names})
    assert all(map(is_kv_scale, store.names()))
    assert kv_scales(store) == {}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight_scale",
        "model.layers.0.self_attn.k_proj.input_scale",
        "model.layers.0.mlp.up_proj.output_scale",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "k_scale",
    ],
)
def test_other_tensors_are_none(tmp_path, name):
    assert not is_kv_scale(name)
    assert kv_scales(store_of(tmp_path, {name: torch.ones(2, 2)})) == {}


@pytest.mark.parametrize("shift", ["k_zero_point", "v_proj.v_bias", "k_proj.output_zero_point"])
def test_shifted_caches_are_left_out(tmp_path, shift):
    scales = {f"{module}.self_attn.k_scale": torch.tensor(0.5) for module in ("a", "b")}
    store = store_of(tmp_path, {**scales, f"a.self_attn.{shift}": torch.tensor([0.0])})
    assert len(kv_scales(store)) == 2
    store = store_of(tmp_path, {**scales, f"a.self_attn.{shift}": torch.tensor([2.0])})
    with pytest.warns(UserWarning, match="zero points, which qcompile does not read"):
        assert list(kv_scales(store)) == ["b.self_attn"]


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (torch.tensor(0.0), "finite and positive"),
        (torch.tensor(-1.0), "finite and positive"),
        (torch.tensor(float("nan")), "finite and positive"),
        (torch.tensor([1.0, float("inf")]), "finite and positive"),
        (torch.ones(2, 2), "one number, or one a head"),
        (torch.ones(0), "one number, or one a head"),
        (torch.ones((), dtype=torch.int8), "is torch.int8"),
        (torch.ones(1 << 17), "one number, or one a head"),
    ],
)
def test_broken_scales(tmp_path, scale, match):
    with pytest.raises(CheckpointError, match=match) as error:
        kv_scales(store_of(tmp_path, {f"{ATTENTION}.k_scale": scale}))
    assert f"model.safetensors: {ATTENTION}.k_scale" in str(error.value)


def test_two_scales_for_one_cache(tmp_path):
    one = torch.ones(())
    with pytest.raises(CheckpointError, match="second scale of the k cache"):
        kv_scales(store_of(tmp_path, {f"{ATTENTION}.k_scale": one, f"{ATTENTION}.k_proj.k_scale": one}))


def test_parameters_of_the_model_are_none(tmp_path):
    name = f"{ATTENTION}.k_scale"
    assert kv_scales(store_of(tmp_path, {name: torch.ones(2, 2)}), {name}) == {}
