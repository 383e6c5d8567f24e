"""Models of transformers over paged caches: sequences decoded together are those decoded alone, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import ConfigError
from qcompile.kv_cache import decode_attention_spec
from qcompile.passes.quantize_attention import ATTENTION, RULE
from tests import tolerance
from tests.capture import capture
from tests.passes.test_quantize_attention import MODELS

transformers = pytest.importorskip("transformers")

PROMPTS = [torch.arange(1, 10), torch.tensor([5, 3]), torch.arange(20, 28)]
STEPS = 6
CASES = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen2", "sdpa"),
    ("mistral", "sdpa"),
    ("gemma2", "eager"),
    ("gemma3", "sdpa"),
    ("gpt2", "sdpa"),
]


def model_of(name: str, spelling: str) -> nn.Module:
    kind, given = MODELS[name]
    config = getattr(transformers, kind)(**given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=spelling)
    return model.eval().requires_grad_(False)


def alone(model: nn.Module, kv_cache: Any, prompt: Tensor, steps: int = STEPS) -> list[int]:
    """What a model writes after one prompt, greedily."""
    cache = qcompile.TransformersCache(model, kv_cache, max_cache_len=32)
    ids, tokens = prompt[None], []
    for _ in range(steps + 1):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


def begin(model: nn.Module, kv_cache: Any) -> tuple[Any, Tensor]:
    """A cache with all prompts, and the token after each."""
    cache = qcompile.TransformersPagedCache(model, kv_cache, batch=3, max_length=32, page_size=8)
    tokens = []
    for prompt in PROMPTS:
        row = cache.pages.add()
        cache.pages.append(len(prompt), rows=[row])
        logits = model(prompt[None].to(model.device), **cache.inputs(len(prompt), [row])).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return cache, torch.cat(tokens)


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_decoding_together_writes_what_decoding_alone_does(name: str, spelling: str) -> None:
    model = model_of(name, spelling)
    cache, ids = begin(model, "int8")
    written = [ids]

    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, **cache.inputs(1)).logits
        return logits

    for _ in range(STEPS):
        cache.pages.append()
        ids = step(ids).argmax(-1)
        written.append(ids)
    assert torch.cat(written, 1).tolist() == [alone(model, "int8", prompt) for prompt in PROMPTS]
    cache.pages.append()
    captured = capture(step, ids)
    assert captured.declined(RULE) == []
    nodes = [n for c in captured.contexts for n in c.graph.nodes if n.target is ATTENTION]
    assert len(nodes) == len(cache.layers)
    windows = {decode_attention_spec(n.args[4]).window for n in nodes}
    assert windows == ({0, 5} if "gemma" in name and name != "gemma" else {5} if name == "mistral" else {0})
    assert all(n.args[2] is None and set(n.kwargs) == {"block_table"} for n in nodes)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_that_is_not_quantized_is_transformers_own(dtype: torch.dtype, compiled: bool) -> None:
    model = model_of("llama", "sdpa").to(dtype)
    cache, ids = begin(model, "auto")
    assert all(layer.store.key_codes.dtype == dtype for layer in cache.layers)
    own = [transformers.DynamicCache() for _ in PROMPTS]
    for prompt, one in zip(PROMPTS, own, strict=True):
        model(prompt[None], past_key_values=one)

    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, **cache.inputs(1)).logits
        return logits

    run = torch.compile(step, backend="qcompile", fullgraph=True) if compiled else step
    with torch.no_grad():
        for _ in range(STEPS):
            cache.pages.append()
            expected = torch.cat([model(i[None], past_key_values=one).logits for i, one in zip(ids, own, strict=True)])
            found = run(ids)
            assert tolerance.sqnr(expected, found) > (35 if dtype == torch.bfloat16 else 100)
            ids = expected.argmax(-1)
    torch.compiler.reset()


def test_prompts_of_unequal_length_are_padded_on_the_left() -> None:
    model = model_of("llama", "sdpa")
    cache = qcompile.TransformersPagedCache(model, "int8", batch=3, max_length=32, page_size=8)
    lengths = [len(prompt) for prompt in PROMPTS]
    for _ in PROMPTS:
        cache.pages.add()
    cache.pages.append(lengths)
    ids = torch.stack([nn.functional.pad(prompt, (max(lengths) - len(prompt), 0)) for prompt in PROMPTS])
    tokens = model(ids, **cache.inputs(max(lengths))).logits[:, -1].argmax(-1)
    assert tokens.tolist() == [alone(model, "int8", prompt, 0)[0] for prompt in PROMPTS]
    assert cache.pages.free_pages == 12 - sum(-(-length // 8) for length in lengths)


def test_compiled_steps_serve_sequences_that_come_and_go() -> None:
    model = model_of("mistral", "sdpa")
    texts = []
    for compiled in (False, True):
        cache, ids = begin(model, "fp8")

        def step(ids: Tensor, cache: Any = cache) -> Tensor:
            logits: Tensor = model(ids, **cache.inputs(1)).logits
            return logits

        run = torch.compile(step, backend="qcompile", fullgraph=True) if compiled else step
        written = []
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for i in range(8):
                cache.pages.append()
                ids = run(ids).argmax(-1)
                written.append(ids)
                if i == 3:  # the first ends, and its row is another's, which begins like the second
                    cache.pages.free(0)
                    assert cache.pages.fork(1) == 0
                    ids[0] = 7
        texts.append(torch.cat(written, 1).tolist())
        torch.compiler.reset()
    assert texts[0] == texts[1]


def test_what_paged_caches_are_not_for_says_so() -> None:
    model = model_of("llama", "sdpa")
    cache = qcompile.TransformersPagedCache(model, "fp8", batch=1, max_length=32)
    with pytest.raises(ConfigError, match=r"lengths of their own, which transformers' generate does not know"):
        model.generate(PROMPTS[0][None], past_key_values=cache, max_new_tokens=2)
    config = transformers.LlamaConfig(**MODELS["llama"][1], layer_types=["chunked_attention"], attention_chunk_size=8)
    model.config = config
    with pytest.raises(ConfigError, match=r"the model has \['chunked_attention'\] too"):
        qcompile.TransformersPagedCache(model, "fp8", batch=1, max_length=32)
