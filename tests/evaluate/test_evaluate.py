"""Evaluations against float64 sums by numpy, layers against decoded value tables, and what is said of misfits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

transformers = pytest.importorskip("transformers")

import qcompile
from qcompile.config import parse_config
from qcompile.errors import ConfigError
from qcompile.evaluate import evaluate, layers, quantized_copy, record
from qcompile.evaluate.layers import Channels, distance
from qcompile.evaluate.models import stored_weights
from qcompile.evaluate.quality import windows
from qcompile.evaluate.recording import predicted
from qcompile.experts import QuantizedExperts
from qcompile.modules import QuantizedLinear
from tests import oracle
from tests.checkpoint.moe_files import make_moe
from tests.checkpoint.tiny_models import llama

WINDOW = 24
INT4 = parse_config("int4")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 320, (100,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def quantized(model):
    return quantized_copy(model, INT4)


@pytest.fixture(scope="module")
def recording(model, ids, tmp_path_factory):
    return record(model, ids, tmp_path_factory.mktemp("recording"), window=WINDOW, rows=30, progress=False)


@pytest.fixture(scope="module")
def evaluation(quantized, ids, recording):
    return evaluate(quantized, ids, recording, progress=False)


def probabilities(model, window):
    """numpy float64 [T, V], of the next tokens."""
    logits = model(window).logits[0].double().numpy()
    exponentials = numpy.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def mean_and_error(values):
    return float(numpy.mean(values)), float(numpy.std(values, ddof=1) / math.sqrt(len(values)))


def test_quality_against_float64(model, quantized, ids, recording, evaluation):
    surprise, own, divergence, same = [], [], [], []
    for start in (0, 24, 48, 72, 76):  # the last window reaches back to the 96 tokens that are predicted already
        window = ids[start : start + WINDOW][None]
        p, q = probabilities(quantized, window), probabilities(model, window)
        for i in range(20 if start == 76 else 1, WINDOW):
            token = int(window[0, i])
            surprise.append(-math.log(p[i - 1, token]))
            own.append(-math.log(q[i - 1, token]))
            divergence.append(float((q[i - 1] * numpy.log(q[i - 1] / p[i - 1])).sum()))
            same.append(p[i - 1].argmax() == q[i - 1].argmax())
    found = evaluation.quality
    assert found.tokens == len(surprise) == predicted(100, WINDOW)
    mean, error = mean_and_error(surprise)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-9)
    assert found.perplexity_error == pytest.approx(math.exp(mean) * error, rel=1e-9)
    assert recording.quality.perplexity == pytest.approx(math.exp(mean_and_error(own)[0]), rel=1e-9)
    assert (found.kl, found.kl_error) == pytest.approx(mean_and_error(divergence), rel=1e-9)
    assert found.kl_p99 == pytest.approx(sorted(divergence)[math.ceil(0.99 * len(divergence)) - 1])
    assert found.top1 == pytest.approx(numpy.mean(same))
    assert evaluation.note == ""
    assert evaluation.bits == pytest.approx(4.125)  # a bfloat16 scale for 128


def decibels(a, b):
    return 10 * numpy.log10((a**2).sum() / ((a - b) ** 2).sum())


def cosine(a, b):
    return numpy.mean((a * b).sum(1) / numpy.sqrt((a**2).sum(1) * (b**2).sum(1)))


def test_layers_against_decoded_tables(model, quantized, ids, evaluation):
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=name: inputs.setdefault(n, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for window, _ in windows(ids, WINDOW):
        model(window)
    for handle in handles:
        handle.remove()
    assert [layer.name for layer in evaluation.layers] == list(inputs) == [n for n, _ in quantized_layers(quantized)]
    for layer in evaluation.layers:
        module = quantized.get_submodule(layer.name)
        weight = model.get_submodule(layer.name).weight.double().numpy()
        decoded = oracle.dequantize(module.logical()).double().numpy()
        assert layer.shape == weight.shape
        assert layer.bits == pytest.approx(4.125)  # a bfloat16 scale for 128
        assert layer.weight.sqnr_db == pytest.approx(decibels(weight, decoded), abs=1e-6)
        assert layer.weight.cosine == pytest.approx(cosine(weight, decoded), abs=1e-9)
        x = torch.cat([part[1::3] for part in inputs[layer.name]]).double().numpy()  # every third: 30 rows of 100
        y, rounded = x @ weight.T, x @ decoded.T
        assert layer.output.sqnr_db == pytest.approx(decibels(y, rounded), abs=1e-3)  # the layer computes in float32
        assert layer.output.cosine == pytest.approx(cosine(y, rounded), abs=1e-5)


def quantized_layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def test_blocks_against_hidden_states(model, quantized, ids, evaluation):
    """transformers' own hidden states; those of the last block only come normed."""
    wanted, found = [], []
    for window, _ in windows(ids, WINDOW):
        for each, into in ((model, wanted), (quantized, found)):
            into.append(each(window, output_hidden_states=True).hidden_states[1][0, 1::3].double().numpy())
    a, b = numpy.concatenate(wanted), numpy.concatenate(found)
    block = evaluation.blocks[0]
    assert [each.name for each in evaluation.blocks] == ["model.layers.0", "model.layers.1"]
    assert block.hidden.sqnr_db == pytest.approx(decibels(a, b), abs=1e-6)
    assert block.hidden.cosine == pytest.approx(cosine(a, b), abs=1e-9)
    assert evaluation.blocks[1].hidden.sqnr_db < block.hidden.sqnr_db


