"""The operator of mixtures of experts: rows of activations, each multiplied by the weight of one of several experts.

Like `qcompile::linear` it is composite: what is done to the activations is plain torch, and the product is one
operator, `grouped_gemm` on GPUs, one launch for all experts and for a gate behind it, or `grouped_gemm_cpu`, a loop
over those that are hit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import DeviceError, GradientError
from qcompile.linear_spec import LinearSpec, decode_spec, gate_of
from qcompile.norms import quantize
from qcompile.ops import apply_epilogue, quantized_by_product
from qcompile.reference import quantize_activation
from qcompile.scheme import Granularity

_library = torch.library.Library("qcompile", "FRAGMENT")
_library.define(
    "grouped_linear(Tensor x, Tensor expert_ids, Tensor[] weight, Tensor? bias, Tensor? input_scale, "
    "Tensor? pre_quant_scale, Tensor? perm, int experts, str spec) -> Tensor"
)
_library.define("grouped_gemm_cpu(Tensor x, Tensor? x_scale, Tensor offsets, Tensor[] weight, str spec) -> Tensor")
_library.define(
    "grouped_gemm(Tensor x, Tensor? x_scale, Tensor offsets, Tensor[] weight, Tensor? bias, str spec, "
    "ScalarType out_dtype) -> Tensor"
)


def _grouped_linear(
    x: Tensor,
    expert_ids: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    input_scale: Tensor | None,
    pre_quant_scale: Tensor | None,
    perm: Tensor | None,
    experts: int,
    spec: str,
) -> Tensor:
    """The epilogue of row i of x [S, K] times the weight of expert `expert_ids[i]`: [S, N], or [S, N / 2] with a gate.

    Args:
        expert_ids: int64 [S], ascending, from 0 to `experts` - 1.
        weight: tensors of the stack that `qcompile.stacks.stack` makes, in the layout that `spec` names.
        bias: [experts, N]. input_scale: float32 [experts]. pre_quant_scale: [experts, K]. perm: int32 [experts, K].
        spec: of one expert's linear [N, K], with the granularity of the stack.
    """
    parsed = decode_spec(spec)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
        raise GradientError(
            "quantized experts are for inference only, and autograd is recording: call the model under torch.no_grad() "
            "or torch.inference_mode(), or call model.requires_grad_(False) first"
        )
    rows = x
    if pre_quant_scale is not None:
        rows = rows * pre_quant_scale.to(rows.dtype)[expert_ids]
    if perm is not None:
        rows = rows.gather(1, perm[expert_ids].to(torch.int64))
    starts = torch.arange(experts + 1, device=x.device, dtype=expert_ids.dtype)
    offsets = torch.searchsorted(expert_ids, starts, out_int32=True)
    activation = parsed.scheme.activation
    if activation is None or activation.outlier_threshold is None:
        return _product(rows, expert_ids, offsets, weight, bias, input_scale, parsed, x.dtype)
    # Outlying columns go through the same codes unquantized.
    outlying = (rows.abs() >= activation.outlier_threshold).any(0)
    alone, gate = _without_gate(parsed)
    unquantized = replace(alone, scheme=replace(alone.scheme, activation=None))
    outliers = rows.masked_fill(~outlying, 0)
    others = rows.masked_fill(outlying, 0)
    y = _product(outliers, expert_ids, offsets, weight, bias, None, unquantized, torch.float32) + _product(
        others, expert_ids, offsets, weight, None, input_scale, replace(alone, epilogue=()), torch.float32
    )
    return apply_epilogue(y, None, [], gate).to(x.dtype)


def _without_gate(parsed: LinearSpec) -> tuple[LinearSpec, LinearSpec]:
    """The same product without its gate, and with its gate alone."""
    gate = gate_of(parsed.epilogue)
    rest = tuple(step for step in parsed.epilogue if step != gate)
    return replace(parsed, epilogue=rest), replace(parsed, epilogue=(gate,) if gate else ())


def _product(
    rows: Tensor,
    expert_ids: Tensor,
    offsets: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    input_scale: Tensor | None,
    parsed: LinearSpec,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `offsets[e]` to `offsets[e + 1]` are of expert e; they are quantized first if the scheme says so."""
    x_scale = None
    if parsed.scheme.activation is not None and not quantized_by_product(rows, parsed):
        activation = parsed.scheme.activation
        if activation.dynamic:
            rows, x_scale = quantize(rows, activation)
        else:
            # An expert's static scale is the scale of its tokens.
            assert input_scale is not None
            x_scale = input_scale[expert_ids][:, None]
            rows, _ = quantize_activation(rows.to(torch.float32) / x_scale, activation, torch.ones_like(input_scale[0]))
            activation = replace(activation, granularity=Granularity.channel(), dynamic=True, scale=None)
            parsed = replace(parsed, scheme=replace(parsed.scheme, activation=activation))
    if rows.device.type == "cpu":
        y = torch.ops.qcompile.grouped_gemm_cpu(rows, x_scale, offsets, weight, parsed.encode())
        return apply_epilogue(y, None if bias is None else bias[expert_ids], [], parsed).to(dtype)
    if rows.device.type == "cuda":
        from qcompile.runtime import gpu_grouped

        if gpu_grouped.gate_objection(parsed) is not None:
            alone, gate = _without_gate(parsed)
            y = _multiply(rows, x_scale, offsets, weight, bias, alone, dtype)
            return apply_epilogue(y, None, [], gate).to(dtype)
        return _multiply(rows, x_scale, offsets, weight, bias, parsed, dtype)
    raise DeviceError(f"qcompile has kernels for cpu and cuda, not for {rows.device.type}")


def _multiply(
    rows: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    parsed: LinearSpec,
    dtype: torch.dtype,
) -> Tensor:
    """The product on a GPU. As in `ops`, compilers see one of torch's own if the number of rows is known."""
    from qcompile.runtime import gpu_grouped

    traced = type(rows) is not Tensor and isinstance(rows.shape[0], int)
    visible = traced and gpu_grouped.torch_multiplies(rows, x_scale, offsets.shape[0] - 1, parsed, dtype)
    operator = gpu_grouped.visible_grouped_gemm() if visible else torch.ops.qcompile.grouped_gemm
    product: Tensor = operator(rows, x_scale, offsets, weight, bias, parsed.encode(), dtype)
    return product


def _grouped_gemm_cpu(x: Tensor, x_scale: Tensor | None, offsets: Tensor, weight: list[Tensor], spec: str) -> Tensor:
    from qcompile.runtime import cpu_grouped

    return cpu_grouped.grouped_gemm(x, x_scale, offsets, weight, decode_spec(spec))


def _grouped_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    spec: str,
    out_dtype: torch.dtype,
) -> Tensor:
    from qcompile.runtime import gpu_grouped

    return gpu_grouped.grouped_gemm(x, x_scale, offsets, weight, bias, decode_spec(spec), out_dtype)


_library.impl("grouped_linear", _grouped_linear, "CompositeImplicitAutograd")
_library.impl("grouped_gemm_cpu", _grouped_gemm_cpu, "CPU")
_library.impl("grouped_gemm", _grouped_gemm, "CUDA")


@torch.library.register_fake("qcompile::grouped_gemm_cpu", lib=_library)
def _(x: Tensor, x_scale: Tensor | None, offsets: Tensor, weight: list[Tensor], spec: str) -> Tensor:
    return x.new_empty((x.shape[0], decode_spec(spec).out_features), dtype=torch.float32)


@torch.library.register_fake("qcompile::grouped_gemm", lib=_library)
def _(
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    spec: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], decode_spec(spec).width), dtype=out_dtype)
