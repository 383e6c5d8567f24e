"""Norms and the quantization in groups of what they give, as one operator."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qcompile.norm_spec import decode_norm
from tests import tolerance
from tests.capture import Captured, capture

WIDTH = 128
FOUND = torch.ops.qcompile.norm_quantize.default


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quantize_norms", "share_quantization"):
        monkeypatch.setattr(importlib.import_module(f"qcompile.passes.{name}"), "LEFT", ())


class Block(nn.Module):
    """A norm, what reads it, and what else a case wants."""

    def __init__(self, norm: nn.Module, forward: Any) -> None:
        super().__init__()
        self.norm, self.run = norm, forward
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in norm.parameters():
            parameter.uniform_(-0.5, 1.5)

    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.run(self, x, other)


NORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (lambda: LlamaRMSNorm(WIDTH), {"weight": "plain", "early": True, "eps": 1e-6}),
    "gemma": (lambda: GemmaRMSNorm(WIDTH), {"weight": "one more", "early": False, "eps": 1e-6}),
    "gpt_oss": (lambda: GptOssRMSNorm(WIDTH), {"weight": "plain", "early": False, "eps": 1e-6}),
    "rms_norm": (lambda: nn.RMSNorm(WIDTH, eps=1e-5), {"weight": "plain", "early": False, "eps": 1e-5}),
    "layer_norm": (lambda: nn.LayerNorm(WIDTH), {"weight": "plain", "norm": "layer", "bias": True, "eps": 1e-5}),
    "no weight": (lambda: nn.RMSNorm(WIDTH, eps=1e-5, elementwise_affine=False), {"weight": ""}),
}


def run(model: nn.Module, scheme: str = "mxfp8") -> tuple[Captured, list[dict[str, Any]]]:
    """A model through the passes, beside itself, and the norms that were found."""
    x, other = (torch.randn(2, 5, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    captured = capture(model, x, other, config={"rules": [{"layers": "*", "scheme": scheme}]})
    with torch.no_grad():
        expected = model(x, other)
    for one, plain in zip(captured.output, expected, strict=True):
        assert tolerance.sqnr(plain.float(), one.float()) > tolerance.float_sqnr_floor(3) - 6
    nodes = [n for c in captured.contexts for n in c.graph.nodes if n.target is FOUND]
    return captured, [vars(decode_norm(node.args[-1])) for node in nodes]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_and_one_reader(name: str) -> None:
    make, expected = NORMS[name]
    model = Block(make(), lambda m, x, _: (m.q(m.norm(x)),)).to(torch.bfloat16)
    captured, (found,) = run(model)
    assert captured.rewritten("quantize_norms") == ["norm and quantization in one"]
    assert expected.items() <= found.items()
    assert (found["k"], found["columns"], found["number"]) == (WIDTH, 32, "fp8_e4m3")
    assert not any(found[key] for key in ("residual", "keep_sum", "keep_norm"))
    assert found["powers"]
    (graph,) = (c.graph for c in captured.contexts)
    others = [str(n.target) for n in graph.nodes if n.op != "placeholder" and n.target is not FOUND]
    assert not any("rsqrt" in name or "norm" in name for name in others)


@pytest.mark.parametrize("name", NORMS)
def test_a_residual_and_several_readers(name: str) -> None:
    def forward(m: Block, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        total = x + other
        normed = m.norm(total)
        return m.q(normed), m.k(normed), F.relu(normed), total * 2

    captured, (found,) = run(Block(NORMS[name][0](), forward).to(torch.bfloat16))
    assert found["residual"]
    assert found["keep_sum"]
    assert found["keep_norm"]
    assert captured.count(FOUND) == 1


def test_a_sum_that_nothing_else_reads_is_not_kept() -> None:
    model = Block(LlamaRMSNorm(WIDTH), lambda m, x, other: (m.q(m.norm(x + other)),)).to(torch.bfloat16)
    _, (found,) = run(model)
    assert (found["residual"], found["keep_sum"]) == (True, False)


def spelled(m: Block, x: Tensor, change: Any = None) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True)
    scaled = wide * torch.rsqrt(mean + 1e-6)
    return m.norm.weight * scaled.to(x.dtype) if change is None else change(m, x, wide, mean, scaled)


NEAR_MISSES: dict[str, tuple[Any, str | None]] = {
    "a sum of squares": (lambda m, x, w, mean, _: (w * torch.rsqrt(w.pow(2).sum(-1, keepdim=True) + 1e-6)).to(x), None),
    "a third power": (lambda m, x, w, *_: (w * torch.rsqrt(w.pow(4).mean(-1, keepdim=True) + 1e-6)).to(x), None),
    "another mean": (lambda m, x, w, *_: (w * torch.rsqrt(w.pow(2).mean(1, keepdim=True) + 1e-6)).to(x), None),
    "another tensor": (lambda m, x, w, mean, _: ((w + 1) * torch.rsqrt(mean + 1e-6)).to(x), None),
    "two more": (lambda m, x, w, mean, scaled: (scaled * (2.0 + m.norm.weight.float())).to(x), None),
    "part is read": (
        lambda m, x, w, mean, scaled: (scaled * m.norm.weight).to(x) + 0 * (scaled.sum() * 0).to(x),
        None,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    change, reason = NEAR_MISSES[name]
    model = Block(LlamaRMSNorm(WIDTH), lambda m, x, _: (m.q(spelled(m, x, change)),)).to(torch.bfloat16)
    captured, found = run(model)
    assert found == []
    assert captured.declined("quantize_norms") == ([] if reason is None else [reason])


def test_what_else_reads_a_part_is_named() -> None:
    def forward(m: Block, x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        wide = x.float()
        mean = wide.pow(2).mean(-1, keepdim=True)
        return m.q(m.norm.weight * (wide * torch.rsqrt(mean + 1e-6)).to(x.dtype)), mean

    captured, found = run(Block(LlamaRMSNorm(WIDTH), forward).to(torch.bfloat16))
    assert found == []
    assert captured.declined("quantize_norms") == ["something else reads a part of a norm"]


def test_static_scales_are_left_to_compilers() -> None:
    model = Block(LlamaRMSNorm(WIDTH), lambda m, x, _: (m.q(m.norm(x)),)).to(torch.bfloat16)
    x = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    activation = {"format": "int8", "granularity": "tensor", "dynamic": False, "scale": 0.1}
    scheme = {"weight": {"format": "int8", "granularity": "channel"}, "activation": activation}
    assert capture(model, x, x, config={"rules": [{"layers": "*", "scheme": scheme}]}).count(FOUND) == 0


def test_a_scale_a_token() -> None:
    model = Block(LlamaRMSNorm(WIDTH), lambda m, x, _: (m.q(m.norm(x)),)).to(torch.bfloat16)
    x = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    captured = capture(model, x, x, config={"rules": [{"layers": "*", "scheme": "fp8"}]})
    assert captured.rewritten("quantize_norms") == ["norm and quantization in one"]
    (found,) = (decode_norm(n.args[-1]) for c in captured.contexts for n in c.graph.nodes if n.target is FOUND)
    assert (found.norm, found.columns) == ("rms", WIDTH)


@pytest.mark.parametrize("scheme", ["fp8", "int8", "mxfp8"])
def test_rows_that_are_in_memory(scheme: str) -> None:
    """Inputs of the graph, results of linears, and of attention: not those of formulas."""

    def forward(m: Block, x: Tensor, other: Tensor) -> tuple[Tensor]:
        q, k, v = (t.unflatten(-1, (4, 32)).transpose(1, 2) for t in (m.q(x), *m.k(x).chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return (m.q(m.q(y)) + m.q(torch.sin(other)),)

    model = Block(nn.Identity(), forward).to(torch.bfloat16)
    x, other = (torch.randn(2, 5, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    captured = capture(model, x, other, config={"rules": [{"layers": "*", "scheme": scheme}]})
    assert captured.rewritten("share_quantization") == ["quantization in one kernel"] * 3
    with torch.no_grad():
        (expected,), (found,) = model(x, other), captured.output
    assert tolerance.sqnr(expected.float(), found.float()) > tolerance.float_sqnr_floor(3) - 9
