"""Which scheme for a model on a device: memory, speed and accuracy of every scheme that was measured, and the best.

Memory is computed from the shapes. Speed is that of the kernels that would be chosen (`runtime.tuning`): measured where
the shipped table has the shape, else the cost model's, and between linears what an H100 was measured to take. Accuracy
is that of the model that `docs/accuracy.md` measures; losses of quantized weights and of a quantized cache are added.
No rule names a scheme: what no other option beats in memory, time and loss at once is scored, by one formula.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qcompile.calibrate.assign import label
from qcompile.checkpoint.saving.save import FORMATS, formats_for
from qcompile.codegen.devices import CARDS, Card, Device
from qcompile.codegen.predict import predict, predict_plain
from qcompile.config import AUTO, Auto, parse_config
from qcompile.errors import ConfigError, DeviceError, LayerError, suggestion
from qcompile.evaluate.model_shape import (
    ModelShape,
    Shape,
    activation_bytes,
    cache_bytes,
    head_scheme,
    packed_bytes,
    weight_bytes,
)
from qcompile.methods import method_to_config
from qcompile.presets import PRESETS
from qcompile.scheme import Scheme

PREFERENCES: dict[str, tuple[float, float, float]] = {
    "accuracy": (10.0, 0.1, 0.1),
    "speed": (1.0, 1.0, 0.1),
    "memory": (1.0, 0.1, 1.0),
}
"""What a nat of KL divergence, a logarithm of a step's time and one of memory weigh in an option's score: with
"speed", a tenth of a nat is as bad as a tenth of the time more."""

RESERVED = 0.05
"""Share of a device's memory that its driver and the allocator keep."""

UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Target:
    """A device to run on.

    Attributes:
        name: for people.
        card: its kind; None for a CPU.
        capacity: bytes of memory.
        device: its rates; of a CPU memory and operations alone, as measured here.
    """

    name: str
    card: Card | None
    capacity: int
    device: Device


def target_of(name: str) -> Target:
    """A card of `devices.CARDS`, or this machine's `cpu` or `cuda`, whose memory and rates are looked up.

    Raises:
        DeviceError: unknown, naming the nearest; or `cuda` without a GPU.
    """
    key = name.lower().removeprefix("nvidia-").removeprefix("rtx").removeprefix("-").removeprefix("amd-")
    if key in CARDS:
        card = CARDS[key]
        return Target(key, card, card.capacity, card.device)
    if key == "cpu":
        rates = _ceilings("cpu")
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Target("this CPU", None, pages, Device(1, rates["memory"], math.inf, rates["16-bit"], 0))
    if key == "cuda":
        return _this_gpu()
    raise DeviceError(f"device {name!r} is unknown; {suggestion(key, [*CARDS, 'cpu', 'cuda'])}")


@functools.cache
def _ceilings(kind: str) -> dict[str, float]:
    from qcompile.evaluate.timing import ceilings

    return ceilings(torch.device(kind))


def _this_gpu() -> Target:
    if not torch.cuda.is_available():
        raise DeviceError(f"--device cuda: torch sees no GPU here; name one: {', '.join(CARDS)}")
    from qcompile.codegen.devices import device_of
    from qcompile.runtime import gpu

    device = torch.device("cuda")
    kind, name, properties = gpu.target_of(device), gpu.name_of(device), torch.cuda.get_device_properties(device)
    known = next((CARDS[key].device for key in sorted(CARDS, key=len, reverse=True) if key in name), None)
    if known is None:
        rates = _ceilings("cuda")
        known = replace(
            device_of(kind),
            processors=properties.multi_processor_count,
            memory=rates["memory"],
            operations=rates["16-bit"],
        )
    card = Card(target=kind, capacity=properties.total_memory, device=known, tuned=name)
    return Target(torch.cuda.get_device_name(device), card, card.capacity, known)


@dataclass(frozen=True)
class Measured:
    """Accuracy of a configuration, measured on `model`.

    Attributes:
        name: for people.
        config: as the configuration spells it; None for the unquantized model.
        mix: schemes, and the share of layers that has them.
        kl: nats, to the unquantized model.
        loss: logarithm of the perplexity over the unquantized one's.
    """

    name: str
    config: Any
    mix: tuple[tuple[Scheme, float], ...]
    kl: float
    loss: float


@dataclass(frozen=True)
class Table:
    """What was measured, packaged from benchmarks/results.

    Attributes:
        model: whose accuracy it is.
        rows: of weights.
        caches: KL and loss of formats of keys and values.
        between: seconds of a step that a layer takes beside its linears, on an H100.
    """

    model: str
    rows: tuple[Measured, ...]
    caches: Mapping[str, tuple[float, float]]
    between: float


