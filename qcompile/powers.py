"""Powers of two, in which kernels count what they hold."""

from __future__ import annotations


def power_above(count: int) -> int:
    """The least power of two that is not below a count of 1 or more."""
    return 1 << (count - 1).bit_length()
