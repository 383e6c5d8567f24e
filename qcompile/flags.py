"""The process-wide switches: each read once from the environment, and a context manager in code.

| environment          | flag        | meaning                                                                  |
| -------------------- | ----------- | ------------------------------------------------------------------------ |
| `QCOMPILE_DUMP`      | `dump`      | folder that receives the graph after each pass and each generated kernel |
| `QCOMPILE_CACHE_DIR` | `cache_dir` | folder of generated kernels and tuned choices                            |
| `QCOMPILE_VERIFY`    | `verify`    | 1: check the graph after every pass, not only at the end                 |
| `QCOMPILE_CPU_ISA`   | `cpu_isa`   | for generated C++: amx, avx512_bf16, avx512_vnni, avx512, avx_vnni,      |
|                      |             | avx2, i8mm, dotprod or portable                                          |
| `QCOMPILE_TUNE`      | `tune`      | 1: time the kernels for a linear on the GPU at its first use, and keep   |
|                      |             | what is fastest in `cache_dir`                                           |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "qcompile"


@dataclass
class Flags:
    """Current values of the switches; see the module's table."""

    dump: Path | None = None
    cache_dir: Path = Path()
    verify: bool = False
    cpu_isa: str | None = None
    tune: bool = False

    @classmethod
    def from_environment(cls) -> Flags:
        dump = os.environ.get("QCOMPILE_DUMP")
        cache = os.environ.get("QCOMPILE_CACHE_DIR")
        return cls(
            dump=Path(dump) if dump else None,
            cache_dir=Path(cache) if cache else _default_cache_dir(),
            verify=os.environ.get("QCOMPILE_VERIFY", "0") not in ("", "0"),
            cpu_isa=os.environ.get("QCOMPILE_CPU_ISA") or None,
            tune=os.environ.get("QCOMPILE_TUNE", "0") not in ("", "0"),
        )


flags = Flags.from_environment()


@contextlib.contextmanager
def override(**changes: object) -> Iterator[Flags]:
    """Set flags for the duration of a `with` block.

    Raises:
        AttributeError: for a name that is not a flag.
    """
    known = {f.name for f in fields(Flags)}
    if unknown := set(changes) - known:
        raise AttributeError(f"unknown flags {sorted(unknown)}; there are {sorted(known)}")
    before = {name: getattr(flags, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(flags, name, value)
        yield flags
    finally:
        for name, value in before.items():
            setattr(flags, name, value)
