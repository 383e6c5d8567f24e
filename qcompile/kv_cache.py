"""Quantized keys and values: what a scheme means, how tensors become codes and come back, and specs for operators.

Codes of a cache are uint8 [B, H, T, width]: a vector of `head_dim` numbers of one head and token takes `width` bytes.
In a cache that is not quantized they are the numbers themselves, of a floating-point type.
Scales are float32: [] (one for a tensor), [H] (one a head) or [B, H, T] (one a token and head). A number is its code's
value times the scale. Paged caches have pages for B and tokens of a page for T.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile import spec_text
from qcompile.errors import ConfigError, shown, suggestion
from qcompile.fingerprint import fingerprint
from qcompile.formats import Format, IntegerFormat, get_format
from qcompile.scheme_config import check_keys

SCALES = ("tensor", "head", "token")
"""What shares a scale: everything, a head, or one token of one head."""

MOST_QUERIES, MOST_ROWS, MOST_SIZE = 8, 64, 256
"""What kernels for attention from few tokens take: tokens of a sequence; tokens times query heads for each head of
keys; elements of a plain key or value."""


@dataclass(frozen=True)
class KVFormat(ABC):
    """How scaled vectors become bytes. Make one, `register` it, and name it in a configuration.

    Attributes:
        name: registry key.
        absmax: the magnitude that a scale brings the largest element to.
        scales: of `SCALES`, where a configuration names the format alone.
    """

    name: str
    absmax: float
    scales: str

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        return torch.uint8

    @abstractmethod
    def width(self, head_dim: int) -> int:
        """Elements of `dtype` that a vector takes.

        Raises:
            ConfigError: a length that the format cannot store.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """uint8 [..., width] of float32 [..., head_dim] that is divided by its scale already; saturates."""

    @abstractmethod
    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        """float32 [..., head_dim] of uint8 [..., width]."""


@dataclass(frozen=True)
class NumberFormat(KVFormat):
    """Each number by itself, in a format of `qcompile.formats` with 8 or 4 bits.

    Of 4-bit codes, byte i of a vector holds number i in its low half and number i + head_dim / 2 in its high half.

    Attributes:
        number: the format.
    """

    number: Format

    @property
    def is_float(self) -> bool:
        """Whether codes are bytes of one of torch's types."""
        return self.number.native_dtype is not None and self.number.native_dtype.is_floating_point

    def width(self, head_dim: int) -> int:
        if head_dim * self.number.bits % 8 != 0:
            raise ConfigError(f"{self.name} keys and values need an even head size, not {head_dim}")
        return head_dim * self.number.bits // 8

    def encode(self, x: Tensor) -> Tensor:
        codes = self.number.encode(x)
        if self.number.bits == 8:
            return codes
        low, high = codes.chunk(2, -1)
        return low | (high << 4)

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        dtype = self.number.native_dtype
        if dtype is not None and self.is_float:
            return codes.view(dtype).to(torch.float32)
        if dtype is not None:
            return (codes ^ 128).view(dtype).to(torch.float32)
        if self.number.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
            if isinstance(self.number, IntegerFormat):  # bytes, as long as that goes
                return (codes.view(torch.int8) - self.number.offset).to(torch.float32)
        values = self.number.decode(codes.to(torch.int32))
        assert isinstance(values, Tensor)
        return values


@dataclass(frozen=True)
class PlainFormat(KVFormat):
    """Numbers as they are, of the type that the format is named by."""

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.name)
        return found

    def width(self, head_dim: int) -> int:
        return head_dim

    def encode(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        return codes.to(torch.float32)


KV_FORMATS: dict[str, KVFormat] = {}
ALIASES = {"fp8": "fp8_e4m3"}


def register(fmt: KVFormat) -> KVFormat:
    """Add a format.

    Raises:
        ValueError: a name that is taken.
    """
    if fmt.name in KV_FORMATS or fmt.name in ALIASES:
        raise ValueError(f"KV format {fmt.name!r} is registered already")
    KV_FORMATS[fmt.name] = fmt
    return fmt


# Floating point keeps its precision whatever the scale, so one for all suffices; integers need one for each vector.
for _name, _scales in (("fp8_e4m3", "tensor"), ("fp8_e5m2", "tensor"), ("int8", "token"), ("int4", "token")):
    _number = get_format(_name)
    register(NumberFormat(_name, _number.absmax, _scales, _number))

for _name in ("bfloat16", "float16", "float32"):
    register(PlainFormat(_name, 1.0, "none"))


def kv_format(name: object) -> KVFormat:
    """The format of that name or alias.

    Raises:
        ConfigError: unknown name; the message lists the nearest ones.
    """
    found = KV_FORMATS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"unknown KV cache format {shown(name)}; {suggestion(name, [*KV_FORMATS, *ALIASES])}")
    return found


