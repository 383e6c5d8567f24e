"""A progress bar over the steps of a long operation, on terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(steps: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The steps themselves; on a terminal (standard error) a bar shows how many are done and the time left."""
    if not show or not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(steps, description, console=Console(stderr=True), transient=True)
