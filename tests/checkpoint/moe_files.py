"""Small mixtures of experts, and what models with the same weights compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.experts import QuantizedExperts
from tests import tolerance

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "dtype": "float32",
}
FLOOR = tolerance.rewrite_sqnr_floor(120, 128)
"""Least SQNR in dB between two float32 evaluations of these models: 2 layers of under 60 operators in a row, whose sums
have at most 128 terms."""


def make_moe(kind: str) -> Any:
    """A transformers model in float32 with 4 experts, of which 2 see a token: "mixtral", "qwen3_moe" or "gpt_oss"."""
    import transformers

    if kind == "mixtral":
        config: Any = transformers.MixtralConfig(**_SIZES, num_local_experts=4)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**_SIZES, num_experts=4, moe_intermediate_size=96)
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = transformers.GptOssConfig(**_SIZES, num_local_experts=4, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.3, 0.3)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules, whether quantized or not."""
    return {
        name: module for name, module in model.named_modules() if name.endswith(".experts") and "gating" not in name
    }


def parameter_of(experts: QuantizedExperts, projection: str, transposed: bool) -> Tensor:
    """What the codes of a projection stand for, as transformers keeps it."""
    parts = [projection] if projection in dict(experts.named_children()) else ["gate_proj", "up_proj"]
    weight = torch.cat([experts.get_submodule(part).weight for part in parts], 1)
    return weight.transpose(1, 2) if transposed else weight


def check_same(model: nn.Module, expected: nn.Module, floor: float = FLOOR) -> None:
    """Quantized experts have the very weights of the others, and the models compute the same but for `floor`."""
    quantized = experts_of(model)
    for name, experts in experts_of(expected).items():
        loaded = quantized[name]
        assert isinstance(loaded, QuantizedExperts), name
        for projection in ("gate_up_proj", "down_proj"):
            weight = parameter_of(loaded, projection, experts.is_transposed)
            own = getattr(experts, projection)
            assert torch.equal(weight.to(own.device), own), f"{name}.{projection}"
    check_logits(model, expected, floor)


@torch.no_grad()
def check_logits(model: nn.Module, expected: nn.Module, floor: float = FLOOR) -> None:
    """The models, wherever they are, compute the same but for `floor`."""
    tokens = torch.randint(0, 96, (2, 11))
    one, other = (m(tokens.to(m.get_input_embeddings().weight.device)).logits for m in (expected, model))
    assert tolerance.sqnr(one, other) >= floor
