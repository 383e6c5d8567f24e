"""Attention over a cache, against float64: by torch on CPUs, its meaning in plain torch, the Triton kernel.

For the C++ kernels see `test_cpp_attention.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.attention import reference
from qcompile.codegen.attention_spec import AttentionKernelSpec, AttentionTile, Reach, attention_kernel_spec
from qcompile.codegen.cost_model import device_of
from qcompile.codegen.render import render
from qcompile.codegen.spec import decode_kernel_spec
from qcompile.errors import GradientError
from qcompile.flags import override
from qcompile.kv_cache import SCALES, AttentionSpec, KVScheme, KVSpec, kv_format, quantize
from qcompile.runtime import attention_cpu, attention_gpu, cache
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.strategies import FLOATS
from tests.triton_interpreter import interpret

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
MASKS = ("none", "causal", "padding", "additive", "least finite", "per head", "empty rows", "empty")
QUERIES = (1, 1, 2, 5, 8)
Cache = list[Tensor]


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


@dataclass
class Problem:
    """Queries and a cache; what it must give is computed in float64."""

    query: Tensor
    cache: Cache
    mask: Tensor | None
    length: Tensor | None
    spec: AttentionSpec

    def kernel(self, target: str, tile: AttentionTile) -> AttentionKernelSpec:
        heads, queries = self.cache[0].shape[1], 0 if tile.rows else self.query.shape[2]
        group, mask = self.query.shape[1] // heads, attention_gpu.mask_kind(self.mask)
        reach, _ = attention_gpu.reach_of(self.cache, self.length, None, None)
        return attention_kernel_spec(self.spec, heads, group, queries, mask, reach, self.query.dtype, target, tile)

    def interpret(self, target: str, tile: AttentionTile) -> Tensor:
        """Run the generated kernel on the CPU."""
        kernel = self.kernel(target, tile)
        function = interpret(cache.load(kernel).kernel)
        return attention_gpu.launch(kernel, function, self.query, self.cache, self.mask, self.length)

    def check_kernel(self, y: Tensor) -> None:
        """`check` with what the kernel does: codes are multiplied exactly, and weights in float16 or E4M3."""
        if self.spec.scheme.compute == "fp8":
            self.check_fp8(y)
            return
        half = self.query.dtype != torch.float32
        step = 2.0**-25 if self.query.dtype == torch.bfloat16 else 0.0  # float16's at 1
        self.check(y, torch.float16 if half else torch.float32, step)

    def check_fp8(self, y: Tensor, accumulate: float = tolerance.ACCUMULATE_UNIT) -> None:
        """`check` of products in FP8; queries are rounded unless they are E4M3 in 448ths of their greatest element."""
        query = self.query.double()
        unit = query.abs().amax(-1, keepdim=True) / 448
        exact = bool(((query / unit).to(torch.float8_e4m3fn).double() * unit == query).all())
        scale = self.cache[3].double()
        codes = oracle.kv_values(self.cache[2], torch.ones(()), self.spec.scheme.format.name, self.spec.value.head_dim)
        greatest = scale.amax(-1)[:, :, None, None] if scale.dim() == 3 else scale.reshape(1, -1, 1, 1)
        self.check(
            y,
            torch.float8_e4m3fn,
            # Of a unit eta / 2 is lost below the normal numbers, and in the normal ones 2^-4 of each.
            query_step=0.0 if exact else 2.0**-10 / 448,
            query_unit=0.0 if exact else tolerance.unit(torch.float8_e4m3fn) * (1 + 2.0**-20),
            weight_step=2.0**-10 / 256,  # weights are at most 256
            weighted=codes.abs() * greatest,
            accumulate_unit=accumulate,
        )

    def check(
        self,
        y: Tensor,
        weights: torch.dtype = torch.float32,
        query_step: float = 0.0,
        compute: torch.dtype = torch.float32,
        **more: Any,
    ) -> None:
        """Every element within the derived bound, zeros where nothing is attended to."""
        name, offsets = self.spec.scheme.format.name, not self.spec.scheme.symmetric
        key_parts = oracle.kv_parts(self.cache[0], self.cache[1], name, self.spec.key.head_dim, offsets)
        value_parts = oracle.kv_parts(self.cache[2], self.cache[3], name, self.spec.value.head_dim, offsets)
        key, value = sum(key_parts), sum(value_parts)
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        spec, length = self.spec, None if self.length is None else int(self.length)
        options = {"scale": spec.scale, "softcap": spec.softcap}
        positions = {"length": length, "causal": spec.causal, "window": spec.window}
        expected, p, s = oracle.attention(self.query, key, value, self.mask, **positions, **options)
        bound = tolerance.attention_bound(
            self.query,
            key,
            value,
            p,
            s,
            compute_dtype=compute,
            weight_dtype=weights,
            out_dtype=y.dtype,
            query_step=query_step,
            magnitudes=(key_parts[0].abs() + key_parts[1].abs(), value_parts[0].abs() + value_parts[1].abs()),
            **options,
            **more,
        )
        assert y.shape == expected.shape
        assert y.dtype == self.query.dtype
        tolerance.assert_within(y, expected, bound)
        assert not y[(p == 0).all(-1)].any()


def make_mask(kind: str, batch: int, heads: int, queries: int, context: int, dtype: torch.dtype) -> Tensor | None:
    position = torch.arange(context)
    last = context - queries + torch.arange(queries)
    causal = position <= last[:, None]
    if kind == "none":
        return None
    if kind == "causal":
        return causal[None, None]
    if kind == "padding":
        return (causal & (position >= torch.randint(0, context, (batch, 1, 1))))[:, None]
    if kind == "additive":
        return torch.randn(batch, 1, queries, context).masked_fill(~causal, -torch.inf).to(dtype)
    if kind == "least finite":
        return torch.zeros(1, 1, queries, context, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)
    if kind == "per head":
        return torch.rand(batch, heads, queries, context) < 0.7
    if kind == "empty rows":
        return (torch.rand(batch, 1, queries, 1) < 0.5) & causal
    return torch.zeros(1, 1, 1, context, dtype=torch.bool)


def problem(
    kv: str = "fp8_e4m3",
    scales: str = "token",
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    queries: int = 1,
    context: int = 40,
    size: int = 32,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: str = "causal",
    length: int | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    shared: int = 0,
    symmetric: bool = True,
    compute: str | None = None,
) -> Problem:
    scheme = KVScheme(format=kv_format(kv), scales=scales, group=shared, symmetric=symmetric, compute=compute)
    cache: Cache = []
    for width in (size, value_size or size):
        x = torch.randn(batch, heads, context, width)
        scale = {"tensor": torch.tensor(0.02), "head": torch.rand(heads) / 50 + 0.01}.get(scales)
        if scheme.plain:
            scale = torch.ones(())
        elif scale is not None:
            scale = scale * 448 / scheme.format.absmax
        cache += quantize(x, scheme, scale)
    spec = AttentionSpec(
        key=KVSpec(scheme=scheme, head_dim=size),
        value=KVSpec(scheme=scheme, head_dim=value_size or size),
        scale=size**-0.5,
        softcap=softcap,
        causal=causal,
        window=window,
    )
    return Problem(
        query=torch.randn(batch, heads * group, queries, size).to(dtype),
        cache=cache,
        mask=make_mask(mask, batch, heads * group, queries, context, dtype),
        length=None if length is None else torch.tensor(length),
        spec=spec,
    )


def on_cpu(given_: Problem) -> Tensor:
    context = given_.cache[0].shape[2]
    end = context if given_.length is None else int(given_.length)
    part = [t[:, :, :end] if t.dim() > 2 else t for t in given_.cache]
    mask = None if given_.mask is None else given_.mask.expand(*given_.mask.shape[:-1], context)[..., :end]
    return attention_cpu.in_stretches(given_.query, part, mask, given_.spec)


def operator(given_: Problem) -> Tensor:
    spec = given_.spec.encode()
    y: Tensor = torch.ops.qcompile.attention(given_.query, given_.cache, given_.mask, given_.length, spec)
    return y


def in_plain_torch(given_: Problem) -> Tensor:
    return reference(given_.query, given_.cache, given_.mask, given_.length, given_.spec.encode())


PLAIN: dict[str, Callable[[Problem], Tensor]] = {"cpu": on_cpu, "reference": in_plain_torch}


@st.composite
def problems(draw: st.DrawFn, sizes: tuple[int, ...] = (2, 16, 24, 64), queries: tuple[int, ...] = QUERIES) -> Problem:
    context = draw(st.sampled_from([1, 2, 15, 64, 65, 130]))
    kv, scales = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(SCALES))
    compact, causal = scales == "token" and draw(st.booleans()), draw(st.booleans())
    if compact:
        sizes = (32, 64)
    return problem(
        kv,
        scales,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        queries=draw(st.sampled_from(queries)),
        context=context,
        size=draw(st.sampled_from(sizes)),
        value_size=draw(st.none() | st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(FLOATS)),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        causal=causal,
        window=draw(st.sampled_from([0, 0, 1, 20])) if causal else 0,
        shared=draw(st.sampled_from([0, 16])) if compact else 0,
        symmetric=not (compact and kv.startswith("int") and draw(st.booleans())),
    )


@pytest.mark.parametrize("how", PLAIN)
@given(given_=problems())
def test_plain(how: str, given_: Problem) -> None:
    given_.check(PLAIN[how](given_))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("how", PLAIN)
def test_every_mask(how: str, mask: str) -> None:
    given_ = problem(mask=mask, queries=3)
    given_.check(PLAIN[how](given_))


@pytest.mark.parametrize("how", PLAIN)
def test_context_of_one_gives_the_value(how: str) -> None:
    given_ = problem(context=1, group=1, mask="none")
    y = PLAIN[how](given_)
    value = oracle.kv_values(given_.cache[2], given_.cache[3], "fp8_e4m3", 32)
    assert torch.equal(y.double(), value.float().double())


@pytest.mark.parametrize("how", PLAIN)
def test_what_lies_behind_the_length_is_not_read(how: str) -> None:
    given_ = problem("fp8_e4m3", "token", length=17, mask="none")
    before = PLAIN[how](given_)
    for codes, scale in (given_.cache[:2], given_.cache[2:]):
        codes[:, :, 17:] = 0x7F  # NaN
        scale[:, :, 17:] = torch.nan
    assert torch.equal(PLAIN[how](given_), before)


def test_blocks_do_not_change_the_result_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = problem("int8", context=700, queries=2)
    for block in (1, 16, 699, 4096):
        monkeypatch.setattr(attention_cpu, "BLOCK", block)
        given_.check(on_cpu(given_))


def test_rotated_vectors_give_what_their_numbers_give() -> None:
    """Rotation of queries and results against the reference, which turns keys and values back."""
    given_ = problem("int8", queries=3, context=50, size=24)
    scheme = replace(given_.spec.scheme, rotate=True)
    halves = {name: KVSpec(scheme=scheme, head_dim=24) for name in ("key", "value")}
    given_ = replace(given_, spec=replace(given_.spec, **halves))
    one, two = operator(given_), in_plain_torch(given_)
    magnitude = oracle.kv_values(given_.cache[2], given_.cache[3], "int8", 24).abs().amax() * torch.ones_like(two)
    tolerance.assert_within(one, two, tolerance.float_bound(two, 8 * 50, torch.float32, magnitude * 24))


def test_a_long_context_is_stable() -> None:
    given_ = problem("fp8_e4m3", "tensor", batch=1, heads=1, group=1, context=65536, size=16, mask="none")
    given_.query *= 30
    given_.check(on_cpu(given_))


def test_scores_far_apart_do_not_overflow() -> None:
    given_ = problem("int8", context=64)
    given_ = replace(given_, query=given_.query * 1e4)
    given_.check(on_cpu(given_))
    assert on_cpu(given_).isfinite().all()


def test_autograd_is_refused() -> None:
    given_ = problem()
    given_.query.requires_grad_(True)
    with pytest.raises(GradientError, match="KV cache is for inference only"):
        torch.ops.qcompile.attention(given_.query, given_.cache, given_.mask, None, given_.spec.encode())


def test_the_operator_traces() -> None:
    given_ = problem(dtype=torch.bfloat16)
    spec = given_.spec.encode()

    def attend(query: Tensor, cache: Cache, mask: Tensor) -> Tensor:
        return torch.ops.qcompile.attention(query, cache, mask, None, spec)

    assert given_.mask is not None
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    given = given_.query, given_.cache, given_.mask
    assert torch.equal(compiled(*given), attend(*given))


SMALL = AttentionTile(context=16, split=1, warps=4, stages=2)
tiles = st.builds(
    AttentionTile,
    context=st.sampled_from([16, 32, 64]),
    split=st.sampled_from([1, 2, 4]),
    warps=st.just(4),
    stages=st.just(2),
)


@given(problems(), tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel(given_: Problem, tile: AttentionTile, target: str) -> None:
    given_.check_kernel(given_.interpret(target, tile))


prefill_tiles = st.builds(
    AttentionTile,
    context=st.sampled_from([16, 64]),
    split=st.sampled_from([1, 2, 8]),
    warps=st.just(4),
    stages=st.just(2),
    rows=st.sampled_from([16, 64]),
)


@given(problems(queries=(1, 9, 40)), prefill_tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel_for_many_queries(given_: Problem, tile: AttentionTile, target: str) -> None:
    given_.check_kernel(given_.interpret(target, tile))


def test_few_programs_share_a_long_context() -> None:
    choose, options = attention_gpu.choose_prefill, ("none", Reach(length=True), torch.bfloat16, "sm_90")
    spec = problem("fp8_e4m3", size=128, compute=None).spec
    splits = {
        shape: choose(spec, batch, 8, 4, queries, context, *options).tile.split
        for shape in ((1, 32, 16384), (1, 9, 256), (4, 32, 16384), (1, 2048, 2048))
        for batch, queries, context in (shape,)
    }
    assert splits == {(1, 32, 16384): 16, (1, 9, 256): 1, (4, 32, 16384): 4, (1, 2048, 2048): 1}


@pytest.mark.parametrize("ways", [1, 4])
def test_warps_that_attend_by_themselves(ways: int) -> None:
    given_ = problem("int4", queries=3, context=200, size=64, dtype=torch.bfloat16, shared=32, symmetric=False)
    given_.check_kernel(given_.interpret("sm_90", AttentionTile(context=64, split=2, warps=4, stages=2, ways=ways)))


@pytest.mark.parametrize("queries", [1, 8, 40])
def test_what_positions_say_needs_no_mask(queries: int) -> None:
    """A mask that says the same gives the same."""
    given_ = problem("int8", queries=queries, context=100, mask="none", length=77, causal=True, window=30)
    position, last = torch.arange(100), 77 - queries + torch.arange(queries)[:, None]
    mask = (position <= last) & (position > last - 30)
    other = replace(given_, mask=mask, spec=replace(given_.spec, causal=False, window=0))
    assert torch.equal(in_plain_torch(given_), in_plain_torch(other))
    tile = replace(SMALL, rows=32 if queries > 8 else 0)
    for one, two in (
        (on_cpu(given_), on_cpu(other)),
        (operator(given_), operator(other)),
        (given_.interpret("sm_90", tile), other.interpret("sm_90", tile)),
    ):
        tolerance.assert_within(one, two, tolerance.float_bound(two, 8 * 100, torch.float32, two.abs() + 4))


@pytest.mark.parametrize("mask", MASKS)
def test_kernel_with_every_mask(mask: str) -> None:
    given_ = problem("int4", mask=mask, queries=3)
    given_.check_kernel(given_.interpret("sm_90", replace(SMALL, split=2)))


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernel_decodes_every_code(kv: str, target: str) -> None:
    """One position attended to by each query gives its value."""
    count = 8
    given_ = problem(kv, "tensor", batch=1, heads=1, group=1, queries=count, context=count, size=64)
    for codes in (given_.cache[0], given_.cache[2]):
        codes.view(-1).copy_(torch.arange(codes.numel()) % 256)
    given_ = replace(given_, mask=torch.eye(count, dtype=torch.bool))
    value = oracle.kv_values(given_.cache[2], torch.ones(()), kv, 64)
    for codes in (given_.cache[0], given_.cache[2]):
        codes.masked_fill_(~value.isfinite() if codes.shape[-1] == 64 else torch.tensor(False), 0)
    value = oracle.kv_values(given_.cache[2], given_.cache[3], kv, 64)
    y = given_.interpret(target, SMALL)
    assert torch.equal(y.double(), value.float().double())


def test_the_kernels_file_makes_itself_again() -> None:
    kernel = problem().kernel("sm_90", SMALL)
    source = render(kernel)
    line = next(line for line in source.splitlines() if line.startswith("# {"))
    assert decode_kernel_spec(line.removeprefix("# ")) == kernel
    assert render(kernel) == source


@given(st.integers(1, 4096), st.integers(1, 1 << 18), st.sampled_from([64, 128, 256]), st.integers(1, 64))
def test_every_part_of_the_context_has_work(pairs: int, context: int, size: int, rows: int) -> None:
    tile = attention_gpu.tile_of(pairs, context, size, rows, "sm_90")
    assert tile.split == 1 or tile.split * tile.context <= context


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_do_not_spill(target: str) -> None:
    kernels = [
        plain_problem(heads=8, group=group, queries=queries, size=size, mask="causal", dtype=dtype).kernel(target)
        for group, queries, size, dtype in (
            (4, 1, 128, torch.bfloat16),
            (8, 8, 64, torch.float16),
            (2, 1, 256, torch.float16),
        )
    ]
    for kv, scales, size, group, queries, mask in (
        ("fp8_e4m3", "tensor", 128, 4, 1, "causal"),
        ("fp8_e5m2", "token", 64, 8, 8, "causal"),
        ("int4", "head", 256, 2, 1, "additive"),
    ):
        given_ = problem(
            kv,
            scales,
            heads=8,
            group=group,
            queries=queries,
            size=size,
            mask=mask,
            length=1,
            dtype=torch.bfloat16,
        )
        kernels.append(given_.kernel(target, attention_gpu.tile_of(8, 16384, size, group * queries, target)))
        bare = replace(given_, mask=None, spec=replace(given_.spec, causal=True))
        tile = attention_gpu.prefill_tile_of(4096, size, target, torch.bfloat16)
        kernels += [bare.kernel(target, replace(tile, split=split)) for split in (1, 8)]
    rich = problem("int4", heads=8, group=4, size=128, mask="none", causal=True, shared=32, symmetric=False)
    rich = replace(rich, query=rich.query.to(torch.bfloat16))
    tile = attention_gpu.tile_of(8, 16384, 128, 4, target, integers=True, grouped=True)
    kernels.append(rich.kernel(target, tile))
    kernels.append(rich.kernel(target, attention_gpu.prefill_tile_of(4096, 128, target, torch.bfloat16, grouped=True)))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        # Putting the parts of many rows together may, once a program.
        counted = "looped" if kernel.tile.rows and kernel.tile.split > 1 and target.startswith("sm_") else "spills"
        assert found[counted] == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"


@dataclass
class Plain:
    """Queries, and keys and values of their type."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    length: Tensor | None
    scale: float
    causal: bool = False
    window: int = 0

    def kernel(self, target: str, tile: AttentionTile | None = None) -> AttentionKernelSpec:
        batch, heads, context, size = self.key.shape
        sizes, group = (size, self.value.shape[3]), self.query.shape[1] // heads
        queries, kind = self.query.shape[2], attention_gpu.mask_kind(self.mask)
        kernel = attention_gpu.choose_plain(
            batch,
            heads,
            group,
            queries,
            context,
            sizes,
            self.scale,
            kind,
            self.length is not None,
            self.query.dtype,
            target,
        )
        return kernel if tile is None else replace(kernel, tile=tile)

    def interpret(self, target: str, tile: AttentionTile) -> Tensor:
        """Run the generated kernel on the CPU."""
        kernel, tensors = self.kernel(target, tile), [self.key, self.key, self.value, self.value]
        function = interpret(cache.load(kernel).kernel)
        return attention_gpu.launch(kernel, function, self.query, tensors, self.mask, self.length)

    def operator(self) -> Tensor:
        """What `qcompile.attention_plain` gives where the tensors are."""
        y: Tensor = torch.ops.qcompile.attention_plain(
            self.query, self.key, self.value, self.mask, self.length, self.scale, self.causal, self.window
        )
        return y

    def check(self, y: Tensor) -> None:
        """Every element within the derived bound, zeros where nothing is attended to."""
        length = None if self.length is None else int(self.length)
        positions = {"length": length, "causal": self.causal, "window": self.window}
        given_ = (self.query, self.key, self.value, self.mask)
        expected, p, s = oracle.attention(*given_, scale=self.scale, **positions)
        bound = tolerance.attention_bound(
            self.query,
            self.key.double(),
            self.value.double(),
            p,
            s,
            compute_dtype=y.dtype,
            weight_dtype=y.dtype,
            out_dtype=y.dtype,
            scale=self.scale,
        )
        tolerance.assert_within(y, expected, bound)
        assert not y[(p == 0).all(-1)].any()


