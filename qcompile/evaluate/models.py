"""Language models to measure: from a GGUF file, or of random weights; and the text to measure them on."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompile.checkpoint.gguf import DEMO_REMEDY, load_decoded
from qcompile.checkpoint.gguf_tokenizer import load_tokenizer
from qcompile.errors import CheckpointError

# The shape of SmolLM2-135M.
_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model of transformers with what turns text into tokens and back.

    Attributes:
        name: for people.
        model: takes token ids [B, T] and returns an object whose `logits` are [B, T, V].
        encode: a text's token ids, int64 [T], without special tokens.
        encode_prompt: a user's request's token ids, int64 [T], in the model's chat format.
        decode: the text of token ids.
        stop: token ids that end a text.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], Tensor]
    encode_prompt: Callable[[str], Tensor]
    decode: Callable[[list[int]], str]
    stop: tuple[int, ...] = ()


def sample_text() -> str:
    """The English essay that ships with the package: 1,659 words, under the project's licence."""
    return (importlib.resources.files("qcompile.evaluate") / "sample.txt").read_text(encoding="utf-8")


def load_language_model(path: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """A language model from a GGUF file, its weights decoded.

    Raises:
        CheckpointError: a file that is missing or damaged, or whose model or tokenizer cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: no such file; the demonstration's own: `{DEMO_REMEDY}`")
    model, tokenizer = load_decoded(path, dtype, device), load_tokenizer(path)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    def encode_prompt(prompt: str) -> Tensor:
        if tokenizer.chat_template is None:
            return encode(prompt)
        turn = [{"role": "user", "content": prompt}]
        return encode(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    stop = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return LanguageModel(path.stem, model, encode, encode_prompt, decode, stop)


def random_language_model(device: torch.device, dtype: torch.dtype = torch.bfloat16, **shape: int) -> LanguageModel:
    """A Llama of random weights (seed 0), of SmolLM2-135M's shape unless `shape` changes it.

    Its tokens are the UTF-8 bytes of a text, and what it writes is shown as token ids: only sizes, speeds and the
    distance to its own original mean something.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(_SHAPE | shape)))

    def encode(text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    ready = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return LanguageModel("random weights, shape of SmolLM2-135M", ready, encode, encode, decode)
