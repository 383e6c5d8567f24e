"""Quantized products on CPUs: a generated C++ kernel for every packed weight in layout `rows16`.

| weights, activations                   | few rows of x (M)                | more rows                               |
| -------------------------------------- | -------------------------------- | --------------------------------------- |
| `rows16`, integers on both sides (1)   | integers, generated              | the same, or others' way (2)            |
| `rows16`, whole numbers, x bfloat16    | integers, generated (3)          | as all others                           |
| `rows16`, all others                   | generated, to M = FEW_ROWS       | generated decoder + mm; with a matrix   |
|                                        |                                  | unit and bfloat16 the generated kernel  |
| other layouts, or no C++ compiler      | torch decodes + mm               | the same                                |

(1) int8 activations, and codes that stand for whole numbers (`layouts.multiplies_integers`). The kernel itself rounds x
where scales are dynamic, of rows or of groups. Integers are multiplied, and what the sum of at most 1024 columns of a
group stands for is added up in float32.
(2) above FEW_ROWS int8 codes + aten's mm, for int8 weights with one scale a row or tensor on both sides, on processors
without products of bytes; and as all others, for groups of 16 columns where floats are multiplied by the matrix unit.
(3) on processors with products of bytes. Each number of x becomes three int8, 23 bits below the greatest of its group:
what is above 2^-14 of that is exact, and the rest is off by 2^-23 of it at most. Products of bytes take fewer
instructions than those of floats, and codes need no decoding for them.

The other generated kernel multiplies x by codes and applies a group's scale, zero point and offset to the sum in
float32. In bfloat16 integers of fewer than 8 bits stand in the mantissa as they are, c of b bits as 1 + c / 2^b, and
the sum of x takes the 1 off. "Decode + mm" decodes a few hundred rows of the weight at a time into a buffer that stays
in the cache and multiplies by them, so a weight is never held whole in a wide dtype; scale and offset are combined in
float32 before the weight is rounded. Both multiply bfloat16, for bfloat16 and quantized activations, or float32, for
float32 and float16. Sums are float32; products of bfloat16 are rounded to it, and those of quantized activations where
the weight is decoded first. Where the processor has no bfloat16 products the kernel for few rows multiplies float32.
Quantized activations enter as exact codes, except those with a scale a group, which are rounded to bfloat16.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.codegen.cpp import ISAS, cpp_spec
from qcompile.errors import DeviceError
from qcompile.formats.whole import whole_numbers
from qcompile.layouts import LAYOUTS, integer_product, multiplies_integers
from qcompile.linear_spec import LinearSpec, decode_spec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation, quantize_activation
from qcompile.runtime import attention_cpu, cpp, cpu_operators
from qcompile.scheme import Granularity

FEW_ROWS = 32
"""Largest M of the generated kernel: its time grows with M while decoding costs the same for any."""

ANY_ROWS = 1 << 62

WEIGHTS_PER_THREAD = 1 << 15
"""Fewer are multiplied sooner than another thread starts."""

BUFFER_ELEMENTS = 1 << 20
"""Weights decoded at a time: 2 MB of bfloat16."""


def kernel_name(spec: LinearSpec) -> str:
    """What multiplies by a weight of this spec, for reports."""
    if spec.layout == "rows16" and cpp.compiler() is not None:
        if _integers(spec):
            more = ", int8 mm" if integer_product(spec.scheme, spec.shape) and not _dots_bytes() else ""
            return f"C++ for {cpp.isa()}, integers" + more + (f" above M = {FEW_ROWS}" if more else "")
        more = "int8 mm" if integer_product(spec.scheme, spec.shape) else "mm"
        half = " (but bfloat16)" if "amx_bf16" in ISAS[cpp.isa()] else ""
        return f"C++ for {cpp.isa()}, decode + {more} above M = {FEW_ROWS}{half}"
    return "torch decode + mm" + (" (no C++ compiler)" if spec.layout == "rows16" else "")


def product(x: Tensor, x_scale: Tensor | None, weight: list[Tensor], parsed: LinearSpec) -> Tensor:
    """x [M, K] (8-bit codes if `x_scale` is given) times the packed weight: float32 [M, N], or x's bfloat16.

    Plain ATen but for `qcompile::gemm_cpu`, so a compiler fuses the scales with the epilogue.

    Args:
        x: floating point also where the scheme quantizes activations, if the product does that (`quantizes`).

    Raises:
        DeviceError: a weight laid out for GPUs.
    """
    if parsed.layout in ("fragment", "fragment24"):
        raise DeviceError(
            f"weights in layout {parsed.layout} are for GPUs; move the module with .to('cpu'), which lays them out anew"
        )
    activation, inner = parsed.scheme.activation, None
    if x_scale is not None:
        assert activation is not None
        if activation.granularity.is_group and _integers(parsed):
            x_scale, inner = None, x_scale
        elif activation.granularity.is_group:
            x, x_scale = dequantize_activation(x, x_scale, activation).to(torch.bfloat16), None
    y = torch.ops.qcompile.gemm_cpu(x, inner, weight, parsed.encode())
    return y if x_scale is None else y.to(torch.float32) * x_scale


def quantizes(spec: LinearSpec) -> bool:
    """Whether `product` takes activations as they are and quantizes them itself: to int8, by rows or groups."""
    activation = spec.scheme.activation
    return activation is not None and activation.dynamic and activation.granularity.rows == 1 and _integers(spec)


def _dots_bytes() -> bool:
    """Whether the processor has products of bytes that do not saturate, in one instruction."""
    return not {"avx512_vnni", "avx_vnni", "asimddp"}.isdisjoint(ISAS[cpp.isa()])


def _integers(spec: LinearSpec) -> bool:
    return spec.layout == "rows16" and multiplies_integers(spec.scheme)


def gemm(x: Tensor, x_scale: Tensor | None, weight: list[Tensor], spec: str) -> Tensor:
    """x [M, K], floating point or codes of 8 bits, times the packed weight of a spec, as `LinearSpec.encode` writes it.

    Args:
        x: floating point is quantized as the scheme says; the scale of codes is the caller's to apply, except
        x_scale: float32 [M, groups] of codes with a scale a group.

    Returns:
        [M, N] in bfloat16 if x is, else in float32.
    """
    linear = _linear(spec)
    linear.tell(spec, x.dtype)
    m, dtype = x.shape[0], torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if m == 0:
        return x.new_empty((0, linear.spec.out_features), dtype=dtype)
    if (kernel := linear.integers(dtype, m) or linear.limbs(x.dtype, m)) is not None:
        return _integer_product(x, x_scale, weight, linear, kernel)
    activation = linear.spec.scheme.activation
    if activation is not None and x.element_size() > 1:
        x, x_scale = quantize_activation(x, activation)
    if x_scale is not None and activation is not None and activation.granularity.is_group:
        x, x_scale = dequantize_activation(x, x_scale, activation).to(torch.bfloat16), None
    y = _product(x, weight, linear)
    return (y if x_scale is None else y * x_scale).to(dtype)


def prepare(spec: str, dtype: torch.dtype) -> None:
    """Build and load the kernels for x of a type, which a call otherwise does; may run beside other threads."""
    linear, result = _linear(spec), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    floating = linear.spec.scheme.activation is None
    if linear.integers(result, 1) is None:
        linear.few(result if floating else torch.bfloat16)
    if floating:
        linear.limbs(dtype, 1)
    cpu_operators.build()


def _product(x: Tensor, weight: list[Tensor], linear: _Linear) -> Tensor:
    """x [M, K], whose quantization is done, times the weight: float32 or bfloat16."""
    m = x.shape[0]
    # Codes of 8 bits are bfloat16 exactly.
    multiplied = torch.bfloat16 if x.element_size() == 1 or x.dtype == torch.bfloat16 else torch.float32
    if (kernel := linear.direct(multiplied, m)) is not None:
        return _generated(x, weight, linear, kernel)
    exact = x.dtype == torch.int8 and integer_product(linear.spec.scheme, linear.spec.shape)
    if exact and (kernel := linear.kernel(multiplied)) is not None:
        return _decode_int8_mm(x, weight, linear, kernel)
    return _decode_mm(x.to(multiplied), weight, linear)


class _Linear:
    """What a spec's calls share."""

    def __init__(self, spec: LinearSpec) -> None:
        weight = spec.scheme.weight
        self.spec = spec
        self.kernels: dict[tuple[torch.dtype, bool, bool], cpp.Kernel | None] = {}
        self.told: set[torch.dtype] = set()
        self.columns = weight.granularity.block_of((1, -(-spec.in_features // 32) * 32))[1]
        above = spec.in_features if weight.super_scale is None else weight.super_scale.columns
        self.super_columns = self.columns * spec.in_features if above == -1 else above
        names = [name for name, *_ in cpp.Weight._fields_[:6]]
        self.indices = [(name, weight.fields.index(name)) for name in names if name in weight.fields]

    def kernel(self, dtype: torch.dtype, *, integers: bool = False, limbs: bool = False) -> cpp.Kernel | None:
        """For x and decoded weights of this type, or one that multiplies integers; None if there is none."""
        key = (dtype, integers, limbs)
        if key not in self.kernels:
            there = self.spec.layout == "rows16"
            wanted = cpp_spec(self.spec, dtype, cpp.isa(), integers=integers, limbs=limbs) if there else None
            self.kernels[key] = None if wanted is None else cpp.load(wanted)
        return self.kernels[key]

    @functools.cached_property
    def limb_rows(self) -> int:
        """The most rows of bfloat16 x whose product as three integers each is the fastest; 0 if there is none."""
        weight = self.spec.scheme.weight
        floats = self.spec.layout == "rows16" and self.spec.scheme.activation is None
        if not floats or not _dots_bytes() or whole_numbers(weight.format.name) is None:
            return 0
        if "amx_int8" in ISAS[cpp.isa()] and weight.format.bits == 8 and self.columns >= 128:
            return 8
        return 1 if "amx_bf16" in ISAS[cpp.isa()] or self.columns < 128 else 2

    def limbs(self, dtype: torch.dtype, m: int) -> cpp.Kernel | None:
        """The kernel that multiplies `m` rows of x, which are not quantized, as integers where that is the fastest."""
        return self.kernel(dtype, limbs=True) if dtype == torch.bfloat16 and m <= self.limb_rows else None

    @functools.cached_property
    def integer_rows(self) -> int:
        """The most rows of x for which a product of integers is the fastest; 0 if there is none."""
        if not _integers(self.spec):
            return 0
        if "amx_int8" in ISAS[cpp.isa()]:
            return ANY_ROWS if self.columns >= 32 else FEW_ROWS
        by_torch = integer_product(self.spec.scheme, self.spec.shape) and not _dots_bytes()
        return FEW_ROWS if by_torch else ANY_ROWS

    def integers(self, dtype: torch.dtype, m: int) -> cpp.Kernel | None:
        """The kernel that rounds `m` rows of x and multiplies integers, where that is the fastest."""
        return self.kernel(dtype, integers=True) if m <= self.integer_rows else None

    def few(self, dtype: torch.dtype) -> tuple[cpp.Kernel | None, int]:
        """The kernel that multiplies few rows of x of this type faster than decoding does, and how many those are.

        It takes float32 where the processor has no products of bfloat16.
        """
        found = self.kernel(dtype)
        if found is not None and dtype == torch.bfloat16:
            features = ISAS[found.spec.isa]
            if "amx_bf16" in features:
                return found, ANY_ROWS
            if "avx512_bf16" not in features:
                found = self.kernel(torch.float32)
        return found, FEW_ROWS

    def direct(self, dtype: torch.dtype, m: int) -> cpp.Kernel | None:
        """The kernel for `m` rows of x; None if decoding is faster."""
        found, rows = self.few(dtype)
        return found if m <= rows else None

    def tell(self, spec: str, dtype: torch.dtype) -> None:
        """Let the operator of C++ know the kernel for x of this type, the next time that it is called."""
        if dtype in self.told:
            return
        self.told.add(dtype)
        result = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        found: list[tuple[cpp.Kernel | None, int]] = []
        if self.integer_rows:
            found = [(self.integers(result, 1), self.integer_rows)]
        elif self.spec.scheme.activation is None:
            found = [(self.limbs(dtype, 1), self.limb_rows), self.few(result)]
        kernels = [(kernel, rows) for kernel, rows in found if kernel is not None]
        if kernels:
            places = dict(self.indices)
            indices = [places.get(name, -1) for name, *_ in cpp.Weight._fields_[:6]]
            cpu_operators.add_linear(spec, dtype, kernels, self.threads, self.weight(None), indices)

    @property
    def threads(self) -> int:
        """That are worth their start."""
        n, k = self.spec.shape
        return max(1, n * k // WEIGHTS_PER_THREAD)

    def weight(self, tensors: list[Tensor] | None) -> cpp.Weight:
        """The kernel's view of the weight's tensors; None leaves addresses out."""
        addresses = {} if tensors is None else {name: tensors[index].data_ptr() for name, index in self.indices}
        n, k = self.spec.shape
        return cpp.Weight(**addresses, n=n, k=k, columns=self.columns, super_columns=self.super_columns)


@functools.lru_cache(maxsize=4096)
def _linear(spec: str) -> _Linear:
    return _Linear(decode_spec(spec))


def forget_kernels() -> None:
    """Have kernels chosen anew, where `flags.cpu_isa` has changed; no product may be under way."""
    _linear.cache_clear()
    attention_cpu.kernel_of.cache_clear()
    cpu_operators.forget_kernels()


def _generated(x: Tensor, tensors: list[Tensor], linear: _Linear, kernel: cpp.Kernel) -> Tensor:
    """float32 [M, N]."""
    m, k = x.shape
    x = x.to(torch.bfloat16 if kernel.spec.element == "bfloat16" else torch.float32)
    x = F.pad(x, (0, -k % 32)) if k % 32 else x.contiguous()
    n, stride = linear.spec.out_features, x.shape[1]
    y = torch.empty(m, n)
    scratch = torch.empty(max(m, 16) * (stride - (-k // linear.columns)))
    threads = min(torch.get_num_threads(), linear.threads)
    weight = linear.weight(tensors)
    kernel.gemm(x.data_ptr(), m, stride, weight, scratch.data_ptr(), y.data_ptr(), 0, threads)
    return y


def _integer_product(
    x: Tensor, x_scale: Tensor | None, tensors: list[Tensor], linear: _Linear, kernel: cpp.Kernel
) -> Tensor:
    """[M, N] of the kernel's type, of x that it quantizes or of codes."""
    m, k = x.shape
    codes = x.dtype == torch.int8
    x = x if codes or x.dtype == torch.bfloat16 else x.to(torch.float32)
    x = F.pad(x, (0, -k % 32)) if k % 32 else x.contiguous()
    n, stride = linear.spec.out_features, x.shape[1]
    y = torch.empty(m, n, dtype=torch.bfloat16 if kernel.spec.element == "bfloat16" else torch.float32)
    threads = min(torch.get_num_threads(), linear.threads)
    weight = linear.weight(tensors)
    scratch = torch.empty(kernel.scratch_bytes(weight, m, threads), dtype=torch.uint8)
    given_scale = None if x_scale is None else x_scale.contiguous()
    kernel.gemm(
        None if codes else x.data_ptr(),
        x.data_ptr() if codes else None,
        None if given_scale is None else given_scale.data_ptr(),
        m,
        stride,
        weight,
        scratch.data_ptr(),
        y.data_ptr(),
        threads,
    )
    return y


def _decode_mm(x: Tensor, tensors: list[Tensor], linear: _Linear) -> Tensor:
    n, k = linear.spec.shape
    kernel = linear.kernel(x.dtype)
    tile = LAYOUTS[linear.spec.layout].tile
    step = max(64, BUFFER_ELEMENTS // k // 64 * 64)
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    if kernel is None:
        for first in range(0, n, step):
            rows = dequantize(_rows(tensors, linear.spec, first, min(first + step, n))).to(x.dtype)
            torch.mm(x, rows.t(), out=y[:, first : first + step])
        return y
    weight, threads = linear.weight(tensors), torch.get_num_threads()
    buffer = torch.empty(min(step, n + -n % tile) * k, dtype=x.dtype)
    for first in range(0, n, step):
        count = min(step, n + -n % tile - first)
        columns = buffer[: k * count].view(k, count)
        kernel.decode(weight, first, count, columns.data_ptr(), threads)
        part = y[:, first : first + count]
        torch.mm(x, columns[:, : part.shape[1]], out=part)
    return y


def _decode_int8_mm(x: Tensor, tensors: list[Tensor], linear: _Linear, kernel: cpp.Kernel) -> Tensor:
    """Codes times codes, then the scale of each row of the weight: float32."""
    n, k = linear.spec.shape
    padded = n + -n % LAYOUTS[linear.spec.layout].tile
    step = max(64, 2 * BUFFER_ELEMENTS // k // 64 * 64)
    y = torch.empty(x.shape[0], n)
    weight, scale = linear.weight(tensors), tensors[1].reshape(-1).to(torch.float32)
    buffer = torch.empty(min(step, padded) * k, dtype=torch.int8)
    for first in range(0, n, step):
        count = min(step, padded - first)
        columns = buffer[: k * count].view(k, count)
        kernel.decode_int8(weight, first, count, columns.data_ptr(), torch.get_num_threads())
        part = y[:, first : first + count]
        sums = torch._int_mm(x, columns)[:, : part.shape[1]]
        torch.mul(sums, scale[first : first + part.shape[1]], out=part)
    return y


def _rows(tensors: list[Tensor], spec: LinearSpec, first: int, end: int) -> PackedWeight:
    """Rows `first` to `end` of a weight in any layout: in the logical one, with a scale of its own each."""
    layout, scheme = LAYOUTS[spec.layout], spec.scheme.weight
    rows, columns = scheme.granularity.block_of(spec.shape)
    index = torch.arange(first, end) // rows
    single = replace(scheme, granularity=Granularity(1, columns), act_order=False)

    def part(name: str, tensor: Tensor) -> Tensor:
        if layout.tile > 1 or name == "codes" or name.startswith("super"):
            return tensor[first // layout.tile : -(-end // layout.tile)]
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        return raw[index].view(tensor.dtype)

    named = [part(name, tensor) for name, tensor in zip(scheme.fields, tensors, strict=True) if name != "perm"]
    packed = PackedWeight.from_tensors(named, (end - first, spec.in_features), single, spec.layout)
    return layout.unpack(packed)
