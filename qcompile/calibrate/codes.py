"""From a weight and what was seen of its inputs to codes, by the way that a scheme names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.bitpack import pack_bits
from qcompile.calibrate.gptq import gptq
from qcompile.calibrate.hqq import hqq_grid
from qcompile.calibrate.search import search_grid
from qcompile.errors import LayerError
from qcompile.hadamard import turn_gram, turn_weight
from qcompile.methods import GPTQ, HQQ, RTN, Given
from qcompile.packed import PackedWeight
from qcompile.reference import Grid, finite_float32, leave_two_of_four, quantize_weight, row_strips, super_scale
from qcompile.scheme import Scheme, WeightScheme


def check_codes(scheme: Scheme, layer: str) -> None:
    """Refuse a method that cannot choose codes as a scheme has them.

    Raises:
        LayerError: names the layer, the reason and the way out.
    """
    if isinstance(scheme.method.codes, Given):
        raise LayerError(f"{layer}: method checkpoint is of weights that were read; choose rtn")
    if scheme.weight.act_order and not isinstance(scheme.method.codes, GPTQ):
        raise LayerError(f"{layer}: columns are sorted (act_order) by gptq alone; leave act_order out, or choose gptq")


@torch.no_grad()
def choose_codes(weight: Tensor, scheme: Scheme, hessian: Tensor | None, layer: str) -> PackedWeight:
    """Quantize a weight by its scheme's method; folds are done already.

    Args:
        weight: floating point [N, K].
        scheme: fitted to its shape.
        hessian: float32 [K, K], the mean of x x^T over inputs; for methods that need data.
        layer: named in errors.

    Raises:
        LayerError, CalibrationError: see `check_codes` and the methods.
    """
    check_codes(scheme, layer)
    if scheme.weight.rotated:
        plain = replace(scheme, weight=replace(scheme.weight, rotated=False))
        gram = None if hessian is None else turn_gram(hessian)
        return replace(choose_codes(turn_weight(weight), plain, gram, layer), scheme=scheme.weight)
    how = scheme.method.codes
    if isinstance(how, GPTQ):
        assert hessian is not None
        return gptq(weight, hessian, scheme.weight, how, layer)
    if isinstance(how, HQQ):
        return _nearest(weight, scheme.weight, layer, lambda w, above: hqq_grid(w, scheme.weight, how, above, layer))
    if isinstance(how, RTN) and how.clip != "none":
        clip = how.clip
        return _nearest(
            weight, scheme.weight, layer, lambda w, above: search_grid(w, scheme.weight, above, layer, clip, hessian)
        )
    return quantize_weight(weight, scheme.weight, layer)


def _nearest(
    weight: Tensor, scheme: WeightScheme, layer: str, choose: Callable[[Tensor, Tensor | None], Grid]
) -> PackedWeight:
    """The nearest codes on a grid that is chosen for some rows at a time."""
    strips = row_strips(weight, scheme, layer)
    above = super_scale(strips, scheme, layer)
    packed = []
    for strip in strips:
        w = leave_two_of_four(finite_float32(strip, layer), scheme)
        grid = choose(w, above)
        packed.append((pack_bits(grid.encode(w), scheme.format.bits), *grid.tensors))
    tensors = [torch.cat(parts) for parts in zip(*packed, strict=True)]
    result = PackedWeight.from_tensors(tensors, (weight.shape[0], weight.shape[1]), scheme)
    result.check(layer)
    return result
