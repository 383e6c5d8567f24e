"""Rows that are added, normalized and quantized on GPUs: one launch of a generated Triton kernel."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile import compat, exchange
from qcompile.codegen.norm_kernel_spec import WIDEST, NormKernelSpec, held_columns, norm_kernel_spec
from qcompile.codegen.spec import dtype_name, launches_early, native_fp8
from qcompile.exchange import Shared
from qcompile.norm_spec import NormSpec, decode_norm, largest_sum
from qcompile.norms import results
from qcompile.runtime import cache, launcher
from qcompile.runtime.gpu import stores, target_of
from qcompile.tensors import by_bytes


def objection(norm: NormSpec, device: torch.device) -> str | None:
    """Why a norm has no kernel; None if it has one."""
    if norm.columns < norm.k and norm.columns & (norm.columns - 1):
        return f"groups of {norm.columns} columns are no power of two"
    if held_columns(norm) > WIDEST:
        return f"rows of {norm.k} columns are more than a program holds"
    if norm.group and norm.columns % 2:
        return "words of rows of an odd number of columns are not whole"
    if norm.number and not stores(norm.activation.held, device):
        return f"{target_of(device)} does not convert to {norm.number}"
    return None


def norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: NormSpec
) -> list[Tensor]:
    """See `qcompile.norms.plain`."""
    shared = exchange.shared(norm.group) if norm.group else None
    if shared and x.nbytes > largest_sum(shared.size):
        x, norm, shared = compat.all_reduce(x.contiguous(), norm.group), replace(norm, group=""), None
    kernel = norm_kernel_spec(norm, dtype_name(x.dtype), target_of(x.device), shared.size if shared else 1)
    # Triton launches on the current device.
    guard = torch.cuda.device(x.device) if torch.cuda.device_count() > 1 else contextlib.nullcontext()
    with guard:
        return launch(kernel, cache.load(kernel).kernel, x, residual, weight, bias, shared)


def launch(
    kernel: NormKernelSpec,
    function: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shared: Shared | None = None,
) -> list[Tensor]:
    """Allocate the results and run `function`, the Triton function of `kernel`'s module, over its grid."""
    norm = decode_norm(kernel.norm)
    x = x.contiguous()
    found = results(x, norm)
    rows = x.numel() // norm.k
    if rows:
        codes, scale = found[:2] if norm.number else (x, x)
        # A pointer that the kernel does not use gets the rows, so that one signature serves all.
        given = [x if tensor is None else tensor.contiguous() for tensor in (residual, weight, bias)]
        options: dict[str, Any] = {"num_warps": kernel.tile.warps, "num_stages": kernel.tile.stages}
        if launches_early(kernel.target) and x.device.type != "cpu":  # which has Triton's interpreter
            options["launch_pdl"] = True
        launcher.launch(
            function,
            (rows,),
            x,
            *given,
            codes if native_fp8(kernel.target) else by_bytes(codes),
            scale,
            found[-1 - norm.keep_norm] if norm.keep_sum else x,
            found[-1] if norm.keep_norm else x,
            *((shared.own, shared.peers, shared.calls, shared.rank) if shared else (x, x, x, 0)),
            **options,
        )
    return found
