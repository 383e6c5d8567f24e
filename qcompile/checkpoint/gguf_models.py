"""What models of each architecture are called in GGUF files: their tensors, their settings, and how those are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompile.checkpoint.gguf_file import GgufFile
from qcompile.errors import CheckpointError, shown

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate|up|down)_proj\.(weight|bias)")
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_ROUTED = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between the architectures of files.

    Attributes:
        model_type: what transformers calls it.
        layer: names in a layer, of files and of transformers.
        settings: integer metadata that it has beyond everyone's, and transformers' names for it.
        interleaved: rows of the query and key projections lie as rotary embeddings of neighbouring pairs want them;
            transformers rotates halves.
        norm_plus_one: norm weights are stored with the 1 added that the model adds itself.
        paired_experts: transformers' stacked parameters are transposed, with rows of the gate and of the up projection
            by turns, and have biases.
    """

    model_type: str
    layer: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_plus_one: bool = False
    paired_experts: bool = False


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", layer=_LAYER, interleaved=True),
    "llama with experts": Architecture(
        model_type="mixtral",
        layer=_LAYER | _EXPERTS,
        settings={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        interleaved=True,
    ),
    "qwen2": Architecture(model_type="qwen2", layer=_LAYER),
    "qwen3": Architecture(model_type="qwen3", layer=_LAYER | _HEAD_NORMS),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        layer=_LAYER | _EXPERTS | _SHARED_EXPERT,
        settings=_ROUTED
        | {
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        layer=_LAYER | _HEAD_NORMS | _EXPERTS,
        settings=_ROUTED | {"expert_feed_forward_length": "moe_intermediate_size"},
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        layer=_LAYER
        | _EXPERTS
        | {
            "ffn_gate_inp": "mlp.router",
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
        },
        settings={
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.sliding_window": "sliding_window",
        },
        paired_experts=True,
    ),
    "gemma": Architecture(model_type="gemma", layer=_LAYER, norm_plus_one=True),
    "gemma2": Architecture(
        model_type="gemma2",
        layer=_LAYER | _SANDWICH,
        settings={"attention.sliding_window": "sliding_window"},
        norm_plus_one=True,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        layer=_LAYER | _SANDWICH | _HEAD_NORMS,
        settings={"attention.sliding_window": "sliding_window"},
        norm_plus_one=True,
    ),
}

BLOCK_NAME = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", re.ASCII)
TOP_NAME = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)
ROPE_FACTORS = "rope_freqs.weight"


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: models of architecture {shown(name)} cannot be read from GGUF; take the model's safetensors "
            f"(readable: {', '.join(ARCHITECTURES)})"
        )
    if name == "llama" and file.metadata.get("llama.expert_count"):
        return name, ARCHITECTURES["llama with experts"]
    return name, ARCHITECTURES[name]


class Settings:
    """The metadata `<architecture>.*`, checked as it is read."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def fail(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {self.architecture}.{key} is {shown(value)}, not {wanted}")

    def raw(self, key: str) -> Any:
        """A value; where every layer has its own, that of all."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.fail(key, value, "the same in every layer, which is all that can be read")
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.fail(key, value, "a positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.raw(key)
        value = default if value is None else value
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise self.fail(key, value, "a positive number")
        return value
