"""Torch's own ways to multiply by a quantized weight, which take the place of a generated kernel where they are faster.

Each is a function of the arguments below that returns a product, and the scales with which it still has to be
multiplied; `finish` does that and applies the epilogue.

    x: [M, K], floating point, or 8-bit codes if `x_scale` is given.
    x_scale: float32 [M, 1] or [], as `quantize_activation` makes it.
    weight: in the layout of the template whose place this takes.
    kernel: that template's kernel; `tile` does not matter.

`objection(name, kernel, m)` says why one of them cannot take a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qcompile.codegen.spec import KernelSpec, decoding_spec, finishing_spec
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.runtime import cache, launcher
from qcompile.tensors import by_bytes

Product: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""[M, N], and the float32 scales that still multiply it: of rows, [M, 1] or [], and of columns, [N] or [1]."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def scaled_mm(x: Tensor, x_scale: Tensor | None, weight: PackedWeight, kernel: KernelSpec, wrap: Any) -> Product:
    """`torch._scaled_mm`: fp8 times fp8, by cuBLAS or CUTLASS. Returns `kernel.out_dtype`, with all scales applied.

    Takes weights of the layout `rows8` with a scale a tensor or a row, activations with a scale a tensor or a row. With
    one scale each it takes any of e4m3 and e5m2 but e5m2 times e5m2; else both are expanded to one a row, and it takes
    e4m3 only and returns bfloat16 only. K and N are multiples of 16. It runs from sm_89, with scales of rows from
    sm_90. `use_fast_accum` stays off: its sums lose up to a quarter of a long sum of one sign.
    """
    assert x_scale is not None
    m, n = x.shape[0], kernel.n
    scale = weight.scale.to(torch.float32)
    if x_scale.numel() == 1 and scale.numel() == 1 and kernel.activation_scale == "tensor":
        x_scale, scale = x_scale.reshape(()), scale.reshape(())
    else:
        x_scale, scale = (
            x_scale.reshape(-1, 1).expand(m, 1).contiguous(),
            scale.reshape(1, -1).expand(1, n).contiguous(),
        )
    y = torch._scaled_mm(
        x.contiguous(), weight.codes.t(), x_scale, scale, out_dtype=_DTYPES[kernel.out_dtype], use_fast_accum=False
    )
    return y, None, None


def _scaled_mm_objection(kernel: KernelSpec, m: int) -> str | None:
    if not kernel.weight.startswith("fp8") or not (kernel.activation or "").startswith("fp8"):
        return "weights and activations are not both fp8"
    if (objection := _rows8_objection(kernel)) is not None:
        return objection
    if kernel.k % 16 or kernel.n % 16:
        return "K or N is no multiple of 16"
    whole = kernel.activation_scale == "tensor" and kernel.rows >= kernel.n
    if not kernel.target.startswith("sm_") or int(kernel.target[3:]) < (89 if whole else 90):
        return f"{kernel.target} does not multiply fp8 {'' if whole else 'with scales of rows'}".strip()
    if whole:
        return "e5m2 times e5m2" if kernel.weight == kernel.activation == "fp8_e5m2" else None
    if "fp8_e5m2" in (kernel.weight, kernel.activation):
        return "e5m2 with scales of rows"
    return None if kernel.out_dtype == "bfloat16" else f"{kernel.out_dtype} with scales of rows"


def int_mm(x: Tensor, x_scale: Tensor | None, weight: PackedWeight, kernel: KernelSpec, wrap: Any) -> Product:
    """`torch._int_mm`: int8 times int8, by cuBLAS. Returns int32, which both scales still have to multiply.

    Takes weights of the layout `rows8` with a scale a tensor or a row, activations with a scale a tensor or a row.
    M is greater than 16, K at least 16, and K and N are multiples of 8; K is less than 2**17, so that sums fit.
    """
    assert x_scale is not None
    return torch._int_mm(x.contiguous(), weight.codes.t()), x_scale, weight.scale.to(torch.float32).reshape(-1)


def _int_mm_objection(kernel: KernelSpec, m: int) -> str | None:
    if kernel.weight != "int8" or kernel.activation != "int8":
        return "weights and activations are not both int8"
    if (objection := _rows8_objection(kernel)) is not None:
        return objection
    if m <= 16:
        return "M is 16 or less"
    if kernel.k % 8 or kernel.n % 8 or not 16 <= kernel.k < 2**17:
        return "K or N is no multiple of 8, or K is not between 16 and 2**17"
    return None if kernel.target.startswith("sm_") else f"not for {kernel.target}"


def decode_mm(x: Tensor, x_scale: Tensor | None, weight: PackedWeight, kernel: KernelSpec, wrap: Any) -> Product:
    """The weight written out in the activations' type by a generated kernel, then `torch.mm`. Returns that type.

    Takes weights of the layout `fragment` of every format, and bfloat16 or float16 activations; or 8-bit activations
    with a scale a tensor or a row, which become bfloat16 (that holds their codes) and whose product has yet to be
    multiplied by that scale; the output is bfloat16 then. The decoded weight, 2 N K bytes, lives as long as the
    product takes. Weights are rounded once to that type, and so is the product before the epilogue, as in a linear
    that is not quantized.
    """
    decoded = decode(weight, decoding_spec(kernel), wrap)
    return torch.mm(x.to(decoded.dtype), decoded.t()), x_scale, None


def decode(weight: PackedWeight, kernel: KernelSpec, wrap: Any = lambda function: function) -> Tensor:
    """[N, K] in `kernel.out_dtype`, by a kernel of the template `decode_fragment`."""
    decoded = weight.codes.new_empty((kernel.n, kernel.k), dtype=_DTYPES[kernel.out_dtype])
    more = (weight.scale, weight.zero_point, weight.offset, weight.super_scale, weight.super_offset)
    # A pointer that the kernel does not use gets some input, so that one signature serves all.
    stored = [weight.codes if tensor is None else by_bytes(tensor) for tensor in more]
    grid = (-(-kernel.k // kernel.tile.k), -(-kernel.n // kernel.tile.n))
    function = wrap(cache.load(kernel).kernel)
    options = {"num_warps": kernel.tile.warps, "num_stages": kernel.tile.stages}
    launcher.launch(function, grid, weight.codes, *stored, decoded, **options)
    return decoded


def _decode_mm_objection(kernel: KernelSpec, m: int) -> str | None:
    if kernel.template != "gemm_fragment":
        return "codes are not in fragments"
    if kernel.activation_scale == "group":
        return "activations have a scale a group"
    if kernel.compute not in ("bfloat16", "float16"):
        return f"{kernel.compute} activations, which torch multiplies without tensor cores"
    if kernel.out_dtype != kernel.compute:
        return f"{kernel.out_dtype} of a product that is rounded to {kernel.compute}"
    return None


def _rows8_objection(kernel: KernelSpec) -> str | None:
    if kernel.template != "gemm_rows8":
        return "codes are not in rows"
    if kernel.groups > 1 or kernel.activation_scale == "group":
        return "a scale is of less than a row"
    if kernel.rows not in (1, kernel.n):
        return "a scale is of several rows"
    return None if kernel.symmetric else "zero points"


PATHS: dict[str, Callable[[Tensor, Tensor | None, PackedWeight, KernelSpec, Any], Product]] = {
    "scaled_mm": scaled_mm,
    "int_mm": int_mm,
    "decode_mm": decode_mm,
}
_OBJECTIONS = {"scaled_mm": _scaled_mm_objection, "int_mm": _int_mm_objection, "decode_mm": _decode_mm_objection}


def objection(name: str, kernel: KernelSpec, m: int) -> str | None:
    """Why a path of `PATHS` cannot take the place of a kernel for up to `m` rows (a `gpu.bucket`); None if it can."""
    return _OBJECTIONS[name](kernel, m)


def finish(
    product: Product,
    bias: Tensor | None,
    operands: list[Tensor],
    spec: LinearSpec,
    kernel: KernelSpec,
    wrap: Callable[[Any], Any],
) -> Tensor:
    """The product times its scales, and the epilogue of `spec`, both in float32: [M, N], or [M, N / 2] with a gate.

    The bias is [N], or one for each row, [M, N].

    While a compiler traces, this is plain torch, which it fuses with what follows; else it is one generated kernel.
    """
    y, x_scale, scale = product
    out_dtype = _DTYPES[kernel.out_dtype]
    if x_scale is None and scale is None and not spec.epilogue:
        return y.to(out_dtype)
    if type(y) is not Tensor:
        return finish_in_torch(product, bias, operands, spec, out_dtype)
    last = finishing_spec(kernel, y.dtype, x_scale=x_scale is not None, scale=scale is not None)
    m, n = y.shape
    finished = y.new_empty((m, spec.width), dtype=spec.output_dtype(out_dtype))
    given = [y if t is None else t.contiguous() for t in (x_scale, None if scale is None else scale.expand(n), bias)]
    function = wrap(cache.load(last).kernel)
    launcher.launch(
        function,
        (-(-m // last.tile.m), -(-spec.width // last.tile.n)),
        y,
        *given,
        *([operand.contiguous() for operand in operands] or [y]),
        finished,
        0 if bias is None or bias.dim() == 1 else n,
        m,
        num_warps=last.tile.warps,
        num_stages=last.tile.stages,
    )
    return finished


def finish_in_torch(
    product: Product, bias: Tensor | None, operands: list[Tensor], spec: LinearSpec, out_dtype: torch.dtype
) -> Tensor:
    """`finish` as torch computes it."""
    from qcompile.ops import apply_epilogue

    y = product[0].to(torch.float32)
    for scale in product[1:]:
        y = y if scale is None else y * scale
    return apply_epilogue(y, bias, operands, spec).to(spec.output_dtype(out_dtype))
