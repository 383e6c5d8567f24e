"""Products on CPUs against the float64 oracle of their own codes, and bit for bit where no rounding can happen.

Every scheme runs as torch decodes it, without a compiler; those of GENERATED have kernels built, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile import ops  # noqa: F401  (registers the operators)
from qcompile.flags import override
from qcompile.formats import FORMATS
from qcompile.layouts import choose_layout, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.reference import dequantize_activation, quantize_activation, quantize_weight
from qcompile.runtime import cpp, cpu
from qcompile.scheme import SCALE_DTYPES, Scheme
from qcompile.scheme_config import parse_scheme
from tests import oracle, tolerance

SHAPE = (96, 256)
STATIC_SCALE = 0.05


def _combinations() -> dict[str, Scheme]:
    """Every preset; every weight format at several granularities, with and without zero points and activations."""
    found = dict(PRESETS)
    weights: list[dict[str, object]] = []
    for bits in range(2, 9):
        for symmetric in (True, False):
            sizes: list[dict[str, object]] = [{"group_size": 16}, {"group_size": 32}, {"group_size": -1}]
            weights += [{"format": f"int{bits}", "symmetric": symmetric, **size} for size in sizes]
    for name in ("fp8_e4m3", "fp8_e5m2", "int8"):
        weights += [{"format": name, "granularity": "tensor"}, {"format": name, "block_size": [64, 48]}]
        weights += [{"format": name, "group_size": 32}]
    activations: list[dict[str, object] | None] = [
        None,
        {"format": "int8"},
        {"format": "int8", "granularity": "tensor"},
        {"format": "int8", "dynamic": False},
        {"format": "fp8_e4m3"},
        {"format": "fp8_e5m2", "granularity": "tensor"},
    ]
    for index, weight in enumerate(weights):
        eight = weight["format"] in ("int8", "fp8_e4m3", "fp8_e5m2")
        for activation in activations if eight else (None, activations[1 + index % 5]):
            key = ",".join(str(v) for v in [*weight.values(), *(activation or {}).values()])
            found[key] = parse_scheme({"weight": weight, "activation": activation})
        if weight.get("group_size") == 32:
            grouped = {"format": "int8", "group_size": 32}
            found[f"{weight['format']},{weight.get('symmetric')},grouped"] = parse_scheme(
                {"weight": weight, "activation": grouped}
            )
    return found


def _read(name: str, group: int, scale_dtype: str, above: int = -1, *, offset: bool = False) -> Scheme:
    """A scheme of checkpoints, whose scales have scales."""
    weight = {"format": name, "group_size": group, "offset": offset, "scale_dtype": scale_dtype}
    parsed = parse_scheme({"weight": {**weight, "super_scale": {"group_size": above, "dtype": "float16"}}})
    return replace(parsed, weight=replace(parsed.weight, format=FORMATS[name]), method=CHECKPOINT)


SCHEMES = _combinations()
SCHEMES |= {
    "q4_k": _read("uint4", 32, "uint8", 256, offset=True),
    "q2_k": _read("uint2", 16, "uint8", 256, offset=True),
    "q6_k": _read("int6", 16, "int8", 256),
    "iq4_xs": _read("iq4_nl", 32, "int8", 256),
}
GENERATED = [
    *("int4", "int4_asym", "int3", "q5_1", "int8_weight_only", "nf4", "mxfp4", "nvfp4", "fp8_weight_only", "fp8_block"),
    *("q4_k", "q6_k", "int7,False,16", "fp8_e5m2,[64, 48]", "int4_int8"),
]
"""Names of SCHEMES, of which every part of the template has one."""
OTHER_ISAS = [
    *(("avx512_bf16", "int3"), ("avx512_bf16", "nvfp4"), ("avx512", "q5_1"), ("avx2", "q5_1"), ("avx2", "nvfp4")),
    *(("portable", "int3"), ("portable", "fp8_weight_only")),
]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpp, "load", lambda spec: None)
    cpu.forget_kernels()
    yield
    cpu.forget_kernels()


def _random(scheme: Scheme, shape: tuple[int, int]) -> PackedWeight:
    """Any codes and integer scales."""
    weight, blocks = scheme.weight, scheme.weight.granularity.scale_shape(shape)
    assert weight.super_scale is not None
    lowest = -32 if weight.scale_dtype == "int8" else 0

    def integers() -> Tensor:
        return torch.randint(lowest, 64, blocks).to(SCALE_DTYPES[weight.scale_dtype])

    above = [torch.rand(shape[0], weight.super_scale.count(shape[1])).half() / 1024 for _ in range(2)]
    return PackedWeight.from_codes(
        torch.randint(0, 2**weight.format.bits, shape).to(torch.uint8),
        integers(),
        None,
        weight,
        offset=integers() if weight.offset else None,
        super_scale=above[0],
        super_offset=-8 * above[1] if weight.offset else None,
    )


class Quantized:
    """A packed weight in the layout for CPUs, its operator, and its oracle."""

    def __init__(self, scheme: Scheme, weight: Tensor) -> None:
        shape = (weight.shape[0], weight.shape[1])
        self.scheme = scheme.fit("layer", shape)
        checkpoint = self.scheme.method == CHECKPOINT
        self.logical = _random(self.scheme, shape) if checkpoint else quantize_weight(weight, self.scheme.weight)
        self.layout = choose_layout(self.scheme, shape, "cpu")
        self.packed: PackedWeight = to_layout(self.logical, self.layout)
        self.spec = LinearSpec(in_features=shape[1], out_features=shape[0], scheme=self.scheme, layout=self.layout.name)
        activation = self.scheme.activation
        static = activation is not None and not activation.dynamic
        self.input_scale = torch.tensor(STATIC_SCALE) if static else None

    def __call__(self, x: Tensor) -> Tensor:
        weight = list(self.packed.tensors)
        return torch.ops.qcompile.linear(x, weight, None, self.input_scale, None, [], self.spec.encode())

    def weight(self) -> Tensor:
        return oracle.dequantize(self.logical)

    def check(self, x: Tensor, y: Tensor) -> None:
        activation, given = self.scheme.activation, x
        if activation is not None:
            given = dequantize_activation(*quantize_activation(x, activation, self.input_scale), activation)
        weight = self.weight()
        exact = oracle.linear(given, weight)
        # A product in bfloat16 is rounded to it, then to the output's dtype; one in float32 errs less.
        product = tolerance.gemm_bound(given, weight, torch.bfloat16, torch.bfloat16)
        if self.scheme.activation is not None and not self.scheme.activation.granularity.is_group:
            # The codes are exact in bfloat16; their products with the scale, as `given` holds them, are not.
            x_codes, x_scale = quantize_activation(x, self.scheme.activation, self.input_scale)
            scale = x_scale.double()
            product = tolerance.gemm_bound(x_codes.double(), weight, torch.bfloat16, torch.bfloat16) * scale
            product = product + tolerance.rounding(exact.abs() + product, torch.float32)
            exact = oracle.linear(x_codes.double() * scale, weight)
        assert y.dtype == x.dtype
        tolerance.assert_within(y, exact, tolerance.epilogue_bound(exact, product, out_dtype=x.dtype))


def check_every_m(layer: Quantized, rows: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
    """Within the bound for each number of rows of x."""
    for m in rows:
        x = torch.randn(m, layer.spec.in_features, dtype=dtype)
        activation = layer.scheme.activation
        if m == 0 and activation is not None and activation.dynamic and str(activation.granularity) == "tensor":
            continue  # no elements, so no scale
        y = layer(x)
        assert y.shape == (m, layer.spec.out_features)
        if m:
            layer.check(x, y)


def check_identity(scheme: Scheme, rows: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
    """With one 1 a row of x nothing is summed, and with scales that are powers of two y is the weight, rounded once."""
    if scheme.activation is not None:
        return  # dynamic scales of max / 127.5 are no powers of two; `integer_products` covers what is exact
    layer = Quantized(scheme, torch.randn(SHAPE))
    layer.logical = layer.logical.map(_powers_of_two)
    layer.packed = to_layout(layer.logical, layer.layout)
    x = torch.eye(SHAPE[1], dtype=dtype)
    for count in rows:
        y = torch.cat([layer(part) for part in x.split(count)])
        assert torch.equal(y, layer.weight().T.to(y.dtype)), count


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_decoded_by_torch(name: str, no_compiler: None) -> None:
    check_every_m(Quantized(SCHEMES[name], torch.randn(SHAPE)), (0, 3, 130))
    check_identity(SCHEMES[name], (256,))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_kernels(name: str) -> None:
    layer = Quantized(SCHEMES[name], torch.randn(SHAPE))
    assert cpu._linear(layer.spec.encode()).kernel(torch.bfloat16) is not None
    check_every_m(layer, (0, 1, 2, 3, 7, 18, 40, 1025))
    check_identity(SCHEMES[name], (1, 7, 256))


@pytest.mark.parametrize("name", ["int4_asym", "int8_weight_only", "q4_k", "fp8_block"])
def test_generated_kernels_in_float32(name: str) -> None:
    layer = Quantized(SCHEMES[name], torch.randn(SHAPE))
    for dtype in (torch.float32, torch.float16):
        check_every_m(layer, (1, 7, 130), dtype)
    check_identity(SCHEMES[name], (1, 256), torch.float32)
    if layer.scheme.activation is None:
        for m in (3, 130):
            x = torch.randn(m, SHAPE[1])
            bound = tolerance.gemm_bound(x, layer.weight(), torch.float32)
            tolerance.assert_within(layer(x), oracle.linear(x, layer.weight()), bound)


@pytest.mark.parametrize(("isa", "name"), OTHER_ISAS)
def test_other_instruction_sets(isa: str, name: str) -> None:
    if isa not in cpp.available():
        pytest.skip(f"no {isa} here")
    with override(cpu_isa=isa):
        cpu.forget_kernels()
        check_every_m(Quantized(SCHEMES[name], torch.randn(SHAPE)), (1, 2, 7, 130))
        check_identity(SCHEMES[name], (1, 7, 256))
    cpu.forget_kernels()


def _powers_of_two(name: str, values: Tensor) -> Tensor:
    """Scales from 1/8 to 4, as far as their type holds them; offsets of a few digits; all else as it is."""
    if not name.endswith(("scale", "offset")):
        return values
    power = torch.exp2(torch.randint(0 if values.dtype == torch.uint8 else -3, 3, values.shape).float())
    return (power * torch.randint(-3, 4, values.shape) if name == "offset" else power).to(values.dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("m", [1, 1025])
def test_offsets_that_nearly_cancel_scaled_codes(m: int, compiled: bool, request: pytest.FixtureRequest) -> None:
    """Weights far smaller than their offsets: with either part rounded to bfloat16, nothing of them would be left."""
    if not compiled:
        request.getfixturevalue("no_compiler")
    scheme = parse_scheme({"weight": {"format": "uint8", "offset": True, "group_size": 32, "scale_dtype": "float32"}})
    layer = Quantized(scheme, torch.randn(SHAPE))
    scale = torch.rand(SHAPE[0], 8) + 0.5
    codes = torch.randint(254, 256, SHAPE).to(torch.uint8)
    layer.logical = PackedWeight.from_codes(codes, scale, None, layer.scheme.weight, offset=-254.5 * scale)
    layer.packed = to_layout(layer.logical, layer.layout)
    x = torch.randn(m, SHAPE[1], dtype=torch.bfloat16)
    layer.check(x, layer(x))


@pytest.mark.parametrize("rows", [1, 256], ids=["few", "many"])
def test_a_code_at_its_zero_point_is_zero(rows: int) -> None:
    """aten's kernel holds the zero rounded to bfloat16, which alone would leave a small number."""
    layer = Quantized(PRESETS["int4_asym"], torch.randn(SHAPE))
    y = torch.cat([layer(part) for part in torch.eye(SHAPE[1], dtype=torch.bfloat16).split(rows)])
    zeros = layer.weight().T == 0
    assert zeros.any()
    assert not y[zeros].any()


