"""Greedy generation with a static cache against the plainest way there is, and the measures beside it."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("transformers")

from qcompile.evaluate import Decoder, prefill_rate, random_language_model, weight_bytes

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def tiny():
    return random_language_model(torch.device("cpu"), torch.float32, **TINY)


def greedy(model, prompt, tokens):
    """Without any cache: the whole text again for each token."""
    ids = prompt
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax(-1, keepdim=True)])
    return ids[len(prompt) :].tolist()


def test_decoding_is_greedy(tiny):
    decoder = Decoder(tiny.model, tiny.model, 40)
    for text in ("hello", "a longer prompt than that"):
        prompt = tiny.encode(text)
        assert decoder.generate(prompt, 12).ids == greedy(tiny.model, prompt, 12)


def test_compiled_steps_decode_the_same_with_one_graph(tiny):
    graphs = []

    def counting(graph_module, _inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch.compiler.reset()
    decoder = Decoder(tiny.model, torch.compile(tiny.model, backend=counting, fullgraph=True), 40)
    for text in ("hello", "a longer prompt"):
        prompt = tiny.encode(text)
        assert decoder.generate(prompt, 12).ids == greedy(tiny.model, prompt, 12)
    assert len(graphs) == 1


def test_stop_tokens_end_the_text(tiny):
    prompt = tiny.encode("hello")
    decoder = Decoder(tiny.model, tiny.model, 40)
    free = decoder.generate(prompt, 12).ids
    assert decoder.generate(prompt, 12, stop=(free[3],)).ids == free[: free.index(free[3])]


def test_the_cache_is_finite(tiny):
    with pytest.raises(ValueError, match="more than the cache's 10"):
        Decoder(tiny.model, tiny.model, 10).generate(tiny.encode("hello"), 6)


def test_rates_are_positive(tiny):
    assert prefill_rate(tiny.model, tiny.encode("hello")[None]) > 0
    generation = Decoder(tiny.model, tiny.model, 10).generate(tiny.encode("hello"), 1)
    assert generation.decode_rate > 0
    assert generation.processors > 0


def test_what_waits_has_no_processor(tiny):
    def slow(**given):
        time.sleep(0.05)
        return tiny.model(**given)

    assert Decoder(tiny.model, slow, 20).generate(tiny.encode("hello"), 6).processors < 0.8


def test_shared_weights_count_once(tiny):
    assert tiny.model.lm_head.weight is tiny.model.model.embed_tokens.weight
    assert weight_bytes(tiny.model) >= sum(p.nbytes for p in tiny.model.parameters())
    assert weight_bytes(tiny.model) < sum(p.nbytes for p in tiny.model.parameters()) + tiny.model.lm_head.weight.nbytes
