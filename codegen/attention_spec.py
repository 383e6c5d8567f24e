"""Everything that decides the source of a kernel for attention from a few tokens over a cache, as one value."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch

from qcompile.codegen.spec import dtype_name, launches_early, native_fp8
from qcompile.formats import IntegerFormat
from qcompile.kv_cache import AttentionSpec, KVFormat, NumberFormat
from qcompile.powers import power_above

ATTENTION_TEMPLATE = "attention_decode"
PREFILL_TEMPLATE = "attention_prefill"
WARP_GROUPS = ("sm_90", "sm_100", "sm_103")
"""Targets whose matrix units take operands from shared memory."""


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """How the work is cut: a program takes a head of keys and a `split`-th of the context, `context` tokens a time.

    Of sequences of unequal length it takes about a `split`-th of all their tokens together.

    Attributes:
        ways: `warps`, if each warp attends by itself to its part of these tokens, or 1.
        rows: queries of a program, in kernels for many; 0 if it takes all of a head of keys.
        lanes: whether keys and values go from memory to registers, of 16 tokens at a time for each warp.
    """

    context: int
    split: int
    warps: int
    stages: int
    ways: int = 1
    rows: int = 0
    lanes: bool = False


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Which positions a kernel looks at, and where they lie.

    Attributes:
        length, start: whether there is one.
        sequences: a power of two that holds the number of sequences, if they differ in length or start; else 0.
        page: tokens of a page, of a paged cache; else 0.
    """

    length: bool
    start: bool = False
    sequences: int = 0
    page: int = 0


