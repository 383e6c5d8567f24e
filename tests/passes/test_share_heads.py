"""Attention to keys that heads share: rewritten or declined with its reason, and the same as before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.attention import attends_from_many
from qcompile.passes.share_heads import ATTENTION, RULE
from tests import tolerance
from tests.capture import capture

BATCH, HEADS, GROUP, SIZE, LENGTH = 2, 2, 4, 16, 12
SQUARES = attends_from_many(torch.empty(0, dtype=torch.bfloat16))
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def repeat(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, GROUP, length, size).reshape(batch, heads * GROUP, length, size)


def tensors(tokens: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and a mask that leaves the last positions out."""
    query = torch.randn(BATCH, HEADS * GROUP, tokens, SIZE, dtype=dtype)
    key, value = (torch.randn(BATCH, HEADS, LENGTH, SIZE, dtype=dtype) for _ in range(2))
    last = torch.arange(7, 7 + tokens)[:, None]
    return query, key, value, (torch.arange(LENGTH) <= last).expand(BATCH, 1, tokens, LENGTH)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)


SPELLINGS: dict[str, Attend] = {
    "repeated": lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m),
    "scaled": lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m, scale=0.4),
    "interleaved": lambda q, k, v, m: sdpa(q, k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, dim=1), m),
    "shared": lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True),
    "added mask": lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), added(m)),
    "no mask": lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), None),
}


def close(actual: Tensor, expected: Tensor) -> bool:
    """Attention rounds weights and its result to bfloat16, in either spelling."""
    return tolerance.sqnr(expected, actual) > -20 * torch.tensor(4 * tolerance.unit(torch.bfloat16)).log10().item()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, tokens: int) -> None:
    given = tensors(tokens)
    captured = capture(SPELLINGS[spelling], *given)
    assert captured.declined(RULE) == []
    assert captured.count(ATTENTION) == 1
    assert captured.count(F.scaled_dot_product_attention) == 0
    (graph,) = (c.graph for c in captured.contexts)
    assert not any("expand" in str(n.target) or "repeat" in str(n.target) for n in graph.nodes)
    assert close(captured.output, SPELLINGS[spelling](*given))


def test_the_length_ends_what_is_read() -> None:
    captured = capture(SPELLINGS["repeated"], *tensors())
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    length = node.args[4]
    assert length.meta["example_value"].shape == ()
    query, key, value, mask = tensors()
    for tensor in (key, value):
        tensor[:, :, 8:] = 1e4
    assert close(
        capture(SPELLINGS["repeated"], query, key, value, mask).output, sdpa(query, repeat(key), repeat(value), mask)
    )


def test_one_length_serves_all_layers() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(sdpa(q, repeat(k), repeat(v), mask), repeat(v), repeat(k), mask)

    captured = capture(twice, *tensors())
    assert captured.count(ATTENTION) == 2
    assert captured.count(torch.amax) == 1


