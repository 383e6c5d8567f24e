"""Packed weights of experts, one above the other in one `PackedWeight`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import LayerError
from qcompile.layouts import LAYOUTS, TILE, Layout, choose_layout, rows_of
from qcompile.packed import LOGICAL, PackedWeight
from qcompile.scheme import Granularity, Scheme, WeightScheme


def padded_rows(out_features: int) -> int:
    """How many rows of a stack an expert of N output features takes: N, filled up to whole tiles of `fragment`."""
    return -(-out_features // TILE) * TILE


def stacked_scheme(scheme: WeightScheme, out_features: int) -> WeightScheme:
    """The scheme of a stack of experts [N, K]: no block crosses experts, and permutations are kept beside the stack."""
    granularity = scheme.granularity
    rows = granularity.rows
    if rows != 1 and (not 0 < rows <= out_features or padded_rows(out_features) % rows):
        granularity = Granularity(1, granularity.columns)
    return replace(scheme, granularity=granularity, act_order=False)


def stack_layout(scheme: Scheme, shape: tuple[int, int], device_type: str) -> Layout:
    """How a stack lies in memory on a kind of device: as its experts would, those that are 2:4 sparse as dense ones."""
    weight = replace(scheme.weight, sparsity=None)
    layout = choose_layout(replace(scheme, weight=weight), shape, device_type)
    return layout if layout.mergeable else LAYOUTS[LOGICAL]


def stack(weights: Sequence[PackedWeight], layer: str = "experts") -> PackedWeight:
    """The experts' weights [N, K] as one weight [experts * padded_rows(N), K], exactly, without their permutations.

    Args:
        weights: of one scheme and shape, in the logical layout.
        layer: named in errors.

    Raises:
        LayerError: schemes or shapes that differ.
    """
    first = weights[0]
    n, k = first.shape
    for index, weight in enumerate(weights):
        if weight.scheme != first.scheme or weight.shape != first.shape:
            raise LayerError(
                f"{layer}: expert {index} is {weight.scheme} {weight.shape}, but expert 0 is {first.scheme} "
                f"{first.shape}; experts run as one stack, so they must be quantized alike"
            )
    scheme = stacked_scheme(first.scheme, n)
    per_row = scheme.granularity.rows != first.scheme.granularity.rows
    height = first.scheme.granularity.block_of(first.shape)[0] if per_row else 1

    def joined(name: str) -> Tensor:
        parts = []
        dtype = getattr(first, name).dtype
        for weight in weights:
            values: Tensor = getattr(weight, name)
            values = values.view(torch.uint8) if values.element_size() == 1 else values
            if per_row and name in ("scale", "zero_point", "offset"):
                values = values.repeat_interleave(height, 0)[:n]
            rows = scheme.granularity.rows if name in ("scale", "zero_point", "offset") else 1
            parts += [values, values[:1].expand(padded_rows(n) // rows - values.shape[0], -1)]
        return torch.cat(parts).view(dtype)

    shape = (len(weights) * padded_rows(n), k)
    return PackedWeight.from_tensors([joined(name) for name in scheme.fields], shape, scheme)


def expert(weights: PackedWeight, index: int, out_features: int) -> PackedWeight:
    """One expert's weight [N, K] of a stack, in the stack's layout; its tensors are views."""
    first = index * padded_rows(out_features)
    return rows_of(weights, first, first + out_features)
