"""Models whose weights torchao quantized, compiled and taken over: its codes run, and nothing is rounded anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile.errors import LayerError
from qcompile.layouts import LAYOUTS
from qcompile.packing import packed_weight
from qcompile.pipeline import bind_inputs, rewrite
from qcompile.torchao_tensors import read_tensor
from tests.capture import capture
from tests.tolerance import assert_within, gemm_bound, rewrite_sqnr_floor, sqnr

pytest.importorskip("torchao")

from torchao.quantization import Int8Tensor, MappingType, PerRow, PerTensor, quantize_

from tests.checkpoint.torchao_files import CONFIGS, act, int8


class Block(nn.Module):
    """Three linears of one input, and one more."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(64, 64, bias=False, dtype=dtype)
        self.k = nn.Linear(64, 32, bias=False, dtype=dtype)
        self.v = nn.Linear(64, 32, bias=False, dtype=dtype)
        self.o = nn.Linear(64, 64, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(F.silu(self.q(x)) * torch.cat([self.k(x), self.v(x)], -1))


def quantized_block(name: str, dtype: torch.dtype = torch.float32) -> Block:
    block = Block(dtype).eval().requires_grad_(False)
    quantize_(block, CONFIGS[name]())
    return block


@pytest.mark.parametrize("name", ["int4", "float8"])
def test_compiled_models_run_torchaos_weights(name):
    block, x = quantized_block(name), torch.randn(5, 64)
    captured = capture(block, x)
    assert [(spec.out_features, spec.epilogue) for spec in captured.specs] == [(128, ()), (64, ("bias", "add"))]
    assert captured.count(F.linear) == 0
    assert sqnr(block(x), captured.output) >= rewrite_sqnr_floor(8, 64)
    prepared = read_tensor(block.q.weight).scheme
    assert {(s.scheme.weight, s.scheme.activation) for s in captured.specs} == {(prepared.weight, prepared.activation)}


def test_quantized_activations_of_torchao_stay_quantized():
    block, x = quantized_block("int8 dynamic"), torch.randn(5, 64)
    captured = capture(block, x)
    assert {str(spec.scheme.activation) for spec in captured.specs} == {"int8 dynamic per token"}
    replaced = qcompile.quantize_(quantized_block("int8 dynamic"), progress=False)
    assert torch.equal(capture(replaced, x).output, captured.output)


def test_a_configuration_takes_the_other_layers():
    block, x = Block(torch.float32).eval().requires_grad_(False), torch.randn(5, 64)
    quantize_(block, CONFIGS["int8"](), filter_fn=lambda module, name: name == "o")
    captured = capture(block, x, config="int4")
    assert [str(spec.scheme.weight) for spec in captured.specs] == ["int4 group 64", "int8 channel"]


def test_scales_of_the_input_come_along():
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).requires_grad_(False)
    static = {"act_quant_kwargs": act(granularity=PerTensor()), "act_quant_scale": torch.tensor([[0.05]])}
    model[0].weight = nn.Parameter(int8(**static, act_pre_scale=torch.rand(64) + 0.5), requires_grad=False)
    x = torch.randn(5, 64)
    found = capture(model, x).output
    pre_scaled = x * model[0].weight.act_pre_scale
    rounded = (pre_scaled / 0.05).round().clamp(-128, 127) * torch.tensor(0.05)
    exact = rounded.double() @ model[0].weight.dequantize().double().T
    assert_within(found, exact, gemm_bound(rounded, model[0].weight.dequantize(), torch.float32))
    replaced = qcompile.quantize_(model, progress=False)
    assert torch.equal(replaced(x), found)


class Pair(nn.Module):
    """Two linears of one input, with static scales of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)
        for position, linear in enumerate((self.one, self.two)):
            original = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed + position))
            tensor = Int8Tensor.from_hp(
                original,
                PerRow(),
                act_quant_kwargs=act(granularity=PerTensor()),
                act_quant_scale=torch.tensor([[0.01 * (seed + position + 1)]]),
            )
            linear.weight = nn.Parameter(tensor, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_linears_with_scales_of_their_own_stay_apart():
    captured = capture(Pair(0), torch.randn(5, 64))
    assert len(captured.specs) == 2
    assert "each scales its input in its own way" in captured.declined("merge_projections")


@torch.no_grad()
def test_one_graph_serves_equal_modules_with_other_weights():
    contexts = []

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        contexts.append(rewrite(graph_module, example_inputs, None))
        context = contexts[-1]
        return bind_inputs(context, lambda *args: context.module(*args))[1]

    torch.compiler.reset()
    x, run = torch.randn(5, 64), torch.compile(lambda module, x: module(x), backend=backend)
    for seed in (0, 10, 0):
        assert torch.equal(run(Pair(seed), x), qcompile.quantize_(Pair(seed), progress=False)(x))
    assert len(contexts) == 1


def test_a_graph_is_not_used_for_weights_of_another_scheme():
    one, other = int8(), int8(mapping_type=MappingType.ASYMMETRIC)
    scheme = read_tensor(one).scheme
    assert packed_weight((one,), False, scheme, LAYOUTS["logical"], "x").scheme == scheme.weight
    with pytest.raises(LayerError, match="x: torchao quantized its weight to uint8 channel, but the graph"):
        packed_weight((other,), False, scheme, LAYOUTS["logical"], "x")


def test_classes_that_are_not_known_stay_torchaos(monkeypatch):
    block, x = quantized_block("int8"), torch.randn(5, 64)
    monkeypatch.delitem(qcompile.torchao_tensors._READERS, "Int8Tensor")
    captured = capture(block, x)
    assert captured.count(F.linear) == 4
    assert captured.declined("annotate")[0].startswith("torchao's Int8Tensor: no class that is readable")
    assert torch.equal(captured.output, block(x))
    with pytest.raises(LayerError, match="q: torchao's Int8Tensor"):
        qcompile.quantize_(block, progress=False)


def test_torch_compile_from_end_to_end():
    block, x = quantized_block("int8"), torch.randn(5, 64)
    with torch.no_grad():
        explained = qcompile.explain(block, x)
        assert [layer.note for layer in explained.layers] == ["quantized by torchao"] * 2
        compiled = torch.compile(block, backend="qcompile")(x)
    assert sqnr(capture(block, x).output, compiled) >= rewrite_sqnr_floor(8, 64)
