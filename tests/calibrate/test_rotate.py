"""A turned residual stream leaves the float model as it is, and spreads outliers; where it is illegal, that is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.calibrate.rotate import hadamard, rotate_
from qcompile.calibrate.stream import Batch, without_cache
from qcompile.calibrate.trace import Illegal
from qcompile.errors import ConfigError
from qcompile.linears import linear_modules
from qcompile.modules import QuantizedLinear
from qcompile.scheme_config import parse_scheme
from tests import tolerance
from tests.calibrate.problems import batches, decoder

transformers = pytest.importorskip("transformers")

DEPTH, INNER = 120, 64
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
KINDS = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {"pad_token_id": 0, "eos_token_id": 1},
}


def transformer(kind: str, more: dict) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("size", [1, 2, 48, 64, 576, 7])
def test_the_matrix_is_orthogonal(size):
    matrix = hadamard(size)
    block = size & -size
    assert torch.equal((matrix != 0).sum(1), torch.full((size,), block))
    residual = (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()
    assert residual <= tolerance.gamma(size + 1, 2.0**-52)


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind):
    model = transformer(kind, KINDS[kind])
    ids = torch.randint(0, 50, (2, 9))
    expected = model(ids).logits
    before = model.get_input_embeddings().weight.clone()
    with without_cache(model):
        rotate_(model, Batch((ids,), {}), list(linear_modules(model)), 0)
    assert not torch.equal(before, model.get_input_embeddings().weight)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    norms = [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]
    assert all(torch.equal(p, torch.ones_like(p)) for p in norms)
    assert tolerance.sqnr(expected, model(ids).logits) > tolerance.rewrite_sqnr_floor(DEPTH, INNER)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def computed_embedding() -> nn.Module:
    model = transformer("Llama", {"tie_word_embeddings": False})
    nn.utils.parametrize.register_parametrization(model.get_input_embeddings(), "weight", Doubled(), unsafe=True)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: transformer("OPT", {"ffn_dim": 64}), "operator layer_norm reads the residual stream"),
        (decoder, "operator linear reads the residual stream"),
        (computed_embedding, "an embedding's weight is computed"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "the model has 0 lists of blocks"),
    ],
    ids=["layer norm", "no last norm", "computed embedding", "no blocks"],
)
def test_what_a_rotation_does_not_pass_through(model, reason):
    model = model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with without_cache(model), pytest.raises(Illegal, match=reason):
        rotate_(model, Batch((batches()[0],), {}), list(linear_modules(model)), 0)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_outliers_are_spread():
    """Channels whose inputs are large by the norm's weight and embedding: int4 is better after turning."""
    model = transformer("Llama", {"tie_word_embeddings": False, "num_hidden_layers": 2})
    model.model.embed_tokens.weight[:, 5] *= 50
    ids = [torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    state, expected = model.state_dict(), model(ids[0]).logits
    scheme = {
        "weight": {"format": "int8", "granularity": "channel"},
        "activation": {"format": "int8", "dynamic": False},
    }
    found = {}
    for method in ("rtn", ["hadamard", "rtn"]):
        turned = transformer("Llama", {"tie_word_embeddings": False})
        turned.load_state_dict(state)
        results = []
        rules = [{"layers": "model.*", "scheme": {**scheme, "method": method}}]
        qcompile.quantize_(turned, {"rules": rules}, calibration=ids, report=results.append)
        assert all(not result.declined for result in results)
        found[str(method)] = tolerance.sqnr(expected, turned(ids[0]).logits)
    assert found["['hadamard', 'rtn']"] > found["rtn"]


def test_a_reason_is_told():
    results = []
    rules = [{"layers": "layers.*", "scheme": {"preset": "int8_weight_only", "method": ["hadamard", "awq", "gptq"]}}]
    qcompile.quantize_(decoder(), {"rules": rules}, calibration=batches(), report=results.append)
    assert {result.declined for result in results} == {"hadamard: operator linear reads the residual stream"}
    assert all(result.folded for result in results)


def test_mistakes():
    with pytest.raises(ConfigError, match="hadamard turns the whole model before all else, so it comes first"):
        parse_scheme({"preset": "int4", "method": ["awq", "hadamard"]})
    schemes = [{"preset": "int4", "method": [{"name": "hadamard", "seed": seed}]} for seed in (1, 2)]
    rules = [{"layers": "layers.0.*", "scheme": schemes[0]}, {"layers": "layers.*", "scheme": schemes[1]}]
    with pytest.raises(ConfigError, match="layers name different seeds"):
        qcompile.quantize_(decoder(), {"rules": rules}, calibration=batches())


def test_what_nothing_reaches_turns_its_inputs_online(tmp_path):
    """Products of gate and up are turned when the model runs; all else is folded, and a resumed call does the same."""
    state = transformer("Llama", {"tie_word_embeddings": False}).state_dict()
    ids = [torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    online = {"name": "hadamard", "online": True}
    rules = [{"layers": "model.*", "scheme": {"weight": {"format": "int8"}, "method": [online, "gptq"]}}]
    made = []
    for _ in range(2):
        model = transformer("Llama", {"tie_word_embeddings": False})
        model.load_state_dict(state)
        expected = model(ids[0]).logits
        qcompile.quantize_(model, {"rules": rules}, calibration=ids, resume=tmp_path / "resume", progress=False)
        made.append(model)
        assert tolerance.sqnr(expected, model(ids[0]).logits) > 30
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    rotated = {name.rpartition(".")[2] for name, layer in layers.items() if layer.scheme.weight.rotated}
    assert rotated == {"down_proj"}
    assert torch.equal(made[0](ids[0]).logits, made[1](ids[0]).logits)


def test_static_scales_are_not_turned_online():
    results = []
    scheme = {
        "weight": {"format": "int8"},
        "activation": {"format": "int8", "dynamic": False},
        "method": {"name": "hadamard", "online": True},
    }
    model, ids = transformer("Llama", {}), torch.randint(0, 50, (1, 24))
    rules = {"rules": [{"layers": "model.*", "scheme": scheme}]}
    qcompile.quantize_(model, rules, calibration=[ids], progress=False, report=results.append)
    told = {result.name.rpartition(".")[2]: result.declined for result in results if result.declined}
    assert told.keys() == {"down_proj"}
    assert "dynamic activation scales" in told["down_proj"]
