"""GGUF's types chosen with an importance matrix: as good as ggml's own quantizer, and what files hold, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qcompile
from qcompile.calibrate.codes import choose_codes
from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES
from qcompile.checkpoint.saving.base import Rounding
from qcompile.checkpoint.saving.gguf_pack import pack_layer
from qcompile.checkpoint.saving.layers import Layer
from qcompile.errors import ConfigError, LayerError
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme import Scheme
from qcompile.scheme_config import parse_scheme, scheme_to_dict
from tests import tolerance
from tests.strategies import matrices

gguf = pytest.importorskip("gguf")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "calibrate"
THEIRS = json.loads((FIXTURES / "ggml.json").read_text())
K_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
SUBSTITUTES = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
OTHERS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
IMPORTANCE = {"name": "rtn", "clip": "importance"}


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(FIXTURES / "super_blocks.safetensors")
    return tensors["weight"].float(), tensors["importance"]


def chosen(name: str, method: object, weight: torch.Tensor, importance: torch.Tensor) -> PackedWeight:
    scheme = parse_scheme({"preset": name, "method": method}).fit("layer", tuple(weight.shape))
    return choose_codes(weight, scheme, torch.diag(importance), "layer")


def weighted(weight: torch.Tensor, packed: PackedWeight, importance: torch.Tensor) -> float:
    error = weight.double() - dequantize(packed).double()
    return float((error.square() * importance).sum() / (weight.double().square() * importance).sum())


@pytest.mark.parametrize("name", [*K_TYPES, *OTHERS])
def test_ggml(name):
    weight, importance = problem()
    ours = weighted(weight, chosen(name, IMPORTANCE, weight, importance), importance)
    assert ours <= THEIRS[f"{name} importance"]
    assert ours <= weighted(weight, chosen(name, "rtn", weight, importance), importance)


@pytest.mark.parametrize("method", ["rtn", {"name": "rtn", "clip": "mse"}, IMPORTANCE, "gptq"])
@pytest.mark.parametrize("name", K_TYPES)
def test_gguf_decodes_what_is_packed(name, method):
    """Bit for bit, by gguf-py, which shares no code with us."""
    weight, importance = problem()
    packed = chosen(name, method, weight, importance)
    layer = Layer(
        name="layer",
        scheme=Scheme(weight=packed.scheme),
        shape=packed.shape,
        dtype=torch.float32,
        weight=lambda: packed,
        bias=None,
        input_scale=None,
        pre_quant_scale=None,
    )
    number, blocks = pack_layer(layer, Rounding(False))
    assert BLOCK_TYPES[number].name.lower() == name
    theirs = gguf.dequantize(np.ascontiguousarray(blocks.numpy()), gguf.GGMLQuantizationType(number))
    assert torch.equal(torch.from_numpy(theirs.copy()), dequantize(packed))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(K_TYPES),
    weight=matrices(st.integers(1, 4), st.sampled_from([256, 512]), (torch.float32, torch.bfloat16)),
    method=st.sampled_from(["rtn", {"name": "rtn", "clip": "mse"}, IMPORTANCE]),
    dead=st.booleans(),
)
def test_no_worse_than_the_range(name, weight, method, dead):
    """Also of zeros, outliers, subnormals, weights of one sign, and where no input was other than 0."""
    importance = torch.zeros(weight.shape[1]) if dead else torch.linspace(0, 3, weight.shape[1])
    packed = chosen(name, method, weight, importance)
    assert dequantize(packed).isfinite().all()
    nearest = quantize_weight(weight, packed.scheme)
    of = torch.ones_like(importance) if method != IMPORTANCE else importance
    found, bound = (((weight.double() - dequantize(p).double()).square() * of).sum() for p in (packed, nearest))
    assert found <= bound * (1 + 2**-15) + 1e-30


@pytest.mark.parametrize("name", K_TYPES)
def test_other_widths(name):
    """Where super-blocks do not fit, a preset becomes the type that llama.cpp takes; an explicit scheme is an error."""
    scheme = PRESETS[name]
    substitute = PRESETS[SUBSTITUTES[name]]
    assert scheme.fit("layer", (8, 576)).weight == substitute.fit("layer", (8, 576)).weight
    assert scheme.fit("layer", (8, 768)).weight == scheme.weight
    explicit = replace(scheme, weight=replace(scheme.weight, flexible_group=False))
    assert parse_scheme(scheme_to_dict(explicit)) == explicit
    with pytest.raises(LayerError, match="layer: super-blocks of 256 do not divide its 576 input features"):
        explicit.fit("layer", (8, 576))


def test_mistakes():
    with pytest.raises(ConfigError, match="method hqq does not choose uint8 scales"):
        parse_scheme({"preset": "q4_k", "method": "hqq"})
    given_ = {"format": "uint4", "group_size": 32, "symmetric": False, "scale_dtype": "uint8"}
    for above in ({"group_size": 256, "dtype": "float16"}, {"group_size": 48, "dtype": "float16"}):
        scheme = parse_scheme({"weight": {**given_, "super_scale": above, "offset": above["group_size"] == 48}}).weight
        with pytest.raises(LayerError, match="are read from checkpoints, not chosen here"):
            quantize_weight(torch.randn(4, 512), scheme)
    with pytest.raises(ConfigError, match="super_scale bits must be an integer from 2 to 8, not 9"):
        parse_scheme({"weight": {**given_, "super_scale": {"bits": 9}}})
    with pytest.raises(LayerError, match="layer: a super scale overflows float16"):
        quantize_weight(torch.full((1, 256), 1e9), PRESETS["q6_k"].weight, "layer")


def test_a_model_compiles_to_them():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 16), torch.nn.Linear(16, 4)).eval().requires_grad_(False)
    x = torch.randn(3, 256)
    config = {"rules": [{"layers": "0", "scheme": "q4_k"}]}
    compiled = torch.compile(model, backend="qcompile", options={"config": config})(x)
    qcompile.quantize_(model, config)
    assert tolerance.sqnr(model(x), compiled) > tolerance.rewrite_sqnr_floor(2, 256)