def test_channels(model, ids, recording):
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for window, _ in windows(ids, WINDOW):
        model(window)
    handle.remove()
    x = torch.cat(seen).double()
    by_name = {name: channels for channels in recording.inputs for name in channels.names}
    channels = by_name["model.layers.1.mlp.down_proj"]
    assert torch.equal(channels.maxima.double(), x.abs().amax(0))
    assert channels.rms == pytest.approx(x.square().mean().sqrt().item())
    assert channels.peak == pytest.approx((x.abs().max() / x.square().mean().sqrt()).item())
    shared = by_name["model.layers.0.self_attn.k_proj"]
    assert shared.names == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    weight = model.model.layers[0].mlp.up_proj.weight.double()
    own = next(c for c in recording.weights if c.names == ("model.layers.0.mlp.up_proj",))
    assert torch.equal(own.maxima.double(), weight.abs().amax(0))
    assert own.rms == pytest.approx(weight.square().mean().sqrt().item())


def test_bins_keep_the_largest():
    channels = Channels(("a",), torch.tensor([1.0, 8.0, 2.0, 3.0, 5.0]), 2.0)
    assert channels.binned(2) == [4.0, 2.5]
    assert channels.binned(9) == [0.5, 4.0, 1.0, 1.5, 2.5]
    assert Channels(("a",), torch.zeros(3), 0.0).peak == 0


def test_a_model_is_no_distance_from_itself(model, ids, recording):
    found = evaluate(model, ids, recording, progress=False)
    assert (found.quality.kl, found.quality.top1) == (0, 1)
    assert found.layers == ()
    assert all(block.hidden.sqnr_db == math.inf for block in found.blocks)


def test_alone(quantized, ids, evaluation):
    found = evaluate(quantized, ids, window=WINDOW, progress=False)
    assert found.quality == replace(evaluation.quality, kl=0.0, top1=1.0, kl_error=0.0, kl_p99=0.0)
    assert len(found.inputs) == 9  # four of each block, and the head's
    assert {name for c in found.weights for name in c.names} == {name for name, _ in quantized_layers(quantized)}


def test_a_module_as_reference(model, quantized, ids, evaluation):
    found = evaluate(quantized, ids, model, window=WINDOW, rows=30, progress=False)
    assert found == evaluation


# ---- numbers


