"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.errors import ConfigError, nearest

Scores = dict[str, dict[str, float]]
"""Task to metric (as `acc` or `acc_stderr`) to value."""


class Tasks:
    """Tasks by their names, and what runs them.

    Args:
        given: names that lm-evaluation-harness knows, or `.yaml` files of tasks of one's own.
        limit: documents of each task, at most; None for all.

    Raises:
        ConfigError: it is not installed; a task that it does not know.
    """

    def __init__(self, given: Sequence[str], limit: int | None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("tasks need lm-evaluation-harness: `pip install lm_eval`")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        files = [Path(name) for name in given if name.endswith((".yaml", ".yml"))]
        for file in files:
            if not file.is_file():
                raise ConfigError(f"task {file}: there is no such file")
        self.limit = limit
        self.manager: Any = TaskManager(include_path=sorted({str(file.parent) for file in files}) or None)
        self.names = [_name_in(Path(name)) if Path(name) in files else name for name in given]
        for name in self.names:
            if not self.manager.match_tasks([name]):
                near = ", ".join(nearest(name, self.manager.all_tasks))
                raise ConfigError(
                    f"lm-evaluation-harness knows no task {name!r}" + (f"; nearest: {near}" if near else "")
                )

    def run(self, model: nn.Module, tokenizer: Any) -> Scores:
        """Run them on a causal language model of transformers.

        Raises:
            ConfigError: data that cannot be had; what the harness says.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # tasks print
                harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
                found = simple_evaluate(
                    harness, tasks=self.names, limit=self.limit, task_manager=self.manager, log_samples=False
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ConfigError(f"tasks {', '.join(self.names)}: {type(error).__name__}: {error}") from error
        return {
            task: {
                metric.removesuffix(",none"): float(value)
                for metric, value in metrics.items()
                if "," in metric and isinstance(value, (int, float))
            }
            for task, metrics in found["results"].items()
        }


def _name_in(file: Path) -> str:
    """The name that a task's file gives it.

    Raises:
        ConfigError: it gives none.
    """
    match = re.search(r"^task:\s*[\"']?([^\"'\s#]+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if match is None:
        raise ConfigError(f"task {file}: it has no line `task: NAME`")
    return match[1]
