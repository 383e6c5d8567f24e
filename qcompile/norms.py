"""The operator that adds rows, normalizes and quantizes them, by rows or groups of columns; or does some of this.

Compilers do not join a sum over a row with the maxima of its groups, and make three kernels of the maximum of a single
long row. Here all is one operator: on GPUs a kernel of its own, which begins while the one before ends; elsewhere plain
torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile import compat
from qcompile.norm_spec import NormSpec, decode_norm, quantization
from qcompile.reference import quantize_activation
from qcompile.scheme import ActivationScheme

_library = torch.library.Library("qcompile", "FRAGMENT")
_SCHEMA = "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str spec) -> Tensor[]"
_library.define(f"norm_quantize{_SCHEMA}")
_library.define(f"norm_quantize_gpu{_SCHEMA}")
OP = torch.ops.qcompile.norm_quantize.default
"""What passes put into graphs."""


def plain(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> list[Tensor]:
    """Codes [..., K] and scales [..., groups] of the norm if it is quantized, then what is kept of sum and norm."""
    x = compat.all_reduce(x.contiguous(), spec.group) if spec.group else x
    held = x if residual is None else x + residual
    norm = held if spec.norm == "" else _normalized(held, weight, bias, spec)
    quantized = quantize_activation(norm, spec.activation) if spec.number else ()
    return [*quantized, *[held] * spec.keep_sum, *[norm] * spec.keep_norm]


def _normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    value = x.to(torch.float32)
    if spec.norm == "layer":
        value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + spec.eps)
    if spec.early:
        value = value.to(x.dtype).to(torch.float32)
    if weight is not None:
        value = value * (weight.to(torch.float32) + (1.0 if spec.weight == "one more" else 0.0))
    if bias is not None:
        value = value + bias.to(torch.float32)
    return value.to(x.dtype)


def quantize(x: Tensor, activation: ActivationScheme, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_activation`, by one kernel where a GPU has one for it and no compiler traces."""
    spec = quantization(activation, x.shape[-1])
    if spec is not None and x.device.type == "cuda" and type(x) is Tensor:
        codes, scale = OP(x, None, None, None, spec.encode())
        return codes, scale
    return quantize_activation(x, activation, static_scale)


def _norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: str
) -> list[Tensor]:
    parsed = decode_norm(spec)
    if x.device.type == "cuda":
        from qcompile.runtime import norm_gpu

        if norm_gpu.objection(parsed, x.device) is None:
            found: list[Tensor] = torch.ops.qcompile.norm_quantize_gpu(x, residual, weight, bias, spec)
            return found
    return plain(x, residual, weight, bias, parsed)


def _norm_quantize_gpu(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: str
) -> list[Tensor]:
    from qcompile.runtime import norm_gpu

    return norm_gpu.norm_quantize(x, residual, weight, bias, decode_norm(spec))


_library.impl("norm_quantize", _norm_quantize, "CompositeImplicitAutograd")
_library.impl("norm_quantize_gpu", _norm_quantize_gpu, "CUDA")


def results(x: Tensor, spec: NormSpec) -> list[Tensor]:
    """Tensors without values for what `plain` returns."""
    kept = [x.new_empty(x.shape) for _ in range(spec.keep_sum + spec.keep_norm)]
    if not spec.number:
        return kept
    scale = x.new_empty((*x.shape[:-1], -(-spec.k // spec.columns)), dtype=torch.float32)
    return [x.new_empty(x.shape, dtype=spec.activation.dtype), scale, *kept]


@torch.library.register_fake("qcompile::norm_quantize_gpu", lib=_library)
def _(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: str) -> list[Tensor]:
    return results(x, decode_norm(spec))