@dataclass(frozen=True, kw_only=True)
class AttentionKernelSpec:
    """A kernel for one shape of attention and one kind of device; batch and context are its arguments.

    Attributes:
        number: name of the number format of keys and values, of 8 or 4 bits; or `x_dtype`, for a cache of that type.
        bits: of a code.
        scales: see `KVScheme`; "none" for a cache that is not quantized.
        group_size, offsets: numbers of a vector that share a scale, 0 for all; whether scales have offsets.
        heads, group, queries: heads of keys; query heads for each; tokens attended from, 0 for any number.
        key_size, value_size: of a head.
        scale, softcap, causal, window: see `AttentionSpec`.
        mask: "none", "boolean" or "added".
        reach: of positions.
        x_dtype: of queries and results.
        in_fp8: whether queries and weights are rounded to E4M3, and codes multiplied as they are.
        target: see `KernelSpec`.
    """

    number: str
    bits: int
    scales: str
    group_size: int
    offsets: bool
    heads: int
    group: int
    queries: int
    key_size: int
    value_size: int
    scale: float
    softcap: float
    causal: bool
    window: int
    mask: str
    reach: Reach
    x_dtype: str
    target: str
    tile: AttentionTile
    in_fp8: bool = False
    template: str = ATTENTION_TEMPLATE

    @property
    def rows(self) -> int:
        """Queries of a program, rounded up to what matrix units take."""
        if self.tile.lanes:
            return 8
        return self.tile.rows or _power(self.group * self.queries)

    def pieces(self, size: int) -> int:
        """Parts of a vector that are multiplied by themselves; of many queries, registers hold 128 elements.

        Lanes put them together themselves.
        """
        if self.tile.lanes:
            return 1
        if self.group_size:
            return size // self.group_size
        return 2 if self.bits == 4 or (self.tile.rows and size > 128 and size % 32 == 0) else 1

    @property
    def part(self) -> int:
        """Numbers that a program leaves for the one that puts parts together."""
        rows = self.tile.rows or power_above(self.group * self.queries)
        pieces = self.pieces(self.value_size)
        return rows * (pieces * _power(self.value_size // pieces) + 2)

    @property
    def compute(self) -> str:
        """The type of queries and weights in products: of 8 bits and less float16, which holds their values exactly."""
        if self.in_fp8:
            return "float8e4nv"
        return self.x_dtype if self.plain or self.x_dtype == "float32" else "float16"

    @property
    def plain(self) -> bool:
        """Whether keys and values are numbers of `x_dtype` themselves."""
        return self.scales == "none"

    @property
    def turned(self) -> bool:
        """Whether values are decoded before they are turned: from 64 rows on, matrix units read them as they lie."""
        few = not self.tile.rows and self.rows < 64
        return few and self.compute == "float16" and not self.plain and self.target.startswith("sm_")

    def constants(self) -> dict[str, object]:
        """Those of the template."""
        keys, values = self.pieces(self.key_size), self.pieces(self.value_size)
        return {
            "BITS": self.bits,
            "NATIVE": self.plain or (self.number.startswith("fp8") and native_fp8(self.target)),
            "SCALES": self.scales,
            "GROUP_SIZE": self.group_size,
            "OFFSETS": self.offsets,
            "HEADS": self.heads,
            "GROUP": self.group,
            "QUERIES": self.queries,
            "KEY_SIZE": self.key_size,
            "VALUE_SIZE": self.value_size,
            "KEY_PIECES": keys,
            "VALUE_PIECES": values,
            "SCALE": self.scale,
            "SOFTCAP": self.softcap,
            "MASK": self.mask,
            "LENGTH": self.reach.length,
            "START": self.reach.start,
            "SEQUENCES": self.reach.sequences,
            "PAGE": self.reach.page,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "COMPUTE": f"tl.{self.compute}",
            "APART": self.in_fp8 and self.target.startswith("sm_"),
            "TURNED": self.turned,
            "DIVIDE": (self.x_dtype == "bfloat16" and not self.plain) or self.in_fp8,
            "PRECISION": "tf32x3" if self.target.startswith("sm_") else "ieee",
            "ROWS": self.rows,
            "BLOCK_K": _power(self.key_size // keys, 32 if self.in_fp8 else 16),
            "BLOCK_V": _power(self.value_size // values),
            "BLOCK_T": self.tile.context,
            "WAYS": self.tile.ways,
            "SPLIT": self.tile.split,
            "LANES": self.tile.lanes,
            "EARLY": launches_early(self.target),
        }

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def _power(size: int, least: int = 16) -> int:
    """The power of two that holds a size, from the least that matrix units take on."""
    return max(least, power_above(size))


def decode_attention_kernel_spec(text: str) -> AttentionKernelSpec:
    """The inverse of `AttentionKernelSpec.encode`."""
    given = json.loads(text)
    return AttentionKernelSpec(**{**given, "tile": AttentionTile(**given["tile"]), "reach": Reach(**given["reach"])})


def reads(fmt: KVFormat, x_dtype: torch.dtype) -> bool:
    """Whether the templates read a format: codes of numbers, or 16-bit numbers of the queries' type."""
    return isinstance(fmt, NumberFormat) or (fmt.dtype == x_dtype and x_dtype in (torch.bfloat16, torch.float16))


def lanes_objection(spec: AttentionSpec, rows: int, page: int, x_dtype: torch.dtype, target: str) -> str | None:
    """Why a tile may not have `lanes`, or None.

    Args:
        rows: queries of a head of keys.
        page: tokens of a page, of a paged cache; else 0.
    """
    fmt, sizes, scheme = spec.scheme.format, (spec.key.head_dim, spec.value.head_dim), spec.scheme
    in_fp8 = isinstance(fmt, NumberFormat) and fmt.name.startswith("fp8") and native_fp8(target)
    in_four_bits = has_integers(fmt) and fmt.name == "int4" and target.startswith("sm_")
    if not (in_fp8 or in_four_bits):
        return "codes are neither int4 nor FP8 that the target converts"
    if scheme.compute == "fp8" or x_dtype not in (torch.bfloat16, torch.float16):
        return "products are not of float16"
    if in_fp8 and scheme.scales == "token":
        return "tokens of FP8 have scales"
    if scheme.group and scheme.group < 32:  # eight threads have words of a value
        return "groups are of fewer than 32"
    taken = (64, 128) if in_fp8 else (64, 128, 256)  # of 256 bytes, registers do not hold
    if rows > 8 or not all(size in taken for size in sizes):
        return f"there are more than 8 queries, or vectors are not of {', '.join(map(str, taken))}"
    return "a page is not of whole 16 tokens" if page % 16 else None


def has_integers(fmt: KVFormat) -> bool:
    """Whether codes are integers."""
    return isinstance(fmt, NumberFormat) and isinstance(fmt.number, IntegerFormat)


def attention_kernel_spec(
    spec: AttentionSpec,
    heads: int,
    group: int,
    queries: int,
    mask: str,
    reach: Reach,
    x_dtype: torch.dtype,
    target: str,
    tile: AttentionTile,
) -> AttentionKernelSpec:
    """The kernel for a cache that it `reads`, from at most `MOST_QUERIES` and `MOST_ROWS` unless the tile has rows.

    Args:
        queries: 0 if the tile has rows.
    """
    fmt, stored = spec.scheme.format, None
    if not spec.scheme.plain:
        assert isinstance(fmt, NumberFormat)
        stored = fmt.number
    return AttentionKernelSpec(
        number=fmt.name if stored is None else stored.name,
        bits=16 if stored is None else stored.bits,
        scales=spec.scheme.scales,
        group_size=spec.scheme.group,
        offsets=not spec.scheme.symmetric,
        heads=heads,
        group=group,
        queries=queries,
        key_size=spec.key.head_dim,
        value_size=spec.value.head_dim,
        scale=spec.scale,
        softcap=spec.softcap,
        causal=spec.causal,
        window=spec.window,
        mask=mask,
        reach=reach,
        x_dtype=dtype_name(x_dtype),
        target=target,
        tile=tile,
        in_fp8=spec.scheme.compute == "fp8",
        template=PREFILL_TEMPLATE if tile.rows else ATTENTION_TEMPLATE,
    )
