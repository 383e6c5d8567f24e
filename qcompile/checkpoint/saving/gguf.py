"""GGUF files that llama.cpp runs: dense models of the architectures llama, qwen2 and qwen3.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint import gguf_models
from qcompile.checkpoint.saving.base import Rounding, Unsavable, refusal
from qcompile.checkpoint.saving.gguf_pack import block_type, pack_layer
from qcompile.checkpoint.saving.layers import Layer
from qcompile.checkpoint.store import read_json
from qcompile.errors import CheckpointError, shown
from qcompile.reference import dequantize

NAME = "gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_FLOAT32, _FLOAT16, _BFLOAT16 = 0, 1, 30
_QUANTIZATION_VERSION = 2
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {f"{_WORDS}\\p{{N}}{_REST}": "qwen2", f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe"}
"""How llama.cpp calls the rules by which byte-level tokenizers split texts into words."""


def write(
    model: nn.Module, layers: Sequence[Layer], path: Path, rounding: Rounding, holding: Callable[[Layer], list[str]]
) -> None:
    """Write a model, one tensor at a time.

    Args:
        layers: the quantized ones.
        holding: the formats that hold a layer, for errors.

    Raises:
        CheckpointError: an architecture, a parameter or a layer that has no place in GGUF; gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError('writing GGUF needs the package gguf: `pip install "qcompile[demo]"`') from None
    import numpy as np

    config = getattr(model, "config", None)
    architecture = getattr(config, "model_type", None)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{type(model).__name__} cannot be written as GGUF, only models of {', '.join(ARCHITECTURES)}; choose the "
            "format compressed-tensors"
        )
    names = Names(config)
    entries: dict[str, tuple[int, tuple[int, ...], Callable[[], Tensor]]] = {}

    def add(name: str, kind: int, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        entries[names.in_file(name)] = (kind, shape, make)

    def plain(name: str, tensor: Tensor) -> Tensor:
        return names.rows_in_file(name, tensor.detach().to("cpu"))

    def packed(layer: Layer) -> Tensor:
        try:
            return names.rows_in_file(layer.name, pack_layer(layer, rounding)[1])
        except Unsavable as reason:
            raise refusal(layer, NAME, str(reason), holding(layer)) from None

    shared = next((layer for layer in layers if layer.name == "lm_head" and _is_embedding(model, layer)), None)
    for name, tensor in model.named_parameters():
        if name == "model.embed_tokens.weight" and shared is not None:
            continue
        kind = _FLOAT32 if tensor.dim() == 1 else _plain_type(name, tensor)
        add(name, kind, tuple(tensor.shape), partial(plain, name, tensor))
    for layer in layers:
        try:
            number = block_type(layer)
        except Unsavable as reason:
            raise refusal(layer, NAME, str(reason), holding(layer)) from None
        name = "model.embed_tokens" if layer is shared else layer.name
        add(f"{name}.weight", number, layer.shape, partial(packed, layer))
    if (factors := _rope_factors(config)) is not None:
        entries["rope_freqs.weight"] = (_FLOAT32, tuple(factors.shape), lambda: factors)

    writer = gguf.GGUFWriter(path, architecture)
    _metadata(writer, config)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    _tokenizer(writer, model, gguf)
    for name, (kind, shape, _) in entries.items():
        columns, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        size = shape[-1] // columns * nbytes
        whole = math.prod(shape[:-1]) * size
        writer.add_tensor_info(name, (*shape[:-1], size), np.dtype(np.uint8), whole, gguf.GGMLQuantizationType(kind))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for kind, _, make in entries.values():
            values = make()
            values = values.to(torch.float32) if kind == _FLOAT32 else values
            writer.write_tensor_data(values.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _is_embedding(model: nn.Module, head: Layer) -> bool:
    """Whether the output head's codes stand for the token embedding, which a file then has once."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if tuple(embedding.shape) != head.shape:
        return False
    values = dequantize(head.weight()).to(embedding.dtype)
    return torch.equal(values, embedding.detach().to("cpu"))


def _plain_type(name: str, tensor: Tensor) -> int:
    kinds = {torch.float32: _FLOAT32, torch.float16: _FLOAT16, torch.bfloat16: _BFLOAT16}
    if tensor.dtype not in kinds:
        raise CheckpointError(f"{name}: GGUF models have no {tensor.dtype}; convert the model to bfloat16 first")
    return kinds[tensor.dtype]


class Names:
    """Names and row orders of a file's tensors."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.known = gguf_models.ARCHITECTURES[config.model_type]
        self.top = {ours: theirs for theirs, ours in gguf_models.TOP.items()}
        self.layer = {ours: theirs for theirs, ours in self.known.layer.items()}

    def in_file(self, name: str) -> str:
        """A parameter's name."""
        module, _, kind = name.rpartition(".")
        match = _LAYER_NAME.fullmatch(module)
        found = self.layer.get(match[2]) if match else self.top.get(module)
        if found is None or kind not in ("weight", "bias"):
            raise CheckpointError(f"{name}: has no place in a GGUF file of a {self.config.model_type} model")
        return f"blk.{match[1]}.{found}.{kind}" if match else f"{found}.{kind}"

    def rows_in_file(self, name: str, rows: Tensor) -> Tensor:
        """Rows (of numbers or of blocks) of a query or key projection as rotary embeddings of neighbouring pairs want
        them, where the architecture does so."""
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(next((part for part in reversed(name.split(".")) if part not in ("weight", "bias")), ""))
        if heads is None or not self.known.interleaved:
            return rows
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _metadata(writer: Any, config: Any) -> None:
    """What llama.cpp must know of the model.

    Raises:
        CheckpointError: settings that it does not have.
    """
    rope, head_dim = config.rope_parameters, _head_dim(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise CheckpointError(f"rope_type {shown(kind)} cannot be written as GGUF; choose compressed-tensors")
    if getattr(config, "use_sliding_window", False):
        raise CheckpointError("sliding windows cannot be written as GGUF; choose compressed-tensors")
    if config.hidden_act != "silu":
        raise CheckpointError(f"hidden_act {shown(config.hidden_act)} is not what llama.cpp computes, silu")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if kind in ("linear", "yarn"):
        writer.add_string(f"{config.model_type}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope_factors(config: Any) -> Tensor | None:
    """What Llama 3.1 divides each rotary frequency by: float32 [head_dim / 2]."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float64) / _head_dim(config)
    turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** -exponents / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / rope["factor"] + blend)).to(torch.float32)


def _tokenizer(writer: Any, model: nn.Module, gguf: Any) -> None:
    """The tokenizer of where the model came from; where there is none, the file says so."""
    name = getattr(model, "name_or_path", None)
    source = Path(name) if isinstance(name, str) and name else None
    if source is not None and source.is_file() and source.suffix == ".gguf":
        for field in gguf.GGUFReader(source).fields.values():
            if field.name.startswith("tokenizer."):
                kinds = (*field.types, None)
                writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[1])
        return
    if source is not None and (source / "tokenizer.json").is_file():
        if _hf_tokenizer(writer, source, model.config.vocab_size, gguf):  # type: ignore[union-attr, arg-type]
            return
        warnings.warn(
            f"{source / 'tokenizer.json'}: llama.cpp has no rule for how it splits words; the file has no tokenizer",
            stacklevel=4,
        )
    writer.add_tokenizer_model("no_vocab")


def _hf_tokenizer(writer: Any, folder: Path, size: int, gguf: Any) -> bool:
    """Write a tokenizer of pairs of bytes; False if it is another."""
    described = read_json(folder / "tokenizer.json")
    rule = _rule(described.get("pre_tokenizer"))
    vocabulary = described.get("model", {}).get("vocab")
    if rule is None or described["model"].get("type") != "BPE" or not isinstance(vocabulary, dict):
        return False
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    added = {entry["content"]: entry for entry in described.get("added_tokens", ())}
    for token, index in (vocabulary | {content: entry["id"] for content, entry in added.items()}).items():
        if not 0 <= index < size:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: token {shown(token)} is number {index} of {size}")
        tokens[index] = token
        kinds[index] = int(gguf.TokenType.NORMAL)
        if token in added:
            kinds[index] = int(gguf.TokenType.CONTROL if added[token]["special"] else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
    return True


def _rule(given: Any) -> str | None:
    """llama.cpp's name for a pre-tokenizer."""
    steps = given.get("pretokenizers", [given]) if isinstance(given, dict) else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None
