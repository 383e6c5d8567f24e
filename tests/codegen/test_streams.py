"""What can be known of streams without a GPU: who computes what, machine code, and what they do not take."""

from __future__ import annotations

import functools
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen import stream_spec
from qcompile.codegen.cost_model import candidates, shared_bytes
from qcompile.codegen.devices import device_of
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.stream_spec import has_gluon, stream_objection
from qcompile.formats import get_format
from qcompile.layouts import LAYOUTS
from qcompile.presets import preset
from qcompile.runtime import cache
from qcompile.runtime import measure as timing
from qcompile.runtime.streams import division
from qcompile.scheme import Granularity, Scheme, WeightScheme
from qcompile.tensors import by_bytes
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.kernels.problems import random_weight
from tests.triton_interpreter import install_assembly

pytestmark = pytest.mark.skipif(not has_gluon(), reason="needs a Triton whose Gluon the templates were tried with")

BF16 = torch.bfloat16


def like(name: str = "int4", shape: tuple[int, int] = (4096, 4096), *steps: str) -> KernelSpec:
    return replace(timing.job(name, preset(name), shape, 256, BF16).like("sm_90"), epilogue=steps)


def streams(kernel: KernelSpec, m: int) -> list[KernelSpec]:
    return [found for found in candidates(kernel, m) if found.tile.form == "stream"]


@functools.cache
def template() -> Any:
    """The module of a stream's kernel."""
    return cache.load(streams(like(), 256)[0])


def scalar_functions(steps: int, tiles: int, programs: int, program: int) -> Any:
    """The template's functions of who computes what, as plain Python of integers, in a program."""
    language = types.SimpleNamespace(
        num_programs=lambda axis: programs,
        program_id=lambda axis: program,
        minimum=min,
        where=lambda condition, yes, no: yes if condition else no,
    )
    names = {"gl": language, "STEPS": steps, "TILES_N": tiles, "ROWS": 4, "HALVES": 1, "BLOCK_M": 128, "BAND": 3}
    for name in ("shared_tiles", "first_shared", "steps_of_program", "corner_of", "place_of", "sharers_of"):
        names[name] = types.FunctionType(getattr(template(), name).fn.__code__, names)
    return types.SimpleNamespace(**names)


@given(
    tiles_n=st.integers(1, 80),
    tiles_m=st.integers(1, 8),
    steps=st.integers(1, 40),
    split=st.sampled_from([0, 1, 2, 4, 8]),
    processors=st.integers(1, 140),
)
def test_programs_share_all_steps(tiles_n: int, tiles_m: int, steps: int, split: int, processors: int) -> None:
    tiles = tiles_n * tiles_m
    programs, shared, sharers = division(tiles, steps, split, processors)
    sharers = max(1, sharers)
    done: set[tuple[int, int]] = set()
    places: dict[int, tuple[int, int]] = {}
    parts: dict[int, list[tuple[int, int]]] = {}
    for program in range(programs):
        scalar = scalar_functions(steps, tiles_n, programs, program)
        whole, left = scalar.shared_tiles(tiles_m)
        assert left == shared * steps
        i, (count, before) = 0, scalar.steps_of_program(tiles_m, sharers)
        assert before == whole * steps
        while i < count:
            tile, tile_n, first_m, step = scalar.place_of(i, tiles_m, sharers)
            assert places.setdefault(tile, (tile_n, first_m)) == (tile_n, first_m)
            length = min(steps - step, count - i)
            new = {(tile, step + j) for j in range(length)}
            assert len(new) == length
            assert not new & done
            done |= new
            if length < steps:
                assert program < sharers
                parts.setdefault(tile, []).append((program, 2 * program + (i > whole * steps and step == 0)))
            i += length
    assert done == {(tile, step) for tile in range(tiles) for step in range(steps)}
    assert {*places.values()} == {(4 * n, 128 * m) for n in range(tiles_n) for m in range(tiles_m)}
    assert split != 1 or not parts
    slots = [slot for found in parts.values() for _, slot in found]
    assert len(slots) == len(set(slots))
    for tile, found in parts.items():
        number, least, most, slot = scalar_functions(steps, tiles_n, programs, 0).sharers_of(tile, tiles_m, sharers)
        assert 0 <= number < shared
        assert found == [(p, slot if p == least else 2 * p) for p in range(least, most + 1)]


