"""Seconds that a product takes with our kernels and with torch's own: what decides where nothing was timed.

`cost_model.seconds` orders the tiles of one template, and is off by a factor that differs between templates
(`STRETCH`). The times of torch's kernels are rooflines whose rates are shares of the device's. All shares, and the time
of a launch, were measured on an H100 (torch 2.11, cold weights, CUDA graphs: `benchmarks/results`) and are taken for
those of other devices too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy

from qcompile.codegen.cost_model import bytes_out, seconds, stacked_rows
from qcompile.codegen.devices import Device, device_of
from qcompile.codegen.spec import KernelSpec, scales_of
from qcompile.scheme import SCALE_DTYPES

STRETCH = {
    ("gemm_fragment", "bfloat16"): 1.5,
    ("gemm_fragment", "float16"): 1.5,
    ("gemm_stream", "bfloat16"): 1.05,
    ("gemm_stream", "float16"): 1.05,
    ("gemm_rows8", "fp8"): 1.0,
    ("gemm_rows8", "int8"): 1.0,
    ("gemm_stream_rows8", "int8"): 0.8,
}
"""Measured over modelled time at M >= 64, by template and `KernelSpec.compute`; 1.3 for all others."""

_NARROW = 1.7
"""Likewise, beyond that, of weights that are scaled in float32 because groups are too narrow for products."""

MARGIN = 1.1
"""Factor on the times of torch's kernels: one of ours that may be as fast needs fewer launches and less memory."""

_M, _N, _K, _BITS, _Y = sympy.symbols("M N K bits y_bytes", positive=True)
_MEMORY, _OPERATIONS = sympy.symbols("memory operations", positive=True)
_LAUNCH = 3e-6
"""Seconds of one of torch's products beyond its roofline."""
_PASS = 1.5e-6
"""Seconds of a kernel that only moves memory, beyond moving it."""
_READ = sympy.Float(0.83) * _MEMORY
"""Bytes a second that a kernel reads and writes."""
_PRODUCT = 2 * sympy.ceiling(_M / 64) * 64 * _N * _K


def _roofline(moved: sympy.Expr, share: float, factor: int) -> sympy.Expr:
    return _LAUNCH + sympy.Max(moved / _READ, _PRODUCT / (share * factor * _OPERATIONS))


_PLAIN_MM = _roofline(2 * _N * _K + 2 * _M * _K + _M * _N * _Y, 0.78, 1)
_GROUPED_MM = _roofline(2 * _N * _K + 2 * _M * _K + _M * _N * _Y, 0.48, 1)
EXPRESSIONS: dict[str, sympy.Expr] = {
    "scaled_mm": 2 * _PASS + _roofline(_N * _K + _M * _K + _M * _N * _Y, 0.65, 2),
    "int_mm": _PASS + _roofline(_N * _K + _M * _K + 4 * _M * _N, 0.44, 2) + _M * _N * (4 + _Y) / _READ,
    "decode_mm": 2 * _PASS + _N * _K * (_BITS / 8 + 2) / _READ + _PLAIN_MM,
    "scaled_grouped_mm": 3 * _PASS + _roofline(_N * _K + _M * _K + _M * _N * _Y, 0.4, 2),
    "decode_grouped_mm": 3 * _PASS + _N * _K * (_BITS / 8 + 2) / _READ + _GROUPED_MM,
}
"""Seconds of each of torch's ways, by its name in `runtime/vendor.py`, with what comes before and after the product.
For stacks of experts (`runtime/vendor_grouped.py`) N counts the rows of all."""


@functools.cache
def _compiled(vendor: str) -> Callable[..., float]:
    symbols = (_M, _N, _K, _BITS, _Y, _MEMORY, _OPERATIONS)
    return sympy.lambdify(symbols, EXPRESSIONS.get(vendor, _PLAIN_MM), "math")


def predict_plain(shape: tuple[int, int], m: int, device: Device) -> float:
    """Seconds of torch's product of M = `m` rows by a weight [N, K], all in 16 bits."""
    return _compiled("")(m, *shape, 16, 2, device.memory, device.operations)


def predict(spec: KernelSpec, m: int, vendor: str | None = None, device: Device | None = None) -> float:
    """Seconds of M = `m` rows.

    Args:
        vendor: one of `EXPRESSIONS`, which takes the place of the kernel whose tile `spec` has.
        device: None for one of the kernel's target.
    """
    if vendor is None:
        template = "gemm_rows8" if spec.in_rows else "gemm_fragment"
        if spec.streams:
            template = spec.source
        in_float32 = template == "gemm_fragment" and scales_of(spec, spec.tile.scales) == "weights"
        narrow = _NARROW if in_float32 and spec.columns <= 16 else 1.0
        return STRETCH.get((template, spec.compute), 1.3) * narrow * seconds(spec, m, device)
    device, width = device or device_of(spec.target), 4 if spec.out_dtype == "float32" else 2
    bits = spec.stored_bits
    n = stacked_rows(spec, m)
    return MARGIN * _compiled(vendor)(m, n, spec.k, bits, width, device.memory, device.operations)


def weight_bytes(spec: KernelSpec) -> int:
    """Bytes of a packed weight, in the logical layout or the sparse one, or some less.

    A spec does not say of which type scales of scales are, nor that columns are permuted: two bytes are counted for
    each of the former, which is the least, and none for the latter.
    """
    blocks = -(-spec.n // spec.rows) * spec.groups
    scale = SCALE_DTYPES[spec.scale_dtype].itemsize
    block = scale * (2 if spec.offset else 1) + (not spec.symmetric and not spec.offset)
    above = -(-spec.k // spec.super_columns) * (2 if spec.offset else 1) if spec.super_columns else 0
    return spec.n * -(-spec.k * spec.stored_bits // 8) + blocks * block + 2 * spec.n * above


def limit(spec: KernelSpec, m: int) -> float:
    """Seconds that no kernel stays below: `weight_bytes`, input and output moved once, and products.

    These are of 16 bits or, for 8-bit activations, of 8.
    """
    device = device_of(spec.target)
    wide = {"float32": 4, "bfloat16": 2, "float16": 2}
    moved = weight_bytes(spec) + m * spec.k * wide.get(spec.x_dtype, 1) + m * spec.n * bytes_out(spec)
    rate = device.operations * (1 if spec.activation is None else 2)
    return max(moved / device.memory, 2 * m * spec.n * spec.k / rate)
