"""The contract of a number format, and the registry of those there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from qcompile.errors import ConfigError, shown, suggestion
from qcompile.expr import Value


@dataclass(frozen=True)
class Format(ABC):
    """How an unsigned code of `bits` bits stands for a number.

    Attributes:
        name: registry key, e.g. `"int4"`.
        bits: width of a code; codes are 0 .. 2**bits - 1.

    Invariants, tested for every registered format over every code:
        `decode` of a code is exact in float32;
        `encode(decode(c))` decodes to the same number for every code whose value is finite.
    """

    name: str
    bits: int

    @property
    @abstractmethod
    def absmax(self) -> float:
        """The magnitude that a block's largest element is scaled to when it is quantized symmetrically."""

    @property
    @abstractmethod
    def native_dtype(self) -> torch.dtype | None:
        """torch's own 8-bit dtype with these values, or None."""

    @abstractmethod
    def decode(self, code: Value) -> Value:
        """The float32 value of an int32 code: a formula of `qcompile.expr`."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The uint8 code nearest to each element (ties to even), saturating; NaN becomes a code the format defines.

        Args:
            x: float32, already divided by its scale.
        """


FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Add a format; the name must be new."""
    if fmt.name in FORMATS:
        raise ValueError(f"format {fmt.name!r} is registered already")
    FORMATS[fmt.name] = fmt
    return fmt


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: unknown name; the message lists the nearest ones.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"unknown number format {shown(name)}; {suggestion(name, FORMATS)}")
    return FORMATS[name]