@dataclass(frozen=True, kw_only=True)
class KVScheme:
    """What keys and values are stored as.

    Attributes:
        format: how vectors become bytes.
        scales: of `SCALES`, or "none" for numbers as they are. "token" scales are computed as tokens are stored; the
            others come from calibration or from a checkpoint, and are 1 for floating-point formats that have none.
        group: numbers of a vector that share a scale, or 0 for all of it.
        symmetric: whether a number is its code's value times the scale; else an offset is added.
        rotate: whether vectors are multiplied by a Hadamard matrix first, which spreads numbers that stand out.
        compute: "fp8" if attention rounds queries and weights to E4M3 and multiplies codes as they are; else codes are
            multiplied in a type that holds them exactly.
    """

    format: KVFormat
    scales: str
    group: int = 0
    symmetric: bool = True
    rotate: bool = False
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.plain:
            if (self.scales, self.group, self.symmetric, self.rotate, self.compute) != ("none", 0, True, False, None):
                raise ConfigError(
                    f"kv_cache: {self.format.name} keys and values are not quantized, and have no options"
                )
            return
        if self.scales not in SCALES:
            raise ConfigError(f"kv_cache: scales {shown(self.scales)} is unknown; {suggestion(self.scales, SCALES)}")
        integers = isinstance(self.format, NumberFormat) and isinstance(self.format.number, IntegerFormat)
        if type(self.group) is not int or self.group not in (0, 16, 32, 64, 128):
            raise ConfigError(f"kv_cache: group must be 16, 32, 64 or 128 numbers, not {shown(self.group)}")
        for name, value in (("symmetric", self.symmetric), ("rotate", self.rotate)):
            if type(value) is not bool:
                raise ConfigError(f"kv_cache: {name} must be true or false, not {shown(value)}")
        if self.group and not self.dynamic:
            raise ConfigError(f'kv_cache: groups have scales for each token; give "scales": "token", not {self.scales}')
        if not self.symmetric and not (integers and self.dynamic):
            raise ConfigError(
                'kv_cache: "symmetric": false is for int8 and int4 with scales per token, '
                f"not for {self.format.name} with scales per {self.scales}"
            )
        if self.rotate and not self.dynamic:
            raise ConfigError(
                f'kv_cache: "rotate" needs "scales": "token", since {self.scales} scales are of vectors as they are'
            )
        if self.compute not in (None, "fp8"):
            raise ConfigError(f'kv_cache: compute must be "fp8" or null, not {shown(self.compute)}')
        if self.compute and not (isinstance(self.format, NumberFormat) and self.format.is_float):
            raise ConfigError(f'kv_cache: "compute": "fp8" multiplies codes of FP8, not of {self.format.name}')
        if self.compute and self.group:
            raise ConfigError(
                'kv_cache: "compute": "fp8" multiplies whole vectors, which have no groups; leave one out'
            )

    def __str__(self) -> str:
        if self.plain:
            return f"{self.format.name}, not quantized"
        per = "token and head" if self.scales == "token" else self.scales
        if self.group:
            per += f", one for {self.group} numbers"
        more = ", with offsets" * (not self.symmetric) + ", rotated" * self.rotate
        more += ", multiplied in FP8" if self.compute else ""
        return f"{self.format.name}, scales per {per}{more}"

    @property
    def plain(self) -> bool:
        """Whether numbers are stored as they are."""
        return isinstance(self.format, PlainFormat)

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed as tokens are stored."""
        return self.scales == "token"

    @property
    def compact(self) -> bool:
        """Whether scales are bfloat16 [B, H, T, scales of a vector, then their offsets], not float32."""
        return self.group > 0 or not self.symmetric

    def scale_count(self, head_dim: int) -> int:
        """Scales, and offsets, of a vector.

        Raises:
            ConfigError: a length that groups do not divide.
        """
        bits = self.format.number.bits if isinstance(self.format, NumberFormat) else 8
        if self.group and head_dim * bits % (8 * self.group) != 0:
            raise ConfigError(
                f"kv_cache: groups of {self.group} numbers of {self.format.name} do not divide heads of {head_dim}"
            )
        return (head_dim // self.group if self.group else 1) * (1 if self.symmetric else 2)

    def to_config(self) -> str | dict[str, Any]:
        """As `parse_kv_cache` takes it: the name alone where that says it all."""
        given: dict[str, Any] = {"format": self.format.name}
        if self.scales != self.format.scales:
            given["scales"] = self.scales
        if self.group:
            given["group"] = self.group
        if not self.symmetric:
            given["symmetric"] = False
        if self.rotate:
            given["rotate"] = True
        if self.compute:
            given["compute"] = self.compute
        return self.format.name if len(given) == 1 else given


def parse_kv_cache(given: object, dtype: torch.dtype | None = None) -> KVScheme | None:
    """A scheme from a format's name, an alias, `{"format": ..., "scales": ...}`, or a `KVScheme`; None stays None.

    Args:
        dtype: what "auto" means: the type of a model's keys and values.

    Raises:
        ConfigError: anything else, or unknown names in it.
    """
    if given is None or isinstance(given, KVScheme):
        return given
    if given == "auto":
        if dtype is None:
            raise ConfigError('kv_cache "auto" is the type of a model, which nothing tells here; name it: "bfloat16"')
        given = str(dtype).removeprefix("torch.")
    if isinstance(given, str):
        fmt = kv_format(given)
        return KVScheme(format=fmt, scales=fmt.scales)
    if not isinstance(given, Mapping):
        raise ConfigError(f"kv_cache must be a name, a mapping or null, not {shown(given)}")
    options = ("group", "symmetric", "rotate", "compute")
    check_keys("kv_cache", given, ("format", "scales", *options))
    if "format" not in given:
        raise ConfigError('kv_cache needs a format, as in {"format": "fp8_e4m3", "scales": "head"}')
    fmt = kv_format(given["format"])
    more = {name: given[name] for name in options if name in given}
    return KVScheme(format=fmt, scales=given.get("scales", fmt.scales), **more)


def expand_scale(scale: Tensor) -> Tensor:
    """A scale [], [H] or [B, H, T] as something to multiply [B, H, T, D] with."""
    if scale.dim() == 1:
        return scale[:, None, None]
    return scale.unsqueeze(-1) if scale.dim() == 3 else scale


def hadamard(size: int, device: torch.device) -> Tensor:
    """A symmetric orthogonal float32 [size, size]: Sylvester's matrices of the largest power of two that divides it.

    Elements of one are +-1 over the root of its size: by whether row and column have an odd number of bits in common.
    """
    block = size & -size
    place = torch.arange(size, device=device)
    common = place[:, None] & place & (block - 1)
    shift = 1
    while shift < block.bit_length():
        common = common ^ (common >> shift)
        shift *= 2
    signs = (1 - 2 * (common & 1)).to(torch.float32) * block**-0.5
    return signs.where(place[:, None] // block == place // block, 0.0)


def rotated(x: Tensor) -> Tensor:
    """x times `hadamard`, in float32; done twice it gives x again."""
    return torch.matmul(x.to(torch.float32), hadamard(x.shape[-1], x.device))


def _grouped_scale(values: Tensor, scheme: KVScheme) -> tuple[Tensor, Tensor, Tensor]:
    """For float32 [..., groups, numbers]: scales and offsets [..., groups, 1] as stored, and both side by side."""
    if scheme.symmetric:
        offset = None
        scale = values.abs().amax(-1, keepdim=True) / scheme.format.absmax
    else:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        scale = (high - low) / (2 * scheme.format.absmax)
    scale = scale.to(torch.bfloat16)
    scale = scale.masked_fill(scale == 0, 1.0)
    if scheme.symmetric:
        return scale.to(torch.float32), torch.zeros_like(scale, dtype=torch.float32), scale.squeeze(-1)
    # The least number has the least code, which lies half a step farther from 0 than absmax.
    offset = (low + (scheme.format.absmax + 0.5) * scale.to(torch.float32)).to(torch.bfloat16)
    stored = torch.cat([scale.squeeze(-1), offset.squeeze(-1)], -1)
    return scale.to(torch.float32), offset.to(torch.float32), stored


def quantize(x: Tensor, scheme: KVScheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys or values [B, H, T, D] as codes uint8 [B, H, T, width] and their scale.

    Made of plain torch operators, so that a compiler fuses it with what made `x`. With scales a token, a vector that
    holds NaN or infinity gets a scale that is not finite and decodes to NaN; with the others infinities saturate.

    Args:
        scale: float32 [] or [H]; given exactly if the scheme's scales are not computed here.

    Returns:
        the codes, and `scale`, or float32 [B, H, T], or bfloat16 [B, H, T, `scheme.scale_count`].
    """
    if scheme.plain:
        assert scale is not None
        return scheme.format.encode(x), scale
    values = rotated(x) if scheme.rotate else x.to(torch.float32)
    if scheme.compact:
        parts = values.unflatten(-1, (-1, scheme.group or values.shape[-1]))
        factor, offset, stored = _grouped_scale(parts, scheme)
        return scheme.format.encode(((parts - offset) / factor).flatten(-2)), stored
    if scheme.dynamic:
        scale = values.abs().amax(-1) / scheme.format.absmax
        scale = scale.masked_fill(scale == 0, 1.0)
    assert scale is not None
    return scheme.format.encode(values / expand_scale(scale)), scale


