"""Generated kernels on disk, named by the hash of their text, and loaded once a process."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from qcompile.codegen.render import render
from qcompile.codegen.spec import AnySpec
from qcompile.flags import flags


def digest(source: str) -> str:
    """The name of a source: 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def write_file(path: Path, text: str) -> None:
    """Write under another name, then rename: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def store(source: str) -> Path:
    """The file `<cache_dir>/kernels/<hash>/kernel.py` holding the source; one whose content differs is written anew.

    Safe when several processes store the same source at once. With `flags.dump` set, `<dump>/kernels/<hash>.py` gets a
    copy.

    Raises:
        OSError: the folder cannot be written to.
    """
    name = digest(source)
    path = flags.cache_dir / "kernels" / name / "kernel.py"
    try:
        intact = path.read_bytes() == source.encode()
    except OSError:
        intact = False
    if not intact:
        write_file(path, source)
    if flags.dump is not None:
        write_file(flags.dump / "kernels" / f"{name}.py", source)
    return path


@functools.cache
def load(spec: AnySpec) -> ModuleType:
    """The module of a kernel, whose `kernel` is the Triton function."""
    source = render(spec)
    path = store(source)
    name = f"qcompile_kernel_{digest(source)}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)  # the text that was verified, whatever the file holds now
    return module
