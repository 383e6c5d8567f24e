"""Progress of a command on standard error: a bar on terminals, a line a step elsewhere."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """A known number of named steps; `next` begins one and thereby ends the one before."""

    def __init__(self, total: int) -> None:
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total)
        self.begun = 0

    def __enter__(self) -> Steps:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def pause(self) -> None:
        """Leave the terminal to a bar of the step's own; the next step takes it back."""
        self.bar.stop()

    def next(self, name: str) -> None:
        """Begin a step."""
        self.bar.start()
        self.bar.update(self.task, completed=self.begun, description=name)
        self.begun += 1
        if not self.console.is_terminal:
            self.console.print(f"{name} ...", highlight=False)


def quiet_imports() -> None:
    """Keep what other packages log while they are imported from breaking the progress bar."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
