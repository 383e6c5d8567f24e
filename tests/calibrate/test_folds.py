"""Folds are found from graphs and leave the float model as it is; where they are illegal, the reason is told."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import qcompile
from qcompile.calibrate.folds import groups, site
from qcompile.calibrate.smoothquant import smooth_scales
from qcompile.calibrate.stream import call_of
from qcompile.calibrate.trace import Illegal, trace_block
from tests import tolerance
from tests.calibrate.problems import Block, batches, decoder, layer, statistics

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
DEPTH, INNER = 60, 64
"""Operators of a block one after another, with those that folding adds; terms of its sums."""


def owners(block: nn.Module) -> dict[int, int]:
    found: dict[int, int] = {}
    for _, parameter in block.named_parameters(remove_duplicate=False):
        found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def fold_all(block: nn.Module, call) -> dict[str, str]:
    """Fold random scales wherever it is legal, checking that the block stays what it was.

    Returns:
        for each group of linears, by their names: the parameters that took up scales, or why none did.
    """
    names = {id(p): n.removesuffix(".weight") for n, p in block.named_parameters()}
    outcome = {}
    with torch.no_grad():
        before = block(*call.args, **call.kwargs)
        trace = trace_block(block, call)
        for root, readers in groups(trace).items():
            key = " ".join(names[id(reader.weight)] for reader in readers)
            try:
                found = site(trace, root, readers, owners(block))
            except Illegal as reason:
                outcome[key] = f"no: {reason}" + outcome.get(key, "")
                continue
            found.apply(found.shared(torch.rand(len(found.classes)) * 3 + 0.3))
            after = block(*call.args, **call.kwargs)
            first, second = (t if isinstance(t, torch.Tensor) else t[0] for t in (before, after))
            assert tolerance.sqnr(first, second) > tolerance.rewrite_sqnr_floor(DEPTH, INNER)
            assert not torch.equal(first, torch.zeros_like(first))
            outcome[key] = " ".join(names[id(source.parameter)] for source in found.sources)
    return outcome


def test_a_new_architecture():
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    assert fold_all(block, call_of((torch.randn(2, 5, 32),), {"mask": mask})) == {
        "query key_value": "scale_a",
        "out": "key_value key_value.bias",
        "gate_up": "scale_b",
        "down": "gate_up gate_up.bias",
    }


def test_heads_that_share_values_share_scales():
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    trace = trace_block(block, call_of((torch.randn(1, 3, 32),), {}))
    root, readers = next((r, ls) for r, ls in groups(trace).items() if ls[0].weight is block.out.weight)
    classes = site(trace, root, readers, owners(block)).classes.view(4, 8)
    assert torch.equal(classes[0], torch.arange(8))
    assert torch.equal(classes[0], classes[1])
    assert torch.equal(classes[2], torch.arange(16, 24))
    assert torch.equal(classes[2], classes[3])


def captured(model: nn.Module, block: nn.Module):
    seen = {}
    handle = block.register_forward_pre_hook(lambda _, a, k: seen.update(a=a, k=k), with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(0, 50, (2, 7)), use_cache=False)
    handle.remove()
    return call_of(seen["a"], seen["k"])


LLAMA = {
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
QWEN = LLAMA | {"self_attn.o_proj": "self_attn.v_proj self_attn.v_proj.bias"}
ARCHITECTURES = {
    "Llama": ({}, LLAMA),
    "Llama eager": ({"attn_implementation": "eager"}, LLAMA),
    "Gemma": ({"head_dim": 8}, LLAMA),
    "Qwen2": ({}, QWEN),
    "Qwen3": ({"head_dim": 8}, LLAMA),
    "Mistral": ({}, LLAMA),
    "Phi3": (
        {"pad_token_id": 0, "eos_token_id": 1},
        {
            "self_attn.qkv_proj": "input_layernorm",
            "self_attn.o_proj": "self_attn.qkv_proj",
            "mlp.gate_up_proj": "post_attention_layernorm",
            "mlp.down_proj": "mlp.gate_up_proj",
        },
    ),
    "Phi": (
        {},
        {
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1": "input_layernorm input_layernorm.bias",
            "self_attn.dense": "self_attn.v_proj self_attn.v_proj.bias",
            "mlp.fc2": "no: operator pow reads what would change too",
        },
    ),
    "OPT": (
        {"ffn_dim": 64},
        {
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "self_attn_layer_norm self_attn_layer_norm.bias",
            "self_attn.out_proj": "self_attn.v_proj self_attn.v_proj.bias",
            "fc1": "final_layer_norm final_layer_norm.bias",
            "fc2": "fc1 fc1.bias",
        },
    ),
    "GPT2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4},
        {
            "attn.c_attn": "ln_1 ln_1.bias",
            "attn.c_proj": "attn.c_attn attn.c_attn.bias",
            "mlp.c_fc": "ln_2 ln_2.bias",
            "mlp.c_proj": None,
        },
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    more, expected = ARCHITECTURES[name]
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for parameter in layers[0].parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    found = fold_all(layers[0], captured(model, layers[0]))
    assert set(found) == set(expected)
    for key, where in expected.items():
        if where is None:
            assert found[key].startswith("no: operator")
        else:
            assert found[key] == where, key


class Near(nn.Module):
    """A linear behind a norm's weight, with something in the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.gain = nn.Parameter(torch.ones(1))
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        if kind == "tied":
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "before":
            return self.first(x)
        if self.kind == "gelu":
            return self.second(nn.functional.gelu(self.first(x)))
        if self.kind == "gain":
            return self.second(torch.tanh(x) * self.gain)
        normed = torch.tanh(x) * self.weight
        if self.kind == "residual":
            return normed + self.first(normed)
        if self.kind == "softmax":
            return self.first(normed) + normed.softmax(-1).sum()
        if self.kind == "tied":
            return self.first(normed) + self.second(normed)
        if self.kind == "twice":
            return self.first(normed) + self.first(torch.sin(x))
        assert self.kind == "values"
        return self.first(normed) if bool(normed.sum() > 0) else normed


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("before", "it comes from before the block"),
        ("gelu", "operator gelu does not commute with scales"),
        ("gain", "all channels would share one scale|tanh does not commute"),
        ("residual", "operator add reads its input too"),
        ("softmax", "operator softmax reads its input too"),
        ("tied", "a parameter belongs to several modules|would change twice"),
        ("twice", "a parameter is used several times"),
    ],
)
def test_near_misses_are_declined(kind, reason):
    torch.manual_seed(0)
    block = Near(kind).requires_grad_(False)
    outcome = fold_all(block, call_of((torch.randn(3, 16),), {}))
    assert any(re.match(f"no: .*({reason})", found) for found in outcome.values()), outcome


