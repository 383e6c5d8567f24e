"""A process's part of a tensor, of a quantized linear, of an expert: what is packed is cut in its portable form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import LayerError
from qcompile.packed import PackedLinear, concatenate
from qcompile.parts import Place
from qcompile.plans import REPLICATE
from qcompile.scheme import WHOLE


def check_share(place: Place, name: str, extent: int, what: str, unit: int = 1) -> None:
    """
    Raises:
        LayerError: processes cannot have equal numbers of whole units of a layer's extent.
    """
    if extent % (unit * place.size):
        units = f"{extent // unit} times {unit} " if unit > 1 else f"{extent} "
        raise LayerError(
            f"{name}: {place.size} processes cannot share its {units}{what} equally; take a number "
            f'of processes that divides them, or leave it and what it reads whole: plan={{glob: "{REPLICATE}"}}'
        )


def piece(place: Place, tensor: Tensor, dim: int, halves: int = 1) -> Tensor:
    """This process's part of a dimension, or of each half of it, in memory of its own."""
    share = tensor.shape[dim] // halves
    start, end = place.part(share)
    return torch.cat([tensor.narrow(dim, half * share + start, end - start) for half in range(halves)], dim)


def rows(place: Place, name: str, whole: PackedLinear, halves: int = 1) -> PackedLinear:
    """This process's output features, or those of each half of them.

    Raises:
        LayerError: parts that divide a block of rows.
    """
    weight = whole.weight
    count = weight.shape[0] // halves
    start, end = place.part(count)
    block = weight.scheme.granularity.rows
    if block != WHOLE and (end - start) % block:
        raise LayerError(
            f"{name}: {place.size} parts of {count} rows divide its blocks of {block} rows; take fewer "
            "processes, or another scheme"
        )
    found = [weight.rows(half * count + start, half * count + end) for half in range(halves)]
    own = found[0] if halves == 1 else concatenate(found)
    bias = None if whole.bias is None else piece(place, whole.bias, 0, halves)
    return replace(whole.with_weight(own.clone()), bias=bias)


def columns(place: Place, name: str, whole: PackedLinear) -> PackedLinear:
    """This process's columns, with the whole bias; with `act_order` these belong to the inputs that `perm` says.

    Raises:
        LayerError: parts that divide what belongs together.
    """
    weight, pre = whole.weight, whole.pre_quant_scale
    first, last = place.part(weight.shape[1])
    for what, unit in weight.scheme.column_units.items():
        if (last - first) % unit:
            raise LayerError(
                f"{name}: {place.size} parts of {weight.shape[1]} columns divide its {what} of {unit} columns; take "
                "fewer processes, or a scheme whose groups divide the parts, or leave the layer and those that it "
                f'reads whole: plan={{glob: "{REPLICATE}"}}'
            )
    if pre is not None:
        pre = pre[first:last] if weight.perm is None else pre[weight.perm[first:last].to(torch.int64)]
    return replace(whole.with_weight(weight.columns(first, last).clone()), pre_quant_scale=pre)


def expert(place: Place, name: str, whole: PackedLinear, projection: str, concatenated: bool) -> PackedLinear:
    """This process's inner features of one expert, in one of its projections.

    Args:
        name: of the projection of all experts.
        projection: "gate_up_proj", "gate_proj", "up_proj" or "down_proj".
        concatenated: whether the rows of a gate_up_proj are all gates and then all others, not one of each in turn.

    Raises:
        LayerError: it cannot be divided.
    """
    n, k = whole.weight.shape
    if projection != "down_proj":
        both = projection == "gate_up_proj"
        check_share(place, name, n, "output features", 2 if both else 1)
        return rows(place, name, whole, 2 if both and concatenated else 1)
    check_share(place, name, k, "inner features")
    if whole.weight.scheme.arranges_inputs:
        raise LayerError(
            f"{name}: experts whose inputs are arranged (act_order, rotated) cannot be divided; leave them whole: "
            f'plan={{"*.experts": "{REPLICATE}"}}'
        )
    own = columns(place, name, whole)
    # The first process brings the bias to the sum.
    return own if own.bias is None or place.rank == 0 else replace(own, bias=torch.zeros_like(own.bias))
