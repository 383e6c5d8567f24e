"""Quantized products beside torch's own, for any shape: time, error, and the limit of the device.

`error` is |y - y'| / |y'| (Frobenius), where y' is the float64 product of the very numbers that a kernel multiplies:
dequantized weights and, for 8-bit activations, dequantized activations. The limit is the longer of moving each byte of
weight, input and output once and of multiplying, at the rates of `timing.ceilings`. 8-bit activations start as
bfloat16: their quantization is part of the time, for torch's kernels as for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import qcompile.ops  # noqa: F401  (registers the operators)
from qcompile import compat
from qcompile.evaluate.timing import Call, Row, copies, microseconds
from qcompile.layouts import LAYOUTS, choose_layout, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.norms import quantize
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation, quantize_activation, quantize_weight
from qcompile.scheme import ActivationScheme, Scheme

OURS = "qcompile"
PLAIN = ("F.linear", "bfloat16")
LIMIT = 2.0**-8
"""Greatest `error` of ours: rounding to bfloat16 errs by less than 2**-9, root mean square; the rest is for the sum."""


def limit(packed: PackedWeight) -> float:
    """`LIMIT`, and what it errs by that GPUs round codes times scales to bfloat16 before offsets of K-quants are added.

    That is 2**-9 of these in the root mean square, and rows of x are independent of weights, so that a product errs by
    as much of itself as weights do.
    """
    if packed.super_offset is None or packed.device.type == "cpu":
        return LIMIT
    scaled = dequantize(packed.map(lambda name, tensor: torch.zeros_like(tensor) if name == "offset" else tensor))
    return LIMIT + 2.0**-9 * float(scaled.norm() / dequantize(packed).norm())


@dataclass(frozen=True)
class Candidate:
    """`calls`, one for each copy of the weight, that give the product; `expected` is their float64 result."""

    impl: str
    scheme: str
    calls: list[Call]
    expected: Tensor


def floor(
    scheme: Scheme | None,
    packed: PackedWeight | None,
    n: int,
    k: int,
    m: int,
    rates: dict[str, float],
    width: int | None = None,
) -> float:
    """Microseconds that no kernel stays below: `ceilings` for what must be moved and multiplied.

    Args:
        scheme, packed: of the weight, in the logical layout; None for one in bfloat16.
        width: columns of the output; by default N.
    """
    weight = 2.0 * n * k if packed is None else packed.nbytes
    if packed is not None and packed.scheme.sparsity is not None:
        weight -= packed.codes.numel() * (1 - packed.scheme.stored_bits / packed.scheme.format.bits)
    moved = weight + 2 * m * ((width or n) + k)
    rate = rates["8-bit" if scheme is not None and scheme.activation is not None else "16-bit"]
    return 1e6 * max(moved / rates["memory"], 2 * m * n * k / rate)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float64."""
    return torch.mm(x.to(torch.float64), weight.to(torch.float64).t())


@torch.compile(dynamic=False)
def quantize_by_inductor(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scales [M, 1], as graphs have them where no kernel of ours quantizes."""
    return quantize_activation(x, scheme)


def _quantized(x: Tensor, scheme: ActivationScheme | None, by: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """What x [M, K] is as codes and scales."""
    return x if scheme is None else dequantize_activation(*by(x, scheme), scheme)


@torch.compile(dynamic=False)
def scale_product(y: Tensor, x_scale: Tensor, scale: Tensor) -> Tensor:
    """An int32 product [M, N], times its scales [M, 1] and [1, N], in bfloat16."""
    return (y.to(torch.float32) * x_scale * scale).to(torch.bfloat16)


def _bfloat16(x: Tensor, weight: Tensor) -> Candidate:
    """cuBLAS, or oneDNN on CPUs."""
    weight = weight.to(torch.bfloat16)
    calls: list[Call] = [lambda w=w: F.linear(x, w) for (w,) in copies(x.device, weight)]  # type: ignore[misc]
    return Candidate(*PLAIN, calls, product(x, weight))


def laid_out(scheme: Scheme, packed: PackedWeight) -> PackedWeight:
    """A weight in the layout of its device's kernel."""
    return to_layout(packed, choose_layout(scheme, packed.shape, packed.device.type))


def _ours(name: str, scheme: Scheme, x: Tensor, weight: PackedWeight, expected: Tensor, *steps: str) -> Candidate:
    """What a linear runs in a compiled graph: quantization, if any, and, on GPUs, what `runtime/tuning.py` chooses.

    Args:
        weight: `laid_out`.
    """
    n, k = weight.shape
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=weight.layout, epilogue=steps)
    text = spec.encode()

    def call(weight: tuple[Tensor, ...]) -> Tensor:
        if x.device.type == "cpu":
            if steps:
                y: Tensor = torch.ops.qcompile.linear(x, list(weight), None, None, None, [], text)
            else:  # what compiled graphs call
                y = torch.ops.qcompile.gemm_cpu(x, None, list(weight), text)
            return y
        from qcompile.runtime import gpu

        rows, x_scale = (x, None) if scheme.activation is None else quantize(x, scheme.activation)
        return gpu.gemm(rows, x_scale, list(weight), None, [], spec, torch.bfloat16)

    calls: list[Call] = [lambda w=w: call(w) for w in copies(x.device, *weight.tensors)]  # type: ignore[misc]
    return Candidate(OURS, name, calls, expected)


