"""Sliding windows over quantized caches: decoding past the window, and caches that hold more than the window."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile.caches import KVCache
from qcompile.kv_cache import decode_attention_spec
from qcompile.passes import GraphContext
from qcompile.passes.quantize_attention import ATTENTION, RULE
from qcompile.pipeline import bind_inputs, rewrite
from tests import tolerance
from tests.capture import capture
from tests.kv_cache.test_caches import rounded
from tests.kv_cache.test_paged_models import model_of

transformers = pytest.importorskip("transformers")

WINDOW, SIZE, LENGTH = 5, 16, 40


class Rounded(transformers.DynamicCache):  # type: ignore[misc]
    """transformers' own cache of keys and values that were rounded as a quantized cache does."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        states = (rounded(x, "int8") for x in (key_states, value_states))
        return super().update(*states, layer_idx, *args, **kwargs)


def decode(model: nn.Module, step: Any, cache: Any, ids: Tensor, mask: Tensor | None, tokens: list[Tensor]) -> Tensor:
    """Logits of steps that are given their tokens, after a prompt."""
    given_: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    model(ids, past_key_values=cache, **given_)
    logits = []
    for token in tokens:
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], 1)
            given_ = {"attention_mask": mask}
        logits.append(step(token, past_key_values=cache, **given_).logits)
    return torch.cat(logits, 1)


CASES = [("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa"), ("gemma3", "eager")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [3, 9])
@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_decoding_past_the_window(name: str, spelling: str, prompt: int, padded: bool) -> None:
    """Prompts shorter and longer than the window, eagerly: as over transformers' own growing caches."""
    model = model_of(name, spelling)
    ids = torch.randint(1, 64, (2, prompt))
    mask = torch.ones_like(ids) if padded else None
    if mask is not None:
        mask[0, :2] = 0
    tokens = [torch.randint(1, 64, (2, 1)) for _ in range(2 * WINDOW)]
    found = decode(model, model, qcompile.TransformersCache(model, "int8", max_cache_len=32), ids, mask, tokens)
    for config in (model.config, None):  # with windows of their own, and whole
        expected = decode(model, model, Rounded(config=config), ids, mask, tokens)
        # Rounding may move a key or value by one step.
        floor = tolerance.product_sqnr_floor(tolerance.sqnr_floor("int8", 8))
        assert tolerance.sqnr(expected, found) > floor


@pytest.mark.parametrize(("name", "spelling"), [CASES[0], CASES[2], CASES[3]])
def test_compiled_decoding_past_the_window(name: str, spelling: str) -> None:
    """Few graphs serve all steps: before the window is full, as it is filled, and after."""
    model = model_of(name, spelling)
    ids, tokens = torch.randint(1, 64, (2, 3)), [torch.randint(1, 64, (2, 1)) for _ in range(WINDOW + 1)]
    contexts: list[GraphContext] = []

    def passes_alone(graph_module: Any, example_inputs: Any, **_: Any) -> Any:
        context = rewrite(graph_module, example_inputs, None)
        contexts.append(context)
        return bind_inputs(context, lambda *args: context.module(*args))[1]

    torch.compiler.reset()
    results = []
    for step in (model, torch.compile(model, backend=passes_alone, fullgraph=True)):
        cache = qcompile.TransformersCache(model, "int8", max_cache_len=32)
        with torch.no_grad():
            results.append(decode(model, step, cache, ids, None, tokens))
    torch.compiler.reset()
    floor = tolerance.product_sqnr_floor(tolerance.sqnr_floor("int8", 8))
    assert tolerance.sqnr(*results) > floor
    assert len(contexts) <= 4
    for context in contexts:
        assert sum(n.target is ATTENTION for n in context.graph.nodes) == model.config.num_hidden_layers


class Windowed(nn.Module):
    """A model of one's own: a whole cache, of which a step attends to the last few tokens."""

    def __init__(self, count: int, padding: Tensor | None = None) -> None:
        super().__init__()
        self.cache = KVCache(2, 2, LENGTH, SIZE, "fp8", dtype=torch.float32)
        self.cache.update(torch.arange(count), *(torch.randn(2, 2, count, SIZE) for _ in "kv"))
        self.padding = padding

    def forward(self, query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        keys, values = self.cache.update(position, key, value)
        places = torch.arange(LENGTH)[None, None, None, :]
        last = position[None, None, :, None]
        mask = (places <= last) & (places > last - WINDOW)
        if self.padding is not None:
            mask = mask & (places >= self.padding[:, None, None, None])
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_of_a_whole_cache_the_window_alone_is_read(tokens: int, padded: bool) -> None:
    model = Windowed(30, torch.tensor([0, 28]) if padded else None)
    inputs = torch.randn(2, 4, tokens, SIZE), *(torch.randn(2, 2, tokens, SIZE) for _ in "kv")
    position = torch.arange(30, 30 + tokens)
    plain = copy.deepcopy(model)(*inputs, position)
    for codes in (model.cache.key_codes, model.cache.value_codes):  # what lies before the window is NaN
        codes[:, :, : 30 - WINDOW + 1] = 0x7F
    captured = capture(model, *inputs, position)
    assert captured.declined(RULE) == []
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    assert (node.args[2] is None) == (tokens == 1 and not padded)
    assert "start" in node.kwargs
    assert decode_attention_spec(node.args[4]).window == 0
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)
