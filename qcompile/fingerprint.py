"""A hash of qcompile's own sources, so that no cache outlives the code that filled it."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def fingerprint() -> str:
    """16 hexadecimal digits that change with any source file of the installed package."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in (
        package,
        package / "passes",
        package / "codegen",
    ):  # the last two may be links, which rglob passes by
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
