"""Attention over quantized caches: every spelling is rewritten or declined with its reason, and gives the same."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile.caches import KVCache
from qcompile.kv_cache import decode_attention_spec
from qcompile.passes.quantize_attention import ATTENTION, RULE
from tests import tolerance
from tests.capture import Captured, capture

BATCH, HEADS, GROUP, SIZE, LENGTH = 2, 2, 2, 16, 12
READ = torch.ops.qcompile.dequantize_kv

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Stores a key and a value, then attends as it is told: (query, keys, values, mask) -> result."""

    def __init__(self, attend: Attend, group: int, kv_cache: Any = "int8") -> None:
        super().__init__()
        self.attend = attend
        self.cache = KVCache(BATCH, HEADS, LENGTH, SIZE, kv_cache, dtype=torch.float32)
        past = torch.arange(7)
        self.cache.update(past, *(torch.randn(BATCH, HEADS, 7, SIZE) for _ in "kv"))
        self.inputs = [torch.randn(BATCH, HEADS * group, 1, SIZE), *(torch.randn(BATCH, HEADS, 1, SIZE) for _ in "kv")]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        keys, values = self.cache.update(torch.tensor([7]), key, value)
        return self.attend(query, keys, values, mask)

    def run(self, mask: Tensor | None = None, config: Any = None) -> tuple[Captured, Tensor]:
        """Through the pass, and as it is."""
        mask = torch.arange(LENGTH)[None, None, None] <= 7 if mask is None else mask
        with torch.no_grad():
            plain = copy.deepcopy(self)(*self.inputs, mask)
        return capture(self, *self.inputs, mask, config=config), plain


def repeat(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, GROUP, length, size).reshape(batch, heads * GROUP, length, size)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, repeat(k).transpose(2, 3)) * SIZE**-0.5
    weights = F.softmax(scores + additive(mask), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), repeat(v))


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.tanh(q @ repeat(k).mT * 0.3 / 4.0) * 4.0
    return (scores + additive(mask)).softmax(-1) @ repeat(v)


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ repeat(k).permute(0, 1, 3, 2)
    scores /= math.sqrt(SIZE)
    scores += additive(mask)
    return torch.softmax(scores.float(), dim=3).type_as(q) @ repeat(v)


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q * 0.25) @ k.repeat_interleave(GROUP, dim=1).transpose(-2, -1)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v.repeat_interleave(GROUP, dim=1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


SPELLINGS: dict[str, tuple[Attend, float, float]] = {
    "sdpa": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m), 0.25, 0),
    "sdpa gqa": (lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True), 0.25, 0),
    "sdpa scale": (lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True, scale=0.4), 0.4, 0),
    "sdpa additive": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), additive(m)), 0.25, 0),
    "sdpa positional": (lambda q, k, v, m: F.scaled_dot_product_attention(q, repeat(k), repeat(v), m, 0.0), 0.25, 0),
    "sdpa contiguous": (lambda q, k, v, m: sdpa(q, repeat(k).contiguous(), repeat(v.contiguous()), m), 0.25, 0),
    "sdpa no mask": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), None), 0.25, 0),
    "written out": (written_out, 0.25, 0),
    "capped": (capped, 0.3, 4.0),
    "in place": (in_place, 0.25, 0),
    "filled": (filled, 1.0, 0),
    "no mask": (lambda q, k, v, m: (q @ repeat(k).mT).softmax(-1) @ repeat(v), 1.0, 0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    attend, scale, cap = SPELLINGS[spelling]
    captured, plain = Attention(attend, GROUP, "int4" if cap else "fp8").run()
    assert captured.declined(RULE) == []
    assert captured.count(ATTENTION) == 1
    assert captured.count(READ) == 0
    (node,) = (n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION)
    spec = decode_attention_spec(node.args[-1])
    assert (spec.scale, spec.softcap) == (pytest.approx(scale), cap)
    assert (node.args[3] is None) == ("no mask" in spelling)
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


@pytest.mark.parametrize("attend", [sdpa, lambda q, k, v, m: (q @ k.mT * 0.25 + additive(m)).softmax(-1) @ v])
def test_as_many_query_heads_as_key_heads(attend: Attend) -> None:
    captured, plain = Attention(attend, 1).run()
    assert captured.count(ATTENTION) == 1
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


def test_products_that_a_device_has_not_are_an_error_with_the_layers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.caches.check_compute", lambda *_: None)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(sdpa, 1, {"format": "fp8", "compute": "fp8"})
            self.inputs = self.attention.inputs

        def forward(self, *given: Tensor) -> Tensor:
            out: Tensor = self.attention(*given)
            return out

    block = Block()
    with pytest.raises(Exception, match=r'attention of attention: .* "compute": "fp8", and cpu .* leave "compute" out'):
        capture(block, *block.inputs, torch.arange(LENGTH)[None, None, None] <= 7)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, repeat(k), repeat(v))  # type: ignore[return-value]


def scores_read_twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ repeat(k).mT).softmax(-1)
    return weights @ repeat(v) + weights.sum()


