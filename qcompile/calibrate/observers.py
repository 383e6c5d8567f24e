"""Static scales of activations: what range of the magnitudes that were seen a format's codes shall cover.

An observer is shown tensors and gives a scale. Magnitudes are those of all numbers together, of each channel (the last
axis), or the greatest of each token, so that a percentile speaks of tokens. KL divergence as in Migacz 2017, "8-bit
Inference with TensorRT" (GTC); the others are what their names say.
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
        top: float32 [S], the greatest magnitudes; S is 1, or the channels.
        counts: float64 [S, 2048], of equal bins from 0 to `width`.
    """

    def __init__(self, observer: Observer, name: str) -> None:
        self.observer, self.name = observer, name
        self.seen = 0
        self.top = torch.zeros(0)
        self.width = torch.zeros(0)
        self.counts = torch.zeros(0)

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
        if self.observer.per == "token":
            magnitude = magnitude.amax(1, keepdim=True)
        rows = magnitude.t().contiguous() if self.observer.per == "channel" else magnitude.reshape(1, -1)  # [S, seen]
        self.seen += rows.shape[1]
        top = rows.amax(1)
        self.top = top if self.top.numel() == 0 else torch.maximum(self.top, top)
        if self.observer.name != "absmax":
            self._count(rows)

    def _count(self, rows: Tensor) -> None:
        if self.counts.numel() == 0:
            self.counts = torch.zeros(rows.shape[0], _BINS, dtype=torch.float64, device=rows.device)
            self.width = torch.zeros_like(self.top)
        while bool((grow := self.top > self.width).any()):
            start = torch.where(self.width == 0, self.top, self.width * 2)
            halved = self.counts.unflatten(1, (-1, 2)).sum(2)
            doubled = torch.cat([halved, torch.zeros_like(halved)], 1)
            self.counts = torch.where((grow & (self.width > 0))[:, None], doubled, self.counts)
            if bool((first := grow & (self.width == 0)).any()):  # what was counted before was all 0
                self.counts[first] = torch.nn.functional.one_hot(torch.zeros(1, dtype=torch.int64), _BINS).to(
                    self.counts
                ) * self.counts[first].sum(1, keepdim=True)
            self.width = torch.where(grow, start, self.width)
        bins = (rows * (_BINS / self.width.clamp(min=1e-38))[:, None]).long().clamp(0, _BINS - 1)
        self.counts.scatter_add_(1, bins, torch.ones_like(rows, dtype=torch.float64))

    def scale(self, fmt: Format) -> Tensor:
        """Scales for codes of a format: float32 [] for tensor and token, [K] for channels. 1 where all was 0.

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
        scale = (limit / fmt.absmax).clamp(min=torch.finfo(torch.float32).smallest_normal)
        return scale if self.observer.per == "channel" else scale.reshape(())

    @property
    def centers(self) -> Tensor:
        """The magnitudes that bins stand for, float64 [S, 2048]."""
        middle = torch.arange(_BINS, dtype=torch.float64, device=self.counts.device) + 0.5
        return middle * (self.width.to(torch.float64) / _BINS)[:, None]


def _absmax(observed: Observed, _: Format) -> Tensor:
    return observed.top


def _percentile(observed: Observed, _: Format) -> Tensor:
    """The upper edge of the bin in which the share is reached."""
    share = observed.counts.cumsum(1) / observed.seen
    bins = (share < observed.observer.percentile / 100).sum(1) + 1
    return (bins * (observed.width.to(torch.float64) / _BINS)).to(torch.float32)


def _candidates(observed: Observed) -> Tensor:
    """Ranges to try, float64 [S, candidates], from a 96th of the greatest magnitude up to it."""
    steps = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64, device=observed.top.device) / _CANDIDATES
    return observed.top.to(torch.float64)[:, None] * steps


def _rounded(values: Tensor, limit: Tensor, fmt: Format) -> Tensor:
    """Magnitudes as codes of a format hold them, float64, with the range [S] mapped to the format's own."""
    scale = (limit / fmt.absmax).clamp(min=torch.finfo(torch.float32).smallest_normal)[:, None]
    decoded = fmt.decode(fmt.encode((values / scale).to(torch.float32)).to(torch.int32))
    assert isinstance(decoded, Tensor)
    return decoded.to(torch.float64) * scale


def _best(observed: Observed, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """The range of least cost; of equals the widest."""
    candidates = _candidates(observed).flip(1)
    costs = torch.stack([cost(candidates[:, i]) for i in range(candidates.shape[1])], 1)
    return candidates.gather(1, costs.argmin(1, keepdim=True))[:, 0].to(torch.float32)


def _mse(observed: Observed, fmt: Format) -> Tensor:
    """Least mean square of the rounding and clipping error."""
    centers = observed.centers

    def cost(limit: Tensor) -> Tensor:
        return (observed.counts * (centers - _rounded(centers, limit, fmt)).square()).sum(1)

    return _best(observed, cost)


def _kl(observed: Observed, fmt: Format) -> Tensor:
    """Least KL divergence between the distribution of magnitudes, and that in which a code's share is spread evenly
    over the bins that round to it; what is clipped counts as of the last bin within the range."""
    centers, counts = observed.centers, observed.counts
    total = counts.sum(1, keepdim=True).clamp(min=1)

    def cost(limit: Tensor) -> Tensor:
        inside = centers <= limit[:, None]
        clipped = (counts * ~inside).sum(1)
        last = inside.sum(1).clamp(min=1) - 1
        reference = counts * inside
        reference.scatter_add_(1, last[:, None], clipped[:, None])
        scale = (limit / fmt.absmax).clamp(min=torch.finfo(torch.float32).smallest_normal)[:, None]
        codes = fmt.encode((centers / scale).to(torch.float32)).long()
        occupied = inside & (counts > 0)
        shape = (counts.shape[0], 2**fmt.bits)
        mass = torch.zeros(shape, dtype=torch.float64, device=counts.device).scatter_add_(1, codes, counts * inside)
        bins = torch.zeros_like(mass).scatter_add_(1, codes, occupied.to(torch.float64))
        spread = torch.where(occupied, (mass / bins.clamp(min=1)).gather(1, codes), 0.0)
        p, q = reference / total, spread / spread.sum(1, keepdim=True).clamp(min=1e-300)
        return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-12).log()), 0.0).sum(1)

    return _best(observed, cost)


_RANGES: dict[str, Callable[[Observed, Format], Tensor]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "mse": _mse,
    "kl": _kl,
}
