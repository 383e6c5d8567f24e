"""`qcompile schemes`: the table of the presets."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qcompile.presets import ALIASES, PRESETS


def schemes() -> None:
    """List the presets."""
    table = Table("name", "weights", "activations", "also called")
    for name, preset in PRESETS.items():
        aliases = ", ".join(alias for alias, known in ALIASES.items() if known == name)
        table.add_row(name, str(preset.weight), str(preset.activation or "as they are"), aliases)
    Console().print(table)