def softmax(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ repeat(v)


NEAR_MISSES: dict[str, tuple[Attend, str]] = {
    "dropout": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m, dropout_p=0.1), "it has dropout"),
    "part of the keys": (
        lambda q, k, v, m: sdpa(q, repeat(k[:, :, :9]), repeat(v[:, :, :9]), m[..., :9]),
        "keys are not the whole cache",
    ),
    "changed values": (lambda q, k, v, m: sdpa(q, repeat(k), repeat(v * 2), m), "values are not the whole cache"),
    "flex": (flex, "flex_attention is compiled to a kernel of its own"),
    "weights read": (scores_read_twice, "what softmax gives is also read by others"),
    "other softmax": (lambda q, k, v, m: (q @ repeat(k).mT).softmax(1) @ repeat(v), "softmax is not over the context"),
    "bias twice": (lambda q, k, v, m: softmax(q @ repeat(k).mT + additive(m) + additive(m), v), "add stands between"),
    "capped otherwise": (
        lambda q, k, v, m: softmax(torch.tanh(q @ repeat(k).mT / 3) * 4, v),
        "divided by 3.0 before tanh and multiplied by 4.0",
    ),
    "least finite": (
        lambda q, k, v, m: softmax((q @ repeat(k).mT).masked_fill(~m, -1e9), v),
        "another value than -inf",
    ),
    "relu": (lambda q, k, v, m: softmax((q @ repeat(k).mT).relu(), v), "relu stands between"),
    "turned keys": (lambda q, k, v, m: softmax(q @ repeat(k).flip(2).mT, v), "keys are not the whole cache"),
    "another reader": (lambda q, k, v, m: k.sum() + v.sum(), "its cache is read by sum, no attention that is known"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_declined(case: str) -> None:
    attend, reason = NEAR_MISSES[case]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured, plain = Attention(attend, GROUP).run()
    assert captured.count(ATTENTION) == 0
    assert captured.declined(RULE)
    assert all(re.search(reason, declined) for declined in captured.declined(RULE)), captured.declined(RULE)
    if case != "dropout":
        assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


def test_a_cache_that_changes_before_attention_is_declined() -> None:
    class Twice(Attention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            keys, values = self.cache.update(torch.tensor([7]), key, value)
            self.cache.update(torch.tensor([3]), value, key)
            return self.attend(query, keys, values, mask)

    captured, plain = Twice(sdpa, 1).run()
    assert captured.count(ATTENTION) == 0
    assert any("changes between being read and being attended to" in reason for reason in captured.declined(RULE))
    assert tolerance.sqnr(plain, captured.output) > tolerance.rewrite_sqnr_floor(4, LENGTH * SIZE)


def test_attention_without_a_cache_is_left_alone() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)

    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16)
    assert capture(attend, q, k).declined(RULE) == []
    (reason,) = capture(attend, q, k, config={"kv_cache": "fp8"}).declined(RULE)
    assert "asks for a KV cache of fp8_e4m3, scales per tensor, but its keys come from no quantized cache" in reason


transformers = pytest.importorskip("transformers")

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}
GEMMA = BASE | {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "query_pre_attn_scalar": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "multi-query": ("LlamaConfig", BASE | {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen3": ("Qwen3Config", BASE),
    "mistral": ("MistralConfig", BASE | {"sliding_window": 5}),
    "gemma": ("GemmaConfig", BASE),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}),
}


CASES = [
    ("llama", "sdpa", True),
    ("llama", "sdpa", False),
    ("llama", "eager", True),
    ("multi-query", "sdpa", True),
    ("qwen2", "eager", True),
    ("qwen3", "sdpa", True),
    ("mistral", "sdpa", True),
    ("mistral", "eager", False),
    ("gemma", "eager", True),
    ("gemma2", "eager", True),  # transformers has no other
    ("gemma3", "sdpa", True),
    ("gpt2", "sdpa", True),
    ("gpt2", "eager", True),
]


@pytest.mark.parametrize(("name", "spelling", "padded"), CASES)
def test_transformers(name: str, spelling: str, padded: bool) -> None:
    """A decoding step after a prompt, of which one sequence may be padded on the left."""
    kind, given = MODELS[name]
    config = getattr(transformers, kind)(**given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=spelling).eval()
    model.requires_grad_(False)
    ids = torch.randint(0, 64, (2, 7))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0

    def prompt() -> Any:
        cache = qcompile.TransformersCache(model, "int8", max_cache_len=16)
        model(ids, past_key_values=cache, **({"attention_mask": mask[:, :7]} if padded else {}))
        return {"past_key_values": cache} | ({"attention_mask": mask} if padded else {})

    with torch.no_grad():
        plain = model(ids[:, :1], **prompt()).logits
        captured = capture(model, ids[:, :1], **prompt())
    assert captured.declined(RULE) == []
    layers = config.num_hidden_layers
    assert captured.count(ATTENTION) == layers
    assert captured.count(READ) == 0
    assert captured.count(torch.ops.qcompile.store_kv) == 2 * layers
    # Rounding may move a key or value by one step.
    floor = tolerance.product_sqnr_floor(tolerance.sqnr_floor("int8", 8))
    assert tolerance.sqnr(plain, captured.output.logits) > floor


def test_compiled_and_eager_models_write_the_same() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval().requires_grad_(False)
    ids = torch.randint(1, 64, (2, 5))
    texts = []
    for run in (model, torch.compile(model, backend="qcompile", fullgraph=True)):
        cache = qcompile.TransformersCache(model, "fp8", max_cache_len=16)
        with torch.no_grad():
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens = [token]
            for _ in range(7):
                token = run(token, past_key_values=cache).logits.argmax(-1)
                tokens.append(token)
        texts.append(torch.cat(tokens, 1))
    torch.compiler.reset()
    assert torch.equal(*texts)


def test_explain_tells_what_became_of_attention() -> None:
    model = Attention(SPELLINGS["sdpa"][0], GROUP)
    mask = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
    found = qcompile.explain(model, *model.inputs, mask)
    assert [event.what for event in found.attention] == ["reads its int8 cache directly"]
    assert "attention of 1 layers: reads its int8 cache directly" in " ".join(str(found).split())
    declined = qcompile.explain(Attention(flex, GROUP), *model.inputs, mask)
    assert "declined: flex_attention is compiled to a kernel of its own" in " ".join(str(declined).split())
