"""Models saved as GGUF: the blocks of the file that they came from, what llama.cpp computes, and tokenizers."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import CheckpointError
from tests import tolerance
from tests.checkpoint.tiny_models import LLAMA3, TINY, llama, quantized, weights

transformers = pytest.importorskip("transformers")

BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_blocks_are_those_that_were_loaded(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    from tests.checkpoint.gguf_files import converted, random_blocks, settings, write

    number = gguf.GGMLQuantizationType[kind]
    model = llama(hidden_size=256, num_hidden_layers=1, attention_bias=True, tie_word_embeddings=kind == "Q4_K")
    tensors = {
        name: (random_blocks(number, values.shape, seed), number) if values.ndim == 2 else values
        for seed, (name, values) in enumerate(converted(model).items())
    }
    architecture, metadata = settings(model.config)
    metadata |= {"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.eos_token_id": 7}
    original = write(tmp_path / "original.gguf", architecture, metadata, tensors)
    qcompile.save(qcompile.load(original, dtype=torch.float32, progress=False), tmp_path / "again", "gguf")
    first = gguf.GGUFReader(original)
    second = gguf.GGUFReader(tmp_path / "again" / "model.gguf")
    found = {tensor.name: tensor for tensor in second.tensors}
    assert found.keys() == {tensor.name for tensor in first.tensors}
    for tensor in first.tensors:
        if tensor.name == "token_embd.weight" and kind != "Q4_K":  # embeddings are decoded
            continue
        assert found[tensor.name].tensor_type == tensor.tensor_type
        assert (found[tensor.name].data == tensor.data).all(), tensor.name
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.eos_token_id", "llama.rope.freq_base", "llama.context_length"):
        assert second.fields[key].contents() == first.fields[key].contents()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
RUN = [
    ("llama", "q8_0", {"attention_bias": True}),
    ("llama", "int4", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    ("llama", "mxfp4", {"rope_parameters": YARN, "max_position_embeddings": 16384, "tie_word_embeddings": True}),
    ("qwen2", "iq4_nl", {}),
    ("qwen3", "q5_1", {"head_dim": 32}),
]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
@pytest.mark.parametrize(("kind", "scheme", "changes"), RUN, ids=[f"{kind}-{scheme}" for kind, scheme, _ in RUN])
def test_llama_cpp_computes_the_same(kind, scheme, changes, tmp_path):
    from tests.checkpoint.llama_cpp_logits import llama_cpp_logits

    model = quantized(scheme, kind=kind, **changes)
    qcompile.save(model, tmp_path, "gguf")
    for name, weight in weights(model).items():  # llama.cpp quantizes inputs, so it is compared on decoded weights
        linear = nn.Linear(*weight.shape[::-1], bias=model.get_submodule(name).bias is not None)
        linear.weight.data = weight.float()
        linear.bias = model.get_submodule(name).bias
        model.set_submodule(name, linear)
    ids = torch.randint(0, TINY["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0]
    found = torch.from_numpy(llama_cpp_logits(tmp_path / "model.gguf", ids[0].tolist(), tmp_path))
    # The inputs of each of 15 products get 8 bits in blocks of 32; the powers of their noises add up.
    floor = tolerance.uniform_sqnr_floor(8, 32) - 10 * math.log10(15)
    assert tolerance.sqnr(expected, found) > tolerance.product_sqnr_floor(floor)


@pytest.mark.parametrize(("kind", "changes"), [("gemma", {}), ("qwen2", {"use_sliding_window": True}), ("gpt2", {})])
def test_models_that_gguf_files_cannot_be_made_of(kind, changes, tmp_path):
    small = {"n_embd": 128, "n_layer": 1, "n_head": 4} if kind == "gpt2" else {}
    model = qcompile.quantize_(llama(kind, **changes, **small), "q8_0", progress=False)
    with pytest.raises(CheckpointError, match="cannot be written as GGUF"):
        qcompile.save(model, tmp_path, "gguf")
    assert list(tmp_path.iterdir()) == []


def tokenizer(folder, rule):
    """A tokenizer of pairs of bytes of 320 tokens, trained on a line."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel

    made = Tokenizer(models.BPE())
    if rule == "qwen2":
        from qcompile.checkpoint.saving.gguf import _SPLITS

        pattern = next(text for text, name in _SPLITS.items() if name == rule)
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, False, False)]
    else:
        steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(steps), ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat sat on the mat, and 12345 others sat there too"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("rule", ["qwen2", "smollm"])
def test_tokenizers_go_along(rule, tmp_path):
    fast = tokenizer(tmp_path / "source", rule)
    llama().save_pretrained(tmp_path / "source")
    model = qcompile.load(tmp_path / "source", dtype=torch.float32, progress=False)
    qcompile.quantize_(model, "int4", progress=False)
    qcompile.save(model, tmp_path / "ct")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ct")
    text = "the cat's 12345 mats,  and\n\nothers"
    assert again(text).input_ids == fast(text).input_ids
    assert (tmp_path / "ct" / "generation_config.json").is_file()

    if importlib.util.find_spec("llama_cpp") is None:
        return
    qcompile.save(model, tmp_path / "gguf", "gguf")
    import subprocess
    import sys

    program = (
        "import sys, llama_cpp; m = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False);"
        "print(m.tokenize(sys.argv[2].encode(), add_bos=False))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "gguf" / "model.gguf"), text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == fast(text).input_ids
