"""Files of results, and what they have in common as text in Markdown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "qcompile"

Row = dict[str, Any]
File = dict[str, Any]


def load(folder: Path, bench: str) -> list[File]:
    """The files of a benchmark, by machine."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*.{bench}.json"))]


def peers_of(folder: Path, machine: str, bench: str) -> list[Row]:
    """Rows of other libraries on a machine."""
    path = folder / f"{machine}.peers.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["bench"] == bench]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(text: str) -> str:
    """A paragraph."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def context(tokens: int) -> str:
    """A number of tokens, such as 256 or 16k."""
    return str(tokens) if tokens < 1024 else f"{tokens // 1024}k"


def run_of(file: File) -> str:
    """When, where and with what."""
    versions = file["versions"]
    named = [f"{name} {version}" for name, version in versions.items() if name not in ("gpu", "threads")]
    where = versions.get("gpu") or f"{file['machine']}, {versions.get('threads')} threads"
    return f"{where}, {', '.join(named)}, {file['date']}."


def lines_of(
    rows: list[Row],
    peers: list[Row],
    name: Callable[[Row], str],
    place: Callable[[Row], Any],
    places: Sequence[Any],
    cell: Callable[[Row], str],
) -> list[list[str]]:
    """Lines of a table: one for each `name`, ours in bold, others' of another run after them with a mark.

    Args:
        place: the column of a row, one of `places`.
    """
    found: dict[str, dict[Any, str]] = {}
    for source, mark in ((rows, ""), (peers, " †")):
        for row in source:
            label = f"**{name(row)}**" if row["impl"] == OURS else name(row) + mark
            found.setdefault(label, {})[place(row)] = cell(row)
    return [[label, *(cells.get(each, "") for each in places)] for label, cells in found.items()]


def time_of(row: Row) -> str:
    """Microseconds, and in brackets the share of the limit where it is known."""
    share = f" ({row['floor_us'] / row['us']:.0%})" if "floor_us" in row else ""
    return number(row["us"]) + share


def layer_sums(rows: list[Row]) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """(scheme, implementation) to M to microseconds and limit, summed over the shapes; only of what has all shapes."""
    shapes = {(row["N"], row["K"]) for row in rows}
    found: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["scheme"], row["impl"]), {}).setdefault(row["M"], []).append(row)
    return {
        key: {
            m: (sum(r["us"] for r in part), sum(r["floor_us"] for r in part))
            for m, part in by_m.items()
            if len(part) == len(shapes)
        }
        for key, by_m in found.items()
    }


def summed(rows: list[Row]) -> list[Row]:
    """`layer_sums` as rows."""
    return [
        {"scheme": scheme, "impl": impl, "M": m, "us": us, "floor_us": least}
        for (scheme, impl), by_m in layer_sums(rows).items()
        for m, (us, least) in by_m.items()
    ]