def plain_problem(
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    queries: int = 1,
    context: int = 40,
    size: int = 32,
    value_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mask: str = "causal",
    length: int | None = None,
    causal: bool = False,
    window: int = 0,
) -> Plain:
    return Plain(
        query=torch.randn(batch, heads * group, queries, size).to(dtype),
        key=torch.randn(batch, heads, context, size).to(dtype),
        value=torch.randn(batch, heads, context, value_size or size).to(dtype),
        mask=make_mask(mask, batch, heads * group, queries, context, dtype),
        length=None if length is None else torch.tensor(length),
        scale=size**-0.5,
        causal=causal,
        window=window,
    )


@st.composite
def plain_problems(draw: st.DrawFn) -> Plain:
    sizes = st.sampled_from([2, 16, 24, 64])
    context = draw(st.sampled_from([1, 2, 15, 64, 65, 130]))
    return plain_problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        queries=draw(st.sampled_from([1, 1, 2, 5, 8])),
        context=context,
        size=draw(sizes),
        value_size=draw(st.none() | sizes),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
    )


@given(plain_problems(), tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel_for_a_cache_that_is_not_quantized(given_: Plain, tile: AttentionTile, target: str) -> None:
    given_.check(given_.interpret(target, tile))


@pytest.mark.parametrize("split", [1, 2])
def test_plain_keys_behind_the_length_are_not_read(split: int) -> None:
    given_ = plain_problem(length=17, mask="none")
    tile = replace(SMALL, split=split)
    before = given_.interpret("sm_90", tile)
    for tensor in (given_.key, given_.value):
        tensor[:, :, 17:] = torch.nan
    assert torch.equal(given_.interpret("sm_90", tile), before)


def test_a_step_in_a_graph_is_few_kernels_and_one_call() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kv_cache.fake_gpu_step", "fp8", "3"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    launched = [line for line in done.stdout.splitlines() if ".run(" in line or "torch.ops.qcompile" in line]
    assert "torch.ops.qcompile.attention_gpu" in launched[-1]
    assert all(line.startswith("triton_poi_") for line in launched[:-1])
    assert "scaled_dot_product" not in done.stdout