class Several(nn.Module):
    """A linear behind an operator that reads what would change twice, or in a way that scales do not pass."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(getattr(self, self.kind)(x))

    def square(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return h * h

    def relu_square(self, x: torch.Tensor) -> torch.Tensor:
        r = torch.relu(self.first(x))
        return r * r

    def relu_product(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return torch.relu(h) * h

    def quotient(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return h / h.expand(3, 16)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x) * self.bias
        return h + self.first(h)

    def layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return h + self.norm(h)

    def rms_norm(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return h + nn.functional.rms_norm(h, (16,), self.bias)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        kv = self.first(x)[None]
        return nn.functional.scaled_dot_product_attention(x[None], kv, kv)[0]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        v = self.first(x)
        return torch.mm(torch.mm(v, x.t()), v)

    def floor(self, x: torch.Tensor) -> torch.Tensor:
        return torch.div(self.first(x), 0.3, rounding_mode="floor")

    def floor_of_a_tensor(self, x: torch.Tensor) -> torch.Tensor:
        return torch.div(self.first(x), torch.sigmoid(x), rounding_mode="floor")

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x) * 9).to(torch.int32).to(torch.float32)

    def addmm(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, self.norm(x), self.weight.t())

    def computed(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 1.5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("square", "operator mul reads what would change through another operand too"),
        ("relu_square", "operator mul reads what would change through another operand too"),
        ("relu_product", "operator mul reads what would change through another operand too"),
        ("quotient", "operator div reads what would change through another operand too|operator expand reads"),
        ("linear", "operator linear reads what would change through another operand too"),
        ("layer_norm", "operator layer_norm reads what would change through another operand too"),
        ("rms_norm", "operator rms_norm reads what would change through another operand too"),
        ("attention", "operator scaled_dot_product_attention reads what would change through another operand too"),
        ("product", "operator mm reads what would change"),
        ("floor", "a division that rounds does not commute with scales"),
        ("floor_of_a_tensor", "a division that rounds does not commute with scales"),
        ("integers", "a cast to integers does not commute with scales"),
        ("addmm", "a weight that is computed"),
        ("computed", "a weight that is computed"),
    ],
)
def test_operators_that_read_it_otherwise_too_are_declined(kind, reason):
    torch.manual_seed(0)
    block = Several(kind).requires_grad_(False)
    for parameter in block.norm.parameters():
        parameter.add_(torch.randn_like(parameter))
    outcome = fold_all(block, call_of((torch.randn(3, 16),), {}))
    assert re.match(f"no: ({reason})", outcome["second"]), outcome


def test_a_block_that_looks_at_values_is_declined():
    block = Near("values").requires_grad_(False)
    with pytest.raises(Illegal, match="the block cannot be traced"):
        trace_block(block, call_of((torch.randn(3, 16),), {}))


def test_smoothquant_scales():
    """Equation 4 of the paper; a channel that is always 0, or a column of zeros, keeps its scale."""
    weight, x = layer(8, 32)
    x[:, 3] = 0
    weight[:, 4] = 0
    seen = statistics(x)
    scale = smooth_scales(seen, [weight, weight * 0.5], 0.5)
    expected = (x.abs().amax(0) / weight.abs().amax(0)).sqrt()
    live = [i for i in range(32) if i not in (3, 4)]
    assert torch.equal(scale[[3, 4]], torch.ones(2))
    tolerance.assert_within(scale[live], expected[live].double(), tolerance.gamma(4) * expected[live].double())


@pytest.mark.parametrize("method", ["awq", "smoothquant", ["smoothquant", "awq"]])
def test_folds_of_a_model_leave_it_as_it_is(method):
    """8-bit weights are near enough to tell a wrong fold."""
    model = decoder()
    expected = [copy.deepcopy(model)(b) for b in batches()]
    results = []
    scheme = {"weight": {"format": "int8", "granularity": "channel"}, "method": method}
    config = {"rules": [{"layers": "layers.*", "scheme": scheme}]}
    before = model.layers[0].scale_a.clone()
    qcompile.quantize_(model, config, calibration=batches(), report=results.append)
    assert all(result.folded and not result.declined for result in results)
    assert not torch.equal(before, model.layers[0].scale_a)
    for batch, y in zip(batches(), expected, strict=True):
        assert tolerance.sqnr(y, model(batch)) > tolerance.uniform_sqnr_floor(8, 48) - 10
