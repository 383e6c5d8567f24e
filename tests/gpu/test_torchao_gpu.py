"""What torchao quantized, on a GPU: each of its tensors, and whole checkpoints that transformers saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.modules import QuantizedLinear
from qcompile.torchao_tensors import read_tensor

pytest.importorskip("torchao")
pytest.importorskip("gguf")
from tests.checkpoint.layer_files import check_logits
from tests.checkpoint.torchao_files import CASES, CONFIGS, save_model
from tests.gpu.test_checkpoints_gpu import FLOAT32_FLOOR, check_compiled, check_layer, check_layers, random

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.mark.parametrize("name", CASES)
def test_tensors(name: str) -> None:
    loaded = read_tensor(CASES[name]())
    layer = QuantizedLinear(loaded.weight.to(DEVICE), loaded.scheme)
    for m in (1, 40):
        check_layer(layer, random(m, layer.in_features))


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints(name: str, tmp_path: Path) -> None:
    """Against the model whose weights torchao decodes."""
    expected = save_model(tmp_path, name)
    for module in expected.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize().to(torch.float32), requires_grad=False)
    folder = tmp_path / "quantized"
    check_layers(folder)
    model = qcompile.load(folder, device=DEVICE, dtype=torch.float32, progress=False)
    check_logits(model, expected.to(DEVICE), FLOAT32_FLOOR)
    check_compiled(model)
