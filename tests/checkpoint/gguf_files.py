"""GGUF files to read: made from models of transformers, as llama.cpp's converter makes them, or from random blocks.

The writer is the gguf package's, names are from its map, and nothing here is shared with the reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Q = gguf.GGMLQuantizationType

# Where a block's float16 numbers lie: random bytes there could be NaN.
HALVES = {
    Q.Q4_0: (0,),
    Q.Q4_1: (0, 2),
    Q.Q5_0: (0,),
    Q.Q5_1: (0, 2),
    Q.Q8_0: (0,),
    Q.Q2_K: (80, 82),
    Q.Q3_K: (108,),
    Q.Q4_K: (0, 2),
    Q.Q5_K: (0, 2),
    Q.Q6_K: (208,),
    Q.IQ4_NL: (0,),
    Q.IQ4_XS: (0,),
    Q.MXFP4: (),
}


def random_blocks(kind: Q, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Rows of blocks whose bytes are random, but for scales: finite of any size, some subnormal, zero or negative."""
    columns, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape)) // columns
    blocks = generator.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for start in HALVES[kind]:
        exponents = generator.integers(-26, 16, count)
        halves = (generator.uniform(-1, 1, count) * 2.0**exponents).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(count, 2)
    if kind == Q.MXFP4:
        blocks[:, 0] %= 255
    return blocks.reshape(*shape[:-1], shape[-1] // columns * nbytes)


def write(
    path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, Any], *, shards: int = 0, alignment: int = 0
) -> Path:
    """A file of tensors: float arrays, or pairs of raw blocks and their type."""
    options = {"split_max_tensors": -(-len(tensors) // shards)} if shards else {}
    writer = gguf.GGUFWriter(path, arch, **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_MODEL_TYPES = {
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}


def settings(config: Any) -> tuple[str, dict[str, Any]]:
    """The architecture and the metadata of a model's configuration."""
    arch = _MODEL_TYPES.get(config.model_type, config.model_type)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = rope["rope_type"]
        values["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if arch in ("gemma2", "gemma3", "gpt-oss"):
        values["attention.sliding_window"] = config.sliding_window
    if arch == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if arch == "gpt-oss":
        values["expert_feed_forward_length"] = config.intermediate_size
    if config.model_type in ("mixtral", "gpt_oss"):
        values["expert_count"] = config.num_local_experts
        values["expert_used_count"] = config.num_experts_per_tok
    if "moe" in arch:
        values["expert_count"] = config.num_experts
        values["expert_used_count"] = config.num_experts_per_tok
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if arch == "qwen2moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return arch, {f"{arch}.{key}": value for key, value in values.items()}


def converted(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A model's parameters as llama.cpp's converter names and arranges them, in float32."""
    config: Any = model.config
    arch, _ = settings(config)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.detach().to(torch.float32)
        base, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, suffix = name, "weight"
        if arch == "gpt-oss" and ".experts." in base:
            stem, _, part = base.rpartition(".")
            suffix = "bias" if part.endswith("_bias") else "weight"
            values = values if suffix == "bias" else values.transpose(1, 2)
            paired = {"gate_proj": values[:, ::2], "up_proj": values[:, 1::2]}
            for layer, half in (paired if "gate_up" in part else {"down_proj": values}).items():
                tensors[f"{names.get_name(f'{stem}.{layer}')}.{suffix}"] = half.contiguous().numpy()
            continue
        if base.endswith("experts.gate_up_proj"):
            stem = base.replace("gate_up_proj", "")
            for part, half in zip(("gate_proj", "up_proj"), values.chunk(2, 1), strict=True):
                tensors[f"{names.get_name(stem + part)}.{suffix}"] = half.contiguous().numpy()
            continue
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        if arch.startswith("gemma") and "norm" in base:
            values = values + 1
        tensors[f"{names.get_name(base)}.{suffix}"] = values.contiguous().numpy()
    return tensors


def blocks_of(tensors: dict[str, np.ndarray], kind: Q) -> dict[str, Any]:
    """Every matrix that the type's blocks fit, quantized by the gguf package."""
    columns = gguf.GGML_QUANT_SIZES[kind][0]
    return {
        name: (gguf.quants.quantize(values, kind), kind)
        if values.ndim >= 2 and values.shape[-1] % columns == 0 and "gate_inp" not in name
        else values
        for name, values in tensors.items()
    }
