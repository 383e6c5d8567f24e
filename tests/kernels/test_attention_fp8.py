"""Attention over FP8 caches that multiplies in FP8, against float64: its meaning in plain torch, the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.attention import check_compute, reference
from qcompile.codegen.attention_spec import AttentionTile
from qcompile.codegen.devices import device_of
from qcompile.errors import ConfigError, DeviceError
from qcompile.flags import override
from qcompile.kv_cache import SCALES, decode_attention_spec, parse_kv_cache
from qcompile.runtime import attention_gpu, cache, gpu
from tests import oracle
from tests.cross_compile import measure
from tests.kernels.attention_problems import MASKS, Problem, problem
from tests.strategies import FLOATS

FORMATS = ("fp8_e4m3", "fp8_e5m2")
SMALL = AttentionTile(context=32, split=2, warps=4, stages=2)


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def e4m3_queries(given_: Problem) -> Problem:
    """With queries that the kernel need not round: E4M3 times 1/128, of which one in each is the greatest."""
    query = (given_.query.float() * 100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    query[..., 0] = 448.0
    return replace(given_, query=(query / 128).to(given_.query.dtype))


@st.composite
def problems(draw: st.DrawFn, queries: tuple[int, ...]) -> Problem:
    context, causal = draw(st.sampled_from([1, 2, 15, 64, 65, 130])), draw(st.booleans())
    sizes = st.sampled_from([2, 16, 24, 64])
    given_ = problem(
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(SCALES)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 3, 8])),
        queries=draw(st.sampled_from(queries)),
        context=context,
        size=draw(sizes),
        value_size=draw(st.none() | sizes),
        dtype=draw(st.sampled_from(FLOATS)),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        causal=causal,
        window=draw(st.sampled_from([0, 0, 1, 20])) if causal else 0,
        compute="fp8",
    )
    return e4m3_queries(given_) if draw(st.booleans()) else given_


def in_plain_torch(given_: Problem) -> Tensor:
    return reference(given_.query, given_.cache, given_.mask, given_.length, given_.spec.encode())


@given(problems((1, 5, 40)))
def test_reference(given_: Problem) -> None:
    given_.check_fp8(in_plain_torch(given_))


tiles = st.builds(
    AttentionTile,
    context=st.sampled_from([32, 64]),
    split=st.sampled_from([1, 4]),
    warps=st.just(4),
    stages=st.just(2),
)
prefill_tiles = st.builds(replace, tiles, split=st.just(1), rows=st.sampled_from([16, 64]))
targets = st.sampled_from(["sm_89", "sm_90", "gfx950"])


@given(problems((1, 1, 2, 8)), tiles, targets)
def test_kernel(given_: Problem, tile: AttentionTile, target: str) -> None:
    given_.check_kernel(given_.interpret(target, tile))


@given(problems((1, 9, 40)), prefill_tiles, targets)
def test_kernel_for_many_queries(given_: Problem, tile: AttentionTile, target: str) -> None:
    given_.check_kernel(given_.interpret(target, tile))


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("rows", [0, 16])
def test_one_position_gives_its_value(kv: str, rows: int) -> None:
    """Of a score of 0 the weight is 256, which E4M3 has: bit for bit the value, of every code."""
    count = 8
    given_ = problem(kv, "tensor", batch=1, heads=1, group=1, queries=count, context=count, size=64, compute="fp8")
    for codes in (given_.cache[0], given_.cache[2]):
        codes.view(-1).copy_(torch.arange(codes.numel()) % 256)
        codes.masked_fill_(~oracle.kv_values(codes, torch.ones(()), kv, 64).isfinite(), 0)
    given_ = replace(given_, query=given_.query * 0, mask=torch.eye(count, dtype=torch.bool))
    value = oracle.kv_values(given_.cache[2], given_.cache[3], kv, 64)
    y = given_.interpret("sm_90", replace(SMALL, split=1, rows=rows))
    assert torch.equal(y.double(), value.float().double())
    assert torch.equal(in_plain_torch(given_).double(), value.float().double())


@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e4])
def test_queries_of_any_magnitude(factor: float) -> None:
    given_ = problem(mask="none", compute="fp8")
    given_ = replace(given_, query=given_.query * factor)
    y = given_.interpret("sm_90", SMALL)
    assert y.isfinite().all()
    given_.check_kernel(y)


def test_queries_that_are_not_numbers_give_none() -> None:
    given_ = problem(mask="none", compute="fp8")
    given_.query[0, 0, 0, 5], given_.query[1, 3, 0, 0] = torch.nan, torch.inf
    for y in (given_.interpret("sm_90", SMALL), in_plain_torch(given_)):
        assert y[0, 0].isnan().all()
        assert y[1, 3].isnan().all()
        assert y[0, 1:].isfinite().all()


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_100", "gfx950"])
def test_cross_compiled_kernels_multiply_in_fp8_and_do_not_spill(target: str) -> None:
    kernels = []
    for kv, scales, size, group, queries in (
        ("fp8_e4m3", "tensor", 128, 4, 1),
        ("fp8_e5m2", "token", 64, 8, 8),
        ("fp8_e4m3", "head", 256, 2, 1),
    ):
        given_ = problem(
            kv,
            scales,
            heads=8,
            group=group,
            queries=queries,
            size=size,
            mask="none",
            length=1,
            causal=True,
            compute="fp8",
        )
        given_ = replace(given_, query=given_.query.to(torch.bfloat16))
        rows = group * queries
        for tile in (
            attention_gpu.tile_of(8, 16384, size, rows, target, in_fp8=True),
            attention_gpu.prefill_tile_of(4096, size, target, torch.bfloat16, in_fp8=True),
        ):
            kernels.append(given_.kernel(target, tile))
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= (99 * 1024 if target == "sm_89" else device_of(target).shared), (kernel, found)
        if kernel.rows >= 64 or target in ("sm_89", "gfx942"):  # else Triton has FP8 products by warp groups alone
            assert any(name in found["mma"] for name in ("e4m3", "f8f6f4", "fp8")), (kernel, found)


def test_configuration() -> None:
    given_ = {"format": "fp8_e4m3", "scales": "token", "rotate": True, "compute": "fp8"}
    scheme = parse_kv_cache(given_)
    assert scheme is not None
    assert scheme.to_config() == given_
    assert "multiplied in FP8" in str(scheme)
    spec = problem(compute="fp8").spec
    assert decode_attention_spec(spec.encode()) == spec
    for wrong, message in (
        ({"format": "fp8", "compute": "fp4"}, 'compute must be "fp8"'),
        ({"format": "int8", "compute": "fp8"}, "multiplies codes of FP8, not of int8"),
        ({"format": "fp8", "scales": "token", "group": 32, "compute": "fp8"}, "have no groups"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_kv_cache(wrong)


def test_devices_without_such_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = problem(compute="fp8")
    with pytest.raises(
        DeviceError, match='attention: the KV cache has "compute": "fp8", and cpu does not multiply FP8'
    ):
        torch.ops.qcompile.attention(given_.query, given_.cache, given_.mask, None, given_.spec.encode())
    for target, served in (("sm_80", False), ("sm_89", True), ("gfx942", False), ("gfx950", True)):
        monkeypatch.setattr(gpu, "target_of", lambda _, target=target: target)
        if served:
            check_compute(given_.spec.scheme, torch.device("cuda"), "attention")
            continue
        with pytest.raises(DeviceError, match=f"attention of layer 3: .* {target} does not multiply FP8 .* leave"):
            check_compute(given_.spec.scheme, torch.device("cuda"), "attention of layer 3")
