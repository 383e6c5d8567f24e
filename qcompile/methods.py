"""How codes are chosen: the steps that a scheme's `method` names, with their settings. `qcompile.calibrate` runs them.

A method is any number of *folds*, which move magnitudes between a layer's input and its weight and leave the float
model as it is, and one way to choose *codes*:

    "gptq"                                         {"name": "gptq", "act_order": true}
    "importance"                                   {"name": "rtn", "clip": "importance"}
    ["smoothquant", "gptq"]                        [{"name": "smoothquant", "strength": 0.8}, "gptq"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from qcompile.errors import ConfigError, shown, suggestion

CLIPS = ("none", "mse", "importance", "output")
"""What a search of each block's range minimizes: nothing (the range is that of the weights), the squared error, that
weighted by each input's mean square, or the error of the block's part of the output."""


def _within(what: str, value: object, low: float, high: float) -> None:
    """Refuse what is no number of [low, high].

    Raises:
        ConfigError: naming the setting.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{what} must be a number from {low:g} to {high:g}, not {shown(value)}")


def _whole(what: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{what} must be an integer from {low} to {high}, not {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Round to nearest, with the range of each block searched or not.

    Attributes:
        clip: of `CLIPS`; "importance" and "output" need calibration.
    """

    name: ClassVar[str] = "rtn"
    clip: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.clip, str) or self.clip not in CLIPS:
            raise ConfigError(f"method: clip {shown(self.clip)} is unknown; {suggestion(self.clip, CLIPS)}")

    @property
    def needs_data(self) -> bool:
        return self.clip in ("importance", "output")


@dataclass(frozen=True, kw_only=True)
class HQQ:
    """Half-quadratic quantization of asymmetric weights, without data; see `qcompile.calibrate.hqq`.

    Attributes:
        iterations: at most.
        norm: p of the l_p norm that is minimized.
    """

    name: ClassVar[str] = "hqq"
    needs_data: ClassVar[bool] = False
    iterations: int = 20
    norm: float = 0.7

    def __post_init__(self) -> None:
        _whole("method: iterations", self.iterations, 1, 10_000)
        _within("method: norm", self.norm, 0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Codes chosen column by column, later ones making up for earlier ones' errors; see `qcompile.calibrate.gptq`.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean.
        block_size: columns whose error is carried to the rest together; it changes speed alone.
        act_order: columns of large inputs first, in static groups: the packed weight has no permutation. (The weight's
            own `act_order` is GPTQ's `desc_act`: groups of the sorted columns.)
        clip: how the range of a group is chosen, of `CLIPS`.
    """

    name: ClassVar[str] = "gptq"
    needs_data: ClassVar[bool] = True
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = True
    clip: str = "importance"

    def __post_init__(self) -> None:
        _within("method: damping", self.damping, 1e-6, 10.0)
        _whole("method: block_size", self.block_size, 1, 1 << 20)
        if not isinstance(self.act_order, bool):
            raise ConfigError(f"method: act_order must be true or false, not {shown(self.act_order)}")
        if not isinstance(self.clip, str) or self.clip not in CLIPS:
            raise ConfigError(f"method: clip {shown(self.clip)} is unknown; {suggestion(self.clip, CLIPS)}")


@dataclass(frozen=True, kw_only=True)
class Given:
    """The codes came from a file, or another library chose them."""

    name: ClassVar[str] = "checkpoint"
    needs_data: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Move the inputs' outliers into the weight; see `qcompile.calibrate.smoothquant`.

    Attributes:
        strength: how much of the inputs' range moves (alpha): 0 none, 1 all.
    """

    name: ClassVar[str] = "smoothquant"
    strength: float = 0.5

    def __post_init__(self) -> None:
        _within("method: strength", self.strength, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """Enlarge the columns of the weight that large inputs meet; see `qcompile.calibrate.awq`.

    Attributes:
        grid: how many strengths are tried.
    """

    name: ClassVar[str] = "awq"
    grid: int = 20

    def __post_init__(self) -> None:
        _whole("method: grid", self.grid, 2, 1000)


OBSERVERS = ("absmax", "percentile", "mse", "kl")
OBSERVED = ("tensor", "token")


@dataclass(frozen=True, kw_only=True)
class Observer:
    """How calibration finds a static scale; see `qcompile.calibrate.observers`.

    Attributes:
        name: of `OBSERVERS`.
        percentile: of the magnitudes, for the observer of that name.
        per: whose magnitudes: of all numbers, or of each token's greatest.
    """

    name: str = "absmax"
    percentile: float = 99.99
    per: str = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in OBSERVERS:
            raise ConfigError(f"observer {shown(self.name)} is unknown; {suggestion(self.name, OBSERVERS)}")
        _within("observer: percentile", self.percentile, 0.01, 100.0)
        if not isinstance(self.per, str) or self.per not in OBSERVED:
            raise ConfigError(f"observer: per {shown(self.per)} is unknown; {suggestion(self.per, OBSERVED)}")


ABSMAX = Observer()


def parse_observer(given: object) -> Observer:
    """An observer from its name, or a mapping of its settings.

    Raises:
        ConfigError: unknown names or values.
    """
    if isinstance(given, Observer):
        return given
    settings = given if isinstance(given, Mapping) else {"name": given}
    known = [field.name for field in fields(Observer)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"an observer has no setting {shown(key)}; there are: {', '.join(known)}")
    return Observer(**settings)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Turn the residual stream of the whole model, and the values of each head, by Hadamard matrices (R1 and R2); see
    `qcompile.calibrate.rotate` and `rotate_heads`.

    It is done before all else, once, if any layer's method names it.

    Attributes:
        seed: of the matrices' signs; one for a model.
        online: whether layers that are reached by neither have their inputs turned when they run, by a Hadamard
            transform before the product (R4); their weights are then `rotated`.
    """

    name: ClassVar[str] = "hadamard"
    seed: int = 0
    online: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.online, bool):
            raise ConfigError(f"method: online must be true or false, not {shown(self.online)}")
        _whole("method: seed", self.seed, 0, 2**31 - 1)


Codes = RTN | HQQ | GPTQ | Given
Fold = Rotation | SmoothQuant | AWQ

_CODES: dict[str, type[Codes]] = {kind.name: kind for kind in (RTN, HQQ, GPTQ, Given)}
_FOLDS: dict[str, type[Fold]] = {kind.name: kind for kind in (Rotation, SmoothQuant, AWQ)}
_KNOWN: dict[str, type[Codes | Fold]] = {**_CODES, **_FOLDS}
_SHORT: dict[str, Codes] = {"importance": RTN(clip="importance")}
"""Names for steps with settings."""
_OFFERED = [*(name for name in _KNOWN if name != Given.name), *_SHORT]
"""What users can choose."""


@dataclass(frozen=True)
class Method:
    """Folds in their order, then how codes are chosen.

    Attributes:
        codes: of the weight as the folds left it.
        folds: each before the next.
    """

    codes: Codes = RTN()
    folds: tuple[Fold, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether inputs of the layer must have been seen."""
        return bool(self.folds) or self.codes.needs_data

    def __str__(self) -> str:
        return " + ".join(step.name for step in (*self.folds, self.codes))


ROUND = Method()
CHECKPOINT = Method(Given())


def parse_method(given: object) -> Method:
    """A method from a step, or a list of steps, each a name or a mapping with `name` and the step's settings.

    Folds alone are followed by rounding to nearest: plainly, or after "awq" with each block's range searched for the
    least error of the output, as AWQ does.

    Raises:
        ConfigError: unknown names or settings, a step twice, several ways to choose codes, or one that is not last.
    """
    if isinstance(given, Method):
        return given
    entries = given if isinstance(given, (list, tuple)) else [given]
    if not entries:
        raise ConfigError(f"method: a list of steps holds at least one; there are: {', '.join(_OFFERED)}")
    steps = [_step(entry) for entry in entries]
    folds = [step for step in steps if isinstance(step, (Rotation, SmoothQuant, AWQ))]
    codes = [step for step in steps if not isinstance(step, (Rotation, SmoothQuant, AWQ))]
    if len(codes) > 1 or (codes and steps[-1] is not codes[0]):
        ways = [name for name in _CODES if name in _OFFERED]
        raise ConfigError(f"method: one of {', '.join(ways)} comes last, after any of {', '.join(_FOLDS)}")
    names = [step.name for step in steps]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"method: {repeated} is named twice; each step is done once")
    if any(isinstance(fold, Rotation) for fold in folds[1:]):
        raise ConfigError("method: hadamard turns the whole model before all else, so it comes first")
    default = RTN(clip="output") if any(isinstance(fold, AWQ) for fold in folds) else RTN()
    return Method(codes[0] if codes else default, tuple(folds))


def _step(given: object) -> Codes | Fold:
    if isinstance(given, str) and given in _SHORT:
        return _SHORT[given]
    name = given.get("name") if isinstance(given, Mapping) else given
    if not isinstance(name, str) or name not in _KNOWN:
        what = shown(name if isinstance(given, Mapping) else given)
        raise ConfigError(f"unknown method {what}; {suggestion(name, _OFFERED)}")
    kind = _KNOWN[name]
    settings = {key: value for key, value in given.items() if key != "name"} if isinstance(given, Mapping) else {}
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"method {name} has no setting {shown(key)}; {suggestion(key, known or ['none'])}")
    return kind(**settings)


def observer_to_config(observer: Observer) -> object:
    """The inverse of `parse_observer`."""
    changed = {f.name: getattr(observer, f.name) for f in fields(observer) if getattr(observer, f.name) != f.default}
    return observer.name if set(changed) <= {"name"} else changed


def method_to_config(method: Method) -> object:
    """The inverse of `parse_method`: plain values, as short as they may be."""
    steps: list[object] = []
    for step in (*method.folds, method.codes):
        changed = {f.name: getattr(step, f.name) for f in fields(step) if getattr(step, f.name) != f.default}
        steps.append({"name": step.name, **changed} if changed else step.name)
    if method.folds and parse_method(steps[:-1]) == method:
        steps.pop()
    return steps[0] if len(steps) == 1 else steps
