"""Exceptions: one class per kind of user mistake, each message naming the place and the way out."""

import difflib
import reprlib
from collections.abc import Iterable


class QCompileError(Exception):
    """Base of every error that qcompile raises on purpose."""


class ConfigError(QCompileError, ValueError):
    """A configuration, scheme or option that cannot be understood or cannot apply."""


class LayerError(QCompileError, ValueError):
    """A layer that cannot be quantized as its rule asks."""


class CalibrationError(QCompileError, ValueError):
    """Calibration data that do not show what a layer needs, or that it cannot be computed from."""


class GradientError(QCompileError, RuntimeError):
    """Autograd would need to differentiate through a quantized operation."""


class DeviceError(QCompileError, RuntimeError):
    """A device is not there, or there is no kernel for it."""


class CacheFullError(QCompileError, RuntimeError):
    """A paged KV cache has no room for more tokens or sequences."""


class WeightReleasedError(QCompileError, RuntimeError):
    """The original of a quantized weight was read after its memory was freed on request."""


class CheckpointError(QCompileError, ValueError):
    """A model file that is missing, damaged or of an unknown kind."""


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 80, 80


def shown(value: object) -> str:
    """A user's value for a message: its repr, cut short where it is long, deep or repeats itself."""
    return _BRIEF.repr(value)


def nearest(given: object, names: Iterable[str], count: int = 3) -> list[str]:
    """Of some names those most like what was given, whose case does not matter; only one if it is that but for case."""
    if not isinstance(given, str):
        return []
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.casefold(), name)
    wanted = given.casefold()
    found = [wanted] if wanted in folded else difflib.get_close_matches(wanted, folded, n=count, cutoff=0.6)
    return [folded[name] for name in found]


def nearest_layers(glob: str, names: list[str]) -> list[str]:
    """Layer names most like a glob that matched none: by the last part, then by the whole name."""
    plain = glob.replace("*", "")
    by_tail = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    tails = difflib.get_close_matches(plain.rsplit(".", 1)[-1], by_tail, n=3, cutoff=0.5)
    return list(
        dict.fromkeys([*(by_tail[t] for t in tails), *difflib.get_close_matches(plain, names, n=3, cutoff=0.3)])
    )[:3]


def suggestion(given: object, names: Iterable[str]) -> str:
    """The end of a message about a name that is unknown: what may have been meant, or all that there are."""
    names = list(names)
    near = nearest(given, names)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}"