@pytest.mark.parametrize("m", [1, 40, 1025])
def test_integer_products_are_exact(m: int) -> None:
    """Sums of so few products are exact in float32 too."""
    layer = Quantized(PRESETS["int8"], torch.randn(100, 250))
    ones = replace(layer.logical, scale=torch.ones(100, 1))
    weight = list(to_layout(ones, layer.layout).tensors)
    x = torch.randint(-128, 128, (m, 250), dtype=torch.int8)
    y = cpu.product(x, torch.ones(m, 1), weight, layer.spec)
    assert torch.equal(y.double(), oracle.linear(x.double(), oracle.dequantize(ones)))


@pytest.mark.parametrize("name", ["int4", "int8_weight_only", "q5_1", "mxfp4"])
@pytest.mark.parametrize("exponents", [0, 13, 60])
def test_one_row_as_integers_loses_next_to_nothing(name: str, exponents: int) -> None:
    """x is off by 2^-23 of the greatest of its group at most, and not at all within 2^-14 of that."""
    layer = Quantized(SCHEMES[name], torch.randn(SHAPE))
    linear = cpu._linear(layer.spec.encode())
    if not linear.limb_rows:
        pytest.skip("a processor without products of bytes")
    wide = 2.0 ** torch.randint(0, exponents + 1, (1, SHAPE[1]))
    x = (torch.randn(1, SHAPE[1]).clamp(-4, 4) * wide).to(torch.bfloat16)
    weight = layer.weight()
    y = layer(x).double()
    groups = x.double().abs().split(linear.columns, -1)
    lost = torch.cat([part.amax().expand_as(part) for part in groups], -1) * 2.0**-22
    bound = tolerance.gemm_bound(x, weight, torch.float32, torch.float32) + lost @ weight.abs().T
    exact = oracle.linear(x, weight)
    assert ((y - exact).abs() <= bound + tolerance.rounding(exact.abs() + bound, torch.bfloat16)).all()