@torch.compile(dynamic=False)
def gate_halves(y: Tensor) -> Tensor:
    """silu(a) * b of the halves a, b of the columns of y [M, N]: [M, N / 2]."""
    a, b = y.chunk(2, -1)
    return F.silu(a) * b


def gate_candidates(
    name: str, scheme: Scheme, x: Tensor, weight: PackedWeight, expected: Tensor
) -> Iterator[Candidate]:
    """Gate and up as one product that multiplies its halves itself, and as one with a kernel of Inductor's after it.

    Args:
        weight: `laid_out`.
        expected: float64 silu(a) * b.
    """
    within = _ours(name, scheme, x, weight, expected, "silu(a)*b")
    yield replace(within, impl=f"{OURS}, gate in the product")
    apart = _ours(name, scheme, x, weight, expected)
    calls: list[Call] = [lambda call=call: gate_halves(call()) for call in apart.calls]  # type: ignore[misc]
    yield replace(apart, impl=f"{OURS}, gate apart", calls=calls)


def _tinygemm(name: str, x: Tensor, packed: PackedWeight, expected: Tensor) -> Candidate:
    """torch's int4 kernel: codes minus 8, times the scale, plus a zero point that is 0 here."""
    codes = packed.unpack_codes()
    scale = packed.scale.t().to(torch.bfloat16)
    scale = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    group = packed.scheme.granularity.columns
    aten = torch.ops.aten
    if x.device.type == "cpu":
        pairs, multiply = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8), aten._weight_int4pack_mm_for_cpu
    else:
        halves = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        pairs, multiply = aten._convert_weight_to_int4pack(halves, 8), aten._weight_int4pack_mm
    weights = copies(x.device, pairs, scale)
    calls: list[Call] = [lambda w=w, s=s: multiply(x, w, group, s) for w, s in weights]  # type: ignore[misc]
    return Candidate("_weight_int4pack_mm", name, calls, expected)


def _int8_weights(name: str, x: Tensor, packed: PackedWeight, expected: Tensor) -> Candidate:
    """torch's product with int8 weights, on CPUs."""
    codes = LAYOUTS["rows8"].pack(packed).codes
    weights = copies(x.device, codes, packed.scale.reshape(-1).to(torch.bfloat16))
    multiply = torch.ops.aten._weight_int8pack_mm
    calls: list[Call] = [lambda w=w, s=s: multiply(x, w, s) for w, s in weights]  # type: ignore[misc]
    return Candidate("_weight_int8pack_mm", name, calls, expected)


def _scaled_mm(
    name: str, x: Tensor, packed: PackedWeight, activation: ActivationScheme, expected: Tensor, fast: bool
) -> Candidate:
    """cuBLAS or CUTLASS, as torch chooses; `fast` adds products with few bits."""

    def call(codes: Tensor, scale: Tensor) -> Tensor:
        rows, x_scale = quantize_by_inductor(x, activation)
        return torch._scaled_mm(rows, codes.t(), x_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)

    laid_out = LAYOUTS["rows8"].pack(packed)
    weights = copies(x.device, laid_out.codes, laid_out.scale)
    calls: list[Call] = [lambda w=w: call(*w) for w in weights]  # type: ignore[misc]
    return Candidate("_scaled_mm, fast accumulation" if fast else "_scaled_mm", name, calls, expected)


def _int_mm(name: str, x: Tensor, packed: PackedWeight, activation: ActivationScheme, expected: Tensor) -> Candidate:
    """torch's int8 product, which on GPUs takes more than 16 rows, and its scales in a kernel of Inductor's."""

    def call(codes: Tensor, scale: Tensor) -> Tensor:
        rows, x_scale = quantize_by_inductor(x, activation)
        return scale_product(torch._int_mm(rows, codes.t()), x_scale, scale.t())

    laid_out = LAYOUTS["rows8"].pack(packed)
    weights = copies(x.device, laid_out.codes, laid_out.scale)
    calls: list[Call] = [lambda w=w: call(*w) for w in weights]  # type: ignore[misc]
    return Candidate("_int_mm", name, calls, expected)


