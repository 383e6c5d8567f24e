"""Specs as strings in graphs: JSON on one line, with apostrophes for quotation marks.

Inductor writes such a string into the C++ code of a graph as it is, so it may hold neither quotation marks nor
backslashes.
"""

from __future__ import annotations

import json
from typing import Any


def write(given: dict[str, Any]) -> str:
    """One line.

    Raises:
        ValueError: a text in it holds a quotation mark, an apostrophe, or what JSON escapes.
    """
    text = json.dumps(given, separators=(",", ":"))
    if "'" in text or "\\" in text:
        raise ValueError(f"no spec in a graph: {text}")
    return text.replace('"', "'")


def read(text: str) -> dict[str, Any]:
    """The inverse of `write`.

    Raises:
        ValueError: a text that is none.
    """
    return json.loads(text.replace("'", '"'))