class Values:
    """A tensor of Gluon's, or memory that is loaded from, with the operations that decoding uses; floats are bits."""

    type = types.SimpleNamespace(layout=None)

    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def index(self, stage: int) -> Values:
        return Values(self.data[stage])

    def slice(self, start: int, length: int, dim: int) -> Values:
        return Values(self.data.take(range(start, start + length), dim))

    def load(self, layout: object) -> Values:
        return self

    def reshape(self, *shape: int) -> Values:
        return Values(self.data.reshape(shape))

    def split(self) -> tuple[Values, Values]:
        return Values(self.data[..., 0]), Values(self.data[..., 1])

    def to(self, dtype: object, bitcast: bool = False) -> Values:
        return Values(self.data.view(np.float32)) if dtype is tl.float32 else self

    def __and__(self, other: int) -> Values:
        return Values(self.data & np.uint32(other))

    def __or__(self, other: Values) -> Values:
        return Values(self.data | other.data)

    def __mul__(self, other: float) -> Values:
        return Values(self.data * self.data.dtype.type(other))

    def __truediv__(self, other: Values) -> Values:
        return Values(self.data / other.data)

    def __mod__(self, other: int) -> Values:
        return Values(self.data % other)

    def __eq__(self, other: object) -> Any:
        return Values(self.data == other)

    def __add__(self, other: int) -> Values:
        return Values(self.data + np.uint32(other % 2**32))

    def __rmul__(self, other: int) -> Values:
        return Values(np.uint32(other) * self.data)


def choose(condition: Values, yes: Any, no: Any) -> Values:
    """gl.where of tensors, floats or integers."""
    if isinstance(no, Values):
        return Values(np.where(condition.data, np.float32(yes), no.data))
    return Values(np.where(condition.data, np.uint32(yes % 2**32), np.uint32(no % 2**32)))


LANGUAGE = {
    "arange": lambda start, end, layout: Values(np.arange(start, end, dtype=np.uint32)),
    "permute": lambda values, order: Values(values.data.transpose(order)),
    "join": lambda a, b: Values(np.stack([a.data, b.data], -1)),
    "expand_dims": lambda values, axis: Values(np.expand_dims(values.data, axis)),
    "static_range": range,
    "where": choose,
    "convert_layout": lambda values, layout, assert_trivial: values,
    "int16": tl.int16,
    "int32": tl.int32,
    "float32": tl.float32,
}
"""What decoding uses of Gluon, on `Values`."""


def plain_assembly(text: str, constraints: str, operands: Any, dtype: Any, is_pure: bool, pack: int) -> Any:
    builder = types.SimpleNamespace()
    install_assembly(builder)
    arrays = [types.SimpleNamespace(data=d) for d in np.broadcast_arrays(*(operand.data for operand in operands))]
    found = builder.create_inline_asm(None, text, constraints, arrays, dtype, is_pure, pack)
    return tuple(Values(result.data) for result in found)


