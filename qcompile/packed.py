"""The one packed form of a quantized weight: what readers and quantizers produce, and kernels lay out anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.bitpack import pack_bits, packed_width, unpack_bits
from qcompile.errors import LayerError
from qcompile.scheme import SCALE_DTYPES, WHOLE, Granularity, Scheme, WeightScheme

LOGICAL = "logical"


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight [N, K] (out features, in features) as codes and scales.

    With `R x C` blocks sharing a scale (`scheme.granularity`), rows of `D` columns sharing a super scale and `b` bits a
    code, for k' = n // R, k // C and k" = n, k // D:

        weight[n, k] = (decode(code[n, k]) - zero_point[k']) * S    or    decode(code[n, k]) * S + O
        S = scale[k'] * super_scale[k"]                                   O = offset[k'] * super_offset[k"]

    in float32, in this order, where what the scheme does not have is left out. With `act_order`, column j of all that
    belongs to the input feature perm[j].

    Attributes, in the `logical` layout:
        codes: uint8 [N, ceil(K * b / 8)], the bit stream of `bitpack`.
        scale: `scheme.scale_dtype` [ceil(N / R), ceil(K / C)].
        zero_point: uint8, of the scale's shape, in units of codes.
        offset: of the scale's dtype and shape.
        super_scale, super_offset: `scheme.super_scale.dtype` [N, ceil(K / D)].
        perm: int32 [K], a permutation.
        shape: (N, K).
        scheme: formats and granularity; its `fields` says which tensors there are.
        layout: `"logical"`, or the name of a kernel's layout (`qcompile.layouts`), which then states the shapes.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    scheme: WeightScheme
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None
    perm: Tensor | None = None
    layout: str = LOGICAL

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], shape: tuple[int, int], scheme: WeightScheme, layout: str = LOGICAL
    ) -> PackedWeight:
        """The inverse of `tensors`."""
        named = dict(zip(scheme.fields, tensors, strict=True))
        return cls(**named, shape=shape, scheme=scheme, layout=layout)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order of `scheme.fields`."""
        return tuple(getattr(self, name) for name in self.scheme.fields)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def map(self, function: Callable[[str, Tensor], Tensor]) -> PackedWeight:
        """The weight whose tensors are `function(name, tensor)`."""
        named = zip(self.scheme.fields, self.tensors, strict=True)
        changed: dict[str, Any] = {name: function(name, tensor) for name, tensor in named}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on another device."""
        return self.map(lambda _, tensor: tensor.to(device))

    def clone(self) -> PackedWeight:
        """The same weight in memory of its own."""
        return self.map(lambda _, tensor: tensor.clone(memory_format=torch.contiguous_format))

    def rows(self, first: int, last: int) -> PackedWeight:
        """Some rows of the logical layout, from one that begins a block of rows."""
        block = self.scheme.granularity.rows

        def part(name: str, tensor: Tensor) -> Tensor:
            if name == "perm" or (block == WHOLE and name in ("scale", "zero_point", "offset")):
                return tensor
            size = block if name in ("scale", "zero_point", "offset") else 1
            return tensor[first // size : -(-last // size)]

        return replace(self.map(part), shape=(min(last, self.shape[0]) - first, self.shape[1]))

    def columns(self, first: int, last: int) -> PackedWeight:
        """Some columns of codes of the logical layout, from and to a multiple of each of `column_units`.

        With `act_order`, the part has none: its column j belongs to the input feature perm[first + j] of the whole.
        """
        bits, scheme = self.scheme.format.bits, self.scheme
        units = scheme.column_units
        assert all(first % unit == last % unit == 0 for unit in units.values())

        def part(name: str, tensor: Tensor) -> Tensor:
            if name == "codes":
                return tensor[:, first * bits // 8 : last * bits // 8]
            size = units.get("super-blocks" if name.startswith("super") else "groups")
            return tensor if size is None else tensor[:, first // size : last // size]

        own = replace(self, scheme=replace(scheme, act_order=False), perm=None)
        return replace(own.map(part), shape=(self.shape[0], last - first))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: WeightScheme,
        layer: str = "weight",
        *,
        offset: Tensor | None = None,
        super_scale: Tensor | None = None,
        super_offset: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> PackedWeight:
        """From one code a byte, uint8 [N, K].

        Raises:
            LayerError: if `check` finds fault.
        """
        rows, columns = codes.shape
        packed = cls(
            codes=pack_bits(codes, scheme.format.bits),
            scale=scale,
            zero_point=zero_point,
            offset=offset,
            super_scale=super_scale,
            super_offset=super_offset,
            perm=perm,
            shape=(rows, columns),
            scheme=scheme,
        )
        packed.check(layer)
        return packed

    def unpack_codes(self) -> Tensor:
        """Codes as uint8 [N, K]; only of the logical layout."""
        assert self.layout == LOGICAL, f"codes of layout {self.layout} are unpacked by the layout"
        return unpack_bits(self.codes, self.scheme.format.bits, self.shape[1])

    def check(self, layer: str = "weight") -> None:
        """Check the class's statements about dtypes and shapes in the logical layout, and 2:4 sparsity.

        Raises:
            LayerError: naming the layer and what is wrong.
        """
        scheme, expected = self.scheme, stored_tensors(self.scheme, self.shape)
        for name in ("codes", "scale", "zero_point", "offset", "super_scale", "super_offset", "perm"):
            if (getattr(self, name) is not None) != (name in scheme.fields):
                has = "lacks" if name in scheme.fields else "has"
                raise LayerError(f"{layer}: the weight {has} {name}, but its scheme has {', '.join(scheme.fields)}")
        for name, tensor in zip(scheme.fields, self.tensors, strict=True):
            dtype, shape = expected[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise LayerError(f"{layer}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            if tensor.device != self.codes.device:
                raise LayerError(f"{layer}: {name} is on {tensor.device}, codes on {self.codes.device}")
        if scheme.sparsity is not None and self.codes.device.type != "meta":
            n, k = self.shape
            kept = F.pad(self.unpack_codes() != scheme.zero_code, (0, -k % 4)).view(n, -1, 4).sum(-1)
            if bool((kept > 2).any()):
                raise LayerError(f"{layer}: more than two of four columns are not 0, but it is to be 2:4 sparse")


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """What a `QuantizedLinear` is made of: what readers give, and what is divided among processes.

    Attributes:
        weight: packed [N, K], in the logical layout.
        scheme: the weight's, and that of the activations.
        bias: [N] or None.
        input_scale: float32 [], exactly for static activations.
        dtype: of the original weight.
        pre_quant_scale: [K], which multiplies the input first.
    """

    weight: PackedWeight
    scheme: Scheme
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    dtype: torch.dtype = torch.float32
    pre_quant_scale: Tensor | None = None

    def with_weight(self, weight: PackedWeight) -> PackedLinear:
        """The same around another weight, whose scheme comes along."""
        return replace(self, weight=weight, scheme=replace(self.scheme, weight=weight.scheme))

    def to(self, device: torch.device | str) -> PackedLinear:
        """The same linear with its tensors on another device."""
        beside = {name: getattr(self, name) for name in ("bias", "input_scale", "pre_quant_scale")}
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in beside.items()}
        return replace(self, weight=self.weight.to(device), **moved)


def stored_tensors(scheme: WeightScheme, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of a packed weight's tensors in the logical layout, of more than its scheme's `fields`.

    Args:
        shape: (N, K); the scheme is fitted to it.
    """
    n, k = shape
    blocks = scheme.granularity.scale_shape(shape)
    scale_dtype = SCALE_DTYPES[scheme.scale_dtype]
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (n, packed_width(k, scheme.format.bits))),
        "scale": (scale_dtype, blocks),
        "zero_point": (torch.uint8, blocks),
        "offset": (scale_dtype, blocks),
        "perm": (torch.int32, (k,)),
    }
    if scheme.super_scale is not None:
        above = SCALE_DTYPES[scheme.super_scale.dtype], (n, scheme.super_scale.count(k))
        found |= {"super_scale": above, "super_offset": above}
    return found