def prefix(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
    positions = torch.arange(LENGTH)[None, None, None, :]
    mask = positions <= (torch.arange(q.shape[2]) + last)[None, None, :, None]
    return sdpa(q, repeat(k), repeat(v), mask.expand(BATCH, -1, q.shape[2], LENGTH))


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_mask_that_only_ends_the_context_is_left_out(tokens: int) -> None:
    query, key, value, _ = tensors(tokens)
    given = query, key, value, torch.tensor(5)
    captured = capture(prefix, *given)
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    assert (node.args[3] is None) == (tokens == 1 or SQUARES)
    assert node.args[4] is not None
    assert close(captured.output, prefix(*given))


@pytest.mark.parametrize("first", [1, 0.5])
def test_positions_that_do_not_begin_at_0_keep_their_mask(first: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
        return sdpa(q, repeat(k), repeat(v), (torch.arange(LENGTH) + first)[None, None, None, :] <= last)

    query, key, value, _ = tensors()
    captured = capture(attend, query, key, value, torch.tensor(5))
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    assert node.args[3] is not None
    assert close(captured.output, attend(query, key, value, torch.tensor(5)))


def changed_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keys = repeat(k)
    k.add_(1)
    return sdpa(q, keys, repeat(v), mask)


NEAR_MISSES: dict[str, tuple[Attend, str]] = {
    "own keys": (lambda q, k, v, m: sdpa(q, k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1), m), ""),
    "shared without mask": (lambda q, k, v, m: sdpa(q, k, v, None, enable_gqa=True), ""),
    "causal": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), None, is_causal=True), "is_causal aligns"),
    "dropout": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m, dropout_p=0.1), "it has dropout"),
    "turned": (lambda q, k, v, m: sdpa(q, repeat(k.mT.contiguous().mT), repeat(v), m), "lie one after another"),
    "float mask": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), added(m).float()), "neither boolean nor"),
    "changed": (changed_between, "something is written between"),
    "whole heads": (lambda q, k, v, m: sdpa(q[:, :HEADS], k.repeat_interleave(1, 1), v, m), "no query heads share"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_declined(case: str) -> None:
    attend, reason = NEAR_MISSES[case]
    given = tensors()
    expected = attend(*(t.clone() for t in given))
    captured = capture(attend, *(t.clone() for t in given))
    assert captured.count(ATTENTION) == 0
    declined = captured.declined(RULE)
    assert bool(declined) == bool(reason)
    assert all(re.search(reason, found) for found in declined), declined
    if case != "dropout":
        assert close(captured.output, expected)


def test_many_tokens_and_other_types_are_declined() -> None:
    attend = SPELLINGS["repeated"]
    assert "from 9 tokens" in capture(attend, *tensors(9)).declined(RULE)[0]
    query, key, value, mask = tensors(dtype=torch.float64)
    assert "not all bfloat16" in capture(attend, query, key, value, mask).declined(RULE)[0]
    query, key, value, mask = tensors(dtype=torch.float32)
    assert capture(attend, query, key, value, mask).count(ATTENTION) == 1


def written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """A mask that is filled after it was made."""
    mask = torch.zeros(m.shape, dtype=torch.bool)
    mask[..., :8] = True
    return sdpa(q, repeat(k), repeat(v), mask)


def edited(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """A mask that only ends the context, but for what is written into it."""
    mask = torch.arange(LENGTH)[None, None, None] <= torch.full((1, 1, 1, 1), 8)
    mask[..., 0] = False
    return sdpa(q, repeat(k), repeat(v), mask)


@pytest.mark.parametrize("attend", [written, edited, lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m, scale=0.0)])
def test_written_masks_and_a_scale_of_zero(attend: Attend) -> None:
    given = tensors()
    captured = capture(attend, *given)
    assert captured.count(ATTENTION) == 1
    assert close(captured.output, attend(*given))


def test_keys_that_change_after_they_were_repeated_are_declined() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        repeated, k = repeat(k), k.clone()
        k += 1
        return sdpa(q, repeated, repeat(v), m)

    given = tensors()
    captured = capture(attend, *given)
    assert captured.count(ATTENTION) == 0
    assert "written between" in captured.declined(RULE)[0]
    assert close(captured.output, attend(*given))


def test_a_decoding_step_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    ids = torch.randint(0, 64, (2, 7))

    def cache() -> Any:
        made = transformers.StaticCache(config=config, max_cache_len=16)
        model(ids, past_key_values=made)
        return made

    with torch.no_grad():
        expected = model(ids[:, :1], past_key_values=cache()).logits
        captured = capture(model, ids[:, :1], past_key_values=cache())
    assert captured.declined(RULE) == []
    assert captured.count(ATTENTION) == 2
    assert captured.count(torch.amax) == (0 if SQUARES else 1)
    # Every step of two layers rounds to bfloat16, about ten in each branch; see `half_sqnr_floor`.
    assert tolerance.sqnr(expected, captured.output.logits) > -20 * torch.tensor(40 * 2.0**-8).log10().item()


@pytest.mark.skipif(not SQUARES, reason="needs a processor with a matrix unit")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_prompt_of_transformers(heads: int, window: int | None) -> None:
    """Neither heads are repeated nor a mask is written."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
        vocab_size=64,
        sliding_window=window,
    )
    model = transformers.MistralForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    ids = torch.randint(0, 64, (2, 11))
    with torch.no_grad():
        expected = model(ids).logits
        captured = capture(model, ids, past_key_values=transformers.StaticCache(config=config, max_cache_len=16))
    assert captured.declined(RULE) == []
    calls = [n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION]
    assert [(n.args[3], *n.args[6:]) for n in calls] == [(None, True, window or 0)] * 2
    assert tolerance.sqnr(expected, captured.output.logits) > -20 * torch.tensor(40 * 2.0**-8).log10().item()


def test_is_causal_is_taken_for_as_many_queries_as_keys() -> None:
    query, key, value, _ = tensors(LENGTH)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, repeat(k), repeat(v), None, is_causal=True)

    captured = capture(attend, query, key, value)
    assert captured.count(ATTENTION) == (1 if SQUARES else 0)
    assert close(captured.output, attend(query, key, value))
    assert capture(attend, query[:, :, :5], key, value).count(ATTENTION) == 0


@pytest.mark.parametrize(("scheme", "kernels"), [("int4", 10), ("fp8", 12), ("fp8_block", 12)])
def test_a_decoding_step_on_a_gpu_launches_few_kernels(scheme: str, kernels: int) -> None:
    """Of a layer: norms (2), linears (4), rotary and stores (3), attention; and in 8 bits, where norms quantize too,
    quantization of what attention and SiLU give (2).
    """
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_decode", scheme, "3"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counted = dict(line.split(" ") for line in done.stdout.splitlines())
    assert (counted["attention"], counted["torch"]) == ("1", "0")
    assert int(counted["kernels"]) <= kernels
