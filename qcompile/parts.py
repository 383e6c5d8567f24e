"""Modules that have a part of a layer, and what they tell the processes that have the other parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qcompile import compat
from qcompile.exchange import ADD_UP
from qcompile.experts import QuantizedExperts
from qcompile.hadamard import transform
from qcompile.linear_spec import LinearSpec
from qcompile.modules import QuantizedLinear
from qcompile.ops import OP


@dataclass(frozen=True)
class Place:
    """A process's place in its group.

    Attributes:
        rank: its number, from 0.
        size: of the group.
        group: the group's name, by which graphs know it.
        direct: whether its GPUs write each other's memory.
    """

    rank: int
    size: int
    group: str
    direct: bool = False

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of a contiguous tensor over the processes."""
        if self.direct:
            return ADD_UP(x, self.group)
        return compat.all_reduce(x, self.group)

    def part(self, extent: int) -> tuple[int, int]:
        """The first, and one after the last, of so many rows or columns that this process has."""
        share = extent // self.size
        return self.rank * share, (self.rank + 1) * share

    def __str__(self) -> str:
        return f"part {self.rank + 1} of {self.size}"


class GatheredLinear(nn.Linear):
    """Some rows of a linear, whose outputs are joined: x [..., K] -> y [..., N], the same on all processes."""

    place: Place

    def forward(self, x: Tensor) -> Tensor:
        return compat.all_gather(super().forward(x), self.place.size, self.place.group)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.place}"


class RowwiseLinear(nn.Linear):
    """Some columns of a linear, whose outputs are added: the same y [..., N] on all processes, which have the bias.

    Attributes:
        splits: whether x is the whole input [..., K], of which its columns are taken; else it is [..., K / size].
    """

    place: Place
    splits: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.splits:
            x = x.narrow(-1, self.place.rank * self.in_features, self.in_features)
        y = self.place.add_up(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.place}"


class VocabularyEmbedding(nn.Embedding):
    """Some rows of an embedding; tokens that others have are 0 here, and the processes' results are added."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        own = input - self.place.rank * self.num_embeddings
        others = (own < 0) | (own >= self.num_embeddings)
        found = F.embedding(own.masked_fill(others, 0), self.weight)
        return self.place.add_up(found.masked_fill(others.unsqueeze(-1), 0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.place}"


class GatheredQuantizedLinear(QuantizedLinear):
    """`GatheredLinear` over a packed weight."""

    place: Place

    def forward(self, x: Tensor) -> Tensor:
        return compat.all_gather(super().forward(x), self.place.size, self.place.group)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.place}"


class RowwiseQuantizedLinear(QuantizedLinear):
    """`RowwiseLinear` over a packed weight.

    Columns of a weight whose inputs are arranged (`act_order`, `rotated`) belong to inputs of other processes, or of
    all. So inputs are gathered there, arranged, and those of the columns are taken.

    Args:
        weight, scheme, ...: of the columns, as a `QuantizedLinear` takes them.
        place: this process's.
        features: int64 [K / size], which features of the whole input, once that is turned, are the columns'; None if
            x is these already.
        gathers: whether x [..., K / size] is gathered first.
        turns: whether the whole input is turned then.
    """

    features: Tensor | None

    def __init__(
        self, *, place: Place, features: Tensor | None = None, gathers: bool = False, turns: bool = False, **given: Any
    ) -> None:
        self.place, self.gathers, self.turns = place, gathers, turns
        super().__init__(**given)
        self.register_buffer("features", features)
        self.beside += ("features",)

    def _spec(self) -> LinearSpec:
        return replace(super()._spec(), epilogue=())

    def forward(self, x: Tensor) -> Tensor:
        beside = self._buffers
        if self.gathers:
            x = compat.all_gather(x, self.place.size, self.place.group)
        if self.turns:
            x = transform(x)
        if (features := beside["features"]) is not None:
            x = x.index_select(-1, features)
        y = OP(x, self._tensors(), None, beside["input_scale"], beside["pre_quant_scale"], [], self.spec)
        y = self.place.add_up(y)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.place}"


class PartOfExperts(QuantizedExperts):
    """Some of the inner features of all experts, whose outputs are added."""

    place: Place

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.place.add_up(super().forward(hidden_states, top_k_index, top_k_weights))

    def extra_repr(self) -> str:
        return str(self.place)


PARTS = (
    GatheredLinear,
    RowwiseLinear,
    VocabularyEmbedding,
    GatheredQuantizedLinear,
    RowwiseQuantizedLinear,
    PartOfExperts,
)
