"""Launches of kernels of `gemm_stream` and `gemm_stream_rows8`, whose inputs are descriptors of tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.spec import KernelSpec, super_last
from qcompile.formats import FORMATS
from qcompile.layouts import plane_widths
from qcompile.packed import PackedWeight
from qcompile.runtime import launcher
from qcompile.runtime.counters import zeros_kept_zero
from qcompile.scheme import SCALE_DTYPES
from qcompile.tensors import by_bytes

WARPS = 4
"""Of a group: what Triton is told of a program's warps, to which the kernel adds those of the other group."""


PLANES = ("codes", "second", "third")
"""The arguments that are descriptors of planes of codes."""


def blocks(kernel: KernelSpec, above_bits: int = 16) -> dict[str, tuple[list[int], Any]]:
    """For each input that has a descriptor, the block that is copied at once, and its layout in shared memory.

    Args:
        above_bits: of the type of scales above scales of groups.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout

    if kernel.in_rows:
        rows, layout = kernel.tile.n // (2 if kernel.gated else 1), NVMMASharedLayout(128, 8, 2)
        return {"x": ([kernel.tile.m, 128], layout), "codes": ([rows, 128], layout)}
    rows, bits = kernel.tile.n // (128 if kernel.gated else 64), FORMATS[kernel.weight].bits
    groups, quads = max(1, 128 // kernel.columns), kernel.quads
    above = [rows, 1, 64], NVMMASharedLayout(0, above_bits, 3)
    scale = [rows, groups, 64], NVMMASharedLayout(0, 8 * SCALE_DTYPES[kernel.scale_dtype].itemsize, 3)
    if quads:
        scale = [rows, 2, 32 * quads], NVMMASharedLayout(0, 32, 3)
    widths = (bits // 2, 1) if kernel.sparse else plane_widths(bits)
    planes = [([rows, 2, width, 128], NVMMASharedLayout(0, 32, 4)) for width in widths]
    return {
        "x": ([kernel.tile.m, 128], NVMMASharedLayout(128, 16, 2)),
        **dict(zip(PLANES, (planes + 2 * planes[:1])[:3], strict=True)),
        "scale": scale,
        "zero_point": ([rows, groups, 64], NVMMASharedLayout(0, 8, 3)),
        "above": above,
        "offset": scale,
        "above_offset": above,
    }


@functools.cache
def _processors(device: torch.device | None) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def division(tiles: int, steps: int, split: int, processors: int) -> tuple[int, int, int]:
    """How many programs there are, how many tiles not all of them have one of, and how many programs have these.

    Args:
        steps: of a tile.
        split: programs for each tile; or 0 for as many as processors, of which about four at most share a tile. With 1
            there are no more than processors, and each tile is one program's.
    """
    if split == 1:
        programs = min(tiles, processors)
        return programs, tiles % programs, tiles % programs
    programs = tiles * min(split, steps) if split else processors
    shared = tiles % programs
    return programs, shared, min(programs, shared * (split or min(4, steps)))


def launch(
    kernel: KernelSpec,
    function: Any,
    x: Tensor,
    x_scale: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    operands: list[Tensor],
    y: Tensor,
) -> None:
    """Run `function`, the Gluon function of `kernel`'s module, on its programs."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    m, tile, codes = x.shape[0], kernel.tile, weight.codes
    tiles = -(-m // tile.m) * -(-kernel.n // tile.n)
    programs, shared, sharers = division(
        tiles, -(-kernel.k // 128), tile.split, _processors(x.device if x.is_cuda else None)
    )
    x = x.contiguous()
    if x.data_ptr() % 16:  # where descriptors cannot begin
        x = x.clone()
    scale = by_bytes(weight.scale).view(torch.int32) if kernel.quads else weight.scale
    scales = [weight.super_scale if kernel.super_columns else scale]
    if kernel.in_rows:
        assert x_scale is not None
        scales.insert(0, x_scale.contiguous())
    else:
        codes = codes.view(*codes.shape[:2], -1, 128)
    above = None if super_last(kernel) else weight.super_scale
    offset = weight.offset
    if offset is not None and kernel.quads:
        offset = by_bytes(offset).view(torch.int32)
    inputs = {"x": x, "scale": scale, "zero_point": weight.zero_point, "above": above, "offset": offset}
    inputs |= {"above_offset": weight.super_offset} | dict.fromkeys(PLANES, codes)
    given = blocks(kernel) if above is None else blocks(kernel, 8 * above.element_size())
    for name in given:  # descriptors that the kernel does not use are some other
        if inputs[name] is None or (name == "scale" and kernel.groups == 1):
            inputs[name], given[name] = codes, given["codes"]
    partial = x.new_empty(1 if tile.split == 1 else max(1, 2 * sharers * tile.m * tile.n), dtype=torch.float32)
    launcher.launch(
        function,
        (programs,),
        *(TensorDescriptor.from_tensor(inputs[name], *block) for name, block in given.items()),
        *scales,
        codes if bias is None else bias,
        *([operand.contiguous() for operand in operands] or [codes]),
        y,
        partial,
        zeros_kept_zero(max(1, 2 * shared), x.device),
        max(1, sharers),
        m,
        num_warps=WARPS,
        launch_pdl=True,
    )
