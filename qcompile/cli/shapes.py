"""Shapes of weights and numbers of tokens, as commands are given them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qcompile.errors import ConfigError

Shape = tuple[int, int]
LARGEST = 1 << 20
_SHAPE = re.compile(r"(\d{1,9})x(\d{1,9})")


def split(given: Sequence[str]) -> list[str]:
    """What texts list, separated by commas; each once."""
    return list(dict.fromkeys(part.strip() for entry in given for part in entry.split(",") if part.strip()))


def parse_shapes(given: Sequence[str]) -> list[Shape]:
    """(N, K) of texts such as 4096x14336: output features, then input features.

    Raises:
        ConfigError: a text of another form, a size that no weight has, or no shape at all.
    """
    found = []
    for text in split(given):
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise ConfigError(f"shape {text!r}: a shape is output features x input features, such as 4096x14336")
        n, k = int(match[1]), int(match[2])
        if not (0 < n <= LARGEST and 0 < k <= LARGEST):
            raise ConfigError(f"shape {text!r}: sizes are from 1 to {LARGEST}")
        found.append((n, k))
    if not found:
        raise ConfigError("no shape is named; try 4096x14336")
    return found


def shapes_in(text: str) -> list[Shape] | None:
    """As `parse_shapes`; None for a text that is no list of shapes, such as the path of a model.

    Raises:
        ConfigError: a size that no weight has.
    """
    parts = split([text])
    return parse_shapes([text]) if parts and all(_SHAPE.fullmatch(part) for part in parts) else None


def parse_experts(given: str) -> tuple[int, int]:
    """Of a mixture: how many experts a token chooses, and how many there are, of a text such as 2/8.

    Raises:
        ConfigError: a text of another form.
    """
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", given.strip())
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ConfigError(f"--experts {given!r}: how many a token chooses, of how many, such as 2/8")
    return int(match[1]), int(match[2])


def parse_tokens(given: Sequence[str]) -> list[int]:
    """Numbers of rows of activations.

    Raises:
        ConfigError: something else, or nothing.
    """
    texts = split(given)
    for text in texts:
        if not (re.fullmatch(r"\d{1,9}", text) and 0 < int(text) <= LARGEST):
            raise ConfigError(f"--tokens {text!r}: numbers of tokens are whole, from 1 to {LARGEST}")
    if not texts:
        raise ConfigError("--tokens names nothing; try --tokens 1,16")
    return list(map(int, texts))
