"""Attention over paged caches and parts of caches, against float64: on CPUs, its meaning in plain torch, the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.attention import reference
from qcompile.codegen.attention_spec import AttentionKernelSpec, AttentionTile, attention_kernel_spec
from qcompile.codegen.devices import device_of
from qcompile.flags import override
from qcompile.kv_cache import SCALES
from qcompile.runtime import attention_gpu, cache
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.kernels.attention_problems import FORMATS, Cache, Problem, problem
from tests.strategies import FLOATS
from tests.triton_interpreter import interpret

PLAIN = ("bfloat16", "float16", "float32")
NAN = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7F, "int8": 0, "int4": 0}
"""A code that is NaN where there is one."""


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


@dataclass
class Paged:
    """A problem whose cache lies in pages, or as it is, of which each sequence attends to a part."""

    whole: Problem
    cache: Cache
    lengths: Tensor
    starts: Tensor | None
    block_table: Tensor | None

    @property
    def places(self) -> dict[str, Tensor | None]:
        return {"start": self.starts, "block_table": self.block_table}

    def operator(self) -> Tensor:
        """What `qcompile.attention` gives where the tensors are."""
        y: Tensor = torch.ops.qcompile.attention(
            self.whole.query, self.cache, self.whole.mask, self.lengths, self.whole.spec.encode(), **self.places
        )
        return y

    def reference(self) -> Tensor:
        spec = self.whole.spec.encode()
        return reference(self.whole.query, self.cache, self.whole.mask, self.lengths, spec, **self.places)

    def kernel(self, target: str, tile: AttentionTile | None = None) -> AttentionKernelSpec:
        query = self.whole.query
        heads, mask = self.cache[0].shape[1], attention_gpu.mask_kind(self.whole.mask)
        reach, context = attention_gpu.reach_of(self.cache, self.lengths, self.starts, self.block_table)
        group, queries = query.shape[1] // heads, query.shape[2]
        if tile is not None and tile.rows:
            queries, reach = 0, replace(reach, sequences=0)
        if tile is None:
            return attention_gpu.choose(
                self.whole.spec, len(query), heads, group, queries, context, mask, reach, query.dtype, target
            )
        return attention_kernel_spec(self.whole.spec, heads, group, queries, mask, reach, query.dtype, target, tile)

    def interpret(self, target: str, tile: AttentionTile) -> Tensor:
        """Run the generated kernel on the CPU."""
        kernel = self.kernel(target, tile)
        function = interpret(cache.load(kernel).kernel)
        given_ = (self.whole.query, self.cache, self.whole.mask, self.lengths, self.starts, self.block_table)
        return attention_gpu.launch(kernel, function, *given_)

    def check_kernel(self, y: Tensor) -> None:
        """`check` with the types that the kernel multiplies in."""
        half = self.whole.query.dtype != torch.float32
        self.check(y, self.whole.query.dtype, torch.bfloat16 if half else torch.float32)

    def check_plain_kernel(self, y: Tensor) -> None:
        """`check` with the type of keys and values, which weights are rounded to."""
        self.check(y, self.whole.query.dtype, self.whole.query.dtype)

    def check_cpu(self, y: Tensor) -> None:
        """`check` with the types that C++ kernels multiply in."""
        multiplied = torch.bfloat16 if self.whole.query.dtype == torch.bfloat16 else torch.float32
        self.check(y, multiplied, multiplied)

    def check(self, y: Tensor, compute: torch.dtype = torch.float32, weights: torch.dtype = torch.float32) -> None:
        """Every element within the derived bound, zeros where nothing is attended to."""
        whole, spec = self.whole, self.whole.spec
        name, offsets = spec.scheme.format.name, not spec.scheme.symmetric
        parts_of = [
            oracle.kv_parts(*whole.cache[i : i + 2], name, half.head_dim, offsets)
            for i, half in ((0, spec.key), (2, spec.value))
        ]
        key, value = (codes + moves for codes, moves in parts_of)
        batch = len(key)
        starts = torch.zeros(batch, dtype=torch.int64) if self.starts is None else self.starts.expand(batch)
        mask = None if whole.mask is None else whole.mask.expand(batch, -1, -1, -1)
        parts = []
        for b, (start, length) in enumerate(zip(starts.tolist(), self.lengths.expand(batch).tolist(), strict=True)):
            one = slice(b, b + 1)
            options = {"scale": spec.scale, "softcap": spec.softcap, "length": length, "start": max(start, 0)}
            own = None if mask is None else mask[one]
            parts.append(oracle.attention(whole.query[one], key[one], value[one], own, **options))
        expected, p, s = (torch.cat(each) for each in zip(*parts, strict=True))
        bound = tolerance.attention_bound(
            whole.query,
            key,
            value,
            p,
            s,
            scale=spec.scale,
            softcap=spec.softcap,
            compute_dtype=compute,
            weight_dtype=weights,
            out_dtype=y.dtype,
            magnitudes=(parts_of[0][0].abs() + parts_of[0][1].abs(), parts_of[1][0].abs() + parts_of[1][1].abs()),
        )
        tolerance.assert_within(y, expected, bound)
        assert not y[(p == 0).all(-1)].any()


def paged(
    kv: str = "fp8_e4m3",
    scales: str = "token",
    lengths: tuple[int, ...] = (17, 1, 32),
    *,
    page: int = 16,
    starts: tuple[int, ...] | None = None,
    shared: int = 0,
    numbers: int = 0,
    in_pages: bool = True,
    **options: object,
) -> Paged:
    """Sequences of these lengths in shuffled pages; what is in no sequence is NaN where the format has it.

    Args:
        shared: pages that the first sequence gives to all others that are as long.
        numbers: of a vector that share a scale; 0 for all.
        in_pages: or one tensor with the context of each.
    """
    batch, most = len(lengths), -(-max(*lengths, 1) // page) + 1
    options = {"mask": "none", "shared": numbers} | options
    whole = problem(kv, scales, batch=batch, context=most * page, **options)  # type: ignore[arg-type]
    for b in range(1, batch):
        same = min(shared, lengths[0] // page, lengths[b] // page) * page
        for t in whole.cache:
            if t.dim() > 2:
                t[b, :, :same] = t[0, :, :same]
    table = torch.full((batch, most), 10**6, dtype=torch.int32)  # entries behind a sequence are not read
    free = torch.randperm(batch * most) + 1
    stored: Cache = []
    for t in whole.cache:
        filler = torch.nan if t.is_floating_point() else NAN[kv]
        stored.append(t.new_full((len(free) + 1, t.shape[1], page, *t.shape[3:]), filler) if t.dim() > 2 else t)
    for b, length in enumerate(lengths):
        for i in range(-(-length // page)):
            given_ = b > 0 and i < min(shared, lengths[0] // page, length // page)
            number = int(table[0, i]) if given_ else int(free[b * most + i])
            table[b, i] = number
            count = min(page, length - i * page)
            for pages, t in zip(stored, whole.cache, strict=True):
                if t.dim() > 2:
                    pages[number, :, :count] = t[b, :, i * page : i * page + count]
    begin = None if starts is None else torch.tensor(starts)
    if not in_pages:
        stored = [t.clone() for t in whole.cache]
        for b, length in enumerate(lengths):
            for t in stored:
                if t.dim() > 2:
                    t[b, :, length:] = torch.nan if t.is_floating_point() else NAN[kv]
    return Paged(whole, stored, torch.tensor(lengths), begin, table if in_pages else None)


@st.composite
def problems(draw: st.DrawFn) -> Paged:
    page = draw(st.sampled_from([1, 8, 16, 32, 64, 48]))
    lengths = tuple(draw(st.lists(st.sampled_from([0, 1, 15, page, 2 * page, 65, 100]), min_size=1, max_size=4)))
    starts = st.lists(st.integers(-3, 70), min_size=len(lengths), max_size=len(lengths))
    sizes = st.sampled_from([2, 16, 24, 64])
    return paged(
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(SCALES)),
        lengths,
        page=page,
        starts=draw(st.none() | starts.map(tuple) | st.integers(0, 40).map(lambda first: (first,))),
        shared=draw(st.integers(0, 3)),
        in_pages=draw(st.sampled_from([True, True, False])),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        queries=draw(st.sampled_from([1, 1, 2, 5])),
        size=draw(sizes),
        value_size=draw(st.none() | sizes),
        dtype=draw(st.sampled_from(FLOATS)),
        mask=draw(st.sampled_from(["none", "none", "causal", "padding", "per head", "additive"])),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
    )


@pytest.mark.parametrize("page", [1, 16, 48, 64])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kv", PLAIN)
def test_pages_of_numbers_as_they_are(kv: str, dtype: torch.dtype, page: int) -> None:
    for queries, starts in ((1, None), (1, (5, 0, 70)), (12, None)):
        options = {"page": page, "starts": starts, "queries": queries, "size": 64, "dtype": dtype, "group": 3}
        given_ = paged(kv, "none", (100, 1, 130), mask="causal" if queries > 1 else "none", **options)
        given_.check_cpu(given_.operator())
        if kv == str(dtype).removeprefix("torch.") and kv != "float32" and page > 1:
            tile = AttentionTile(context=16, split=2, warps=4, stages=2, rows=16 if queries > 8 else 0)
            given_.check_plain_kernel(given_.interpret("sm_90", tile))


@pytest.mark.parametrize("in_pages", [True, False])
@pytest.mark.parametrize("kv", ["fp8_e4m3", *PLAIN])
def test_what_lies_before_the_start_is_not_read(kv: str, in_pages: bool) -> None:
    for dtype in FLOATS:
        starts, options = (37, 5, 70), {"size": 64, "dtype": dtype, "page": 64, "in_pages": in_pages}
        given_ = paged(kv, "none" if kv in PLAIN else "token", (100, 40, 130), starts=starts, **options)
        for b, start in enumerate(starts):
            for t in given_.cache:
                for i in range(start if t.dim() > 2 else 0):
                    table = given_.block_table
                    page, place = (b, i) if table is None else (int(table[b, i // 64]), i % 64)
                    t[page, :, place] = torch.nan if t.is_floating_point() else NAN[kv]
        given_.check_cpu(given_.operator())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_of_numbers_as_they_are_do_not_spill(target: str) -> None:
    kernels = []
    for size, group, queries in ((128, 4, 1), (64, 3, 1), (256, 2, 1), (128, 4, 64)):
        given_ = paged("bfloat16", "none", (5,) * 8, page=64, heads=8, group=group, size=size, dtype=torch.bfloat16)
        if queries == 1:
            tile = attention_gpu.tile_of(64, 16384, size, group, target, sequences=8, page=64)
        else:
            tile = attention_gpu.prefill_tile_of(256, size, target, torch.bfloat16, plain=True)
        kernels.append(given_.kernel(target, tile))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"


@given(problems())
def test_plain(given_: Paged) -> None:
    given_.check_cpu(given_.operator())
    in_range = given_ if given_.block_table is None else replace(given_, block_table=given_.block_table % 10**6)
    in_range.check(in_range.reference())


tiles = st.builds(
    AttentionTile,
    context=st.sampled_from([16, 32, 64]),
    split=st.sampled_from([1, 2, 4, 8]),
    warps=st.just(4),
    stages=st.just(2),
)


@given(problems(), tiles, st.sampled_from(["sm_80", "sm_90", "gfx942"]))
def test_kernel(given_: Paged, tile: AttentionTile, target: str) -> None:
    if tile.split & (tile.split - 1) and not given_.kernel(target, tile).reach.sequences:
        tile = replace(tile, split=4)
    given_.check_kernel(given_.interpret(target, tile))


@pytest.mark.parametrize("page", [16, 64])
def test_every_program_has_a_like_share(page: int) -> None:
    """One long sequence among short ones: many parts, of which the last to arrive adds all in their order."""
    given_ = paged("int8", "token", (700, 1, 0, 64, 130), page=page, heads=2)
    tile = AttentionTile(context=16, split=16, warps=4, stages=2)
    y = given_.interpret("sm_90", tile)
    given_.check_kernel(y)
    assert torch.equal(y, given_.interpret("sm_90", tile))


@pytest.mark.parametrize("starts", [None, (3, 0, 1)])
def test_many_queries(starts: tuple[int, ...] | None) -> None:
    given_ = paged(lengths=(20, 64, 40), queries=12, mask="causal", starts=starts)
    for split in (1, 2, 4):
        tile = AttentionTile(context=16, split=split, warps=4, stages=2, rows=16)
        given_.check_kernel(given_.interpret("sm_90", tile))


def test_formats_that_no_kernel_reads_are_attended_to_by_torch() -> None:
    given_ = paged(lengths=(20, 64, 40), queries=12, mask="causal", starts=(3, 0, 1))
    given_ = replace(given_, block_table=given_.block_table % 10**6)  # type: ignore[operator]
    whole = given_.whole
    y = attention_gpu.in_plain_torch(whole.query, given_.cache, whole.mask, given_.lengths, whole.spec, **given_.places)
    given_.check(y)


@pytest.mark.parametrize("queries", [1, 3])
def test_the_operator_traces(queries: int) -> None:
    given_ = paged(dtype=torch.bfloat16, queries=queries)
    spec = given_.whole.spec.encode()

    def attend(query: Tensor, cache: Cache, lengths: Tensor, table: Tensor) -> Tensor:
        return torch.ops.qcompile.attention(query, cache, None, lengths, spec, block_table=table)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    y = compiled(given_.whole.query, given_.cache, given_.lengths, given_.block_table)
    assert torch.equal(y, given_.operator())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_do_not_spill(target: str) -> None:
    kernels = []
    for kv, scales, size, group, page in (
        ("fp8_e4m3", "tensor", 128, 4, 16),
        ("fp8_e4m3", "token", 128, 4, 64),
        ("int8", "token", 128, 4, 64),
        ("int4", "token", 256, 2, 32),
    ):
        given_ = paged(kv, scales, (5,) * 8, page=page, heads=8, group=group, size=size, dtype=torch.bfloat16)
        tile = attention_gpu.tile_of(64, 16384, size, group, target, sequences=8, page=page)
        kernels.append(given_.kernel(target, tile))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"
        assert target.startswith("gfx") or 16 in found["copies"], "no copies of 16 bytes"
