"""The operators that rewritten graphs and quantized modules call: schemas, fakes, and the way to a kernel.

`qcompile::linear` is composite: compilers see through it to what differs between devices. Quantizing the activations
(`qcompile::quantize` does it for several linears at once; and on CPUs the epilogue) is plain torch there, so Inductor
fuses it with its neighbours; the product itself is one operator, `gemm` on GPUs or `gemm_cpu` on CPUs. Kernels, and the
operator that wraps Triton's, are imported at the first call on a GPU, so importing this module imports no Triton.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import DeviceError, GradientError, LayerError
from qcompile.gates import ACTIVATIONS, columns, gate
from qcompile.hadamard import transform
from qcompile.linear_spec import STORES, LinearSpec, decode_spec
from qcompile.norms import quantize
from qcompile.reference import quantize_activation
from qcompile.scheme import ActivationScheme, Granularity

_library = torch.library.Library("qcompile", "DEF")
_library.define(
    "linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor? input_scale, Tensor? pre_quant_scale, "
    "Tensor[] operands, str spec) -> Tensor"
)
OP = torch.ops.qcompile.linear.default
"""What quantized modules call, and linears of rewritten graphs become."""

_library.define("quantize(Tensor x, Tensor? static_scale, str spec) -> (Tensor, Tensor)")
_library.define("keep(Tensor(a) x) -> Tensor(a)")
_library.define("turn_halves(Tensor x) -> Tensor")
_library.define("gemm_cpu(Tensor x, Tensor? x_scale, Tensor[] weight, str spec) -> Tensor")
_library.define("gemm_any(Tensor x, Tensor? x_scale, Tensor[] weight, str spec) -> Tensor")
_library.define(
    "gemm(Tensor x, Tensor? x_scale, Tensor[] weight, Tensor? bias, Tensor[] operands, str spec, "
    "ScalarType out_dtype) -> Tensor"
)


def apply_epilogue(product: Tensor, bias: Tensor | None, operands: list[Tensor], spec: LinearSpec) -> Tensor:
    """Apply the steps of `spec.epilogue` to a product [M, N]: float32, or codes, of the output's shape."""
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
        elif step in STORES:
            y = store(y, next(remaining), spec)
        elif step in ACTIVATIONS:
            y = ACTIVATIONS[step](y)
        else:
            y = gate(step, *columns(step, y))
    return y


def store(y: Tensor, scale: Tensor, spec: LinearSpec) -> Tensor:
    """The codes that the last step of `spec.epilogue` makes of its output with a static scale."""
    assert spec.stored is not None
    scheme = ActivationScheme(format=spec.stored, granularity=Granularity.tensor(), dynamic=False)
    return quantize_activation(y, scheme, scale)[0]


def _linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    input_scale: Tensor | None,
    pre_quant_scale: Tensor | None,
    operands: list[Tensor],
    spec: str,
) -> Tensor:
    parsed = decode_spec(spec)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *operands)):
        raise GradientError(
            "a quantized linear is for inference only, and autograd is recording: call the model under torch.no_grad() "
            "or torch.inference_mode(), or call model.requires_grad_(False) first"
        )
    if x.shape[-1] != parsed.in_features:
        raise LayerError(
            f"a quantized linear of {parsed.in_features} input features is given {x.shape[-1]}, in {list(x.shape)}"
        )
    if not parsed.codes_of and not x.dtype.is_floating_point:
        raise LayerError(f"a quantized linear is given {x.dtype}; it multiplies floating-point numbers")
    rows = x.reshape(-1, parsed.in_features)
    # The scale of an output that is stored as codes is one number.
    flat = [o.reshape(-1, parsed.width) if o.dim() else o for o in operands]
    if pre_quant_scale is not None:
        rows = rows * pre_quant_scale.to(rows.dtype)
    if parsed.scheme.weight.rotated:
        rows = transform(rows)
        parsed = parsed.of_turned_inputs()
    if parsed.scheme.weight.act_order:
        rows = rows.index_select(1, weight[parsed.scheme.weight.fields.index("perm")])
    activation = parsed.scheme.activation
    if activation is not None and activation.outlier_threshold is not None:
        # Outlying columns go through the same codes unquantized; their product comes to the other's before all else.
        outlying = (rows.abs() >= activation.outlier_threshold).any(0)
        unquantized = replace(parsed, scheme=replace(parsed.scheme, activation=None), epilogue=())
        outliers = _product(rows.masked_fill(~outlying, 0), weight, None, None, [], unquantized, x.dtype)
        rows, flat = rows.masked_fill(outlying, 0), [outliers, *flat]
        parsed = replace(parsed, epilogue=("add", *parsed.epilogue))
    y = _product(rows, weight, bias, input_scale, flat, parsed, parsed.floating(x.dtype))
    return y.reshape(*x.shape[:-1], parsed.width)


