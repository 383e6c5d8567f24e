"""Checkpoints on a GPU: every quantized layer against float64 of the weight that its codes stand for, whole models
against models with those weights, and compiled against eager."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES, BlockType, pack_rows
from qcompile.experts import GroupedLinear
from qcompile.methods import CHECKPOINT
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.reference import dequantize_activation, quantize_activation, quantize_weight
from qcompile.scheme import Scheme
from tests import oracle, tolerance

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
from tests.checkpoint import moe_files, test_experts, test_marlin, whole_files
from tests.checkpoint.gguf_files import random_blocks
from tests.checkpoint.integer_files import read_layer
from tests.checkpoint.layer_files import check_logits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:the checkpoint quantizes float inputs")]

DEVICE = "cuda"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODELS = sorted(path.parent for path in FIXTURES.rglob("config.json") if (path.parent / "model.safetensors").is_file())
FLOAT32_FLOOR = tolerance.rewrite_sqnr_floor(40, 592)
"""Least SQNR in dB between two evaluations of these models, of under 40 operators in a row. Sums have up to 576 terms,
and a product by three TF32 ones errs as 16 terms do (`tolerance.TF32X3_UNIT`)."""


def random(m: int, k: int) -> Tensor:
    return torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)


def check_layer(layer: QuantizedLinear, x: Tensor) -> None:
    """The layer's output for x [M, K] in bfloat16."""
    check_product(layer(x), x, layer, layer.logical(), layer.bias, layer.input_scale, layer.pre_quant_scale)


@torch.no_grad()
def check_product(
    y: Tensor,
    x: Tensor,
    layer: QuantizedLinear | GroupedLinear,
    packed: PackedWeight,
    bias: Tensor | None,
    input_scale: Tensor | None,
    pre_quant_scale: Tensor | None,
) -> None:
    """y [M, N] for x [M, K] in bfloat16, without the bias, which every scheme adds alike."""
    if bias is not None:
        y = y.float() - bias.float()
    given = x if pre_quant_scale is None else x * pre_quant_scale.to(x.dtype)
    activation = layer.scheme.activation
    if activation is not None:
        threshold = math.inf if activation.outlier_threshold is None else activation.outlier_threshold
        outlying = (given.abs() >= threshold).any(0)
        codes, scale = quantize_activation(given.masked_fill(outlying, 0), activation, input_scale)
        restored = dequantize_activation(codes.double(), scale.double(), activation)
        given = torch.where(outlying, given.double(), restored)
    given = given.double().cpu()
    weight = oracle.dequantize(packed.to("cpu"))
    exact = oracle.linear(given, weight)
    unit = 2.0**-13 if activation is not None else tolerance.ACCUMULATE_UNIT
    bound = tolerance.gemm_bound(given, weight, torch.bfloat16, accumulate_unit=unit)
    if bias is not None:
        bound = bound + tolerance.rounding(exact.abs() + bias.double().abs().cpu(), torch.float32)
        exact, y = exact + bias.double().cpu(), y + bias.float()
    tolerance.assert_within(y, exact, tolerance.epilogue_bound(exact, bound, out_dtype=torch.bfloat16))