@pytest.mark.parametrize("columns", [128, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_sparse_words_become_dense_weights(bits: int, dtype: torch.dtype, columns: int) -> None:
    """`decode_spread` on arrays, against the weights, which are rounded once in bfloat16; rows' scales come later."""
    name, kind = f"int{bits}_24", str(dtype).removeprefix("torch.")
    granularity, scale_dtype = (Granularity.group(128), kind) if columns else (Granularity.channel(), "float32")
    scheme = replace(preset(name).weight, granularity=granularity, scale_dtype=scale_dtype)
    kernel = replace(like(name), x_dtype=kind, scale_dtype=scale_dtype, columns=columns or 4096)
    module = cache.load(streams(kernel, 256)[0])
    torch.manual_seed(0)
    logical = random_weight(scheme, 128, 256)
    packed = LAYOUTS["fragment24"].pack(logical)
    words = packed.codes.view(2, 2, 2, -1, 128).numpy().view(np.uint32)  # tiles of rows, steps, halves, lines
    language = types.SimpleNamespace(**LANGUAGE, inline_asm_elementwise=plain_assembly)
    constants = {"BITS": bits, "PIECES": bits // 2}
    constants |= {name: getattr(module, name).value for name in ("WORDS", "OPERANDS_OF_WORDS", "HALF_WORDS", "TABLES")}
    layouts = dict.fromkeys(("CODES", "PLACES", "LANES", "SPREAD", "COMPUTE"))
    decode = types.FunctionType(module.decode_spread.fn.__code__, {"gl": language, **constants, **layouts})
    codes, scale = logical.unpack_codes().double() - 2 ** (bits - 1), logical.scale
    for tile, step, half in np.ndindex(2, 2, 2):
        planes = (Values(words[None, :, step, :, :-1]), Values(words[None, :, step, :, -1:]))
        ring = (None, None, None, planes)
        expected, rows = codes[64 * tile :, 64 * (2 * step + half) :][:64, :64], ()
        if columns:
            each = scale[64 * tile :][:64, step]
            expected = (expected * each[:, None].double()).to(dtype).double()
            halves = each.view(torch.int16).numpy().view(np.uint16).reshape(4, 2, 8).astype(np.uint32) * 0x10001
            rows = tuple(Values(halves[:, r].reshape(4, 8, 1, 1, 1)) for r in range(2))
        weight = decode(ring, 0, half, tile, rows).data
        found = torch.from_numpy(weight.astype(np.int16)).view(dtype).double() * module.FACTOR.value
        assert torch.equal(found, expected)


F16 = torch.float16
KINDS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    **{name: (name, {}, BF16) for name in ("mxfp4", "nvfp4", "fp8_weight_only", "nf4")},
    **{f"{name} float16": (name, {}, F16) for name in ("nvfp4", "fp8_weight_only")},
    "fp8_e5m2": ("fp8_weight_only", {"format": get_format("fp8_e5m2")}, BF16),
    **{f"int{bits}": (f"int{bits}", {}, BF16) for bits in range(2, 8)},
    **{f"int{bits} float16": (f"int{bits}", {"scale_dtype": "float16"}, F16) for bits in range(2, 8)},
    **{
        f"uint{bits}": (f"int{bits}", {"format": get_format(f"uint{bits}"), "symmetric": False}, BF16)
        for bits in range(2, 8)
    },
    "uint3 float32": ("int3", {"format": get_format("uint3"), "symmetric": False, "scale_dtype": "float32"}, BF16),
    **{name: (name, {}, BF16) for name in ("q4_0", "q5_0", "q3_k", "q6_k", "q4_1", "q2_k", "q4_k", "q5_k")},
    **{name: (name, {}, BF16) for name in ("iq4_nl", "iq4_xs")},
    "int2 of 16": ("int2", {"granularity": Granularity.group(16), "scale_dtype": "float32"}, BF16),
    "uint4 of 32": ("int4_asym", {"granularity": Granularity.group(32)}, BF16),
    "int5 of rows": ("int5", {"granularity": Granularity.channel(), "scale_dtype": "float32"}, BF16),
}
"""Weights by the changes to a preset, and the type of activations."""


def spread(scale: torch.Tensor, columns: int) -> torch.Tensor:
    return scale.double().repeat_interleave(columns, 1)


def given_weight(kind: str) -> tuple[WeightScheme, KernelSpec, torch.dtype]:
    name, changes, dtype = KINDS[kind]
    scheme = replace(preset(name).weight, **changes)
    job = timing.job(kind, Scheme(weight=scheme), (4096, 4096), 256, dtype)
    return scheme, job.like("sm_90"), dtype


@pytest.mark.parametrize("kind", KINDS)
def test_words_become_weights(kind: str) -> None:
    """`decode_words` and `decode_bytes` on arrays, with what `load_rows` loads, against the weights but what multiplies
    their products or sums: with scales above, weights in units of these are rounded."""
    scheme, kernel, dtype = given_weight(kind)
    module = cache.load(streams(kernel, 256)[0])
    torch.manual_seed(0)
    logical = random_weight(scheme, 128, 256)
    packed = LAYOUTS["fragment"].pack(logical)
    words = packed.codes.view(2, 2, 2, -1, 128).numpy().view(np.uint32)  # tiles of rows, steps, halves, lines
    planes = np.split(words, module.FIRSTS.value[1:], 3)
    expected = oracle.decode_values(scheme.format.name)[logical.unpack_codes().long()]
    if kind == "nf4":
        expected = expected.to(dtype).double()
    columns, zeros = min(kernel.columns, 256), None
    if "zero_point" in scheme.fields:
        assert packed.zero_point is not None
        expected = expected - logical.zero_point.double().repeat_interleave(columns, 1)
        zeros = packed.zero_point.view(2, 2, -1, 64).numpy().astype(np.uint32)
    if module.SCALES.value in ("fragments", "pairs"):
        whole = module.PAIRS.value or module.SUPERS.value
        exact = oracle.dequantize(logical) if whole else expected * spread(logical.scale, columns)
        expected = exact.to(dtype).double()
    units = torch.ones(128, 1).double()
    if module.SUPERS.value:
        assert logical.super_scale is not None
        units = logical.super_scale.double()
        units = units.where(units != 0, 1.0)
        expected = ((exact / units).to(dtype) * units).double()

    def lines(values: torch.Tensor | None) -> np.ndarray[Any, Any] | None:
        """Of scales or offsets, of tiles of rows and steps."""
        if values is None or module.SCALES.value not in ("fragments", "pairs"):
            return None
        kind_of = torch.int32 if kernel.quads or values.element_size() == 4 else torch.int16
        bits = by_bytes(values).view(kind_of).view(2, 2, module.GROUPS, -1).numpy()
        return bits.view(np.dtype(f"uint{8 * bits.itemsize}"))

    def supers(values: torch.Tensor | None) -> np.ndarray[Any, Any] | None:
        if values is None or not module.SUPERS.value:
            return None
        return np.repeat(values.float().numpy().view(np.uint32)[:, :, None], 2, 1)

    ring_rows = [lines(packed.scale), zeros, supers(packed.super_scale)]
    ring_rows += [lines(packed.offset), supers(packed.super_offset)]
    language = types.SimpleNamespace(**LANGUAGE, inline_asm_elementwise=plain_assembly)
    names: dict[str, Any] = {"gl": language, "SPARSE": False}
    names |= {
        name: getattr(module, name).value
        for name in (
            *("GROUPED", "BITS", "BYTES", "PLANES", "QUADS", "PRODUCTS", "SYMMETRIC", "NEGATIVE"),
            *("PAIRS", "RUNS", "IN_HALF", "SUPERS", "OFFSET", "SCALE_BITS", "OFFSET_WORDS", "FOUR_WORDS"),
            *("FACTOR", "WORDS", "SCALE_WORDS", "CONSTRAINTS", "DECODED"),
        )
    }
    names |= dict.fromkeys(("QUAD_SLOTS", "SLOTS", "FIRST_PLANE", "SECOND_PLANE", "THIRD_PLANE"))
    names |= dict.fromkeys(("WHLV", "WHL", "WH", "SUM_ROWS", "COMPUTE"))
    for function in (
        *("words_of", "two_rows", "runs_of", "quad_rows", "load_rows", "decode_words", "in_order"),
        *("each_of", "of_runs", "joined", "decode_bytes"),
        *("of_rows", "pairs_of", "pairs_of_group", "load_zeros", "load_pairs"),
        *("each_quad", "super_rows", "load_supers", "load_quads"),
    ):
        names[function] = types.FunctionType(getattr(module, function).fn.__code__, names)
    decode = names["decode_bytes" if module.BYTES.value else "decode_words"]
    for tile, step, half in np.ndindex(2, 2, 2):
        ring_planes = tuple(Values(plane[None, :, step]) for plane in planes)
        others = (None if values is None else Values(values[None, :, step]) for values in ring_rows)
        ring = (None, None, None, ring_planes, *others)
        supers, unit = (), Values(np.ones(64, np.float32))
        if module.SUPERS.value:
            supers, ratio, unit = names["load_supers"](ring, 0, tile, unit)
            assert np.array_equal(ratio.data, 1 / unit.data)
        rows = names["load_rows"](ring, 0, tile, half * module.GROUPS // 2, supers)
        weight = decode(ring, 0, half, tile, rows).data
        found = torch.from_numpy(weight.astype(np.int16)).view(dtype).double() * module.FACTOR.value
        found *= torch.from_numpy(unit.data.astype(np.float64))[:, None]
        place = (slice(64 * tile, 64 * tile + 64), slice(64 * (2 * step + half), 64 * (2 * step + half) + 64))
        inexact = module.OFFSET.value or (module.PAIRS.value and module.SCALE_BITS.value == 32)
        if inexact:
            parts = exact.abs()
            if module.OFFSET.value:  # which may cancel most of what it is added to
                assert logical.offset is not None
                scaled = oracle.dequantize(replace(logical, offset=torch.zeros_like(logical.offset)))
                parts = scaled.abs() + (exact - scaled).abs()
            bound = (1 + module.OFFSET.value) * 2**-8 * exact.abs() + tolerance.PAIR_UNIT * parts
            assert ((found - exact[place]).abs() <= bound[place]).all()
        else:
            assert torch.equal(found, expected[place])


BY_WORDS = [
    *("int4", "int4_asym", "int8_weight_only", "int8", "int4_24", "int8_24"),
    *("nf4", "mxfp4", "nvfp4", "fp8_weight_only"),
]
EPILOGUES = {
    (): [*BY_WORDS, "int3", "int7", "q5_0", "q6_k", "q4_k"],
    ("bias", "silu(a)*b", "add"): ["int4", "int8", "nf4", "int4_24", "q4_k"],
    ("bias", "silu", "mul", "add"): ["int4_asym", "nvfp4", "fp8_weight_only", "int3"],
}
"""Steps, and the presets that are compiled with them; decoders of whole fields are alike but for their bits."""


SPILLS = pytest.mark.xfail(
    tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9), reason="Triton 3.9 spills a word before the loop"
)
CASES = [
    pytest.param(name, steps, id=f"{name}-{steps}", marks=SPILLS if (name, steps) == ("int8_24", ()) else ())
    for steps, names in EPILOGUES.items()
    for name in names
]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_machine_code(name: str, steps: tuple[str, ...]) -> None:
    """Weights are decoded while the product before is under way; nothing in the loop spills.

    With an epilogue in the tile of most sums, which leaves the fewest registers.
    """
    one_of_each = {(kernel.tile.m, kernel.tile.n): kernel for kernel in streams(like(name, (4096, 4096), *steps), 256)}
    kernels = [one_of_each[max(one_of_each)]] if steps else list(one_of_each.values())
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["looped"] == 0, (kernel.tile, found)
        assert steps or found["spills"] == 0, (kernel.tile, found)
        assert found["shared"] <= min(shared_bytes(kernel), device_of("sm_90").shared), (kernel.tile, found)
        tiles = kernel.tile.n // 128
        a_group = f"m{tiles}0" if name == "int8" else ("d0m" if name == "nf4" else "dm1") * (2 * tiles) + "0"
        order, expected = found["order"], 2 * a_group
        if 0 < kernel.super_columns < kernel.k:  # where units change, in a branch, groups wait for all products too
            order, expected = "".join(sorted(order.replace("0", ""))), "".join(sorted(expected.replace("0", "")))
        assert order == expected, (kernel.tile, found)


def test_what_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream_objection(like()) is None
    for other in (
        replace(like(), target="sm_100"),
        replace(like(), columns=32, x_dtype="float16"),
        replace(like(), epilogue=("pairs a*b",)),
        replace(like("fp8_weight_only"), scale_dtype="float8_e8m0fnu"),
        replace(like("int8_weight_only"), x_dtype="float16"),
        replace(like("int8_weight_only"), symmetric=False),
        replace(like("mxfp4"), x_dtype="float16"),
        replace(like("nvfp4"), super_columns=256),
        replace(like("int4_24"), columns=32),
        replace(like("q4_k"), x_dtype="float16"),
        like("q8_0"),
        replace(like("iq4_nl"), weight="nf4"),
        like("fp8"),
        like("fp8_block"),
        like("mxfp8"),
        replace(like("int8"), k=4096 + 8),
        replace(like("int8"), target="sm_100"),
    ):
        assert stream_objection(other) is not None, other
        assert not streams(other, 256)
    assert not streams(like(), 32)
    monkeypatch.setattr(stream_spec, "has_gluon", lambda: False)
    assert "Gluon" in str(stream_objection(like()))
