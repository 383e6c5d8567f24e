"""What a linear's inputs look like, summed up over calibration: all that methods of choosing codes ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import CalibrationError


@dataclass
class InputStatistics:
    """Sums over the tokens that reached a linear with K input features.

    Attributes:
        names: the linears that were given these very inputs; they share the statistics.
        tokens: how many.
        gram: float32 [K, K], the sum of x x^T.
        absmax, abssum: float32 [K], the greatest and the summed magnitude of each feature.
    """

    names: list[str]
    tokens: int
    gram: Tensor
    absmax: Tensor
    abssum: Tensor

    @classmethod
    def empty(cls, name: str, features: int, device: torch.device) -> InputStatistics:
        """Of no tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls([name], 0, zeros(features, features), zeros(features), zeros(features))

    def add(self, x: Tensor) -> None:
        """Take in inputs [..., K].

        Raises:
            CalibrationError: they hold NaN or infinity.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"{self.names[0]}: calibration gave it NaN or infinity; run the unquantized model on the same batches, "
                "in float32 or bfloat16 if float16 overflows"
            )
        self.tokens += rows.shape[0]
        if rows.shape[0] == 0:
            return
        magnitude = rows.abs()
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self.abssum += magnitude.sum(0)
        self.gram.addmm_(rows.t(), rows)

    @property
    def hessian(self) -> Tensor:
        """float32 [K, K], the mean of x x^T."""
        return self.gram / max(self.tokens, 1)

    @property
    def absmean(self) -> Tensor:
        """float32 [K], the mean magnitude of each feature."""
        return self.abssum / max(self.tokens, 1)

    def divide(self, scale: Tensor) -> None:
        """Become the statistics of x / scale, for positive scales [K]."""
        self.gram /= scale[:, None] * scale
        self.absmax /= scale
        self.abssum /= scale


@dataclass
class Collector:
    """Gathers statistics of linears while a model runs; those that read one tensor share them.

    Attributes:
        of: by the linears' names.
    """

    of: dict[str, InputStatistics] = field(default_factory=dict)
    _seen: list[tuple[Tensor, InputStatistics]] = field(default_factory=list)

    def next_batch(self) -> None:
        """Forget which tensors were inputs."""
        self._seen.clear()

    def observe(self, name: str, x: Tensor) -> None:
        """Take in a linear's input of this batch."""
        own = self.of.get(name)
        shared = next((found for tensor, found in self._seen if tensor is x), None)
        if own is None and shared is not None and shared.tokens == x.numel() // x.shape[-1]:
            shared.names.append(name)  # nothing but this tensor is in it
            self.of[name] = shared
        elif own is None or own.names[0] == name:
            if own is None:
                own = self.of[name] = InputStatistics.empty(name, x.shape[-1], x.device)
            own.add(x)
            self._seen.append((x, own))
        elif shared is not own:
            raise CalibrationError(
                f"{name}: it reads what {own.names[0]} reads in some calibration batches and not in others; leave it "
                "out with a rule, or use method rtn"
            )


@contextmanager
def observed(modules: Mapping[str, nn.Module], observe: Any) -> Iterator[None]:
    """Call `observe(name, input)` before each call of the modules."""

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