def check_layers(folder: Path) -> None:
    """One layer of each kind of a checkpoint, for a row and for many."""
    model = qcompile.load(folder, device=DEVICE, dtype=torch.bfloat16, progress=False)
    layers = {layer.spec: layer for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    assert layers
    for layer in layers.values():
        for m in (1, 40):
            check_layer(layer, random(m, layer.in_features))


def check_compiled(model: nn.Module) -> None:
    """The compiled model computes what `model` does."""
    torch.compiler.reset()
    compiled: nn.Module = torch.compile(model, backend="qcompile", fullgraph=True)
    check_logits(compiled, model, FLOAT32_FLOOR)


@pytest.mark.parametrize("folder", MODELS, ids=lambda f: str(f.relative_to(FIXTURES)))
def test_checkpoints_of_the_producers(folder: Path) -> None:
    check_layers(folder)
    check_compiled(qcompile.load(folder, device=DEVICE, dtype=torch.float32, progress=False))


@pytest.mark.parametrize("name", whole_files.LLAMAS)
def test_checkpoints(name: str, tmp_path: Path) -> None:
    expected = whole_files.LLAMAS[name](tmp_path)
    check_layers(tmp_path)
    model = qcompile.load(tmp_path, device=DEVICE, dtype=torch.float32, progress=False)
    check_logits(model, expected.to(DEVICE), FLOAT32_FLOOR)
    check_compiled(model)


@pytest.mark.parametrize("name", whole_files.LAYERS)
def test_layers_of_the_producers(name: str, tmp_path: Path) -> None:
    expected = whole_files.LAYERS[name](tmp_path)
    check_layers(tmp_path)
    model = qcompile.load(tmp_path, device=DEVICE, dtype=torch.float32, progress=False)
    check_logits(model, expected.to(DEVICE), FLOAT32_FLOOR)


@pytest.mark.parametrize("name", whole_files.MIXTURES)
def test_mixtures_of_experts(name: str, tmp_path: Path) -> None:
    """Against transformers' model on the CPU, whose products are in float32."""
    expected = whole_files.MIXTURES[name](tmp_path)
    floor = test_experts.FP8_FLOOR if "fp8" in name else moe_files.FLOOR
    model = qcompile.load(tmp_path, device=DEVICE, dtype=torch.float32, progress=False)
    moe_files.check_same(model, expected, floor)
    torch.compiler.reset()
    moe_files.check_logits(torch.compile(model, backend="qcompile", fullgraph=True), model, floor)
    check_experts(qcompile.load(tmp_path, device=DEVICE, dtype=torch.bfloat16, progress=False))


@torch.no_grad()
def check_experts(model: nn.Module) -> None:
    """One projection of each kind, expert by expert, without the gate behind it; one of them has no rows."""
    layers = {layer.spec: layer for layer in model.modules() if isinstance(layer, GroupedLinear)}
    assert layers
    for layer in layers.values():
        layer.end_with("")
        counts = torch.tensor([1, 0, 40, *[3] * (layer.experts - 3)])
        ids = torch.arange(layer.experts).repeat_interleave(counts).to(DEVICE)
        x = random(len(ids), layer.in_features)
        y = layer(x, ids)
        for e in range(layer.experts):
            one = layer.linear(e)
            beside = (one.bias, one.input_scale, one.pre_quant_scale)
            check_product(y[ids == e], x[ids == e], layer, one.weight, *beside)


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_layers_of_gguf_types(kind: BlockType) -> None:
    raw = random_blocks(gguf.GGMLQuantizationType[kind.name], (96, 512))
    if kind.name == "MXFP4":  # exponents that do not overflow
        raw.reshape(96, -1, kind.nbytes)[..., 0] //= 2
    packed = pack_rows(lambda start, stop: torch.from_numpy(raw[start:stop]), (96, 512), kind)
    scheme = Scheme(weight=packed.scheme, method=CHECKPOINT)
    check_layer(QuantizedLinear(packed.to(DEVICE), scheme), random(5, 512))


def test_sorted_columns() -> None:
    weight = replace(PRESETS["int4_asym"].weight, act_order=True)
    perm = torch.randperm(512).to(torch.int32)
    packed = replace(quantize_weight(torch.randn(96, 512), PRESETS["int4_asym"].weight), scheme=weight, perm=perm)
    check_layer(
        QuantizedLinear(packed.to(DEVICE), Scheme(weight=weight)),
        random(5, 512),
    )


@pytest.mark.parametrize("m", [1, 16, 70])
@pytest.mark.parametrize("name", [name for name in test_marlin.CONFIGS if name.startswith("sparse")])
def test_sparse_layers_of_marlin(name: str, m: int, tmp_path: Path) -> None:
    tensors, weight = test_marlin.packed(name)
    shape = tuple(weight.shape)
    read = read_layer(tmp_path / "x.safetensors", test_marlin.CONFIGS[name], shape, tensors)
    assert read is not None
    layer = QuantizedLinear(read.weight, read.scheme).to(DEVICE)
    assert layer.layout == "fragment24"
    assert torch.equal(layer.weight.cpu(), weight)
    check_layer(layer, random(m, shape[1]))


@pytest.mark.parametrize("m", [1, 40])
def test_outlying_columns(m: int) -> None:
    scheme = PRESETS["int8"]
    assert scheme.activation is not None
    scheme = replace(scheme, activation=replace(scheme.activation, outlier_threshold=6.0))
    x = random(m, 512)
    x[0, 7], x[-1, 300] = 20, -9
    check_layer(QuantizedLinear(quantize_weight(torch.randn(96, 512), scheme.weight).to(DEVICE), scheme), x)
