"""Tiny language models of transformers', quantized, saved, loaded and compared."""

from __future__ import annotations

import pytest
import torch

import qcompile
from qcompile.modules import QuantizedLinear
from tests import oracle

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Settings of Llama 3's rotary embedding."""
CT = "compressed-tensors"


def llama(kind="llama", dtype=torch.float32, **changes):
    config = transformers.AutoConfig.for_model(kind, **(TINY | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data.normal_(1, 0.2)
    return model.eval().requires_grad_(False)


def quantized(scheme, **changes):
    """A tiny Llama whose layers but the head have a scheme."""
    rules = [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": scheme}]
    return qcompile.quantize_(llama(**changes), {"rules": rules}, progress=False)


def weights(model):
    """The exact weight of every quantized layer."""
    return {n: oracle.dequantize(m.logical()) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def same(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert len(first) > 0
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    ours, theirs = one.state_dict(), other.state_dict()
    plain = [n for n in ours if n.rpartition(".")[0] not in first or n.endswith(".bias")]
    assert all(torch.equal(ours[n], theirs[n]) for n in plain)


def load(folder, format=CT, **options):
    path = folder / "model.gguf" if format == "gguf" else folder
    return qcompile.load(path, dtype=torch.float32, progress=False, **options)
