"""Tokenizers that GGUF files describe: built, or refused by name."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import numpy as np

from qcompile.checkpoint.gguf_tokenizer import load_tokenizer
from qcompile.errors import CheckpointError
from tests.checkpoint.gguf_files import write

TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "c", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 2,
}
EMBEDDING = {"token_embd.weight": np.ones((4, 4), dtype=np.float32)}


def test_a_tokenizer(tmp_path):
    path = write(tmp_path / "model.gguf", "llama", TOKENS, EMBEDDING)
    assert load_tokenizer(path).encode("cab", add_special_tokens=False) == [2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "no_vocab"},
        {"tokens": [1, 2, 3, 4]},
        {"merges": [1]},
        {"merges": ["x y z"]},
        {"merges": ["x y"]},
        {"tokens": "abcd"},  # makes the tokenizers library panic
        {"eos_token_id": 2**32 - 1},
    ],
)
def test_tokenizers_that_cannot_be(tmp_path, change):
    changed = TOKENS | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    path = write(tmp_path / "model.gguf", "llama", changed, EMBEDDING)
    with pytest.raises(CheckpointError, match=r"cannot build the tokenizer of .*model\.gguf"):
        load_tokenizer(path)
