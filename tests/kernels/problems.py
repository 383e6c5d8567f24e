"""Quantized products with every code in them, what they should give, and how far a kernel may be from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qcompile.codegen.spec import KernelSpec, Tile, kernel_spec
from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize_activation, quantize_activation
from qcompile.runtime import cache, gpu
from qcompile.scheme import SCALE_DTYPES, Scheme
from tests import oracle, tolerance
from tests.triton_interpreter import interpret

Arguments: TypeAlias = tuple[Tensor, Tensor | None, PackedWeight, Tensor | None, list[Tensor]]


@dataclass
class Problem:
    """The arguments of a kernel, and `inputs` [M, K] and `weight` [N, K] in float64 as the oracle dequantizes them."""

    spec: LinearSpec
    x: Tensor
    x_scale: Tensor | None
    packed: PackedWeight
    bias: Tensor | None
    operands: list[Tensor]
    out_dtype: torch.dtype
    inputs: Tensor
    weight: Tensor

    def kernel(self, target: str, tile: Tile) -> KernelSpec:
        return kernel_spec(self.spec, self.x.dtype, self.out_dtype, target, tile)

    def interpret(self, target: str, tile: Tile) -> Tensor:
        """Run the generated kernel on the CPU."""
        kernel = self.kernel(target, tile)
        return gpu.launch(kernel, interpret(cache.load(kernel).kernel), *self.arguments(), self.out_dtype)

    def arguments(self, device: str = "cpu") -> Arguments:
        """x, its scale, the weight, bias and operands."""
        packed = self.packed.to(device)

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        operands = [operand.to(device) for operand in self.operands]
        x, x_scale, bias = self.x.to(device), move(self.x_scale), move(self.bias)
        return x, x_scale, packed, bias, operands

    def check(self, y: Tensor, compute: torch.dtype, accumulate_unit: float = tolerance.ACCUMULATE_UNIT) -> None:
        """Every element within the derived bound of the float64 result."""
        steps = self.spec.epilogue
        product = oracle.linear(self.inputs, self.weight)
        bound = tolerance.gemm_bound(self.inputs, self.weight, compute, accumulate_unit=accumulate_unit)
        bound = tolerance.epilogue_bound(product, bound, self.bias, steps, self.operands, self.out_dtype)
        tolerance.assert_within(y, oracle.epilogue(product, self.bias, steps, self.operands), bound)


def random_codes(format_name: str, n: int, k: int) -> Tensor:
    """uint8 [N, K] of codes whose values are finite, all of them if there is room."""
    finite = torch.arange(256)[: len(oracle.decode_values(format_name))][oracle.decode_values(format_name).isfinite()]
    repeated = finite.repeat(-(-n * k // len(finite)))[: n * k]
    return repeated[torch.randperm(n * k)].to(torch.uint8).view(n, k)


def problem(
    scheme: Scheme,
    layout: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    epilogue: Sequence[str] = (),
    *,
    seed: int = 0,
    identity: bool = False,
) -> Problem:
    """A random problem.

    Args:
        dtype: of the activations before they are quantized, of the output, bias and operands.
        identity: activations are the identity, scales 1 and the output float32: the weights' values come out.
    """
    torch.manual_seed(seed)
    weight = scheme.weight
    codes = random_codes(weight.format.name, n, k)
    blocks = weight.granularity.scale_shape((n, k))
    scale = torch.ones(blocks) if identity else (torch.rand(blocks) + 0.5) / weight.format.absmax
    scale = scale.to(SCALE_DTYPES[weight.scale_dtype])
    zero = None if weight.symmetric else torch.randint(0, 2**weight.format.bits, blocks).to(torch.uint8)
    packed = PackedWeight.from_codes(codes, scale, zero, weight)
    x, x_scale = (torch.eye(m, k) if identity else torch.randn(m, k)).to(dtype), None
    inputs = x.to(torch.float64)
    if scheme.activation is not None:
        static = None if scheme.activation.dynamic else torch.tensor(1.0 if identity else 0.03)
        x, x_scale = quantize_activation(x, scheme.activation, static)
        inputs = dequantize_activation(x.double(), x_scale.double(), scheme.activation).double()
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout, epilogue=tuple(epilogue))
    return Problem(
        spec=spec,
        x=x,
        x_scale=x_scale,
        packed=LAYOUTS[layout].pack(packed),
        bias=torch.randn(n).to(dtype) if "bias" in epilogue else None,
        operands=[torch.randn(m, n).to(dtype) for _ in range(spec.operand_count)],
        out_dtype=torch.float32 if identity else dtype,
        inputs=inputs,
        weight=oracle.dequantize(packed),
    )
