"""Whatever JSON stands in a quantization_config: a method is made, or a CheckpointError says why not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError
from tests.checkpoint.layer_files import store_of

WORDS = st.sampled_from(
    [
        "",
        "static",
        "Linear",
        "re:.*",
        "*",
        "FP8",
        "NVFP4",
        "fp8_e4m3",
        "int4",
        "fp4",
        "per_group",
        "per_tensor",
        "group",
    ]
)
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
JSON = st.recursive(
    st.one_of(NUMBERS, WORDS), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3)
)
ARGS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype")
SPEC = ("dtype", "qscheme", "group_size", "block_size", "symmetric", "is_dynamic", "scale_format")
ALGORITHMS = st.fixed_dictionaries({}, optional={"quant_algo": JSON, "group_size": JSON})


def objects(keys: tuple[str, ...]) -> st.SearchStrategy[Any]:
    return st.one_of(JSON, st.fixed_dictionaries({}, optional=dict.fromkeys(keys, JSON)))


SPECS = objects(SPEC) | st.lists(objects(SPEC), max_size=3)
LAYERS = st.fixed_dictionaries({}, optional={"weight": SPECS, "input_tensors": SPECS})
GROUPS = st.fixed_dictionaries(
    {"targets": st.lists(WORDS, max_size=2) | JSON},
    optional={"weights": objects(ARGS), "input_activations": objects(ARGS), "format": JSON},
)
CONFIGS = {
    "fp8": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("activation_scheme", "weight_block_size", "scale_fmt", "ignored_layers"), JSON)
    ),
    "compressed-tensors": st.fixed_dictionaries(
        {},
        optional={
            "config_groups": JSON | st.dictionaries(WORDS, GROUPS, max_size=2),
            **dict.fromkeys(("format", "ignore", "sparsity_config", "version"), JSON),
        },
    ),
    "modelopt": st.fixed_dictionaries(
        {},
        optional={
            "quantization": JSON,
            "quant_algo": JSON | st.just("MIXED_PRECISION"),
            "quantized_layers": JSON | st.dictionaries(st.just("x"), ALGORITHMS),
        },
    ),
    "quark": st.fixed_dictionaries(
        {},
        optional={
            "global_quant_config": JSON | LAYERS,
            "layer_quant_config": JSON | st.dictionaries(WORDS, JSON | LAYERS, max_size=2),
            "layer_type_quant_config": JSON,
            "export": JSON,
        },
    ),
}
LAYER = {
    "fp8": {"weight": torch.zeros(8, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(())},
    "compressed-tensors": {"weight_packed": torch.zeros(8, 4, dtype=torch.int32), "weight_scale": torch.ones(8, 1)},
    "modelopt": {"weight": torch.zeros(8, 16, dtype=torch.uint8), "weight_scale": torch.ones(8, 2)},
    "quark": {"weight": torch.zeros(8, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(())},
}


@pytest.fixture(scope="module", params=CONFIGS)
def method_and_store(request, tmp_path_factory) -> tuple[str, TensorStore]:
    folder: Path = tmp_path_factory.mktemp("layer")
    return request.param, store_of(folder, {f"x.{name}": tensor for name, tensor in LAYER[request.param].items()})


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes")
@given(data=st.data())
def test_any_json(method_and_store, data):
    name, store = method_and_store
    config = data.draw(CONFIGS[name])
    with contextlib.suppress(CheckpointError):
        method = method_for({**config, "quant_method": name}, store)
        assert method is not None
        method.linear(LayerTensors(store, "x"), (8, 32))
