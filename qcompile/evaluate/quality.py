"""Perplexity of a language model on a text, and its distance to a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor], "object"]
_AT_ONCE = 1 << 20
"""Logits that are held in float64 at a time."""


@dataclass(frozen=True)
class Quality:
    """Means over the predicted tokens of a text, computed in float64 from the models' logits.

    Attributes:
        tokens: how many were predicted.
        perplexity: exp of the mean negative log-likelihood (natural logarithm).
        kl: mean of KL(reference || model) over next-token distributions, in nats; 0 without a reference.
        top1: share of positions at which both find the same token most likely; 1 without a reference.
        perplexity_error, kl_error: standard errors, as if tokens were independent.
        kl_p99: the divergence that 99% of the positions stay below.
    """

    tokens: int
    perplexity: float
    kl: float = 0.0
    top1: float = 1.0
    perplexity_error: float = 0.0
    kl_error: float = 0.0
    kl_p99: float = 0.0


def windows(ids: Tensor, length: int) -> Iterator[tuple[Tensor, int]]:
    """Cut token ids [T] into windows [1, length] of equal length, so that a compiled model sees one shape.

    Yields:
        a window, and the position in it of the first token to predict: 1, since its first token has no context, or
        later in the last window, which reaches back over tokens that are predicted already.
    """
    total = ids.numel()
    length = min(length, total)
    done = 0
    while done < total:
        start = min(done, total - length)
        yield ids[start : start + length][None], max(done - start, 1)
        done = start + length


class Tally:
    """Sums up `Quality`, window by window."""

    def __init__(self) -> None:
        self._surprise: list[Tensor] = []
        self._divergence: list[Tensor] = []
        self._agreed = 0

    def add(self, logits: Tensor, target: Tensor, reference: Tensor | None = None) -> None:
        """Take in predictions.

        Args:
            logits: [T, V], of any floating dtype.
            target: int64 [T], the tokens that came.
            reference: the reference's logits [T, V], or None; always or never.
        """
        rows = max(1, _AT_ONCE // logits.shape[1])
        parts = [None] * -(-len(logits) // rows) if reference is None else reference.split(rows)
        for part, tokens, other in zip(logits.split(rows), target.split(rows), parts, strict=True):
            log_p = F.log_softmax(part, dim=-1, dtype=torch.float64)
            self._surprise.append(F.nll_loss(log_p, tokens, reduction="none").cpu())
            if other is not None:
                log_q = F.log_softmax(other.to(part.device), dim=-1, dtype=torch.float64)
                self._divergence.append(F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).cpu())
                self._agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def quality(self) -> Quality:
        """Of all that was added."""
        surprise = torch.cat(self._surprise)
        count = surprise.numel()
        perplexity = _exp(surprise.mean().item())
        error = perplexity * _standard_error(surprise)
        if not self._divergence:
            return Quality(count, perplexity, perplexity_error=error)
        divergence = torch.cat(self._divergence).clamp_min(0.0)
        return Quality(
            count,
            perplexity,
            divergence.mean().item(),
            self._agreed / count,
            error,
            _standard_error(divergence),
            divergence.sort().values[math.ceil(0.99 * count) - 1].item(),
        )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _standard_error(values: Tensor) -> float:
    return (values.std() / values.numel() ** 0.5).item() if values.numel() > 1 else 0.0


@torch.inference_mode()
def compare(model: Model, reference: Model | None, ids: Tensor, window: int = 256) -> Quality:
    """Measure a model on a text. The reference runs alongside, so no logits are kept beyond a window.

    Args:
        model: from token ids [1, T] to an object whose `logits` are [1, T, V].
        reference: the same, or None for perplexity alone.
        ids: token ids [T] on the models' device, at least 2.
        window: tokens that a model sees at once; the contexts of predicted tokens are 1 to window - 1 long.

    Raises:
        ValueError: fewer than 2 tokens, or a window of less than 2.
    """
    if ids.numel() < 2 or window < 2:
        raise ValueError(f"perplexity needs 2 tokens and a window of 2, not {ids.numel()} and {window}")
    tally = Tally()
    for tokens, first in windows(ids, window):
        other = None if reference is None else logits_of(reference, tokens)[0, first - 1 : -1]
        tally.add(logits_of(model, tokens)[0, first - 1 : -1], tokens[0, first:], other)
    return tally.quality()


def perplexity(model: Model, ids: Tensor, window: int = 256) -> float:
    """exp of the mean negative log-likelihood of a text's tokens; see `compare`."""
    return compare(model, None, ids, window).perplexity


def logits_of(model: Model, tokens: Tensor) -> Tensor:
    """A model's logits [1, T, V] for tokens [1, T]."""
    logits = model(tokens).logits  # type: ignore[attr-defined]
    assert isinstance(logits, Tensor)
    return logits
