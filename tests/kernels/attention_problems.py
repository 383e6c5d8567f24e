"""Problems of attention over a cache, quantized or not: what it must give is computed in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen.attention_spec import AttentionKernelSpec, AttentionTile, attention_kernel_spec
from qcompile.kv_cache import SCALES, AttentionSpec, KVScheme, KVSpec, kv_format, quantize
from qcompile.runtime import attention_gpu, cache
from tests import oracle, tolerance
from tests.strategies import FLOATS
from tests.triton_interpreter import interpret

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
MASKS = ("none", "causal", "padding", "additive", "least finite", "per head", "empty rows", "empty")
QUERIES = (1, 1, 2, 5, 8)
Cache = list[Tensor]


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
