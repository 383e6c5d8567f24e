"""Quantized products on GPUs, from generated Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.predict import limit, predict
from qcompile.codegen.spec import TEMPLATES, KernelSpec, launches_early, native_fp8
from qcompile.errors import DeviceError
from qcompile.flags import flags
from qcompile.formats import Format, IntegerFormat
from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec, decode_spec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation
from qcompile.runtime import cache, launcher, streams, vendor
from qcompile.runtime.counters import zeros_kept_zero
from qcompile.runtime.tuning import Chosen, choose, gpu_family, show
from qcompile.tensors import by_bytes

_X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_BUCKET = 4096


@functools.cache
def target_of(device: torch.device) -> str:
    """What kernels are generated for: "sm_90" or "gfx942", from the device itself."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def bucket(m: int) -> int:
    """The largest M that shares M's kernel: 1, powers of two from 16 to 4096, and that for all above."""
    size = 1 if m <= 1 else 16
    while size < min(m, _LARGEST_BUCKET):
        size *= 2
    return size


@functools.cache
def name_of(device: torch.device) -> str:
    """The key of the tables of choices: "nvidia-h100"; "" where there is no GPU."""
    return gpu_family(torch.cuda.get_device_name(device)) if torch.cuda.is_available() else ""


def launch(
    kernel: KernelSpec,
    function: Any,
    x: Tensor,
    x_scale: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    operands: list[Tensor],
    out_dtype: torch.dtype,
) -> Tensor:
    """Allocate the output [M, width] and run `function`, the Triton function of `kernel`'s module, over its grid.

    Args:
        out_dtype: of the output unless it is stored as codes.
    """
    m, tile = x.shape[0], kernel.tile
    stored = None if kernel.stored is None else kernel.stored.native_dtype
    y = x.new_empty((m, kernel.width), dtype=stored or out_dtype)
    if m == 0:
        return y
    if tile.form == "cores" and x.data_ptr() % 4:  # which reads words of two numbers
        x = x.clone()
    if kernel.streams:
        streams.launch(kernel, function, x, x_scale, weight, bias, operands, y)
        return y
    tiles = -(-m // tile.m) * -(-kernel.n // tile.n)
    native = native_fp8(kernel.target)
    codes = weight.codes if native else by_bytes(weight.codes)

    def given(tensor: Tensor | None) -> Tensor:
        # Pointers that a kernel does not use get some input, so that one signature serves all.
        return codes if tensor is None else by_bytes(tensor)

    partial = arrived = codes
    if tile.split > 1:
        partial = x.new_empty(tiles * tile.split * tile.m * tile.n, dtype=torch.float32)
        arrived = zeros_kept_zero(tiles, x.device)
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if launches_early(kernel.target) and x.device.type != "cpu":  # which has Triton's interpreter
        options["launch_pdl"] = True
    more = (weight.zero_point, weight.offset, weight.super_scale, weight.super_offset)
    launcher.launch(
        function,
        (tiles * tile.split,),
        x.contiguous() if native else by_bytes(x.contiguous()),
        given(None if x_scale is None else x_scale.contiguous()),
        codes,
        given(weight.scale),
        *(map(given, more) if kernel.template == "gemm_fragment" else ()),
        given(bias),
        *([operand.contiguous() for operand in operands] or [codes]),
        y,
        partial,
        arrived,
        m,
        **options,
    )
    return y


def stores(fmt: Format, device: torch.device) -> bool:
    """Whether kernels can store codes of a format."""
    return isinstance(fmt, IntegerFormat) or native_fp8(target_of(device))


def has_kernel(spec: LinearSpec) -> bool:
    """Whether a template multiplies by weights of this layout; others are decoded whole."""
    return spec.layout in TEMPLATES


def _decoded(
    x: Tensor,
    x_scale: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    operands: list[Tensor],
    spec: LinearSpec,
    out_dtype: torch.dtype,
) -> Tensor:
    """For layouts without a kernel: the whole weight is decoded, then torch multiplies."""
    from qcompile.ops import apply_epilogue

    if x_scale is not None:
        assert spec.scheme.activation is not None
        x = dequantize_activation(x, x_scale, spec.scheme.activation)
    decoded = dequantize(replace(LAYOUTS[spec.layout].unpack(weight), perm=None))
    product = torch.mm(x.to(torch.float32), decoded.t())
    return apply_epilogue(product, bias, operands, spec).to(spec.output_dtype(out_dtype))


def gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    operands: list[Tensor],
    spec: LinearSpec,
    out_dtype: torch.dtype,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Tensor:
    """The product of activations and a packed weight, with the epilogue of `spec`.

    Args:
        x: [M, K], floating point, or 8-bit codes if `x_scale` is given.
        x_scale: float32 [M, 1], [M, groups] or [], as `quantize_activation` makes it.
        weight: the packed weight's tensors, in the layout that `spec` names; x has its columns in their order.
        bias: [N].
        operands: of the epilogue's steps, each of the output's shape; last the scale of an output that is stored as
            codes, float32 [].
        out_dtype: float32, bfloat16 or float16: the output's type, unless that is stored as codes.
        wrap: `torch.library.wrap_triton` while tracing.

    Returns:
        [M, N], or [M, N / 2] with a gate.

    Raises:
        DeviceError: activations of another type than float32, bfloat16 and float16.
    """
    check_dtypes(x, x_scale, out_dtype)
    packed = PackedWeight.from_tensors(weight, spec.shape, spec.scheme.weight, spec.layout)
    if not has_kernel(spec):
        return _decoded(x, x_scale, packed, bias, operands, spec, out_dtype)
    if flags.tune and may_time(x):
        tune(spec, bucket(x.shape[0]), x.dtype if x_scale is None else out_dtype, x.device)
    return execute(choice_for(x, spec, out_dtype), x, x_scale, packed, bias, operands, spec, wrap)


def check_dtypes(x: Tensor, x_scale: Tensor | None, out_dtype: torch.dtype) -> None:
    """
    Raises:
        DeviceError: activations of another type than float32, bfloat16 and float16.
    """
    if x_scale is None and x.dtype not in _X_DTYPES:
        raise DeviceError(f"GPU kernels take float32, bfloat16 or float16 activations, not {x.dtype}: cast the model")
    if out_dtype not in _X_DTYPES:
        raise DeviceError(f"GPU kernels return float32, bfloat16 or float16, not {out_dtype}: cast the model")


def choice_for(x: Tensor, spec: LinearSpec, out_dtype: torch.dtype) -> Chosen:
    """What multiplies activations like `x` (which the scheme has quantized, if it does that)."""
    return choose(spec, bucket(x.shape[0]), x.dtype, out_dtype, target_of(x.device), name_of(x.device))


def may_time(x: Tensor) -> bool:
    """Whether kernels may be timed now: on a GPU, while no compiler traces and nothing is captured."""
    return type(x) is Tensor and x.is_cuda and not torch.cuda.is_current_stream_capturing()


@functools.cache
def tune(spec: LinearSpec, m: int, dtype: torch.dtype, device: torch.device, experts: int = 0) -> None:
    """Time the kernels for a linear, once a process, unless the user's table has this shape and bucket.

    Args:
        m: a `bucket`.
        dtype: of the activations before they are quantized.
        experts: see `tuning.any_kernel`.

    Raises:
        OSError: the table cannot be written.
    """
    if has_kernel(spec) and dtype in _X_DTYPES:
        from qcompile.runtime import measure

        job = measure.Job(name="", spec=replace(spec, epilogue=(), codes_of=""), m=m, dtype=dtype, experts=experts)
        measure.tune(job, device)


def execute(
    chosen: Chosen,
    x: Tensor,
    x_scale: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    operands: list[Tensor],
    spec: LinearSpec,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Tensor:
    """`gemm` with a choice that is made."""
    out_dtype = getattr(torch, chosen.kernel.out_dtype)
    # Triton launches on the current device.
    guard = torch.cuda.device(x.device) if torch.cuda.device_count() > 1 else contextlib.nullcontext()
    with guard:
        if chosen.vendor is None or x.shape[0] == 0:
            function = wrap(cache.load(chosen.kernel).kernel)
            return launch(chosen.kernel, function, x, x_scale, weight, bias, operands, out_dtype)
        product = vendor.PATHS[chosen.vendor](x, x_scale, weight, chosen.kernel, wrap)
        return vendor.finish(product, bias, operands, spec, chosen.kernel, wrap)


def torch_multiplies(
    spec: LinearSpec, rows: int, x_dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the product of `gemm` is one of torch's own, which compilers can fuse with what surrounds it."""
    if not has_kernel(spec):
        return True
    return choose(spec, bucket(rows), x_dtype, out_dtype, target_of(device), name_of(device)).vendor is not None


@functools.cache
def visible_gemm() -> Any:
    """`torch.ops.qcompile.visible_gemm`, registered at the first call: a `gemm` that compilers see through.

    For products of torch's own. Our kernels are launched in ways that compilers do not know of: before the kernel
    before has ended, and with counters that are zero before and after.
    """

    @torch.library.triton_op("qcompile::visible_gemm", mutates_args={})
    def visible(
        x: Tensor,
        x_scale: Tensor | None,
        weight: list[Tensor],
        bias: Tensor | None,
        operands: list[Tensor],
        spec: str,
        out_dtype: torch.dtype,
    ) -> Tensor:
        wrap = torch.library.wrap_triton
        return gemm(x, x_scale, weight, bias, operands, decode_spec(spec), out_dtype, wrap)

    return torch.ops.qcompile.visible_gemm


@dataclass(frozen=True)
class Plan:
    """What runs a linear for a number of rows, for reports.

    Attributes:
        kernel: the template and its tile, or torch's product.
        origin: where the choice comes from (`tuning.Chosen`).
        predicted_us: by the cost model.
        measured_us: of this shape and bucket of M, if it was timed.
        limit_us: what the device could do at best, by its nominal rates.
    """

    kernel: str
    origin: str
    predicted_us: float
    measured_us: float | None
    limit_us: float


def plan(spec: LinearSpec, rows: int, dtype: torch.dtype, device: torch.device) -> Plan | None:
    """The plan for activations of `dtype`, before they are quantized; None for layouts without a kernel."""
    if not has_kernel(spec) or dtype not in _X_DTYPES:
        return None
    activation = spec.scheme.activation
    x_dtype = dtype if activation is None else activation.dtype
    chosen = choose(spec, bucket(rows), x_dtype, dtype, target_of(device), name_of(device))
    tile = show(chosen.kernel.tile) if chosen.vendor is None else ""
    return Plan(
        kernel=f"{chosen.name} {tile}".strip(),
        origin=chosen.origin,
        predicted_us=1e6 * predict(chosen.kernel, rows, chosen.vendor),
        measured_us=chosen.us,
        limit_us=1e6 * limit(chosen.kernel, rows if chosen.us is None else bucket(rows)),
    )


def kernel_name(spec: LinearSpec) -> str:
    """What runs a linear on GPUs, for reports."""
    return TEMPLATES[spec.layout] if has_kernel(spec) else "decode, then torch.mm"
