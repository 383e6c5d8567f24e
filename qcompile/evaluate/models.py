"""Language models to measure: from a checkpoint, or of random weights; and the text to measure them on."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.gguf import DEMO_REMEDY, gguf_source, load_decoded
from qcompile.checkpoint.gguf_tokenizer import load_tokenizer
from qcompile.checkpoint.loader import load, skeleton
from qcompile.checkpoint.source import check_installed, open_checkpoint
from qcompile.errors import CheckpointError
from qcompile.evaluate.layers import Original
from qcompile.linears import is_conv1d, linear_modules

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
        tokenizer: transformers' own; None for random weights.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], Tensor]
    encode_prompt: Callable[[str], Tensor]
    decode: Callable[[list[int]], str]
    stop: tuple[int, ...] = ()
    tokenizer: Any = None


def sample_text() -> str:
    """The English essay that ships with the package: 1,659 words, under the project's licence."""
    return (importlib.resources.files("qcompile.evaluate") / "sample.txt").read_text(encoding="utf-8")


def find_model(given: str) -> Path:
    """The folder or file that a user names: its path, or a model of the Hub that is in the cache.

    Nothing is downloaded.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(given)
    if path.exists():
        return path
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise CheckpointError(f"cannot read {given}: no such file or folder; the demonstration's own: `{DEMO_REMEDY}`")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f'{given}: names of the Hub need huggingface_hub: `pip install "qcompile[hf]"`') from None
    try:
        return Path(snapshot_download(given, local_files_only=True))
    except Exception as error:  # of several kinds, by its version
        raise CheckpointError(
            f"{given}: there is no such folder, and no such model in the Hub's cache; `hf download {given}` puts it "
            f"there ({type(error).__name__})"
        ) from None


def load_tokenizer_of(path: Path) -> Any:
    """The tokenizer in a checkpoint's folder or GGUF file, made by transformers.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if path.suffix == ".gguf":
        return load_tokenizer(path)
    check_installed(path)
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of any kind, with files of any content
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: has no tokenizer that transformers reads ({reason})") from None


def load_language_model(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = torch.bfloat16,
    *,
    decode: bool = True,
    tokenizer: Any = None,
) -> LanguageModel:
    """A language model from a checkpoint's folder or a GGUF file.

    Args:
        dtype: to compute in; None for the checkpoint's own, and float32 for GGUF.
        decode: of a GGUF file decode the weights, instead of keeping its codes.
        tokenizer: to use instead of the checkpoint's own.

    Raises:
        CheckpointError: a file that is missing or damaged, or whose model or tokenizer cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"cannot read {path}: no such file; the demonstration's own: `{DEMO_REMEDY}`")
    own = load_tokenizer_of(path) if tokenizer is None else tokenizer  # it fails sooner than the model
    if path.suffix == ".gguf":
        dtype = dtype or torch.float32
        model = load_decoded(path, dtype, device) if decode else load(path, device=device, dtype=dtype, progress=True)
    else:
        model = load(path, device=device, dtype=dtype, progress=True)

    def encode(text: str) -> Tensor:
        return torch.tensor(own.encode(text, add_special_tokens=False), dtype=torch.int64)

    def encode_prompt(prompt: str) -> Tensor:
        if own.chat_template is None:
            return encode(prompt)
        turn = [{"role": "user", "content": prompt}]
        return encode(own.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    def decode_ids(ids: list[int]) -> str:
        return str(own.decode(ids, skip_special_tokens=True))

    stop = () if own.eos_token_id is None else (int(own.eos_token_id),)
    name = path.stem if path.suffix == ".gguf" else path.name
    return LanguageModel(name, model, encode, encode_prompt, decode_ids, stop, own)


def stored_weights(path: Path) -> Original:
    """The weights of a checkpoint that is not quantized, or of a decoded GGUF file, each read when it is asked for."""
    source = gguf_source(path, decode=True) if path.suffix == ".gguf" else open_checkpoint(path)
    model = skeleton(source.config, torch.float32)
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    linears, stored = linear_modules(model), set(source.store.names())
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)

    def read(name: str) -> Tensor | None:
        if name not in linears:
            return source.store.read(name) if name in stored else None
        weight = linears[name].weight
        known = next((other for other in same.get(id(weight), ()) if other in stored), None)
        if known is None:
            return None
        tensor = source.store.read(known)
        return tensor.t() if is_conv1d(linears[name]) else tensor

    return read


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
