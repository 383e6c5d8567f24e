"""A first prompt, whose queries stand at a cache's first positions: torch attends to the tokens that it stored."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qcompile
from qcompile.caches import KVCache
from qcompile.kv_cache import decode_attention_spec
from qcompile.passes.quantize_attention import ATTENTION, RULE, _of_first
from tests import tolerance
from tests.capture import Captured, capture

MODULE = sys.modules[_of_first.__module__]
BATCH, HEADS, SIZE, LENGTH, COUNT = 2, 2, 16, 32, 10
READ = torch.ops.qcompile.dequantize_kv


def by_position(q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
    last = torch.arange(q.shape[2])[None, None, :, None] + first
    mask = torch.arange(k.shape[2])[None, None, None] <= last
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "mask": by_position,
    "is_causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "cut": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2], :], is_causal=True, enable_gqa=True
    ),
}


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where torch's kernels are faster."""
    monkeypatch.setattr(MODULE, "_by_torch", lambda _, read, spec: not spec.scheme.compute)


class Prompt(nn.Module):
    """Stores a prompt, and attends to it."""

    def __init__(self, attend: Callable[..., Tensor], kv_cache: Any = "int8", group: int = 2) -> None:
        super().__init__()
        self.attend = attend
        self.cache = KVCache(BATCH, HEADS, LENGTH, SIZE, kv_cache, dtype=torch.float32)
        shapes = (HEADS * group, HEADS, HEADS)
        self.inputs = [torch.randn(BATCH, heads, COUNT, SIZE) for heads in shapes]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.update(torch.arange(query.shape[2]), key, value)
        return self.attend(query, keys, values)


def calls(captured: Captured, target: Any) -> list[fx.Node]:
    return [n for c in captured.contexts for n in c.graph.nodes if n.target is target]


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kv_cache", ["int8", "int4", "fp8", {"format": "fp8", "scales": "head"}], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_torch_attends_to_the_first_tokens(spelling: str, kv_cache: Any, group: int) -> None:
    prompt = Prompt(SPELLINGS[spelling], kv_cache, group)
    plain = prompt(*prompt.inputs)
    captured = capture(prompt, *prompt.inputs)
    assert captured.declined(RULE) == []
    assert captured.count(ATTENTION) == 0
    (node,) = calls(captured, F.scaled_dot_product_attention)
    assert node.kwargs["is_causal"]
    assert node.args[1].meta["example_value"].shape == (BATCH, HEADS, COUNT, SIZE)
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


@pytest.mark.usefixtures("by_torch")
def test_a_prompt_of_any_length_is_taken() -> None:
    prompt = Prompt(SPELLINGS["is_causal"])
    for states in prompt.inputs:
        torch._dynamo.mark_dynamic(states, 2)
    captured = capture(prompt, *prompt.inputs)
    assert captured.declined(RULE) == []
    assert captured.count(ATTENTION) == 0
    assert tolerance.sqnr(prompt(*prompt.inputs), captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_on_cpus_the_operator_knows_how_many_there_are(spelling: str) -> None:
    prompt = Prompt(SPELLINGS[spelling])
    plain = prompt(*prompt.inputs)
    captured = capture(prompt, *prompt.inputs)
    assert captured.declined(RULE) == []
    (node,) = calls(captured, ATTENTION)
    assert decode_attention_spec(node.args[4]).causal
    assert node.args[2] is None
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


def test_other_positions_are_attended_to_by_the_kernel() -> None:
    prompt = Prompt(lambda q, k, v: by_position(q, k, v, 3))
    captured = capture(prompt, *prompt.inputs)
    assert captured.count(ATTENTION) == 1


@pytest.mark.usefixtures("by_torch")
def test_products_in_fp8_stay_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "check_compute", lambda *_: None)
    monkeypatch.setattr("qcompile.attention.check_compute", lambda *_: None)
    monkeypatch.setattr("qcompile.caches.check_compute", lambda *_: None)
    prompt = Prompt(SPELLINGS["is_causal"], {"format": "fp8", "compute": "fp8"})
    captured = capture(prompt, *prompt.inputs)
    (node,) = calls(captured, ATTENTION)
    spec = decode_attention_spec(node.args[4])
    assert spec.causal
    assert node.args[3].meta["example_value"].shape == ()


def test_more_queries_than_positions_are_declined() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        more = torch.cat([q] * 4, 2)
        return F.scaled_dot_product_attention(more, k, v, is_causal=True, enable_gqa=True)

    prompt = Prompt(attend)
    captured = capture(prompt, *prompt.inputs)
    assert captured.count(ATTENTION) == 0
    assert any("more queries than its cache has positions" in reason for reason in captured.declined(RULE))


transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("again", [False, True])
def test_a_first_prompt_of_transformers(again: bool) -> None:
    """After early initialization, and after a reset; a second prompt reads the codes behind the first."""
    model = llama()
    ids = torch.randint(0, 64, (2, COUNT))

    def cache() -> Any:
        made = qcompile.TransformersCache(model, "int8", max_cache_len=LENGTH)
        made.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
        if again:
            model(ids, past_key_values=made)
            assert int(made.get_seq_length()) == COUNT
            made.reset()
            assert made.get_seq_length() == 0
        return made

    with torch.no_grad():
        one, two = cache(), cache()
        plain = [model(ids, past_key_values=one).logits for _ in range(2)]
        for number, expected in enumerate(plain):
            captured = capture(model, ids, past_key_values=two)
            assert captured.declined(RULE) == []
            assert captured.count(ATTENTION) == (0 if number == 0 else 2)
            assert captured.count(READ) == (4 if number == 0 else 0)
            floor = tolerance.product_sqnr_floor(tolerance.sqnr_floor("int8", 8))
            assert tolerance.sqnr(expected, captured.output.logits) > floor
        assert int(two.get_seq_length()) == 2 * COUNT