def dequantize(codes: Tensor, scale: Tensor, scheme: KVScheme, head_dim: int) -> Tensor:
    """float32 [B, H, T, head_dim] of codes [B, H, T, width] and their scale."""
    values = dequantize_rotated(codes, scale, scheme, head_dim)
    return rotated(values) if scheme.rotate else values


def dequantize_rotated(codes: Tensor, scale: Tensor, scheme: KVScheme, head_dim: int) -> Tensor:
    """As `dequantize`, of vectors that stay as they were multiplied before they were stored."""
    values = scheme.format.decode(codes, head_dim)
    if not scheme.compact:
        return values * expand_scale(scale)
    parts = values.unflatten(-1, (-1, scheme.group or head_dim))
    scale = scale.to(torch.float32)
    if scheme.symmetric:
        return (parts * scale.unsqueeze(-1)).flatten(-2)
    factor, offset = scale.unsqueeze(-1).chunk(2, -2)
    return (parts * factor + offset).flatten(-2)


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """What a block table's pages hold, one after another.

    Args:
        pages: codes [pages, H, page_size, width], or scales [pages, H, page_size].
        block_table: integers [B, most pages].

    Returns:
        [B, H, most pages * page_size, ...].
    """
    return pages[block_table].transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """What operators need to know of a cache of keys (or of values) beside its tensors."""

    scheme: KVScheme
    head_dim: int

    def encode(self) -> str:
        """One line, with the package's fingerprint, which keeps torch's caches on disk right."""
        return spec_text.write(self.plain())

    def plain(self) -> dict[str, Any]:
        """What the line says."""
        scheme = self.scheme
        given = {"format": scheme.format.name, "scales": scheme.scales, "head_dim": self.head_dim}
        given |= {"group": scheme.group, "symmetric": scheme.symmetric, "rotate": scheme.rotate}
        given |= {"compute": scheme.compute}
        return {**given, "code": fingerprint()}


