"""`from_pretrained` quantizes with qcompile while it loads, or reads what is quantized, and saves it again."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import qcompile
from qcompile.errors import CheckpointError, ConfigError, LayerError
from qcompile.modules import QuantizedLinear
from tests.checkpoint.tiny_models import llama, quantized, same

IDS = torch.arange(9)[None]


def from_pretrained(folder, *config, **options):
    given = qcompile.TransformersConfig(*config)
    options = {"dtype": torch.float32} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=given, **options)


@pytest.fixture
def plain(tmp_path):
    model = llama(attention_bias=True)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'TransformerConfig'"):
        _ = qcompile.TransformerConfig


@pytest.mark.parametrize("config", ["int4", "int8", {"rules": [{"layers": "*.mlp.*", "scheme": "nvfp4"}]}], ids=str)
def test_quantizing_while_loading(plain, config):
    expected = qcompile.quantize_(llama(attention_bias=True), config, progress=False)
    model = from_pretrained(plain, config)
    same(expected, model)
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_tied_head(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    model = from_pretrained(tmp_path / "plain", "int8_weight_only")
    same(qcompile.quantize_(llama(tie_word_embeddings=True), "int8_weight_only", progress=False), model)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    same(model, from_pretrained(tmp_path / "saved"))


def test_few_originals_are_in_memory_at_once(plain, monkeypatch):
    """When a layer is quantized, those before it are already."""
    from qcompile.integrations import transformers as module

    seen = []
    original = module.Quantizer.replace

    def replace(self, model, name):
        linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
        seen.append(sum(not m.weight.is_meta for m in linears))
        original(self, model, name)

    monkeypatch.setattr(module.Quantizer, "replace", replace)
    from_pretrained(plain, "int4")
    assert len(seen) == 15
    assert set(seen) == {1}


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(plain, place, tmp_path):
    model = from_pretrained(plain, "int4", device_map=place)
    model.save_pretrained(tmp_path / "saved")
    same(model, from_pretrained(tmp_path / "saved", device_map=place))
    with pytest.raises(ConfigError, match="one device"):
        from_pretrained(tmp_path / "saved", device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_checkpoints_are_read_with_our_readers(format, tmp_path):
    model = quantized("int4")
    qcompile.save(model, tmp_path, format)
    loaded = from_pretrained(tmp_path)
    same(model, loaded)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert not any(p.is_meta for p in loaded.parameters())
    rotary = loaded.model.rotary_emb.inv_freq
    assert torch.equal(rotary, model.model.rotary_emb.inv_freq)
    assert loaded.get_input_embeddings().weight.dtype == torch.float32


def test_methods_that_transformers_does_not_know(tmp_path):
    qcompile.save(quantized("int4"), tmp_path, "gptq")
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"]["quant_method"] = "intel/auto-round"
    described["quantization_config"]["packing_format"] = "auto_round:auto_gptq"
    (tmp_path / "config.json").write_text(json.dumps(described))
    same(quantized("int4"), from_pretrained(tmp_path))


def test_save_pretrained(plain, tmp_path):
    model = from_pretrained(plain, "int4_asym")
    model.save_pretrained(tmp_path / "saved")
    same(model, from_pretrained(tmp_path / "saved"))
    same(model, qcompile.load(tmp_path / "saved", progress=False))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    with pytest.raises(CheckpointError, match=r"nf4.*bitsandbytes"):
        from_pretrained(plain, "nf4").save_pretrained(tmp_path / "refused")


def test_generate_with_a_compiled_forward_and_a_static_cache(tmp_path):
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, "int8_weight_only")
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    ids = IDS[:, 5:6]  # of one token, so that prefill and decode are one graph
    eager = model.generate(ids, **options)
    assert eager.shape == (1, 4)
    model.forward = torch.compile(model.forward, backend="qcompile")
    assert torch.equal(model.generate(ids, **options), eager)


def test_mistakes(plain, tmp_path):
    with pytest.raises(ConfigError, match="int4"):
        qcompile.TransformersConfig("itn4")
    with pytest.raises(ConfigError, match=r'plain: is not quantized; .*TransformersConfig\("int4"\)'):
        from_pretrained(plain)
    with pytest.raises(ConfigError, match="matches no layer"):
        from_pretrained(plain, {"rules": [{"layers": "*.mlpp.*", "scheme": "int4"}]})
    with pytest.raises(ConfigError, match="calibration=batches"):
        from_pretrained(plain, "fp8_static")
    qcompile.save(quantized("int4"), tmp_path / "quantized")
    with pytest.raises(ConfigError, match="is quantized already"):
        from_pretrained(tmp_path / "quantized", "int4")


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(LayerError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        from_pretrained(tmp_path, "int4")


def test_other_quantizers_are_as_they_were(tmp_path):
    """The configuration of a checkpoint still goes before one that is not ours."""
    qcompile.save(quantized("int4"), tmp_path, "gptq")
    with pytest.raises(ValueError, match="GPTQConfig"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)
        )
