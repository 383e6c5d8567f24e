"""Calibrated models save to the formats of other libraries, and come back with the same codes and folded norms."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import qcompile
from qcompile.errors import LayerError
from qcompile.modules import QuantizedLinear
from tests import tolerance
from tests.checkpoint.tiny_models import llama, load, same

STATIC = {
    "weight": {"format": "int8", "granularity": "channel"},
    "activation": {"format": "int8", "dynamic": False, "observer": "mse"},
}


def int4(**more):
    weight = {"format": "int4", "group_size": 64, "scale_dtype": "float16", **more.pop("weight", {})}
    return {"weight": weight, **more}


def calibrated(scheme):
    ids = torch.randint(0, 320, (4, 1, 24), generator=torch.Generator().manual_seed(0))
    config = {"rules": [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": scheme}]}
    return qcompile.quantize_(llama(), config, calibration=list(ids), progress=False)


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("compressed-tensors", int4(method="gptq")),
        ("compressed-tensors", int4(method={"name": "gptq"}, weight={"act_order": True})),
        ("compressed-tensors", int4(method=["awq", "gptq"], weight={"symmetric": False})),
        ("compressed-tensors", {**STATIC, "method": ["smoothquant", "gptq"]}),
        ("compressed-tensors", {"preset": "fp8_static", "method": "gptq"}),
        ("compressed-tensors", {"preset": "nvfp4", "method": "gptq"}),
        ("gptq", int4(method="gptq")),
        ("gptq", int4(method="gptq", weight={"act_order": True, "symmetric": False})),
        ("gptq", int4(method="gptq", weight={"format": "int3"})),
        ("awq", int4(method="awq", weight={"symmetric": False})),
        ("gguf", {"preset": "q4_0", "method": {"name": "rtn", "clip": "importance"}}),
        ("gguf", {"preset": "q4_1", "method": "gptq"}),
    ],
)
def test_back_again(format, scheme, tmp_path):
    model = calibrated(scheme)
    qcompile.save(model, tmp_path, format)
    read = load(tmp_path, format)
    same(model, read)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits, read(ids).logits
        if "act_order" in str(scheme):  # columns of a group may come in another order
            assert tolerance.sqnr(ours, theirs) > tolerance.rewrite_sqnr_floor(60, 256)
        else:
            assert torch.equal(ours, theirs)
        assert tolerance.sqnr(llama()(ids).logits, read(ids).logits) > 8.0


@pytest.mark.parametrize(
    "scheme",
    [
        int4(method=["awq", "gptq"]),
        int4(method="gptq", weight={"symmetric": False}),
        {**STATIC, "method": "smoothquant"},
    ],
)
def test_transformers_and_compressed_tensors(scheme, tmp_path):
    """Their own dequantized weights are ours, and so are the norms that took up scales."""
    pytest.importorskip("compressed_tensors")
    model = calibrated(scheme)
    qcompile.save(model, tmp_path)
    decoded = None if "activation" in scheme else transformers.CompressedTensorsConfig(dequantize=True)
    given = {} if decoded is None else {"quantization_config": decoded}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **given)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits, read(ids).logits
        assert tolerance.sqnr(ours, theirs) > 30.0
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(model.state_dict()[norm], read.state_dict()[norm])
    if "gptq" not in str(scheme["method"]) or isinstance(scheme["method"], list):
        assert not torch.equal(model.state_dict()[norm], llama().state_dict()[norm])
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())


@pytest.mark.parametrize("scales", ["tensor", "head"])
def test_scales_of_a_kv_cache(scales, tmp_path):
    """They are calibrated with the rest, saved, and read again."""
    ids = torch.randint(0, 320, (2, 1, 24), generator=torch.Generator().manual_seed(0))
    rules = [{"layers": "model.*", "scheme": int4(method="gptq")}]
    config = {"rules": rules, "kv_cache": {"format": "fp8", "scales": scales}}
    model = qcompile.quantize_(llama(), config, calibration=[(part,) for part in ids], progress=False)
    found = model.model.layers[1].self_attn.kv_scales
    assert found.k_scale.shape == ((2,) if scales == "head" else ())
    qcompile.save(model, tmp_path)
    again = load(tmp_path).model.layers[1].self_attn.kv_scales
    assert torch.equal(found.k_scale, again.k_scale)
    assert torch.equal(found.v_scale, again.v_scale)


def test_experts(tmp_path):
    """A mixture by GPTQ, its experts too; what could not be done is refused before the work."""
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
        num_local_experts=2,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = [torch.arange(12)[None]]
    rules = [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": int4(method="gptq")}]
    static = {"format": "int8", "dynamic": False}
    experts = {"layers": "*.experts", "scheme": {**int4(), "activation": static}}
    with pytest.raises(LayerError, match=r"experts: static activation scales of experts are not calibrated"):
        qcompile.quantize_(model, {"rules": [experts, *rules]}, calibration=ids)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    qcompile.quantize_(model, {"rules": rules}, calibration=ids, progress=False)
    expected = model(ids[0]).logits
    qcompile.save(model, tmp_path)
    assert torch.equal(load(tmp_path)(ids[0]).logits, expected)
