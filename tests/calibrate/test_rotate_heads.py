"""Turned values leave the float model as it is, and spread outliers; where it is illegal, that is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.calibrate.folds import owners_of
from qcompile.calibrate.rotate_heads import rotate_heads_, turn_values
from qcompile.calibrate.stream import Batch, call_of, without_cache
from qcompile.calibrate.trace import trace_block
from qcompile.linears import linear_modules
from tests import tolerance
from tests.calibrate.problems import Block, batches, decoder
from tests.calibrate.test_rotate import KINDS, transformer

DEPTH, INNER = 60, 64
"""Operators of two blocks one after another; terms of their sums."""
MORE = {
    **KINDS,
    "OPT": {"ffn_dim": 64},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 48, "n_head": 4, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 1},
    "Mistral": {"attn_implementation": "eager", "num_key_value_heads": 1},
}


def turned(model: nn.Module, ids: torch.Tensor) -> tuple[dict[str, str], set[str]]:
    """Why values were not turned, and which parameters changed."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with without_cache(model):
        outcome = rotate_heads_(model, Batch((ids,), {}), list(linear_modules(model)), 0)
    declined = {name: why for name, why in outcome.items() if why}
    return declined, {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("kind", MORE)
def test_architectures(kind):
    """Separate and fused projections, with biases, grouped heads and one for all; fused and plain attention."""
    model = transformer(kind, MORE[kind])
    ids = torch.randint(0, 50, (2, 9))
    expected = model(ids).logits
    declined, changed = turned(model, ids)
    assert not declined
    weights = [name for name in changed if name.endswith("weight")]
    assert len(weights) == 4  # of two blocks
    assert tolerance.sqnr(expected, model(ids).logits) > tolerance.rewrite_sqnr_floor(DEPTH, INNER)


def test_a_block_of_no_library():
    """Keys stay, though one linear gives them and values; each head of values is turned by the same matrix."""
    model, ids = decoder(), batches()[0]
    expected, before = model(ids), model.layers[0].key_value.weight.clone()
    declined, changed = turned(model, ids)
    assert not declined
    assert {name.split(".", 2)[2] for name in changed} == {"key_value.weight", "key_value.bias", "out.weight"}
    keys, values = model.layers[0].key_value.weight.chunk(2)
    assert torch.equal(keys, before.chunk(2)[0])
    heads = zip(values.view(2, 8, -1), before.chunk(2)[1].view(2, 8, -1), strict=True)
    rotations = [torch.linalg.lstsq(old.double().t(), new.double().t()).solution for new, old in heads]
    assert tolerance.sqnr(rotations[0], rotations[1]) > tolerance.rewrite_sqnr_floor(4, INNER)
    assert tolerance.sqnr(expected, model(ids)) > tolerance.rewrite_sqnr_floor(DEPTH, INNER)


class Gated(Block):
    """Its values are multiplied before they are mixed."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between

    def forward(self, x, mask=None):
        batch, tokens, width = x.shape
        q = self.query(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        k, v = self.key_value(x).view(batch, tokens, 2, self.kv_heads, self.size).transpose(1, 3).unbind(2)
        if self.between == "relu":
            v = nn.functional.relu(v)
        if self.between == "values added":
            v = v + x.view(batch, tokens, self.heads, self.size).transpose(1, 2)[:, : self.kv_heads]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        y = mixed.transpose(1, 2).reshape(batch, tokens, width)
        if self.between == "read twice":
            return self.out(y) + y
        return x + self.out(y)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("relu", "operator relu lies between values and the output projection"),
        ("values added", "it comes from before the block"),
        ("read twice", "operator add reads its input too"),
    ],
)
def test_what_a_rotation_does_not_pass_through(between, reason):
    torch.manual_seed(0)
    block = Gated(between).eval().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    trace = trace_block(block, call_of((torch.randn(1, 5, 32),), {}))
    ((readers, why),) = turn_values(trace, owners_of(block), 0)
    assert why == reason
    assert readers[0].weight is block.out.weight
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_outliers_of_values_are_spread():
    """A cache of 4 bits is better after turning, where one channel of each head is large."""
    ids = torch.randint(0, 50, (1, 24))
    model = transformer("Llama", {"tie_word_embeddings": False, "hidden_size": 64, "head_dim": 32})
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[::32] *= 40
        layer.self_attn.o_proj.weight[:, ::32] /= 40
    expected, found = model(ids).logits, []
    for _ in range(2):
        cache = qcompile.TransformersCache(model, "int4", max_cache_len=24)
        found.append(tolerance.sqnr(expected, model(ids, past_key_values=cache).logits))
        turned(model, ids)
    assert found[1] > found[0] + 3


def test_a_reason_is_told():
    model, results = nn.Sequential(*(Gated("relu") for _ in range(2))).eval().requires_grad_(False), []
    scheme = {"preset": "int8_weight_only", "method": "hadamard"}
    config = {"rules": [{"layers": f"*.{name}", "scheme": scheme} for name in ("out", "query")]}
    qcompile.quantize_(model, config, calibration=[torch.randn(1, 5, 32)], report=results.append)
    declined = {result.name: result.declined for result in results}
    assert "hadamard of values: operator relu lies between" in declined["0.out"]
    assert "of values" not in declined["0.query"]
