"""Quantized products with every code in them, what they should give, and how far a kernel may be from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from qcompile.codegen.spec import KernelSpec, Tile, kernel_spec, scales_of
from qcompile.codegen.stream_spec import stream_scales
from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize_activation, quantize_activation
from qcompile.runtime import cache, gpu
from qcompile.scheme import SCALE_DTYPES, Scheme, WeightScheme
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

    def check(
        self,
        y: Tensor,
        compute: torch.dtype,
        accumulate_unit: float = tolerance.ACCUMULATE_UNIT,
        *,
        kernel: KernelSpec | None = None,
    ) -> None:
        """Every element within the derived bound of the float64 result.

        Args:
            kernel: what computed it, where that may round weights before their offsets are added, or scales.
        """
        steps = self.spec.epilogue
        product = oracle.linear(self.inputs, self.weight)
        streams = kernel is not None and kernel.streams and not kernel.in_rows
        pairs = kernel is not None and streams and stream_scales(kernel) == "pairs"
        bound = tolerance.gemm_bound(
            self.inputs,
            self.weight,
            compute,
            accumulate_unit=accumulate_unit,
            scale_unit=tolerance.PAIR_UNIT if pairs else 0.0,
            units=kernel.k // kernel.super_columns if kernel is not None and streams and kernel.super_columns else 0,
        )
        logical = LAYOUTS[self.packed.layout].unpack(self.packed)
        if logical.offset is not None:
            offset = torch.zeros(logical.offset.shape).to(logical.offset.dtype)
            scaled = oracle.dequantize(replace(logical, offset=offset))
            fragments = kernel is not None and scales_of(kernel, kernel.tile.scales) == "fragments"
            rounded = compute if fragments else torch.float32
            bound += tolerance.offset_bound(self.inputs, scaled, self.weight - scaled, rounded, pairs=streams)
        bound = tolerance.epilogue_bound(product, bound, self.bias, steps, self.operands, self.out_dtype)
        tolerance.assert_within(y, oracle.epilogue(product, self.bias, steps, self.operands), bound)


def random_codes(format_name: str, n: int, k: int) -> Tensor:
    """uint8 [N, K] of codes whose values are finite, all of them if there is room."""
    finite = torch.arange(256)[: len(oracle.decode_values(format_name))][oracle.decode_values(format_name).isfinite()]
    repeated = finite.repeat(-(-n * k // len(finite)))[: n * k]
    return repeated[torch.randperm(n * k)].to(torch.uint8).view(n, k)


def sparse_codes(codes: Tensor, zero: int) -> Tensor:
    """The same with two, one or none of each four columns left, by chance; the others are `zero`."""
    n, k = codes.shape
    patterns = [p for p in range(16) if p.bit_count() <= 2]
    kept = torch.tensor([[p >> i & 1 for i in range(4)] for p in patterns], dtype=torch.bool)
    return codes.where(kept[torch.randint(len(kept), (n, -(-k // 4)))].flatten(1)[:, :k], zero)


def random_weight(scheme: WeightScheme, n: int, k: int, *, plain: bool = False) -> PackedWeight:
    """A packed weight with every code in it, and integer scales of both signs if they are signed.

    Args:
        plain: all scales are 1 and all offsets 0; zero points are random.
    """
    blocks = scheme.granularity.scale_shape((n, k))
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    given: dict[str, Tensor] = {}
    if plain:
        given["scale"], given["offset"] = torch.ones(blocks), torch.zeros(blocks)
    elif dtype in (torch.uint8, torch.int8):
        for name in ("scale", "offset"):
            given[name] = torch.randint(-128 if dtype == torch.int8 else 0, 128 if dtype == torch.int8 else 256, blocks)
    else:
        given["scale"] = (torch.rand(blocks) + 0.5) / scheme.format.absmax
        given["offset"] = (torch.rand(blocks) + 0.5) * torch.randint(0, 2, blocks).sub(0.5).sign()
        if dtype == torch.float8_e8m0fnu:
            given["offset"] = given["offset"].abs()
    given = {name: values.float().to(dtype) for name, values in given.items()}
    if scheme.super_scale is not None:
        above = (n, scheme.super_scale.count(k))
        above_dtype = SCALE_DTYPES[scheme.super_scale.dtype]
        given["super_scale"] = (torch.ones(above) if plain else (torch.rand(above) + 0.5) / 32).to(above_dtype)
        if not plain and above[1] > 1:
            given["super_scale"][::3, ::2] = 0
            given["super_scale"][1::3] *= -1
        given["super_offset"] = (torch.ones(above) if plain else torch.randn(above) / 32).to(above_dtype)
    fields = {name: values for name, values in given.items() if name in scheme.fields}
    zero = torch.randint(0, 2**scheme.format.bits, blocks).to(torch.uint8) if "zero_point" in scheme.fields else None
    codes, scale = random_codes(scheme.format.name, n, k), fields.pop("scale")
    if scheme.sparsity is not None:
        codes = sparse_codes(codes, scheme.zero_code)
    return PackedWeight.from_codes(codes, scale, zero, scheme, "weight", **fields)


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
    packed = random_weight(weight, n, k, plain=identity)
    x, x_scale = (torch.eye(m, k) if identity else torch.randn(m, k)).to(dtype), None
    inputs = x.to(torch.float64)
    if scheme.activation is not None:
        static = None if scheme.activation.dynamic else torch.tensor(1.0 if identity else 0.03)
        x, x_scale = quantize_activation(x, scheme.activation, static)
        inputs = dequantize_activation(x.double(), x_scale.double(), scheme.activation).double()
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout, epilogue=tuple(epilogue))
    operands = [torch.randn(m, spec.width).to(dtype) for _ in range(spec.operand_count)]
    if spec.stored is not None:
        operands[-1] = torch.tensor(0.1)
    return Problem(
        spec=spec,
        x=x,
        x_scale=x_scale,
        packed=LAYOUTS[layout].pack(packed),
        bias=torch.randn(n).to(dtype) if "bias" in epilogue else None,
        operands=operands,
        out_dtype=torch.float32 if identity else dtype,
        inputs=inputs,
        weight=oracle.dequantize(packed),
    )