def _of_torch(name: str, scheme: Scheme, x: Tensor, packed: PackedWeight, expected: Tensor) -> Iterator[Candidate]:
    """torch's own kernels for a scheme, on this device."""
    weight, activation, gpu = scheme.weight, scheme.activation, x.device.type == "cuda"
    group, (n, k) = weight.granularity.columns, packed.shape
    rows = weight.granularity.rows == 1 and weight.symmetric and not weight.offset and weight.super_scale is None
    whole = rows and not (isinstance(group, int) and 0 < group < k)
    if weight.sparsity is not None:
        return
    if weight.format.name == "int4" and activation is None and rows and group in (32, 64, 128, 256):
        if n % (64 if gpu else 16) == 0 and k % 128 == 0:
            yield _tinygemm(name, x, packed, expected)
    elif weight.format.name == "int8" and whole and activation is None and not gpu:
        yield _int8_weights(name, x, packed, expected)
    elif activation is not None and whole and activation.dynamic and activation.format.name == weight.format.name:
        if weight.format.name == "fp8_e4m3" and gpu and n % 16 == 0 and k % 16 == 0:
            for fast in (False, True):
                yield _scaled_mm(name, x, packed, activation, expected, fast)
        elif weight.format.name == "int8" and (len(x) > 16 or not gpu) and n % 8 == 0 and k % 8 == 0:
            yield _int_mm(name, x, packed, activation, expected)


def candidates(
    x: Tensor, weight: Tensor, schemes: dict[str, Scheme], packed: dict[str, tuple[PackedWeight, PackedWeight]]
) -> Iterator[Candidate]:
    """Plain, then ours and torch's for each scheme; one after another, so that only one's copies are in memory.

    Args:
        packed: each weight in the logical layout, and `laid_out`.
    """
    yield _bfloat16(x, weight)
    for name, (quantized, own) in packed.items():
        activation, decoded = schemes[name].activation, dequantize(quantized)
        # Ours and Inductor's scales may differ in their last bit, and then codes of numbers in the middle of two do.
        expected = product(_quantized(x, activation, quantize), decoded)
        yield _ours(name, schemes[name], x, own, expected)
        if activation is not None:
            expected = product(_quantized(x, activation, quantize_by_inductor), decoded)
        yield from _of_torch(name, schemes[name], x, quantized, expected)


def measure(
    n: int, k: int, tokens: list[int], schemes: dict[str, Scheme], rates: dict[str, float], device: torch.device
) -> Iterator[Row]:
    """One row for each number of tokens and candidate; weights and activations are random.

    Args:
        schemes: by the names that rows have; each fits N and K.
        rates: of `timing.ceilings`.

    Raises:
        AssertionError: a result of ours is wrong.
    """
    compat.allow_recompilations(64 * len(tokens) * (1 + len(schemes)))
    weight = torch.randn(n, k, device=device) / k**0.5
    quantized = {name: quantize_weight(weight, scheme.weight) for name, scheme in schemes.items()}
    packed = {name: (logical, laid_out(schemes[name], logical)) for name, logical in quantized.items()}
    limits = {name: limit(logical) for name, logical in quantized.items()}
    for m in tokens:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        for candidate in candidates(x, weight, schemes, packed):
            expected = candidate.expected
            error = float((candidate.calls[0]().to(torch.float64) - expected).norm() / expected.norm())
            right = candidate.impl != OURS or error <= limits[candidate.scheme]
            assert right, f"{candidate.scheme} {n}x{k} M={m}: error {error:.2g}"
            least = floor(schemes.get(candidate.scheme), quantized.get(candidate.scheme), n, k, m, rates)
            yield _row("linear", candidate, n, k, m, device, error, least)


def _row(
    bench: str, candidate: Candidate, n: int, k: int, m: int, device: torch.device, error: float, least: float
) -> Row:
    return {
        "bench": bench,
        "impl": candidate.impl,
        "scheme": candidate.scheme,
        "N": n,
        "K": k,
        "M": m,
        "us": round(microseconds(candidate.calls, device), 2),
        "error": float(f"{error:.3g}"),
        "floor_us": round(least, 2),
    }


def measure_gate(
    n: int, k: int, tokens: list[int], schemes: dict[str, Scheme], rates: dict[str, float], device: torch.device
) -> Iterator[Row]:
    """Rows of `gate_candidates`, otherwise as `measure`; N are the rows of gate and up together.

    Raises:
        AssertionError: a result is wrong.
    """
    compat.allow_recompilations(64 * len(tokens) * (1 + len(schemes)))
    weight = torch.randn(n, k, device=device) / k**0.5
    for name, scheme in schemes.items():
        packed = quantize_weight(weight, scheme.weight)
        own, most = laid_out(scheme, packed), limit(packed)
        for m in tokens:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            a, b = product(_quantized(x, scheme.activation, quantize), dequantize(packed)).chunk(2, -1)
            for candidate in gate_candidates(name, scheme, x, own, F.silu(a) * b):
                expected = candidate.expected
                error = float((candidate.calls[0]().to(torch.float64) - expected).norm() / expected.norm())
                assert error <= most, f"{candidate.impl} {name} {n}x{k} M={m}: error {error:.2g}"
                least = floor(scheme, packed, n, k, m, rates, width=n // 2)
                yield _row("gate", candidate, n, k, m, device, error, least)
