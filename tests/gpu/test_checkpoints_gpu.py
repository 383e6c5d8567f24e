"""Checkpoints on a GPU: every quantized layer against float64 of the weight that its codes stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES, BlockType, pack_rows
from qcompile.methods import CHECKPOINT
from qcompile.modules import QuantizedLinear
from qcompile.reference import dequantize_activation, quantize_activation, quantize_weight
from qcompile.scheme import PRESETS, Scheme
from tests import oracle, tolerance

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
from tests.checkpoint.gguf_files import random_blocks
from tests.checkpoint.layer_files import check_logits

pytestmark = pytest.mark.gpu

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODELS = sorted(path.parent for path in FIXTURES.rglob("config.json") if (path.parent / "model.safetensors").is_file())


@torch.no_grad()
def check_layer(layer: QuantizedLinear, x: torch.Tensor) -> None:
    """The layer's output for x [M, K] in bfloat16, without its bias, which every scheme adds alike."""
    y = layer(x)
    if layer.bias is not None:
        y = y.float() - layer.bias.float()
    given = x if layer.pre_quant_scale is None else x * layer.pre_quant_scale.to(x.dtype)
    activation = layer.scheme.activation
    if activation is not None:
        threshold = math.inf if activation.outlier_threshold is None else activation.outlier_threshold
        outlying = (given.abs() >= threshold).any(0)
        codes, scale = quantize_activation(given.masked_fill(outlying, 0), activation, layer.input_scale)
        restored = dequantize_activation(codes.double(), scale.double(), activation)
        given = torch.where(outlying, given.double(), restored)
    given = given.double().cpu()
    weight = oracle.dequantize(layer.logical().to("cpu"))
    exact = oracle.linear(given, weight)
    unit = 2.0**-13 if activation is not None else tolerance.ACCUMULATE_UNIT
    bound = tolerance.gemm_bound(given, weight, torch.bfloat16, accumulate_unit=unit)
    if layer.bias is not None:
        bound = bound + tolerance.rounding(exact.abs() + layer.bias.double().abs().cpu(), torch.float32)
        exact, y = exact + layer.bias.double().cpu(), y + layer.bias.float()
    tolerance.assert_within(y, exact, tolerance.epilogue_bound(exact, bound, out_dtype=torch.bfloat16))


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("folder", MODELS, ids=lambda f: str(f.relative_to(FIXTURES)))
def test_layers_of_a_checkpoint(folder: Path, m: int) -> None:
    model = qcompile.load(folder, device="cuda", dtype=torch.bfloat16, progress=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers
    for layer in {str(layer.spec): layer for layer in layers.values()}.values():
        check_layer(layer, torch.randn(m, layer.in_features, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_layers_of_gguf_types(kind: BlockType) -> None:
    raw = random_blocks(gguf.GGMLQuantizationType[kind.name], (96, 512))
    if kind.name == "MXFP4":  # exponents that do not overflow
        raw.reshape(96, -1, kind.nbytes)[..., 0] //= 2
    packed = pack_rows(lambda start, stop: torch.from_numpy(raw[start:stop]), (96, 512), kind)
    scheme = Scheme(weight=packed.scheme, method=CHECKPOINT)
    check_layer(QuantizedLinear(packed.to("cuda"), scheme), torch.randn(5, 512, device="cuda", dtype=torch.bfloat16))


def test_sorted_columns() -> None:
    weight = replace(PRESETS["int4_asym"].weight, act_order=True)
    perm = torch.randperm(512).to(torch.int32)
    packed = replace(quantize_weight(torch.randn(96, 512), PRESETS["int4_asym"].weight), scheme=weight, perm=perm)
    check_layer(
        QuantizedLinear(packed.to("cuda"), Scheme(weight=weight)),
        torch.randn(5, 512, device="cuda", dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("m", [1, 40])
def test_outlying_columns(m: int) -> None:
    scheme = PRESETS["int8"]
    assert scheme.activation is not None
    scheme = replace(scheme, activation=replace(scheme.activation, outlier_threshold=6.0))
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    x[0, 7], x[-1, 300] = 20, -9
    check_layer(QuantizedLinear(quantize_weight(torch.randn(96, 512), scheme.weight).to("cuda"), scheme), x)


@pytest.mark.parametrize("folder", MODELS, ids=lambda f: str(f.relative_to(FIXTURES)))
def test_a_compiled_checkpoint_computes_what_eager_does(folder: Path) -> None:
    model = qcompile.load(folder, device="cuda", dtype=torch.float32, progress=False)
    torch.compiler.reset()
    check_logits(torch.compile(model, backend="qcompile", fullgraph=True), model)
