"""Products with stacks of experts on GPUs: one launch of a generated Triton kernel for all experts, or torch's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.spec import GroupedSpec, native_fp8
from qcompile.flags import flags
from qcompile.gates import PAIRS
from qcompile.layouts import LAYOUTS, halves_objection
from qcompile.linear_spec import LinearSpec, decode_spec, gate_of
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation
from qcompile.runtime import cache, launcher, vendor_grouped
from qcompile.runtime.counters import zeros_kept_zero
from qcompile.runtime.gpu import bucket, check_dtypes, has_kernel, may_time, name_of, target_of, tune
from qcompile.runtime.tuning import Chosen, choose
from qcompile.stacks import padded_rows
from qcompile.tensors import by_bytes


def rows_bucket(rows: int, experts: int) -> int:
    """The bucket of rows that decides the kernel of a stack: of twice the mean, more than which few experts have."""
    return bucket(-(-2 * rows // experts))


def tile_count(rows: int, experts: int, height: int) -> int:
    """How many tiles of `height` rows any distribution of rows to experts needs at most."""
    hit = min(rows, experts)
    return (rows + hit * (height - 1)) // height


def launch(
    kernel: GroupedSpec,
    function: Any,
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Allocate the output [S, width] and run `function`, the Triton function of `kernel`'s module, over its grid."""
    rows, tile = x.shape[0], kernel.tile
    y = x.new_empty((rows, kernel.width), dtype=out_dtype)
    if rows == 0:
        return y
    native = native_fp8(kernel.target)
    codes = weight.codes if native else by_bytes(weight.codes)

    def stored(tensor: Tensor | None) -> Tensor:
        # A pointer that a kernel does not use gets some input, so that one signature serves all.
        return codes if tensor is None else by_bytes(tensor)

    tiles, blocks = tile_count(rows, kernel.experts, tile.m), -(-kernel.n // tile.n)
    partial = arrived = codes
    if tile.split > 1:
        partial = x.new_empty(tiles * blocks * tile.split * tile.m * tile.n, dtype=torch.float32)
        arrived = zeros_kept_zero(tiles * blocks, x.device)
    more = (weight.zero_point, weight.offset, weight.super_scale, weight.super_offset)
    launcher.launch(
        function,
        (tiles, blocks * tile.split),
        x.contiguous() if native else by_bytes(x.contiguous()),
        stored(None if x_scale is None else x_scale.contiguous()),
        codes,
        stored(weight.scale),
        *(() if kernel.in_rows else map(stored, more)),
        stored(None if bias is None else bias.contiguous()),
        codes,
        y,
        partial,
        arrived,
        offsets,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def _decoded(
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    spec: LinearSpec,
    out_dtype: torch.dtype,
) -> Tensor:
    """For layouts without a kernel: every expert's weight is decoded and multiplied by all rows; its own are kept."""
    from qcompile.ops import apply_epilogue

    if x_scale is not None:
        assert spec.scheme.activation is not None
        x = dequantize_activation(x, x_scale, spec.scheme.activation)
    decoded = dequantize(LAYOUTS[spec.layout].unpack(weight)).unflatten(0, (-1, padded_rows(spec.out_features)))
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    y = x.new_zeros((x.shape[0], spec.out_features), dtype=torch.float32)
    for index, matrix in enumerate(decoded[:, : spec.out_features]):
        product = torch.mm(x.to(torch.float32), matrix.t())
        own = (row >= offsets[index]) & (row < offsets[index + 1])
        y = torch.where(own, product if bias is None else product + bias[index], y)
    steps = spec.epilogue[spec.epilogue[:1] == ("bias",) :]
    return apply_epilogue(y, None, [], replace(spec, epilogue=steps)).to(out_dtype)


def grouped_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    spec: LinearSpec,
    out_dtype: torch.dtype,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Tensor:
    """The epilogue of rows `offsets[e]` to `offsets[e + 1]` of x [S, K] times the weight of expert e: [S, width].

    Nothing is read back from the device.

    Args:
        x: floating point, or 8-bit codes if `x_scale` is given: float32 [S, 1], [S, groups] or [].
        offsets: int32 [experts + 1].
        weight: the stack's tensors, in the layout that `spec` names.
        bias: [experts, N], exactly if the epilogue of `spec` says so.
        spec: of one expert's linear.
        out_dtype: float32, bfloat16 or float16.
        wrap: `torch.library.wrap_triton` while tracing.

    Raises:
        DeviceError: activations of another type than float32, bfloat16 and float16.
    """
    check_dtypes(x, x_scale, out_dtype)
    experts = offsets.shape[0] - 1
    shape = (experts * padded_rows(spec.out_features), spec.in_features)
    packed = PackedWeight.from_tensors(weight, shape, spec.scheme.weight, spec.layout)
    if not has_kernel(spec):
        return _decoded(x, x_scale, offsets, packed, bias, spec, out_dtype)
    if flags.tune and may_time(x):
        tune(spec, rows_bucket(x.shape[0], experts), x.dtype if x_scale is None else out_dtype, x.device, experts)
    chosen = choice_for(x, experts, spec, out_dtype)
    return execute(chosen, x, x_scale, offsets, packed, bias, spec, wrap)


def choice_for(x: Tensor, experts: int, spec: LinearSpec, out_dtype: torch.dtype) -> Chosen:
    """What multiplies rows like `x` (which the scheme has quantized, if it does that) by a stack of experts."""
    rows = rows_bucket(x.shape[0], experts)
    return choose(spec, rows, x.dtype, out_dtype, target_of(x.device), name_of(x.device), experts)


def execute(
    chosen: Chosen,
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    spec: LinearSpec,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Tensor:
    """`grouped_gemm` with a choice that is made."""
    kernel = chosen.kernel
    assert isinstance(kernel, GroupedSpec)
    # Triton launches on the current device.
    guard = torch.cuda.device(x.device) if torch.cuda.device_count() > 1 else contextlib.nullcontext()
    with guard:
        if chosen.vendor is None or x.shape[0] == 0:
            function = wrap(cache.load(kernel).kernel)
            return launch(kernel, function, x, x_scale, offsets, weight, bias, getattr(torch, kernel.out_dtype))
        product = vendor_grouped.PATHS[chosen.vendor](x, x_scale, offsets, weight, kernel, wrap)
        return vendor_grouped.finish(product, offsets, bias, spec, kernel, wrap)


def gate_objection(spec: LinearSpec) -> str | None:
    """Why the gate of `spec`, if it has one, follows the product; None if kernels apply it."""
    gate = gate_of(spec.epilogue) or PAIRS
    return None if gate.startswith(PAIRS) else halves_objection(spec.layout, spec.width, spec.in_features)


def torch_multiplies(x: Tensor, x_scale: Tensor | None, experts: int, spec: LinearSpec, out_dtype: torch.dtype) -> bool:
    """Whether the product of `grouped_gemm` is one of torch's own, which compilers can fuse with what surrounds it."""
    check_dtypes(x, x_scale, out_dtype)
    return not has_kernel(spec) or choice_for(x, experts, spec, out_dtype).vendor is not None


@functools.cache
def visible_grouped_gemm() -> Any:
    """`torch.ops.qcompile.visible_grouped_gemm`, registered at the first call; see `gpu.visible_gemm`."""

    @torch.library.triton_op("qcompile::visible_grouped_gemm", mutates_args={})
    def visible(
        x: Tensor,
        x_scale: Tensor | None,
        offsets: Tensor,
        weight: list[Tensor],
        bias: Tensor | None,
        spec: str,
        out_dtype: torch.dtype,
    ) -> Tensor:
        wrap = torch.library.wrap_triton
        return grouped_gemm(x, x_scale, offsets, weight, bias, decode_spec(spec), out_dtype, wrap)

    return torch.ops.qcompile.visible_grouped_gemm