@given(st.integers(2, 60), st.integers(2, 60))
def test_predicted_counts_what_windows_predict(total, window):
    assert predicted(total, window) == sum(w.shape[1] - first for w, first in windows(torch.arange(total), window))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_distance_against_numpy(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    found = distance(a, b)
    assert found.sqnr_db == pytest.approx(decibels(a.numpy(), b.numpy()))
    assert found.cosine == pytest.approx(cosine(a.numpy(), b.numpy()))


def test_distance_in_parts(monkeypatch):
    a, b = torch.randn(2, 5, 7, 3)
    whole = distance(a, b)
    monkeypatch.setattr(layers, "_AT_ONCE", 7)
    parts = distance(a, b)
    assert (parts.sqnr_db, parts.cosine) == pytest.approx((whole.sqnr_db, whole.cosine))


def test_distance_at_its_limits():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert distance(one, one) == distance(zero, zero) == layers.Distance(math.inf, 1.0)
    assert distance(zero, one) == layers.Distance(-math.inf, 0.0)
    assert math.isnan(distance(one, one * math.nan).sqnr_db)
    assert distance(one, one * math.inf).sqnr_db == -math.inf
    with pytest.raises(ValueError, match="cannot compare"):
        distance(one, one.T)


def test_perplexity_beyond_floats(model, ids):
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            logits = torch.nn.functional.one_hot(tokens, 320).float() * 1e5
            return type("Output", (), {"logits": logits})

    assert evaluate(Sure(), ids, window=WINDOW, progress=False).quality.perplexity == math.inf


# ---- other models


def test_the_copy_shares_what_is_not_quantized(model, quantized):
    before = llama().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert quantized.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_schemes_that_a_copy_cannot_have(model, method):
    with pytest.raises(ConfigError, match="looks at activations: quantize the model first"):
        quantized_copy(model, parse_config({"preset": "int8", "method": method}))
    with pytest.raises(ConfigError, match="looks at activations"):
        quantized_copy(model, parse_config("fp8_static"))
    with pytest.raises(ConfigError, match="matches no layer"):
        quantized_copy(model, parse_config({"rules": [{"layers": "*.q", "scheme": "int8"}]}))


def test_experts(tmp_path):
    model = make_moe("mixtral")
    quantized = quantized_copy(model, parse_config("int8_weight_only"))
    ids = torch.randint(0, model.config.vocab_size, (60,))
    found = {layer.name: layer for layer in evaluate(quantized, ids, model, window=20, progress=False).layers}
    experts = quantized.model.layers[0].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    whole = found["model.layers.0.mlp.experts"]
    assert whole.shape is None
    assert whole.output.sqnr_db > 30
    stacked = found["model.layers.0.mlp.experts.gate_up_proj"]
    original = model.model.layers[0].mlp.experts.gate_up_proj.double().flatten(0, 1).numpy()
    assert stacked.weight.sqnr_db == pytest.approx(
        decibels(original, experts.gate_up_proj.weight.double().flatten(0, 1).numpy()), abs=1e-3
    )
    assert stacked.output is None


def test_gpt2():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=64)
    ).eval()
    quantized = quantized_copy(model, parse_config("int8_weight_only"))
    found = evaluate(quantized, torch.randint(0, 100, (40,)), model, window=20, progress=False)
    assert len(found.layers) == 9
    assert all(layer.weight.sqnr_db > 35 < layer.output.sqnr_db for layer in found.layers)
    assert quantized.config.tie_word_embeddings is False
    quantized.tie_weights()  # the quantized head stays
    assert isinstance(quantized.lm_head, QuantizedLinear)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("tied", [False, True])
def test_stored_weights_are_those_in_memory(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored, kept = stored_weights(tmp_path), layers.module_weights(model)
    for name in ("lm_head", "model.layers.1.self_attn.k_proj"):
        assert torch.equal(stored(name), kept(name))
    assert stored("model.layers.7.self_attn.k_proj") is kept("model.layers.7.self_attn.k_proj") is None


@torch.no_grad()
def test_folded_scales_are_noticed(ids, recording):
    """As AWQ and SmoothQuant do it: the norm before is divided, and the layers that read it are multiplied."""
    folded = llama()
    block, scale = folded.model.layers[1], torch.linspace(0.5, 2, 128)
    block.post_attention_layernorm.weight.div_(scale)
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight.mul_(scale)
    qcompile.quantize_(folded, "int8_weight_only", progress=False)
    found = evaluate(folded, ids, recording, progress=False)
    assert "model.layers.1.post_attention_layernorm.weight is not the reference's" in found.note
    assert found.layers == ()
    assert found.bits == pytest.approx(8.25, abs=0.1)
    assert all(block.hidden.sqnr_db > 30 for block in found.blocks)


@torch.no_grad()
def test_rotations_are_noticed(ids, recording):
    turned = llama()
    turned.model.embed_tokens.weight.copy_(turned.model.embed_tokens.weight.roll(1, 1))
    found = evaluate(turned, ids, recording, progress=False)
    assert "rotated" in found.note
    assert found.layers == found.blocks == ()
    assert found.quality.kl > 0


# ---- misfits


def test_other_vocabulary(ids, recording):
    with pytest.raises(ConfigError, match=r"vocabularies differ: the reference has 320 tokens and the model 322"):
        evaluate(llama(vocab_size=322), ids, recording, progress=False)


def test_texts_that_cannot_be_read(model, ids, recording, tmp_path):
    with pytest.raises(ConfigError, match="the text has 1 tokens"):
        evaluate(model, ids[:1], progress=False)
    with pytest.raises(ConfigError, match="window of 129 tokens: this model reads 2 to 128"):
        evaluate(model, ids.repeat(2), window=129, progress=False)
    with pytest.raises(ConfigError, match="token 320 of the text, but the model knows 320"):
        record(model, torch.tensor([1, 320]), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="another text"):
        evaluate(model, ids[:50], recording, progress=False)


def test_no_room_for_logits(model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"do not fit in .*TMPDIR"):
        record(model, ids, tmp_path, window=WINDOW, progress=False)
