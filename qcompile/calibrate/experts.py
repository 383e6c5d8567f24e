"""What each expert of a mixture is given, summed up over calibration, from the tokens that the router sends to it.

An expert that few tokens reach says little of its inputs: K tokens are as if seen, and those that are missing are taken
from what all experts read, the hidden states; for the inputs of `down_proj`, which are each expert's own, from inputs
without correlations, so that rounding to nearest is what an expert without tokens gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibrate.statistics import InputStatistics
from qcompile.experts import projection_shapes
from qcompile.gating import Gating


class ExpertStatistics:
    """Of one mixture.

    Attributes:
        of: by projections' names, of each expert.
    """

    def __init__(self, name: str, experts: nn.Module) -> None:
        device = next(experts.parameters()).device
        self.experts, self.gating = experts, Gating(experts)
        self.of: dict[str, list[InputStatistics]] = {
            projection: [InputStatistics.empty(f"{name}.{projection}", k, device) for _ in range(count)]
            for projection, (count, _, k) in projection_shapes(experts).items()
        }
        self.first = next(projection for projection in self.of if projection != "down_proj")

    @torch.no_grad()
    def add(self, hidden: Tensor, chosen: Tensor) -> None:
        """Take in what the mixture is called with.

        Args:
            hidden: [tokens, H].
            chosen: int64 [tokens, top k], numbers of experts; a number that is none's is of a token that none gets.

        Raises:
            CalibrationError: NaN or infinity.
        """
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for index, (read, made) in enumerate(zip(self.of[self.first], self.of["down_proj"], strict=True)):
            rows = hidden[(chosen.reshape(len(hidden), -1) == index).any(1)]
            if len(rows):
                read.add(rows)
                made.add(self.gating(self._product(rows, index)))

    def _product(self, rows: Tensor, index: int) -> Tensor:
        weight = getattr(self.experts, self.first)[index]
        bias = getattr(self.experts, f"{self.first}_bias")[index] if self.experts.has_bias else None
        return nn.functional.linear(rows, weight.t() if self.experts.is_transposed else weight, bias)

    def hessian(self, projection: str, index: int) -> Tensor:
        """float32 [K, K], the mean of x x^T, with what is missing made up for."""
        own = self.of[projection][index]
        width = len(own.gram)
        if own.tokens >= width:
            return own.hessian
        every = self.of[projection]
        tokens = max(sum(one.tokens for one in every), 1)
        if projection == self.first:
            rest = torch.stack([one.gram for one in every]).sum(0) / tokens
        else:
            power = torch.stack([one.gram.diagonal().mean() for one in every]).sum() / tokens
            rest = power * torch.eye(width, device=own.gram.device)
        return (own.gram + (width - own.tokens) * rest) / width

    def note(self, projection: str) -> str:
        """Which experts saw fewer tokens than they have inputs; "" if none did."""
        every = self.of[projection]
        few = [one.tokens for one in every if one.tokens < len(one.gram)]
        if not few:
            return ""
        width = len(every[0].gram)
        return f"{len(few)} of {len(every)} experts saw fewer tokens than their {width} inputs, {min(few)} at least"


@contextmanager
def watched(mixtures: Mapping[str, nn.Module], statistics: Mapping[str, ExpertStatistics]) -> Iterator[None]:
    """Let statistics see each call of mixtures' experts."""

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
            statistics[name].add(given["hidden_states"], given["top_k_index"])

        return hook

    with ExitStack() as stack:
        for name in statistics:
            handle = mixtures[name].register_forward_pre_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
