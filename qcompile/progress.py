"""A progress bar over the steps of a long operation, on terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """Progress over a known number of steps, on a terminal: how many are done, the time left, and the last step's name.

    Args:
        total: steps.
        show: whether at all.
    """

    def __init__(self, total: int, description: str, show: bool) -> None:
        self._progress: Any = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn(description),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, text: str) -> None:
        """A step is done."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=text)


def track(steps: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The steps themselves; on a terminal (standard error) a bar shows how many are done and the time left."""
    if not show or not steps or not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(steps, description, console=Console(stderr=True), transient=True)
