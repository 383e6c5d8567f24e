"""Gates: what is one, and how the gatings of transformers' mixtures become steps."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qcompile import gates
from qcompile.gating import Gating, gate_step
from tests import oracle, tolerance
from tests.checkpoint.moe_files import make_moe
from tests.strategies import GATES

ALIKE = "min(max(b,-7.0),7.0)"
SPELLED = {
    "step3p7": ("Step3p7Experts", f"min(silu(a),7.0)*{ALIKE}"),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", oracle.GPT_OSS),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", oracle.GPT_OSS),
    "deepseek_v4": ("DeepseekV4Experts", f"silu(min(a,7.0))*{ALIKE}"),
    "hy_v4": ("HYV4Experts", f"silu(min(a,7.0))*{ALIKE}"),
}
"""Models with a gating of their own."""


class Experts(nn.Module):
    """As much of an experts module as a gating looks at."""

    has_gate = True

    def __init__(self, function: Any, activation: str = "silu") -> None:
        super().__init__()
        self.limit = self.swiglu_limit = 7.0
        self.alpha = self.swiglu_alpha = 1.702
        self.function, self.act_fn = function, ACT2FN[activation]

    def _apply_gate(self, product: Tensor) -> Tensor:
        gated: Tensor = self.function(self, product)
        return gated


def halves(experts: Experts, product: Tensor) -> Tensor:
    gate, up = product.chunk(2, dim=-1)
    gated: Tensor = experts.act_fn(gate) * up
    return gated


@pytest.mark.parametrize("step", GATES)
def test_a_gate_is_its_formula(step: str) -> None:
    assert gates.is_gate(step)
    y = torch.randn(5, 64, dtype=torch.float64) * 6
    found = gates.gate(step, *gates.columns(step, y))
    assert tolerance.sqnr(oracle.epilogue(y, steps=(step,)), found) > 200


@given(st.text(alphabet="ab+-*/(),.7 minsluxotrg_", max_size=24))
def test_any_other_text_is_none(text: str) -> None:
    if gates.is_gate(text):
        assert isinstance(gates.gate(text, torch.randn(3), torch.randn(3)), Tensor)


@pytest.mark.parametrize("text", ["", "silu", "a**b", "2*3", "a/b", "exec(a)", "a.b*b", "min(a)", "a if b else a"])
def test_what_is_no_gate(text: str) -> None:
    assert not gates.is_gate(text)


def check(gating: Gating, step: str) -> None:
    """The step computes what the model's function does."""
    product = torch.randn(7, 64, dtype=torch.float64) * 6
    found = gates.gate(step, *gates.columns(step, product))
    assert tolerance.sqnr(gating(product), found) > 200


@pytest.mark.parametrize(
    ("kind", "step"),
    [("mixtral", "silu(a)*b"), ("qwen3_moe", "silu(a)*b"), ("gpt_oss", f"pairs {oracle.GPT_OSS}")],
)
def test_gatings_of_models(kind: str, step: str) -> None:
    gating = Gating(make_moe(kind).model.layers[0].mlp.experts)
    assert gate_step(gating, 64) == step
    check(gating, step)


@pytest.mark.parametrize("model", SPELLED)
def test_gatings_that_models_spell_out(model: str) -> None:
    name, step = SPELLED[model]
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    gating = Gating(Experts(getattr(module, name)._apply_gate))
    assert gate_step(gating, 64) == step
    check(gating, step)


@pytest.mark.parametrize(
    ("activation", "step"),
    [
        ("gelu", "gelu(a)*b"),
        ("gelu_pytorch_tanh", "gelu_tanh(a)*b"),
        ("relu", "relu(a)*b"),
        ("relu2", "(relu(a)*relu(a))*b"),
        ("quick_gelu", "a*sigmoid(a*1.702)*b"),
    ],
)
def test_activations(activation: str, step: str) -> None:
    gating = Gating(Experts(halves, activation))
    assert gate_step(gating, 64) == step
    check(gating, step)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, y: torch.nn.functional.softplus(y[:, :32]) * y[:, 32:],
        lambda _, y: y[:, :16] * y[:, 16:32],
        lambda _, y: y[:, ::2] * y[:, 32:],
        lambda _, y: y[:, :32] * y[:, 32:] if y.sum() > 0 else y[:, :32],
        lambda _, y: y[:, :32] * y[:, 32:].sum(-1, keepdim=True),
    ],
)
def test_what_is_no_formula_of_two_columns(function: Any) -> None:
    assert gate_step(Gating(Experts(function)), 64) is None
