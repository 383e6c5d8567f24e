"""Torch's own ways to multiply by a stack of experts, which take the place of a generated kernel where they are faster.

As in `vendor`, each returns a product and the scales that still have to multiply it, which `finish` does. None reads
where rows end back from the device.

    x: [S, K], floating point, or 8-bit codes if `x_scale` is given, sorted by expert.
    x_scale: float32 [S, 1] or [], as `quantize_activation` makes it.
    offsets: int32 [experts + 1], where the rows of each expert begin and the last end.
    weight: the stack, in the layout of the template whose place this takes.
    kernel: that template's kernel, of one expert; `tile` does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.spec import GroupedSpec, decoding_spec, one_expert
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.runtime import vendor
from qcompile.runtime.vendor import Product
from qcompile.stacks import padded_rows

LARGEST = 2 << 30
"""Bytes of a decoded stack, at most, that is written out for a product."""


def scaled_grouped_mm(
    x: Tensor, x_scale: Tensor | None, offsets: Tensor, weight: PackedWeight, kernel: GroupedSpec, wrap: Any
) -> Product:
    """`torch._scaled_grouped_mm`: e4m3 times e4m3, by CUTLASS. Returns bfloat16, with all scales applied.

    Takes stacks of the layout `rows8` with a scale a row, and activations with a scale a tensor or a row. K and N are
    multiples of 16. It runs on sm_90. `use_fast_accum` stays off, as in `vendor.scaled_mm`.
    """
    assert x_scale is not None
    scale = weight.scale.to(torch.float32).view(kernel.experts, -1)[:, : kernel.n]
    y = torch._scaled_grouped_mm(
        x.contiguous(),
        _of_experts(weight.codes, kernel),
        x_scale.reshape(-1).expand(x.shape[0]).contiguous(),
        scale,
        offs=offsets[1:],
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return y, None, None


def _scaled_grouped_mm_objection(kernel: GroupedSpec) -> str | None:
    if kernel.weight != "fp8_e4m3" or kernel.activation != "fp8_e4m3":
        return "weights and activations are not both e4m3"
    if not kernel.in_rows:
        return "codes are not in rows"
    if kernel.groups > 1 or kernel.activation_scale == "group":
        return "a scale is of less than a row"
    if kernel.rows != 1:
        return "a scale is of several rows"
    if kernel.k % 16 or kernel.n % 16:
        return "K or N is no multiple of 16"
    if kernel.target != "sm_90":
        return f"not for {kernel.target}"
    return None if kernel.out_dtype == "bfloat16" else f"{kernel.out_dtype} output"


def decode_grouped_mm(
    x: Tensor, x_scale: Tensor | None, offsets: Tensor, weight: PackedWeight, kernel: GroupedSpec, wrap: Any
) -> Product:
    """The stack written out in bfloat16 by a generated kernel, then `torch._grouped_mm`. Returns bfloat16.

    Takes stacks of the layout `fragment` of every format, of at most `LARGEST` bytes when decoded, which live as long
    as the product takes; and bfloat16 activations, or 8-bit ones with a scale a tensor or a row, which become bfloat16
    and whose product has yet to be multiplied by that scale. K and N are multiples of 8. Elsewhere than on sm_90 and
    sm_100, torch multiplies expert by expert and waits for the offsets.
    """
    alone = replace(decoding_spec(one_expert(kernel)), n=kernel.experts * padded_rows(kernel.n))
    decoded = vendor.decode(weight, alone, wrap)
    y = torch._grouped_mm(x.to(decoded.dtype).contiguous(), _of_experts(decoded, kernel), offs=offsets[1:])
    return y, x_scale, None


def _decode_grouped_mm_objection(kernel: GroupedSpec) -> str | None:
    if kernel.in_rows:
        return "codes are not in fragments"
    if kernel.activation_scale == "group":
        return "activations have a scale a group"
    if kernel.compute != "bfloat16" or kernel.out_dtype != "bfloat16":
        return "activations or output are not bfloat16"
    if kernel.k % 8 or kernel.n % 8:
        return "K or N is no multiple of 8"
    if 2 * kernel.experts * padded_rows(kernel.n) * kernel.k > LARGEST:
        return f"the decoded stack takes more than {LARGEST} bytes"
    return None if kernel.target in ("sm_90", "sm_100") else f"not for {kernel.target}"


def _of_experts(stack: Tensor, kernel: GroupedSpec) -> Tensor:
    """A view [experts, K, N] of a stack [experts * padded rows, K]."""
    return stack.view(kernel.experts, -1, kernel.k)[:, : kernel.n].transpose(1, 2)


Path = Callable[[Tensor, Tensor | None, Tensor, PackedWeight, GroupedSpec, Any], Product]
PATHS: dict[str, Path] = {"scaled_grouped_mm": scaled_grouped_mm, "decode_grouped_mm": decode_grouped_mm}
_OBJECTIONS = {"scaled_grouped_mm": _scaled_grouped_mm_objection, "decode_grouped_mm": _decode_grouped_mm_objection}


def objection(name: str, kernel: GroupedSpec) -> str | None:
    """Why a path of `PATHS` cannot take the place of a kernel; None if it can."""
    return _OBJECTIONS[name](kernel)


def finish(
    product: Product,
    offsets: Tensor,
    bias: Tensor | None,
    spec: LinearSpec,
    kernel: GroupedSpec,
    wrap: Callable[[Any], Any],
) -> Tensor:
    """The product times its scales, and the epilogue of `spec`, with the bias [experts, N] of each row's expert.

    See `vendor.finish`.
    """
    if bias is not None:
        row = torch.arange(product[0].shape[0], device=offsets.device, dtype=offsets.dtype)
        bias = bias.index_select(0, torch.searchsorted(offsets[1:], row, right=True, out_int32=True))
    return vendor.finish(product, bias, [], spec, one_expert(kernel), wrap)