def _quantize(x: Tensor, static_scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """The codes [..., K] of activations, and their scales, as linears of `spec` quantize them."""
    activation = decode_spec(spec).scheme.activation
    assert activation is not None
    codes, scale = quantize_activation(x, activation, static_scale)
    return _keep(codes), _keep(scale)


def _keep(x: Tensor) -> Tensor:
    """x itself. Inductor writes it once; without this every reader would compute it, or have a copy written."""
    return x.as_strided(x.shape, x.stride())


def _turn_halves(x: Tensor) -> Tensor:
    """cat((-b, a), -1) of the halves a and b of the last dimension, element by element: Inductor writes no copy."""
    other = x.unflatten(-1, (2, x.shape[-1] // 2)).flip(-2)
    return torch.where(torch.arange(2, device=x.device)[:, None] == 0, -other, other).flatten(-2)


def quantized_by_product(rows: Tensor, parsed: LinearSpec) -> bool:
    """Whether the product takes activations as they are and quantizes them itself."""
    if rows.device.type != "cpu":
        return False
    from qcompile.runtime import cpu

    return cpu.quantizes(parsed)


def _product(
    rows: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    input_scale: Tensor | None,
    operands: list[Tensor],
    parsed: LinearSpec,
    dtype: torch.dtype,
) -> Tensor:
    """The epilogue of the product of [M, K], which is quantized first if the scheme says so: [M, N], or [M, N / 2].

    Args:
        dtype: of the output, unless that is stored as codes.
    """
    x_scale = None
    if parsed.codes_of:
        assert input_scale is not None
        x_scale = input_scale.to(torch.float32)
        per_tensor = (
            parsed.scheme.activation is not None and parsed.scheme.activation.granularity == Granularity.tensor()
        )
        x_scale = x_scale.reshape(()) if per_tensor else x_scale.reshape(-1, x_scale.shape[-1])
    elif parsed.scheme.activation is not None and not quantized_by_product(rows, parsed):
        rows, x_scale = quantize(rows, parsed.scheme.activation, input_scale)
    if rows.device.type == "cpu":
        from qcompile.runtime import cpu

        product = cpu.product(rows, x_scale, weight, parsed)
        if not parsed.epilogue and product.dtype == dtype:
            return product
        return apply_epilogue(product, bias, operands, parsed).to(parsed.output_dtype(dtype))
    if rows.device.type == "cuda":
        from qcompile.runtime import gpu

        gpu.check_dtypes(rows, x_scale, dtype)
        visible = type(rows) is not Tensor and seen_through(parsed, rows, dtype)
        operator = gpu.visible_gemm() if visible else torch.ops.qcompile.gemm
        if parsed.stored is None or gpu.stores(parsed.stored, rows.device):
            y: Tensor = operator(rows, x_scale, weight, bias, operands, parsed.encode(), dtype)
            return y
        floating = replace(parsed, epilogue=parsed.epilogue[:-1])
        y = operator(rows, x_scale, weight, bias, operands[:-1], floating.encode(), dtype)
        return store(y, operands[-1], parsed)
    raise DeviceError(f"qcompile has kernels for cpu and cuda, not for {rows.device.type}")


def seen_through(parsed: LinearSpec, rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether compilers see a linear's product and its epilogue: M is known then, and the choice is torch's product.

    Args:
        rows: [M, K], quantized or not.
        dtype: of the output, unless that is stored as codes.
    """
    if rows.device.type != "cuda" or not isinstance(rows.shape[0], int):
        return False
    from qcompile.runtime import gpu

    activation = parsed.scheme.activation
    x_dtype = rows.dtype if activation is None else activation.dtype
    return gpu.torch_multiplies(parsed, rows.shape[0], x_dtype, dtype, rows.device)


def tune(spec: str, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Time the kernels for a linear of `rows` rows of `dtype`, unless that was done before; only GPUs have a choice."""
    if device.type == "cuda":
        from qcompile.runtime import gpu

        parsed = decode_spec(spec).of_turned_inputs()
        gpu.tune(parsed, gpu.bucket(rows), parsed.floating(dtype), device)


def prepare(spec: str, dtype: torch.dtype) -> None:
    """Have what a linear on CPUs calls for x of a type before it is called."""
    from qcompile.runtime import cpu

    parsed = decode_spec(spec).of_turned_inputs()
    cpu.prepare(parsed.encode(), parsed.floating(dtype))


def _gemm_any(x: Tensor, x_scale: Tensor | None, weight: list[Tensor], spec: str) -> Tensor:
    """`gemm_cpu` until the operator of C++ is there, and then for what that has no kernel for."""
    from qcompile.runtime import cpu

    return cpu.gemm(x, x_scale, weight, spec)


def _gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    operands: list[Tensor],
    spec: str,
    out_dtype: torch.dtype,
) -> Tensor:
    from qcompile.runtime import gpu

    return gpu.gemm(x, x_scale, weight, bias, operands, decode_spec(spec), out_dtype)


_library.impl("linear", _linear, "CompositeImplicitAutograd")
_library.impl("quantize", _quantize, "CompositeImplicitAutograd")
_library.impl("keep", _keep, "CompositeImplicitAutograd")
_library.impl("turn_halves", _turn_halves, "CompositeImplicitAutograd")
_library.impl("gemm_cpu", _gemm_any, "CompositeExplicitAutograd")  # C++ registers for CPUs: runtime/cpu_operators.py
_library.impl("gemm_any", _gemm_any, "CPU")
_library.impl("gemm", _gemm, "CUDA")


@torch.library.register_fake("qcompile::gemm_cpu", lib=_library)
def _(x: Tensor, x_scale: Tensor | None, weight: list[Tensor], spec: str) -> Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty((x.shape[0], decode_spec(spec).out_features), dtype=dtype)


@torch.library.register_fake("qcompile::gemm", lib=_library)
def _(
    x: Tensor,
    x_scale: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    operands: list[Tensor],
    spec: str,
    out_dtype: torch.dtype,
) -> Tensor:
    parsed = decode_spec(spec)
    return x.new_empty((x.shape[0], parsed.width), dtype=parsed.output_dtype(out_dtype))
