"""Static scales of activations: what range of the magnitudes that were seen a format's codes shall cover.

An observer is shown tensors and gives a scale. Magnitudes are those of all numbers together, or the greatest of each
token, so that a percentile speaks of tokens. KL divergence as in Migacz 2017, "8-bit Inference with TensorRT" (GTC);
the others are what their names say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.formats import Format
from qcompile.methods import Observer

_BINS = 2048
_CANDIDATES = 96


class Observed:
    """A histogram of magnitudes, whose range grows with what it is shown.

    Attributes:
        observer: what to do with it.
        seen: how many numbers (of tokens: how many tokens).
        top: float32 [], the greatest magnitude.
        counts: float64 [2048], of equal bins from 0 to `width`, float32 [].
    """

    def __init__(self, observer: Observer, name: str) -> None:
        self.observer, self.name = observer, name
        self.seen = 0
        self.top = torch.zeros(())
        self.width = torch.zeros(())
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in a tensor [..., K].

        Raises:
            CalibrationError: it holds NaN or infinity.
        """
        magnitude = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).abs()
        if not bool(torch.isfinite(magnitude).all()):
            raise CalibrationError(f"{self.name}: calibration gave it NaN or infinity, so its static scale is unknown")
        if magnitude.numel() == 0:
            return
        magnitude = magnitude.amax(1) if self.observer.per == "token" else magnitude.reshape(-1)
        self.seen += magnitude.numel()
        self.top = torch.maximum(self.top.to(magnitude.device), magnitude.amax())
        if self.observer.name != "absmax":
            self._count(magnitude)

    def _count(self, magnitude: Tensor) -> None:
        self.counts, self.width = self.counts.to(magnitude.device), self.width.to(magnitude.device)
        if bool(self.width == 0):  # what was counted before was all 0, in the first bin
            self.width = self.top
        while bool(self.top > self.width):
            halved = self.counts.unflatten(0, (-1, 2)).sum(1)
            self.counts = torch.cat([halved, torch.zeros_like(halved)])
            self.width = self.width * 2
        bins = (magnitude * (_BINS / self.width.clamp(min=1e-38))).long().clamp(0, _BINS - 1)
        self.counts.scatter_add_(0, bins, torch.ones_like(magnitude, dtype=torch.float64))

    def scale(self, fmt: Format) -> Tensor:
        """The scale for codes of a format, float32 []; 1 where all was 0.

        Raises:
            CalibrationError: nothing was shown.
        """
        if self.seen == 0:
            raise CalibrationError(
                f"{self.name}: calibration batches never reached it, so its static scale is unknown; give batches that "
                "do, or choose dynamic activations"
            )
        limit = _RANGES[self.observer.name](self, fmt)
        limit = torch.where(self.top == 0, torch.full_like(limit, fmt.absmax), torch.minimum(limit, self.top))
        return (limit / fmt.absmax).clamp(min=torch.finfo(torch.float32).smallest_normal)

    @property
    def centers(self) -> Tensor:
        """The magnitudes that bins stand for, float64 [2048]."""
        middle = torch.arange(_BINS, dtype=torch.float64, device=self.counts.device) + 0.5
        return middle * (self.width.to(torch.float64) / _BINS)


def _absmax(observed: Observed, _: Format) -> Tensor:
    return observed.top


def _percentile(observed: Observed, _: Format) -> Tensor:
    """The upper edge of the bin in which the share is reached."""
    share = observed.counts.cumsum(0) / observed.seen
    bins = (share < observed.observer.percentile / 100).sum() + 1
    return (bins * (observed.width.to(torch.float64) / _BINS)).to(torch.float32)


def _candidates(observed: Observed) -> Tensor:
    """Ranges to try, float64 [candidates], from a 96th of the greatest magnitude up to it."""
    steps = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64, device=observed.top.device) / _CANDIDATES
    return observed.top.to(torch.float64) * steps


def _rounded(values: Tensor, limit: Tensor, fmt: Format) -> Tensor:
    """Magnitudes as codes of a format hold them, float64, with the range [] mapped to the format's own."""
    scale = (limit / fmt.absmax).clamp(min=torch.finfo(torch.float32).smallest_normal)
    decoded = fmt.decode(fmt.encode((values / scale).to(torch.float32)).to(torch.int32))
    assert isinstance(decoded, Tensor)
    return decoded.to(torch.float64) * scale


def _best(observed: Observed, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """The range of least cost; of equals the widest."""
    candidates = _candidates(observed).flip(0)
    costs = torch.stack([cost(candidate) for candidate in candidates])
    return candidates[costs.argmin()].to(torch.float32)


def _mse(observed: Observed, fmt: Format) -> Tensor:
    """Least mean square of the rounding and clipping error."""
    centers = observed.centers

    def cost(limit: Tensor) -> Tensor:
        return (observed.counts * (centers - _rounded(centers, limit, fmt)).square()).sum()

    return _best(observed, cost)


def _kl(observed: Observed, fmt: Format) -> Tensor:
    """Least KL divergence between the distribution of magnitudes, and that in which a code's share is spread evenly
    over the bins that round to it; what is clipped counts as of the last bin within the range."""
    centers, counts = observed.centers, observed.counts
    total = counts.sum().clamp(min=1)

    def cost(limit: Tensor) -> Tensor:
        inside = centers <= limit
        reference = counts * inside
        reference[inside.sum().clamp(min=1) - 1] += (counts * ~inside).sum()
        scale = (limit / fmt.absmax).clamp(min=torch.finfo(torch.float32).smallest_normal)
        codes = fmt.encode((centers / scale).to(torch.float32)).long()
        occupied = inside & (counts > 0)
        mass = torch.zeros(2**fmt.bits, dtype=torch.float64, device=counts.device)
        bins = torch.zeros_like(mass).scatter_add_(0, codes, occupied.to(torch.float64))
        mass.scatter_add_(0, codes, counts * inside)
        spread = torch.where(occupied, (mass / bins.clamp(min=1))[codes], 0.0)
        p, q = reference / total, spread / spread.sum().clamp(min=1e-300)
        return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-12).log()), 0.0).sum()

    return _best(observed, cost)


_RANGES: dict[str, Callable[[Observed, Format], Tensor]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "mse": _mse,
    "kl": _kl,
}