@functools.cache
def measured() -> Table:
    """The packaged results."""
    text = (importlib.resources.files("qcompile.evaluate") / "measured.json").read_text(encoding="utf-8")
    given = json.loads(text)
    rows = tuple(
        Measured(row["name"] if row["config"] else UNQUANTIZED, row["config"], _mix(row), row["kl"], row["loss"])
        for row in given["accuracy"]
    )
    caches = {name: (entry["kl"], entry["loss"]) for name, entry in given["caches"].items()}
    return Table(given["model"], rows, caches, given["between_us"] * 1e-6)


def _mix(row: Mapping[str, Any]) -> tuple[tuple[Scheme, float], ...]:
    if row["config"] is None:
        return ()
    (rule,) = parse_config(row["config"]).rules
    if isinstance(rule.scheme, Auto):
        schemes = {label(scheme): scheme for scheme in rule.scheme.schemes}
        total = sum(row["layers"].values())
        return tuple((schemes[name], count / total) for name, count in row["layers"].items())
    assert rule.scheme is not None
    return ((rule.scheme, 1.0),)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A configuration of weights and cache for a model on a device.

    Attributes:
        name: what was measured.
        config: of the weights; None leaves them.
        kv_cache: "bfloat16", or a format of keys and values.
        weight_bytes, cache_bytes, activation_bytes: of memory.
        fits: whether all fit the device.
        step: seconds of a decoding step.
        prompt: seconds of reading a context.
        timed: share of the steps' time in linears that was measured on this card, not predicted.
        kl, loss: as `Measured`, of weights and cache together.
        score: by the preference; least is best. None for an option that another beats, or that does not fit.
    """

    name: str
    config: Any
    kv_cache: str
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    fits: bool
    step: float
    prompt: float
    timed: float
    kl: float
    loss: float
    score: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of all."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True)
class Recommendation:
    """All options, the best first, and what they were made for."""

    model: ModelShape
    target: Target
    prefer: str
    batch: int
    context: int
    options: tuple[Option, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Option | None:
        """The option with the least score; None if nothing fits."""
        return self.options[0] if self.options and self.options[0].score is not None else None


def check_preference(prefer: str) -> None:
    """
    Raises:
        ConfigError: unknown, naming the nearest.
    """
    if prefer not in PREFERENCES:
        raise ConfigError(f"--prefer {prefer!r} is unknown; {suggestion(prefer, PREFERENCES)}")


def recommend(
    model: ModelShape, target: Target, prefer: str = "accuracy", batch: int = 1, context: int = 4096
) -> Recommendation:
    """Every measured configuration with every cache, the best first.

    Args:
        prefer: of `PREFERENCES`.
        batch: sequences at once.
        context: tokens of each, prompt and answer.
    """
    check_preference(prefer)
    table, options = measured(), []
    left_out: dict[str, str] = {}
    for row in table.rows:
        try:
            weights = weight_bytes(model, row.mix)
            step = _linears(model, row.mix, target, batch)
            prompt = _linears(model, row.mix, target, batch * context)
        except LayerError as error:
            left_out[row.name] = str(error)
            continue
        for cache in ("bfloat16", *table.caches):
            kl, loss = table.caches.get(cache, (0.0, 0.0))
            kept = cache_bytes(model, cache, batch, context)
            working = activation_bytes(model, batch, context)
            read = kept / (0.83 * target.device.memory)
            beside = (table.between if target.card is not None else 0.0) * model.layers
            option = Option(
                name=row.name,
                config=row.config,
                kv_cache=cache,
                weight_bytes=weights,
                cache_bytes=kept,
                activation_bytes=working,
                fits=weights + kept + working <= (1 - RESERVED) * target.capacity,
                step=step.seconds + read + beside,
                prompt=prompt.seconds + beside + _attention(model, target, batch, context),
                timed=step.timed,
                kl=row.kl + kl,
                loss=row.loss + loss,
            )
            options.append(option)
    scored = {id(option) for option in pareto([option for option in options if option.fits])}
    by = PREFERENCES[prefer]
    options = [replace(option, score=score(option, by)) if id(option) in scored else option for option in options]
    options.sort(key=lambda option: (option.score is None, not option.fits, score(option, by)))
    return Recommendation(model, target, prefer, batch, context, tuple(options), left_out)


def pareto(options: Sequence[Option]) -> Iterator[Option]:
    """The options that no other equals or beats in memory, time and KL, and beats in one of them."""
    each = [(option, (option.memory, option.step, option.kl)) for option in options]
    for option, own in each:
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for _, other in each):
            yield option


def score(option: Option, weights: tuple[float, float, float]) -> float:
    """The weighted sum of KL divergence and the logarithms of a step's time and of memory."""
    return weights[0] * option.kl + weights[1] * math.log(option.step) + weights[2] * math.log(option.memory)


