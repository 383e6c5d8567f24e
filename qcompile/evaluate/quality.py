"""Perplexity of a language model on a text, and its distance to a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor], "object"]


@dataclass(frozen=True)
class Quality:
    """Means over the predicted tokens of a text.

    Attributes:
        tokens: how many were predicted.
        perplexity: exp of the mean negative log-likelihood (natural logarithm).
        kl: mean of KL(reference || model) over next-token distributions, in nats; 0 without a reference.
        top1: share of positions at which both find the same token most likely; 1 without a reference.
    """

    tokens: int
    perplexity: float
    kl: float = 0.0
    top1: float = 1.0


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
    count, surprise, divergence, agreed = 0, 0.0, 0.0, 0.0
    for tokens, first in windows(ids, window):
        target = tokens[0, first:]
        log_p = F.log_softmax(_logits(model, tokens)[0, first - 1 : -1].float(), dim=-1)
        surprise += F.nll_loss(log_p, target, reduction="sum").double().item()
        count += target.numel()
        if reference is not None:
            log_q = F.log_softmax(_logits(reference, tokens)[0, first - 1 : -1].float(), dim=-1)
            divergence += F.kl_div(log_p, log_q, reduction="sum", log_target=True).double().item()
            agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    if reference is None:
        return Quality(count, math.exp(surprise / count))
    return Quality(count, math.exp(surprise / count), max(divergence / count, 0.0), agreed / count)


def perplexity(model: Model, ids: Tensor, window: int = 256) -> float:
    """exp of the mean negative log-likelihood of a text's tokens; see `compare`."""
    return compare(model, None, ids, window).perplexity


def _logits(model: Model, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits  # type: ignore[attr-defined]
    assert isinstance(logits, Tensor)
    return logits
