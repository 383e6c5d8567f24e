"""Products with stacks of experts: the operator on CPUs and the Triton template in its interpreter, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qcompile.grouped  # noqa: F401  (registers the operator)
from qcompile.codegen.devices import device_of
from qcompile.codegen.spec import GroupedSpec, KernelSpec, Tile, grouped_spec, kernel_spec, scales_of
from qcompile.errors import LayerError
from qcompile.flags import override
from qcompile.formats import get_format
from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec
from qcompile.ops import apply_epilogue
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS, preset
from qcompile.reference import dequantize_activation, quantize_activation
from qcompile.runtime import cache, gpu_grouped, tuning
from qcompile.scheme import ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme
from qcompile.stacks import expert, padded_rows, stack, stack_layout, stacked_scheme
from qcompile.tensors import by_bytes
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.kernels.problems import random_weight
from tests.triton_interpreter import interpret

EIGHT = ("int8", "fp8", "fp8_block", "fp8 tensor", "fp8 block, one group", "int8 of fp8", "rows of 3")
"""Schemes with 8 bits on both sides: a scale a channel, block, tensor, or what becomes a scale a row in stacks."""

SMALL = Tile(m=16, n=64, k=64, split=1, warps=4, stages=2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def gguf_like(format_name: str, columns: int, scale: str, *, offset: bool = False) -> Scheme:
    """Groups in super-blocks of 256, as K-quants have them."""
    weight = WeightScheme(
        format=get_format(format_name),
        granularity=Granularity.group(columns),
        symmetric=not offset,
        offset=offset,
        scale_dtype=scale,
        super_scale=SuperScale(columns=256, dtype="float16"),
    )
    return Scheme(weight=weight)


def eight_bits(weight: str, block: Granularity, activation: str, per: Granularity) -> Scheme:
    """8-bit weights times 8-bit activations."""
    return Scheme(
        weight=WeightScheme(format=get_format(weight), granularity=block),
        activation=ActivationScheme(format=get_format(activation), granularity=per),
    )


SCHEMES = {name: scheme for name, scheme in PRESETS.items() if name != "fp8_static"} | {
    "k-quant": gguf_like("uint4", 32, "uint8", offset=True),
    "small tiles": Scheme(weight=WeightScheme(format=get_format("fp8_e4m3"), granularity=Granularity.block(32, 32))),
    "k-quant without offsets": gguf_like("int4", 16, "int8"),
    "fp8 tensor": eight_bits("fp8_e4m3", Granularity.tensor(), "fp8_e4m3", Granularity.tensor()),
    "fp8 block, one group": eight_bits("fp8_e5m2", Granularity.block(64, 256), "fp8_e4m3", Granularity.group(256)),
    "int8 of fp8": eight_bits("int8", Granularity.group(32), "fp8_e4m3", Granularity.channel()),
    "rows of 3": eight_bits("int8", Granularity.block(3, 32), "int8", Granularity.group(32)),
}


def fitted(name: str, shape: tuple[int, int]) -> Scheme:
    """A scheme for a shape; blocks of some may be longer than a row here."""
    scheme = SCHEMES[name]
    return scheme if name.startswith("k-quant") or "one group" in name else scheme.fit("layer", shape)


DECODED = ("int3", "int4_asym", "fp8_block", "nf4", "mxfp4", "nvfp4", "q5_1", "k-quant", "k-quant without offsets")
"""A scheme for each way in which the template decodes."""


@dataclass
class Problem:
    """A stack of experts and rows for them; `expected` and `bound` are float64 [S, N]."""

    spec: LinearSpec
    x: Tensor
    expert_ids: Tensor
    offsets: Tensor
    stacked: PackedWeight
    weights: list[PackedWeight]
    bias: Tensor | None

    def interpret(self, target: str, tile: Tile, out_dtype: torch.dtype) -> Tensor:
        """Run the generated kernel on the CPU."""
        activation = self.spec.scheme.activation
        x, x_scale = (self.x, None) if activation is None else quantize_activation(self.x, activation)
        kernel = self.kernel(target, tile, x.dtype, out_dtype)
        function = interpret(cache.load(kernel).kernel)
        weight = self.packed
        return gpu_grouped.launch(kernel, function, x, x_scale, self.offsets, weight, self.bias, out_dtype)

    def kernel(self, target: str, tile: Tile, x_dtype: torch.dtype, out_dtype: torch.dtype) -> GroupedSpec:
        return grouped_spec(kernel_spec(self.spec, x_dtype, out_dtype, target, tile), len(self.weights))

    @property
    def packed(self) -> PackedWeight:
        """The stack in the layout that it has on GPUs."""
        return LAYOUTS[self.spec.layout].pack(self.stacked)

    def check(
        self,
        y: Tensor,
        compute: torch.dtype,
        accumulate_unit: float = tolerance.ACCUMULATE_UNIT,
        between: torch.dtype = torch.float32,
        *,
        kernel: KernelSpec | None = None,
    ) -> None:
        """Every element within the derived bound of the float64 result.

        Args:
            between: to which products are rounded before the epilogue.
            kernel: what computed it, where that may round weights before their offsets are added.
        """
        fragments = kernel is not None and scales_of(kernel, kernel.tile.scales) == "fragments"
        inputs = self.x.double()
        activation = self.spec.scheme.activation
        if activation is not None:
            codes, scale = quantize_activation(self.x, activation)
            inputs = dequantize_activation(codes.double(), scale.double(), activation).double()
        for index, packed in enumerate(self.weights):
            rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
            weight = oracle.dequantize(packed)
            product = oracle.linear(inputs[rows], weight)
            bound = tolerance.gemm_bound(inputs[rows], weight, compute, between, accumulate_unit=accumulate_unit)
            if packed.offset is not None:
                scaled = oracle.dequantize(replace(packed, offset=torch.zeros_like(packed.offset)))
                bound = bound + tolerance.offset_bound(
                    inputs[rows], scaled, weight - scaled, compute if fragments else torch.float32
                )
            steps = self.spec.epilogue
            bias = None if self.bias is None else self.bias[index]
            bound = tolerance.epilogue_bound(product, bound, bias, steps, out_dtype=y.dtype)
            tolerance.assert_within(y[rows], oracle.epilogue(product, bias, steps), bound)


def problem(
    scheme: Scheme,
    counts: Sequence[int],
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    identity: bool = False,
    layout: str | None = None,
    gate: str = "",
) -> Problem:
    """Experts with `counts` rows each.

    Args:
        layout: None for that which stacks have on GPUs.
        identity: each expert's rows are the identity and its scales 1: the weights' values come out.
    """
    weights = [random_weight(scheme.weight, n, k, plain=identity) for _ in counts]
    total = sum(counts)
    x = torch.cat([torch.eye(count, k) for count in counts]) if identity else torch.randn(total, k)
    fitted = replace(scheme, weight=stacked_scheme(scheme.weight, n))
    layout = layout or stack_layout(fitted, (n, k), "cuda").name
    spec = LinearSpec(in_features=k, out_features=n, scheme=fitted, layout=layout)
    return Problem(
        spec=spec.with_epilogue(*["bias"] * bias, *[gate] * bool(gate)),
        x=x.to(dtype),
        expert_ids=torch.repeat_interleave(torch.tensor(counts)),
        offsets=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        stacked=stack(weights),
        weights=weights,
        bias=torch.randn(len(counts), n).to(dtype) if bias else None,
    )


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("n", [64, 72])
def test_a_stack_has_the_weights_of_its_experts(name: str, n: int) -> None:
    scheme = SCHEMES[name].fit("layer", (n, 256)).weight
    weights = [random_weight(scheme, n, 256) for _ in range(3)]
    stacked = stack(weights)
    stacked.check()
    assert stacked.shape == (3 * padded_rows(n), 256)
    for index, weight in enumerate(weights):
        assert torch.equal(oracle.dequantize(expert(stacked, index, n)), oracle.dequantize(weight))


@pytest.mark.parametrize("name", DECODED)
def test_identity_returns_the_weights(name: str) -> None:
    scheme = fitted(name, (72, 64))
    given_ = problem(replace(scheme, activation=None), [64, 0, 64], 72, 64, identity=True)
    y = given_.interpret("sm_90", SMALL, torch.float32)
    expected = [oracle.dequantize(weight).T for weight, count in zip(given_.weights, [64, 0, 64], strict=True) if count]
    assert torch.equal(y, torch.cat(expected).to(torch.bfloat16).float())


@pytest.mark.parametrize("name", ["fp8", "int8", "fp8_block"])
def test_identity_returns_weights_in_rows(name: str) -> None:
    scheme = replace(fitted(name, (72, 64)), activation=None)
    given_ = problem(scheme, [64, 0, 64], 72, 64, identity=True, layout="rows8")
    expected = torch.cat([oracle.dequantize(given_.weights[index]).T for index in (0, 2)])
    assert torch.equal(given_.interpret("sm_90", SMALL, torch.float32).double(), expected)


@pytest.mark.parametrize("name", EIGHT)
def test_eight_bits_on_both_sides_are_multiplied_as_they_are(name: str) -> None:
    given_ = problem(fitted(name, (128, 256)), [1], 128, 256)
    kernel = given_.kernel("sm_90", SMALL, torch.int8, torch.bfloat16)
    assert (given_.spec.layout, kernel.template) == ("rows8", "gemm_grouped_rows8")
    kinds = {"int8": "int8", "rows of 3": "int8", "int8 of fp8": "bfloat16"}
    assert kernel.compute == kinds.get(name, "fp8")
    moved = LAYOUTS["rows8"].unpack(given_.packed)
    assert all(
        torch.equal(by_bytes(a), by_bytes(b)) for a, b in zip(moved.tensors, given_.stacked.tensors, strict=True)
    )


tiles = st.builds(
    Tile,
    m=st.sampled_from([16, 32]),
    n=st.sampled_from([64, 128]),
    k=st.sampled_from([64, 128]),
    split=st.sampled_from([1, 1, 2, 3]),
    warps=st.just(4),
    stages=st.just(2),
    scales=st.sampled_from(["products", "fragments"]),
    overlap=st.booleans(),
).map(lambda tile: replace(tile, overlap=tile.overlap and tile.k == 128))  # which takes turns of two chunks
counts = st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=5)


@given(
    st.sampled_from([*sorted(SCHEMES), *EIGHT]),
    counts,
    st.integers(1, 140),
    st.sampled_from([64, 160, 256]),
    st.sampled_from(FLOATS),
    tiles,
    st.sampled_from(["sm_80", "sm_90", "gfx942"]),
    st.booleans(),
)
def test_kernel(
    name: str, counts: list[int], n: int, k: int, dtype: torch.dtype, tile: Tile, target: str, bias: bool
) -> None:
    """Any distribution of rows to experts, experts without rows among them."""
    given_ = problem(fitted(name, (n, k)), counts, n, k, dtype, bias=bias)
    y = given_.interpret(target, tile, dtype)
    compute, kernel = (
        torch.bfloat16 if given_.spec.scheme.activation else dtype,
        given_.kernel(target, tile, dtype, dtype),
    )
    given_.check(y, compute, kernel=kernel)


GATES = ("silu(a)*b", f"pairs {oracle.GPT_OSS}")


@given(
    st.sampled_from([*sorted(SCHEMES), *EIGHT]),
    counts,
    st.sampled_from([128, 384]),
    st.sampled_from(FLOATS),
    tiles,
    st.sampled_from(["sm_80", "sm_90", "gfx942"]),
    st.booleans(),
    st.sampled_from(GATES),
)
def test_gates(
    name: str, counts: list[int], n: int, dtype: torch.dtype, tile: Tile, target: str, bias: bool, gate: str
) -> None:
    given_ = problem(fitted(name, (n, 160)), counts, n, 160, dtype, bias=bias, gate=gate)
    assert gpu_grouped.gate_objection(given_.spec) is None
    y = given_.interpret(target, tile, dtype)
    assert y.shape == (sum(counts), n // 2)
    compute, kernel = (
        torch.bfloat16 if given_.spec.scheme.activation else dtype,
        given_.kernel(target, tile, dtype, dtype),
    )
    given_.check(y, compute, kernel=kernel)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block"])
def test_gates_of_rows_that_are_no_multiple_of_a_tile(name: str, gate: str) -> None:
    given_ = problem(fitted(name, (140, 256)), [3, 0, 17], 140, 256, bias=True, gate=gate)
    assert gpu_grouped.gate_objection(given_.spec) is None
    given_.check(given_.interpret("sm_90", SMALL, torch.bfloat16), torch.bfloat16)


def test_kernels_take_pairs_and_halves_of_whole_tiles() -> None:
    why = "halves of 96 output features are no multiple of 64"
    for n, gate, reason in ((192, GATES[0], why), (192, GATES[1], None), (256, GATES[0], None)):
        assert gpu_grouped.gate_objection(problem(fitted("int4", (n, 64)), [1], n, 64, gate=gate).spec) == reason


def test_many_experts() -> None:
    given_ = problem(SCHEMES["mxfp4"], torch.randint(0, 3, (70,)).tolist(), 64, 64)
    given_.check(given_.interpret("sm_90", SMALL, torch.bfloat16), torch.bfloat16)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=300), st.sampled_from([16, 32, 64, 128]))
def test_tiles_are_enough(counts: list[int], height: int) -> None:
    needed = sum(-(-count // height) for count in counts)
    assert needed <= gpu_grouped.tile_count(sum(counts), len(counts), height)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["int4", "fp8", "int8"])
def test_cpu_operator_applies_gates(name: str, gate: str) -> None:
    """Bit for bit the gate of what it returns without one, in float32; of int8 with outlying columns beside."""
    scheme = SCHEMES[name].fit("layer", (72, 256))
    if name == "int8":
        assert scheme.activation is not None
        scheme = replace(scheme, activation=replace(scheme.activation, outlier_threshold=2.0))
    given_ = problem(scheme, [5, 0, 3], 72, 256, torch.float32, bias=True, gate=gate)
    layout = stack_layout(given_.spec.scheme, given_.stacked.shape, "cpu")
    packed = list(layout.pack(given_.stacked).tensors)

    def multiply(spec: LinearSpec) -> Tensor:
        y: Tensor = torch.ops.qcompile.grouped_linear(
            given_.x, given_.expert_ids, packed, given_.bias, None, None, None, 3, spec.encode()
        )
        return y

    spec = replace(given_.spec, layout=layout.name)
    alone = multiply(replace(spec, epilogue=("bias",)))
    assert torch.equal(multiply(spec), apply_epilogue(alone, None, [], replace(spec, epilogue=(gate,))))


@pytest.mark.parametrize(
    ("name", "counts", "stored"),
    [(name, [5, 0, 3, 30], False) for name in SCHEMES if name != "fp8 tensor"]  # whose one scale is of all rows
    + [
        ("int4", [5, 0, 3, 30], True),
        ("int8", [5, 0, 3, 30], True),
        ("int4", [0, 1, 0], False),
        ("fp8", [0, 0], False),
    ],
)
def test_cpu_operator_equals_each_experts_linear(name: str, counts: list[int], stored: bool) -> None:
    """Bit for bit, in the portable layout and (`stored`) in that in which modules hold stacks on CPUs."""
    scheme = SCHEMES[name].fit("layer", (72, 256))
    given_ = problem(scheme, counts, 72, 256, bias=True)
    layout = stack_layout(given_.spec.scheme, given_.stacked.shape, "cpu") if stored else LAYOUTS["logical"]
    spec = replace(given_.spec, layout=layout.name)
    packed = list(layout.pack(given_.stacked).tensors)
    y = torch.ops.qcompile.grouped_linear(
        given_.x, given_.expert_ids, packed, given_.bias, None, None, None, len(counts), spec.encode()
    )
    assert given_.bias is not None
    for index, weight in enumerate(given_.weights):
        rows = slice(int(given_.offsets[index]), int(given_.offsets[index + 1]))
        alone = replace(spec, scheme=replace(scheme, weight=weight.scheme))
        tensors, bias = list(layout.pack(weight).tensors), given_.bias[index]
        expected = torch.ops.qcompile.linear(given_.x[rows], tensors, bias, None, None, [], alone.encode())
        assert torch.equal(y[rows], expected)


def test_static_scales_and_permutations_are_each_experts_own() -> None:
    scheme = preset("fp8_static")
    given_ = problem(scheme, [4, 3], 64, 128, torch.float32)
    layout = LAYOUTS["logical"]
    spec = replace(given_.spec, layout=layout.name)
    scales = torch.tensor([0.01, 0.02])
    before = torch.rand(2, 128) + 0.5
    perm = torch.stack([torch.randperm(128), torch.randperm(128)]).int()
    y = torch.ops.qcompile.grouped_linear(
        given_.x,
        given_.expert_ids,
        list(layout.pack(given_.stacked).tensors),
        None,
        scales,
        before,
        perm,
        2,
        spec.encode(),
    )
    for index, weight in enumerate(given_.weights):
        rows = slice(int(given_.offsets[index]), int(given_.offsets[index + 1]))
        x = (given_.x[rows] * before[index])[:, perm[index].long()]
        tensors = list(layout.pack(weight).tensors)
        alone = replace(spec, scheme=replace(scheme, weight=weight.scheme))
        expected = torch.ops.qcompile.linear(x, tensors, None, scales[index], None, [], alone.encode())
        assert torch.equal(y[rows], expected)


def test_experts_that_are_quantized_in_different_ways_are_refused() -> None:
    weights = [random_weight(SCHEMES[name].fit("layer", (64, 128)).weight, 64, 128) for name in ("int4", "int5")]
    with pytest.raises(LayerError, match=r"layers.0.up_proj: expert 1 is int5"):
        stack(weights, "layers.0.up_proj")


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_do_not_spill(target: str) -> None:
    kernels = []
    shipped = [("mxfp4", 16), ("fp8", 16), ("fp8", 512), ("fp8_block", 256), ("int8", 256)]
    for name, m in shipped + ([("int4", 16), ("mxfp4", 256), ("k-quant", 16)] if target == "sm_90" else []):
        scheme = SCHEMES[name] if name == "k-quant" else SCHEMES[name].fit("layer", (1536, 2048))
        layout = stack_layout(scheme, (1536, 2048), "cuda").name
        spec = LinearSpec(in_features=2048, out_features=1536, scheme=scheme, layout=layout).with_epilogue("bias")
        x_dtype = torch.bfloat16 if scheme.activation is None else scheme.activation.format.native_dtype
        assert x_dtype is not None
        for steps in ((), GATES[:1], GATES[1:]):
            like = tuning.any_kernel(spec.with_epilogue(*steps), x_dtype, torch.bfloat16, target, experts=128)
            kernels.append(tuning.ours(like, m))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"