def test_one_row_with_no_number_has_none() -> None:
    layer = Quantized(PRESETS["int4"], torch.randn(SHAPE))
    for value in (float("inf"), float("nan")):
        x = torch.randn(1, SHAPE[1], dtype=torch.bfloat16)
        x[0, 5] = value
        assert not layer(x).isfinite().any()


@pytest.mark.parametrize("shape", [(64, 32), (1, 64), (130, 336), (96, 640), (2100, 1024)])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "int8_weight_only", "fp8_block", "int4_int8"])
def test_shapes_that_fill_no_tile_and_those_of_many_chunks(name: str, shape: tuple[int, int]) -> None:
    layer = Quantized(PRESETS[name], torch.randn(shape))
    for m in (2, 64):
        x = torch.randn(m, shape[1], dtype=torch.bfloat16)
        layer.check(x, layer(x))


def test_rows_that_are_not_contiguous() -> None:
    for name in ("int4", "int8_weight_only", "int8", "fp8"):
        layer = Quantized(PRESETS[name], torch.randn(SHAPE))
        x = torch.randn(SHAPE[1], 5, dtype=torch.bfloat16).t()
        assert torch.equal(layer(x), layer(x.contiguous())), name


@pytest.mark.parametrize("name", ["int4", "int8", "int8_weight_only", "fp8_block"])
def test_compiled(name: str, fresh_dynamo: None) -> None:
    layer = Quantized(PRESETS[name], torch.randn(SHAPE))
    compiled: Callable[[Tensor], Tensor] = torch.compile(lambda x: torch.relu(layer(x)), dynamic=True)
    for m in (3, 40, 130):
        x = torch.randn(m, SHAPE[1], dtype=torch.bfloat16)
        activation = layer.scheme.activation
        if activation is None:
            assert torch.equal(compiled(x), torch.relu(layer(x)))
        else:  # a fused quantization may round a tie the other way
            assert tolerance.sqnr(torch.relu(layer(x)), compiled(x)) > tolerance.sqnr_floor("int8", SHAPE[1])


def test_names_say_which_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(preset: str) -> str:
        return cpu.kernel_name(Quantized(PRESETS[preset], torch.randn(SHAPE)).spec)

    monkeypatch.setattr(cpp, "available", lambda: ("amx", "avx2"))
    assert name("int4") == name("fp8") == "C++ for amx, decode + mm above M = 32 (but bfloat16)"
    with override(cpu_isa="avx2"):
        assert name("int4") == "C++ for avx2, decode + mm above M = 32"
        assert name("int8") == "C++ for avx2, integers, int8 mm above M = 32"
        assert name("int4_int8") == "C++ for avx2, integers"
    monkeypatch.setattr(cpp, "compiler", lambda: None)
    assert name("int4") == "torch decode + mm (no C++ compiler)"
