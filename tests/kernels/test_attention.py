"""Attention over a quantized cache, against float64: the operator on CPUs, and its meaning in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.attention import reference
from qcompile.errors import GradientError
from qcompile.kv_cache import SCALES, AttentionSpec, KVScheme, KVSpec, kv_format, quantize
from qcompile.runtime import attention_cpu
from tests import oracle, tolerance
from tests.strategies import FLOATS

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
MASKS = ("none", "causal", "padding", "additive", "least finite", "per head", "empty rows", "empty")
Cache = list[Tensor]


@dataclass
class Problem:
    """Queries and a cache; what it must give is computed in float64."""

    query: Tensor
    cache: Cache
    mask: Tensor | None
    length: Tensor | None
    spec: AttentionSpec

    def check(self, y: Tensor, compute: torch.dtype = torch.float32, weights: torch.dtype = torch.float32) -> None:
        """Every element within the derived bound, zeros where nothing is attended to."""
        name = self.spec.scheme.format.name
        key = oracle.kv_values(self.cache[0], self.cache[1], name, self.spec.key.head_dim)
        value = oracle.kv_values(self.cache[2], self.cache[3], name, self.spec.value.head_dim)
        length = None if self.length is None else int(self.length)
        options = {"scale": self.spec.scale, "softcap": self.spec.softcap}
        expected, p, s = oracle.attention(self.query, key, value, self.mask, length=length, **options)
        bound = tolerance.attention_bound(
            self.query, key, value, p, s, compute_dtype=compute, weight_dtype=weights, out_dtype=y.dtype, **options
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
) -> Problem:
    scheme = KVScheme(format=kv_format(kv), scales=scales)
    cache: Cache = []
    for width in (size, value_size or size):
        x = torch.randn(batch, heads, context, width)
        scale = {"tensor": torch.tensor(0.02), "head": torch.rand(heads) / 50 + 0.01, "token": None}[scales]
        if scale is not None:
            scale = scale * 448 / scheme.format.absmax
        cache += quantize(x, scheme, scale)
    spec = AttentionSpec(
        key=KVSpec(scheme=scheme, head_dim=size),
        value=KVSpec(scheme=scheme, head_dim=value_size or size),
        scale=size**-0.5,
        softcap=softcap,
    )
    return Problem(
        query=torch.randn(batch, heads * group, queries, size).to(dtype),
        cache=cache,
        mask=make_mask(mask, batch, heads * group, queries, context, dtype),
        length=None if length is None else torch.tensor(length),
        spec=spec,
    )


def on_cpu(given_: Problem) -> Tensor:
    y: Tensor = torch.ops.qcompile.attention(
        given_.query, given_.cache, given_.mask, given_.length, given_.spec.encode()
    )
    return y


def in_plain_torch(given_: Problem) -> Tensor:
    return reference(given_.query, given_.cache, given_.mask, given_.length, given_.spec.encode())


PLAIN: dict[str, Callable[[Problem], Tensor]] = {"cpu": on_cpu, "reference": in_plain_torch}


@st.composite
def problems(draw: st.DrawFn, sizes: tuple[int, ...] = (2, 16, 24, 64)) -> Problem:
    context = draw(st.sampled_from([1, 2, 15, 64, 65, 130]))
    return problem(
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(SCALES)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        queries=draw(st.sampled_from([1, 1, 2, 5, 8])),
        context=context,
        size=draw(st.sampled_from(sizes)),
        value_size=draw(st.none() | st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(FLOATS)),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
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
        on_cpu(given_)


def test_the_operator_traces() -> None:
    given_ = problem(dtype=torch.bfloat16)
    spec = given_.spec.encode()

    def attend(query: Tensor, cache: Cache, mask: Tensor) -> Tensor:
        return torch.ops.qcompile.attention(query, cache, mask, None, spec)

    assert given_.mask is not None
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given_.query, given_.cache, given_.mask), on_cpu(given_))
