"""Products of integers on CPUs: bit for bit where sums are exact, else within what float32 loses, for all processors.

Kernels of INTEGERS are built, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile import ops  # noqa: F401  (registers the operators)
from qcompile.flags import override
from qcompile.formats import FORMATS, get_format
from qcompile.layouts import LAYOUTS, choose_layout, multiplies_integers, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.reference import dequantize_activation, quantize_activation, quantize_weight
from qcompile.runtime import cpp, cpu
from qcompile.scheme import ActivationScheme, Granularity, Scheme
from qcompile.scheme_config import parse_scheme
from tests import oracle, tolerance

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler")


def _activation(name: str, *, group: bool) -> Scheme:
    """A preset with int8 activations: a scale a row, or one for each of the weight's groups."""
    weight = PRESETS[name].weight
    granularity = weight.granularity if group else Granularity.channel()
    return Scheme(weight=weight, activation=ActivationScheme(format=get_format("int8"), granularity=granularity))


INTEGERS: dict[str, Scheme] = {
    "int8": PRESETS["int8"],
    "int4_int8": PRESETS["int4_int8"],
    "uint5 zero point": parse_scheme(
        {"weight": {"format": "int5", "symmetric": False, "group_size": 64}, "activation": {"format": "int8"}}
    ),
    "uint8 zero point": parse_scheme(
        {"weight": {"format": "int8", "symmetric": False, "group_size": 32}, "activation": {"format": "int8"}}
    ),
    "q4_k": _activation("q4_k", group=True),
    "q6_k": _activation("q6_k", group=True),
    "q5_1": _activation("q5_1", group=False),
    "iq4_nl": _activation("iq4_nl", group=True),
    "mxfp4": _activation("mxfp4", group=True),
}
"""Every part of the template: codes of 8 bits and fewer, planes, tables, zero points, offsets, super scales, groups."""

OTHER_ISAS = ("int8", "q4_k")
"""Of which lesser instruction sets have a kernel each: codes of 8 bits and of fewer, a scale a row and a group."""


class Layer:
    """A packed weight in the layout for CPUs and its spec."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        self.scheme = scheme.fit("layer", shape)
        self.logical = quantize_weight(torch.randn(shape), self.scheme.weight)
        self.spec = LinearSpec(in_features=shape[1], out_features=shape[0], scheme=self.scheme, layout="rows16")
        assert choose_layout(self.scheme, shape, "cpu").name == "rows16"

    @property
    def activation(self) -> ActivationScheme:
        assert self.scheme.activation is not None
        return self.scheme.activation

    def product(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        packed = to_layout(self.logical, LAYOUTS["rows16"])
        return cpu.product(x, x_scale, list(packed.tensors), self.spec)

    @property
    def integer_rows(self) -> int:
        return cpu._linear(self.spec.encode()).integer_rows

    def kernel(self) -> cpp.Kernel:
        found = cpu._linear(self.spec.encode()).integers(torch.float32, 1)
        assert found is not None
        return found

    def check(self, x: Tensor) -> None:
        """Within what float32 sums lose, of the very codes that the reference rounds x to."""
        y = self.product(x)
        codes, scale = quantize_activation(x, self.activation)
        rounded = dequantize_activation(codes.double(), scale.double(), self.activation)
        weight = oracle.dequantize(self.logical)
        out_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        bound = tolerance.gemm_bound(rounded, weight, torch.float64, torch.float32)
        if len(x) > self.integer_rows:  # then floating point is faster
            bound = tolerance.gemm_bound(rounded, weight, torch.bfloat16, torch.bfloat16)
        if self.logical.offset is not None:
            scaled = oracle.dequantize(replace(self.logical, offset=torch.zeros_like(self.logical.offset)))
            bound = bound + tolerance.offset_bound(rounded, scaled, weight - scaled)
        exact = oracle.linear(rounded, weight)
        assert y.dtype == out_dtype
        tolerance.assert_within(y, exact, bound + tolerance.rounding(exact.abs() + bound, out_dtype))

    def check_exactly(self, x: Tensor) -> None:
        """The kernel rounds x as the reference does, and with scales of 1 nothing else is rounded."""
        codes, scale = quantize_activation(x.to(torch.float32), self.activation)
        assert torch.equal(self.product(x.to(torch.float32)), self.product(codes, scale))
        ones = Layer.__new__(Layer)
        ones.scheme, ones.spec, ones.logical = self.scheme, self.spec, self.logical.map(_ones)
        unit = torch.ones_like(scale)
        weight = oracle.dequantize(ones.logical)
        assert torch.equal(ones.product(codes, unit).double(), oracle.linear(codes.double(), weight))


def _ones(name: str, values: Tensor) -> Tensor:
    if name.endswith("offset"):
        return torch.full_like(values, -1 if values.is_floating_point() else 1)
    return torch.ones_like(values) if name.endswith("scale") else values


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels for one instruction set."""
    with override(cpu_isa=request.param):
        cpu.forget_kernels()
        yield request.param
    cpu.forget_kernels()


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    layer = Layer(INTEGERS[name], (96, 256))
    assert layer.kernel().spec.isa == cpp.isa()
    for m in (1, 2, 4, 5, 17, 40):
        x = torch.randn(m, 256)
        layer.check(x)
        layer.check(x.to(torch.bfloat16))
        if m <= layer.integer_rows:
            layer.check_exactly(x)


