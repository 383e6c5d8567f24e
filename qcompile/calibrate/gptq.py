"""GPTQ: codes are chosen column by column, and each column's error is made up for by the columns after it.

Frantar, Ashkboos, Hoefler, Alistarh 2022: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323. With H = X^T X / n over the inputs X of a layer, it makes tr((W - Q) H (W - Q)^T), the
mean square of what the output errs by, small. Groups are static: their scales are chosen before, from the weights as
they were. It works with every format and granularity, since it asks the grid (`qcompile.reference.Grid`) for the
nearest code of a number, and nothing else.

Of 2:4 sparse weights two of four columns are chosen where their codes are, by what leaving out the others costs, as
SparseGPT does (Frantar and Alistarh 2023, arXiv:2301.00774, section 3.3). What is 0 already goes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.calibrate.columns import Columns
from qcompile.calibrate.fit import pick
from qcompile.calibrate.search import search_grid
from qcompile.errors import CalibrationError
from qcompile.methods import GPTQ
from qcompile.packed import PackedWeight
from qcompile.reference import Grid, choose_grid, finite_float32, leave_two_of_four, super_scale
from qcompile.scheme import WeightScheme


def gptq(weight: Tensor, hessian: Tensor, scheme: WeightScheme, settings: GPTQ, layer: str = "weight") -> PackedWeight:
    """Choose a weight's codes.

    Where rounding to nearest has a smaller error, for a row or a strip of rows that share scales, its codes are taken.
    Inputs that are always 0 leave their columns rounded to nearest.

    Args:
        weight: floating point [N, K].
        hessian: float32 [K, K], the mean of x x^T over inputs x.
        scheme: its group divides K. With its `act_order`, groups are of columns sorted by the inputs' mean squares.
        layer: named in errors.

    Raises:
        LayerError: a weight with NaN or infinity, or whose scale overflows its dtype.
        CalibrationError: a Hessian that no damping makes positive definite.
    """
    w = finite_float32(weight.detach(), layer)
    perm = None
    if scheme.act_order:
        perm = hessian.diagonal().argsort(descending=True, stable=True)
        w, hessian = w[:, perm], hessian[perm][:, perm]
    above = super_scale([w], scheme, layer)
    grid, codes = _solve(w, hessian, scheme, settings, above, layer)
    pruned = leave_two_of_four(w, scheme)
    nearest_grid = choose_grid(pruned, scheme, above, layer)
    nearest_codes = nearest_grid.encode(pruned)
    better = _strip_errors(w - nearest_grid.decode(nearest_codes), hessian, scheme) < _strip_errors(
        w - grid.decode(codes), hessian, scheme
    )  # [row blocks]
    rows = better.repeat_interleave(scheme.granularity.block_of((w.shape[0], w.shape[1]))[0])[: w.shape[0]]
    codes = torch.where(rows[:, None], nearest_codes, codes)
    grid = pick(better[:, None].expand(grid.scale.shape), nearest_grid, grid)
    return grid.pack(codes, layer, None if perm is None else perm.to(torch.int32))


def hessian_error(error: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T of each row of a weight's error [N, K]: float32 [N], not negative."""
    return ((error @ hessian) * error).sum(1).clamp(min=0)


def _strip_errors(error: Tensor, hessian: Tensor, scheme: WeightScheme) -> Tensor:
    """`hessian_error` of each strip of rows that share scales."""
    tall = scheme.granularity.block_of((error.shape[0], error.shape[1]))[0]
    per_row = hessian_error(error, hessian)
    padded = torch.nn.functional.pad(per_row, (0, -len(per_row) % tall))
    return padded.unflatten(0, (-1, tall)).sum(1)


def _solve(
    w: Tensor, hessian: Tensor, scheme: WeightScheme, settings: GPTQ, above: Tensor | None, layer: str
) -> tuple[Grid, Tensor]:
    """The grid, and codes uint8 [N, K]."""
    columns = w.shape[1]
    ordered = settings.act_order and not scheme.act_order and scheme.sparsity is None
    order = hessian.diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(columns)
    order = order.to(w.device)
    factor = inverse_factor(hessian[order[:, None], order], settings.damping, layer)
    grid = search_grid(w, scheme, above, layer, settings.clip, hessian)
    chooser = Columns(grid, settings.block_size)
    rest = w[:, order].t().contiguous()  # [K, N], so that a column of the weight lies together
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, columns, chooser.size):
        block, after = slice(start, start + chooser.size), slice(start + chooser.size, None)
        places = order[block]
        before = None if scheme.sparsity is None else w.t()[places]
        errors = chooser.solve(rest[block], factor[block, block], before, places, codes[block])
        rest[after].addmm_(factor[block, after].t(), errors, alpha=-1)
    return grid, codes[order.argsort()].t().contiguous()


def inverse_factor(hessian: Tensor, damping: float, layer: str) -> Tensor:
    """The upper triangular U with U^T U = H^-1, where H has `damping` times its mean diagonal added: float32 [K, K].

    Inputs that never were other than 0 have a diagonal of 0, and get the mean. Where float32 does not suffice for the
    factorization, damping grows tenfold, up to the mean itself.

    Raises:
        CalibrationError: it never succeeds.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            f"{layer}: its inputs overflow when they are squared; leave it out with a rule, or use method rtn"
        )
    if mean == 0:
        return torch.eye(len(hessian), device=hessian.device)
    unit = hessian / mean
    unit.diagonal()[diagonal == 0] = 1.0
    while True:
        damped = unit.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0 and bool(torch.isfinite(upper).all()):
                return upper.div_(mean.sqrt())
        if damping >= 1.0:
            raise CalibrationError(
                f"{layer}: the Hessian of its inputs cannot be factored, damped by as much as its mean; give more "
                "calibration batches, or use method rtn"
            )
        damping = min(damping * 10, 1.0)