@functools.lru_cache(maxsize=256)
def decode_kv_spec(text: str) -> KVSpec:
    """The inverse of `KVSpec.encode`."""
    return _kv_spec(spec_text.read(text))


def _kv_spec(given: dict[str, Any]) -> KVSpec:
    options = {name: given[name] for name in ("group", "symmetric", "rotate", "compute")}
    scheme = KVScheme(format=kv_format(given["format"]), scales=given["scales"], **options)
    return KVSpec(scheme=scheme, head_dim=given["head_dim"])


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Attention over a quantized cache, without its tensors.

    Attributes:
        key, value: the two halves of the cache; one scheme for both.
        scale: what products of queries and keys are multiplied with.
        softcap: scaled products s become softcap * tanh(s / softcap) before the mask is added; 0 leaves them.
        causal: whether the queries stand at the last positions of the context, one after another, and attend to none
            behind their own.
        window: with `causal`, to how many positions a query attends at most, its own among them; 0 for all.
    """

    key: KVSpec
    value: KVSpec
    scale: float
    softcap: float = 0.0
    causal: bool = False
    window: int = 0

    @property
    def scheme(self) -> KVScheme:
        return self.key.scheme

    def encode(self) -> str:
        """One line."""
        given: dict[str, Any] = {"key": self.key.plain(), "value": self.value.plain(), "scale": self.scale}
        given |= {"softcap": self.softcap, "causal": self.causal, "window": self.window}
        return spec_text.write(given)


@functools.lru_cache(maxsize=256)
def decode_attention_spec(text: str) -> AttentionSpec:
    """The inverse of `AttentionSpec.encode`."""
    given = spec_text.read(text)
    halves = {name: _kv_spec(given[name]) for name in ("key", "value")}
    return AttentionSpec(**(given | halves))
