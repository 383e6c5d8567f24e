"""gpt-oss checkpoints against transformers' own reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qcompile.checkpoint.loader import load
from qcompile.errors import CheckpointError
from qcompile.experts import QuantizedExperts
from tests import tolerance
from tests.checkpoint.moe_files import check_same, experts_of, make_moe

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def write(folder: Path, config: dict[str, Any] | None = CONFIG, dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint with random blocks, whose scales lie between 2**-10 and 2**2.

    Returns:
        transformers' model with the weights that transformers decodes.
    """
    model = make_moe("gpt_oss").to(dtype)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, experts in experts_of(model).items():
        for projection in ("gate_up_proj", "down_proj"):
            count, columns, rows = getattr(experts, projection).shape
            blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(117, 130, (count, rows, columns // 32), dtype=torch.uint8)
            del tensors[f"{name}.{projection}"]
            tensors |= {f"{name}.{projection}_blocks": blocks, f"{name}.{projection}_scales": scales}
            getattr(experts, projection).copy_(convert_moe_packed_tensors(blocks, scales, dtype=dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return model


def change(folder: Path, suffix: str, new: Tensor | None) -> None:
    """Replace or remove a tensor of the second layer's experts."""
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.{suffix}"
    del tensors[name]
    save_file(tensors if new is None else tensors | {name: new}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "config", [CONFIG, {"quant_method": "gpt_oss_mxfp4"}, None], ids=["mxfp4", "alias", "no config"]
)
def test_weights_are_transformers_and_logits_too(config: dict[str, Any] | None, tmp_path: Path) -> None:
    expected = write(tmp_path, config)
    check_same(load(tmp_path, progress=False), expected)


def test_bfloat16(tmp_path: Path) -> None:
    expected = write(tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path, progress=False)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, QuantizedExperts)
    assert torch.equal(experts.down_proj.weight.transpose(1, 2), expected.model.layers[0].mlp.experts.down_proj)
    tokens = torch.randint(0, 96, (1, 7))
    # 60 operators in a row on either side that round to bfloat16
    floor = -20 * torch.tensor(60 * 2 * 2.0**-8).log10().item()
    assert tolerance.sqnr(expected(tokens).logits, model(tokens).logits) > floor


@pytest.mark.parametrize(
    ("suffix", "new", "message"),
    [
        ("down_proj_scales", None, r"layers\.1\.mlp\.experts: its tensor down_proj_scales is missing"),
        (
            "down_proj_scales",
            torch.full((4, 64, 4), 255, dtype=torch.uint8),
            "down_proj_scales holds 255, which is NaN",
        ),
        (
            "down_proj_scales",
            torch.zeros(4, 64, 3, dtype=torch.uint8),
            r"has shape \(4, 64, 3\), expected \(4, 64, 4\)",
        ),
        ("gate_up_proj_blocks", torch.zeros(4, 256, 2, 16), r"gate_up_proj_blocks has dtype torch\.float32"),
        ("gate_up_proj_bias", None, "its tensor gate_up_proj_bias is missing"),
    ],
    ids=["no scales", "NaN", "shape", "dtype", "no bias"],
)
def test_damage_is_named(suffix: str, new: Tensor | None, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    change(tmp_path, suffix, new)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, progress=False)
