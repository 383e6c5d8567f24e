"""Memory that was freed and is not yet the system's again."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> None:
    """Return freed memory to the system.

    glibc raises its threshold of what it maps and unmaps by itself to the largest that was freed, up to 32 MB, and
    keeps what is smaller: after quantizing or loading a model, as much as the model takes.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)