@dataclass(frozen=True)
class _Time:
    seconds: float
    timed: float


def _linears(model: ModelShape, mix: Sequence[tuple[Scheme, float]], target: Target, tokens: int) -> _Time:
    """Seconds of all linears for so many tokens, and the share of them that a table says."""
    total = known = 0.0
    for shape, count, rows, schemes in _work(model, mix, tokens):
        for scheme, share in schemes or ((None, 1.0),):
            seconds, timed = _product(scheme, shape, rows, target)
            total += share * count * seconds
            known += share * count * seconds * timed
    return _Time(total, known / total if total else 0.0)


def _work(
    model: ModelShape, mix: Sequence[tuple[Scheme, float]], tokens: int
) -> Iterable[tuple[Shape, float, int, Sequence[tuple[Scheme, float]]]]:
    """Products of a forward pass: shape, how many, rows, schemes."""
    for shape, count in model.products.items():
        yield shape, count, tokens, mix
    for (experts, n, k), count in model.experts.items():
        used = experts * (1 - (1 - 1 / experts) ** (tokens * model.active))  # on average, if all are as likely
        yield (n, k), count * used, max(1, round(tokens * model.active / used)), mix
    if model.head is not None:
        yield model.head, 1, min(tokens, 16), ((head_scheme(mix), 1.0),) if mix else ()


def _attention(model: ModelShape, target: Target, batch: int, context: int) -> float:
    """Seconds of causal attention over a context that is read at once, at half the device's rate of operations."""
    operations = 2 * batch * context**2 * model.layers * model.heads * model.head_dim
    return operations / (0.5 * target.device.operations)


_LARGEST = 4096
"""Rows of the largest bucket that kernels are chosen for; more take as much longer."""


@functools.cache
def _product(scheme: Scheme | None, shape: Shape, rows: int, target: Target) -> tuple[float, bool]:
    """Seconds, and whether they were measured."""
    if target.card is None:
        bits = 16.0 if scheme is None else 8 * packed_bytes(scheme, shape) / math.prod(shape)
        moved = math.prod(shape) * bits / 8 + 2 * rows * sum(shape)
        return max(moved / target.device.memory, 2 * rows * math.prod(shape) / target.device.operations), False
    if scheme is None:
        return predict_plain(shape, rows, target.device), False
    from qcompile.runtime import gpu, measure, tuning

    bucket = gpu.bucket(rows)
    job = measure.job(f"{shape[0]}x{shape[1]}", scheme, shape, bucket, torch.bfloat16)
    if not gpu.has_kernel(job.spec):
        raise LayerError(f"{job.name}: {scheme} has no kernel, so its time is unknown")
    x_dtype = torch.bfloat16 if scheme.activation is None else scheme.activation.dtype
    found = tuning.choose(job.spec, bucket, x_dtype, torch.bfloat16, target.card.target, target.card.tuned)
    more = max(1.0, rows / _LARGEST)
    if found.us is not None:
        return found.us * 1e-6 * more, True
    return predict(found.kernel, min(rows, _LARGEST), found.vendor, target.device) * more, False


def command(option: Option, model: str, output: str = "out") -> str:
    """What makes an option: a command line, or Python where no command says it."""
    if option.config is None:
        return f"{model}, as it is"
    (rule,) = parse_config(option.config).rules
    scheme = rule.scheme
    assert scheme is not None
    each = scheme.schemes if isinstance(scheme, Auto) else (scheme,)
    formats = [f for f in formats_for(each[0]) if all(f in formats_for(other) for other in each)]
    method = method_to_config(scheme.method)
    steps: list[Any] = method if isinstance(method, list) else [method]
    data = isinstance(scheme, Auto) or scheme.needs_data
    name = AUTO if isinstance(scheme, Auto) else label(scheme)
    if not formats or name not in (*PRESETS, AUTO) or not all(isinstance(step, str) for step in steps):
        return f"qcompile.quantize_(model, {option.config!r}{', calibration=batches' if data else ''})"
    parts = [f"qcompile quantize {model} --scheme {name}"]
    parts += [f"--bits {scheme.bits:g}"] if isinstance(scheme, Auto) else []
    parts += [f"--method {','.join(steps)}"] if steps != ["rtn"] else []
    parts += ["--calibration text.txt"] if data else []
    parts += [f"--format {formats[0]}"] if formats[0] != FORMATS[0] else []
    return " ".join([*parts, f"--output {output}"])