def stored_bytes(scheme: WeightScheme, shape: tuple[int, int]) -> int:
    """`PackedWeight.nbytes` of a weight [N, K] of this scheme, in the logical layout."""
    tensors = stored_tensors(scheme, shape)
    return sum(tensors[name][0].itemsize * math.prod(tensors[name][1]) for name in scheme.fields)


def concatenate(weights: list[PackedWeight], *, alternate: bool = False) -> PackedWeight:
    """The weight whose rows are those of all given ones, exactly; they share K, the scheme and the logical layout.

    A per-tensor scale becomes one scale a row.

    Args:
        alternate: the first row of each comes first, then the second of each, of weights of one shape.

    Raises:
        ValueError: blocks that would span two weights, or permutations that differ.
    """
    first = weights[0]
    assert all(w.layout == LOGICAL and w.scheme == first.scheme and w.shape[1] == first.shape[1] for w in weights)
    scheme = first.scheme
    block_rows = scheme.granularity.rows
    per_tensor = scheme.granularity == Granularity.tensor()
    spanning = alternate or not all(w.shape[0] % block_rows == 0 for w in weights[:-1])
    if block_rows != 1 and not per_tensor and spanning:
        raise ValueError("blocks that span two weights cannot be concatenated")
    if first.perm is not None and not all(w.perm is not None and torch.equal(w.perm, first.perm) for w in weights):
        raise ValueError("weights of different act_order cannot be concatenated")

    def joined(name: str, _: Tensor) -> Tensor:
        if name == "perm":
            assert first.perm is not None
            return first.perm
        parts: list[Tensor] = [getattr(w, name) for w in weights]
        if per_tensor and name in ("scale", "zero_point", "offset"):
            parts = [part.expand(w.shape[0], 1) for part, w in zip(parts, weights, strict=True)]
        if alternate:
            raw = [part.view(torch.uint8) if part.element_size() == 1 else part for part in parts]
            return torch.stack(raw, 1).flatten(0, 1).view(parts[0].dtype)
        return torch.cat(parts)

    if per_tensor:
        scheme = replace(scheme, granularity=Granularity.channel())
    merged = first.map(joined)
    return replace(merged, shape=(sum(w.shape[0] for w in weights), first.shape[1]), scheme=scheme)
