"""The one packed form of a quantized weight: what readers and quantizers produce, and kernels lay out anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits, packed_width, unpack_bits
from qcompile.errors import LayerError
from qcompile.scheme import SCALE_DTYPES, Granularity, WeightScheme

LOGICAL = "logical"


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] (out features, in features) as codes and scales.

    With `R x C` blocks sharing a scale (`scheme.granularity`) and `b` bits a code:

        weight[n, k] = (decode(code[n, k]) - zero_point[n // R, k // C]) * scale[n // R, k // C]

    in float32, where a missing zero point is 0.

    Attributes:
        codes: in the `logical` layout uint8 [N, ceil(K * b / 8)], the bit stream of `bitpack`.
        scale: in the `logical` layout `scheme.scale_dtype` [ceil(N / R), ceil(K / C)].
        zero_point: uint8, of the scale's shape, in units of codes; only for asymmetric schemes.
        shape: (N, K).
        scheme: formats and granularity.
        layout: `"logical"`, or the name of a kernel's layout (`qcompile.layouts`), which then states the shapes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int]
    scheme: WeightScheme
    layout: str = LOGICAL

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order codes, scale, zero point."""
        return (self.codes, self.scale) if self.zero_point is None else (self.codes, self.scale, self.zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on another device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero_point=zero)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme, layer: str = "weight"
    ) -> PackedWeight:
        """From one code a byte, uint8 [N, K].

        Raises:
            LayerError: if `check` finds fault.
        """
        rows, columns = codes.shape
        packed = cls(pack_bits(codes, scheme.format.bits), scale, zero_point, (rows, columns), scheme)
        packed.check(layer)
        return packed

    def unpack_codes(self) -> Tensor:
        """Codes as uint8 [N, K]; only of the logical layout."""
        assert self.layout == LOGICAL, f"codes of layout {self.layout} are unpacked by the layout"
        return unpack_bits(self.codes, self.scheme.format.bits, self.shape[1])

    def check(self, layer: str = "weight") -> None:
        """Check the class's statements about dtypes and shapes in the logical layout.

        Raises:
            LayerError: naming the layer and what is wrong.
        """
        n, k = self.shape
        blocks = self.scheme.granularity.scale_shape(self.shape)
        expected = {
            "codes": (self.codes, torch.uint8, (n, packed_width(k, self.scheme.format.bits))),
            "scale": (self.scale, SCALE_DTYPES[self.scheme.scale_dtype], blocks),
        }
        if (self.zero_point is None) != self.scheme.symmetric:
            raise LayerError(f"{layer}: an asymmetric scheme, and only that, has a zero point")
        if self.zero_point is not None:
            expected["zero_point"] = (self.zero_point, torch.uint8, blocks)
        for name, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise LayerError(f"{layer}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            if tensor.device != self.codes.device:
                raise LayerError(f"{layer}: {name} is on {tensor.device}, codes on {self.codes.device}")


def concatenate(weights: list[PackedWeight]) -> PackedWeight:
    """The weight whose rows are those of all given ones, exactly; they share K, the scheme and the logical layout.

    A per-tensor scale becomes one scale a row.
    """
    first = weights[0]
    assert all(w.layout == LOGICAL and w.scheme == first.scheme and w.shape[1] == first.shape[1] for w in weights)
    scheme = first.scheme
    scales = [w.scale for w in weights]
    zeros = [w.zero_point for w in weights if w.zero_point is not None]
    block_rows = scheme.granularity.rows
    if block_rows != 1 and not all(w.shape[0] % block_rows == 0 for w in weights[:-1]):
        raise ValueError("blocks that span two weights cannot be concatenated")
    if scheme.granularity == Granularity.tensor():
        scheme = replace(scheme, granularity=Granularity.channel())
        scales = [s.expand(w.shape[0], 1) for s, w in zip(scales, weights, strict=True)]
        zeros = [z.expand(w.shape[0], 1) for z, w in zip(zeros, weights, strict=False)]
    return PackedWeight(
        codes=torch.cat([w.codes for w in weights]),
        scale=torch.cat(scales),
        zero_point=torch.cat(zeros) if zeros else None,
        shape=(sum(w.shape[0] for w in weights), first.shape[1]),
        scheme=scheme,
    )