@pytest.mark.parametrize("name", OTHER_ISAS)
@pytest.mark.parametrize("isa", cpp.available()[1:], indirect=True)
def test_other_instruction_sets(isa: str, name: str) -> None:
    layer = Layer(INTEGERS[name], (96, 256))
    assert layer.kernel().spec.isa == isa
    for m in (1, 3, 14):
        layer.check(torch.randn(m, 256))
        layer.check_exactly(torch.randn(m, 256))


@pytest.mark.parametrize(
    "isa", [name for name in cpp.available() if name in ("amx", "avx2", "portable")], indirect=True
)
def test_the_greatest_codes_do_not_saturate(isa: str) -> None:
    """Pairs of products of the greatest codes are beyond 16 bits; those of 127 and 128 are not."""
    for name in ("int8", "uint5 zero point"):
        layer = Layer(INTEGERS[name], (96, 256))
        greatest = torch.full((96, 256), 2**layer.scheme.weight.format.bits - 1).to(torch.uint8)
        zero = None if layer.logical.zero_point is None else torch.zeros_like(layer.logical.zero_point)
        layer.logical = PackedWeight.from_codes(
            greatest, torch.ones_like(layer.logical.scale), zero, layer.scheme.weight
        )
        for code in (-128, 127):
            codes = torch.full((3, 256), code, dtype=torch.int8)
            y = layer.product(codes, torch.ones(3, 1))
            assert torch.equal(y.double(), oracle.linear(codes.double(), oracle.dequantize(layer.logical)))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["int8", "int4_int8", "q4_k", "q6_k"]),
    m=st.integers(1, 70),
    n=st.integers(1, 300),
    runs=st.integers(1, 40),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_shapes(name: str, m: int, n: int, runs: int, threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = 256 * -(-runs // 4) if name in ("q4_k", "q6_k") else 32 * runs + (n % 32 if name == "int8" else 0)
    layer, before = Layer(INTEGERS[name], (n, k)), torch.get_num_threads()
    x = torch.randn(m, k)
    try:
        torch.set_num_threads(threads)
        layer.check(x)
        assert torch.equal(layer.product(x), layer.product(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["int4_int8", "q4_k"])
def test_rows_that_are_zero_or_not_finite(name: str) -> None:
    layer = Layer(INTEGERS[name], (96, 256))
    x = torch.randn(6, 256)
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0, torch.nan, torch.inf, -torch.inf
    for rows in (x, x[:4], x[1:2], x.to(torch.bfloat16)):
        y = layer.product(rows)
        finite = rows.isfinite().all(1)
        assert not y[~finite].isfinite().any(1).all() or not y[~finite].isfinite().any()
        assert y[finite].isfinite().all()
    assert not layer.product(x)[0].any() or layer.logical.offset is not None
    layer.check(x[4:])


def test_which_schemes_multiply_integers() -> None:
    int8 = ActivationScheme(format=get_format("int8"), granularity=Granularity.channel())
    found = {
        name
        for name, fmt in FORMATS.items()
        if multiplies_integers(
            Scheme(weight=replace(PRESETS["nf4"].weight, format=fmt, symmetric="uint" not in name), activation=int8)
        )
    }
    assert found == {f"{kind}{bits}" for kind in ("int", "uint") for bits in range(2, 9)} | {"iq4_nl", "fp4_e2m1"}
    assert not multiplies_integers(PRESETS["int4"])
    assert not multiplies_integers(PRESETS["int4_fp8"])
