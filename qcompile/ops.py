"""The operators that rewritten graphs and quantized modules call: schemas, fakes, and the way to a kernel.

`qcompile::linear` is composite: compilers see through it to what differs between devices. Quantizing the activations
(and on CPUs the epilogue) is plain torch there, so Inductor fuses it with its neighbours; the product itself is one
operator, `gemm` on GPUs or `gemm_cpu` on CPUs. Kernels, and the operator that wraps Triton's, are imported at the first
call on a GPU, so importing this module imports no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import DeviceError, GradientError
from qcompile.linear_spec import ACTIVATIONS, LinearSpec, decode_spec
from qcompile.reference import quantize_activation

_library = torch.library.Library("qcompile", "DEF")
_library.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? input_scale, "
    "Tensor[] operands, str spec) -> Tensor"
)
_library.define("gemm_cpu(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, str spec) -> Tensor")
_library.define(
    "gemm_dynamic(Tensor x, Tensor? x_scale, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "Tensor[] operands, str spec, ScalarType out_dtype) -> Tensor"
)


def apply_epilogue(product: Tensor, bias: Tensor | None, operands: list[Tensor], spec: LinearSpec) -> Tensor:
    """Apply the steps of `spec.epilogue` in float32 to a product of the output's shape."""
    y = product.to(torch.float32)
    remaining = iter(operands)
    for step in spec.epilogue:
        if step == "bias":
            assert bias is not None
            y = y + bias
        elif step == "mul":
            y = y * next(remaining)
        elif step == "add":
            y = y + next(remaining)
        else:
            y = ACTIVATIONS[step](y)
    return y


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    operands: list[Tensor],
    spec: str,
) -> Tensor:
    parsed = decode_spec(spec)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *operands)):
        raise GradientError(
            "a quantized linear is for inference only, and autograd is recording: call the model under torch.no_grad() "
            "or torch.inference_mode(), or call model.requires_grad_(False) first"
        )
    rows = x.reshape(-1, parsed.in_features)
    flat = [o.reshape(-1, parsed.out_features) for o in operands]
    x_scale = None
    if parsed.scheme.activation is not None:
        rows, x_scale = quantize_activation(rows, parsed.scheme.activation, input_scale)
    if x.device.type == "cpu":
        y = _cpu(rows, x_scale, codes, scale, zero_point, parsed, spec)
        y = apply_epilogue(y, bias, flat, parsed).to(x.dtype)
    elif x.device.type == "cuda":
        from qcompile.runtime import gpu

        # A graph for one M takes the kernel for that M into Inductor's wrapper; one for every M chooses at run time.
        operator = gpu.gemm_operator() if isinstance(rows.shape[0], int) else torch.ops.qcompile.gemm_dynamic
        y = operator(rows, x_scale, codes, scale, zero_point, bias, flat, spec, x.dtype)
    else:
        raise DeviceError(f"qcompile has kernels for cpu and cuda, not for {x.device.type}")
    return y.reshape(*x.shape[:-1], parsed.out_features)


def _cpu(
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    parsed: LinearSpec,
    spec: str,
) -> Tensor:
    """The product on a CPU, before the epilogue: [M, N] in float32 or the activations' dtype."""
    from qcompile.runtime import cpu

    if parsed.layout == "fragment":
        raise DeviceError(
            "weights in layout fragment are for GPUs; move the module with .to('cpu'), which lays them out anew"
        )
    return cpu.product(x, x_scale, codes, scale, zero_point, parsed, spec)


def _gemm_cpu(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    from qcompile.runtime import cpu

    return cpu.gemm(x, codes, scale, zero_point, decode_spec(spec))


def _gemm_dynamic(
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    operands: list[Tensor],
    spec: str,
    out_dtype: torch.dtype,
) -> Tensor:
    from qcompile.runtime import gpu

    return gpu.gemm(x, x_scale, codes, scale, zero_point, bias, operands, decode_spec(spec), out_dtype)


_library.impl("linear", _linear, "CompositeImplicitAutograd")
_library.impl("gemm_cpu", _gemm_cpu, "CPU")
_library.impl("gemm_dynamic", _gemm_dynamic, "CUDA")


@torch.library.register_fake("qcompile::gemm_cpu", lib=_library)
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty((x.shape[0], decode_spec(spec).out_features), dtype=dtype)


@torch.library.register_fake("qcompile::gemm_dynamic", lib=_library)
def _(
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    operands: list[Tensor],
    spec: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], decode_spec(spec).out_features), dtype=out_dtype)
