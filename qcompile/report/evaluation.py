"""What `qcompile eval` found out, and as plain values for JSON; `qcompile.report.page` makes a page of it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile.evaluate.layers import Channels, LayerError
from qcompile.evaluate.run import Evaluation
from qcompile.evaluate.tasks import Scores

BINS = 64
"""Columns of outlier maps."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second.

    Attributes:
        prefill: of a prompt, not compiled.
        decode: one token a call, compiled, after a short prompt.
        compile_seconds: of the first decoded token.
    """

    prefill: float
    decode: float
    compile_seconds: float


@dataclass(frozen=True)
class Row:
    """A model of the report.

    Attributes:
        name: for people.
        scheme: the configuration that quantized it, as `QuantConfig.to_dict`; None for a checkpoint.
        evaluation: see `Evaluation`.
        seconds: that it took to quantize or load the model, and to read the text.
        speed: None where it was not measured.
        tasks: of lm-evaluation-harness.
        note: why something is missing.
    """

    name: str
    scheme: Mapping[str, Any] | None
    evaluation: Evaluation
    seconds: float
    speed: Speed | None = None
    tasks: Scores = field(default_factory=dict)
    note: str = ""

    @property
    def notes(self) -> list[str]:
        """All that is missing, and why."""
        return [note for note in (self.evaluation.note, self.note) if note]


@dataclass(frozen=True)
class Report:
    """Models on one text.

    Attributes:
        model: what was evaluated.
        reference: the name of the row that KL and agreement are measured from; None if there is none.
        text: where it is from.
        tokens, window: of the text, and how many a model saw at once.
        about: device, dtype, versions, date.
        rows: the reference first.
        inputs, weights: magnitudes of the channels of the reference, or else of the only model.
    """

    model: str
    reference: str | None
    text: str
    tokens: int
    window: int
    about: Mapping[str, str]
    rows: tuple[Row, ...]
    inputs: tuple[Channels, ...]
    weights: tuple[Channels, ...]


@dataclass(frozen=True)
class Column:
    """A column of the table of models: its title, and what it says of each."""

    title: str
    text: Callable[[Row], str]


def _number(value: float, digits: int) -> str:
    """In decimals; with an exponent where there would be too many digits."""
    return f"{value:.{digits}f}" if value < 10**6 or not math.isfinite(value) else f"{value:.2e}"


def _small(value: float) -> str:
    """In decimals; with an exponent where they would not show it."""
    return f"{value:.4f}" if value == 0 or value >= 0.001 or not math.isfinite(value) else f"{value:.1e}"


def _with_error(value: float, error: float) -> str:
    return f"{_small(value)} ± {error:.4f}" if "e" not in _small(value) else f"{_small(value)} ± {error:.1e}"


def columns_of(report: Report) -> list[Column]:
    """The columns for which some model has something."""
    columns = [
        Column("bits", lambda row: "" if row.evaluation.bits is None else f"{row.evaluation.bits:.2f}"),
        Column("weights MB", lambda row: f"{row.evaluation.weight_bytes / 1e6:.1f}"),
        Column(
            "perplexity",
            lambda row: (
                f"{_number(row.evaluation.quality.perplexity, 2)} ± "
                f"{_number(row.evaluation.quality.perplexity_error, 2)}"
            ),
        ),
    ]
    if report.reference is not None:
        columns += [
            Column(
                "KL nats",
                lambda row: _with_error(row.evaluation.quality.kl, row.evaluation.quality.kl_error),
            ),
            Column("KL p99", lambda row: _small(row.evaluation.quality.kl_p99)),
            Column("same token", lambda row: f"{row.evaluation.quality.top1:.1%}"),
        ]
    if any(row.speed for row in report.rows):
        columns += [
            Column("prefill tok/s", lambda row: "" if row.speed is None else f"{row.speed.prefill:.0f}"),
            Column("decode tok/s", lambda row: "" if row.speed is None else f"{row.speed.decode:.1f}"),
        ]
    scores = {(task, metric): None for row in report.rows for task, found in row.tasks.items() for metric in found}
    return columns + [_score(*pair) for pair in scores if not pair[1].split(",")[0].endswith("_stderr")]


def _score(task: str, metric: str) -> Column:
    error = ",".join([f"{metric.split(',')[0]}_stderr", *metric.split(",")[1:]])

    def text(row: Row) -> str:
        found = row.tasks.get(task, {})
        if metric not in found:
            return ""
        return f"{found[metric]:.4f}" + (f" ± {found[error]:.4f}" if error in found else "")

    return Column(f"{task} {metric}", text)


def worst_layers(row: Row, count: int) -> list[LayerError]:
    """The layers whose outputs have the lowest SQNR, the lowest first."""
    known = [(each.output.sqnr_db, each) for each in row.evaluation.layers if each.output and each.shape]
    return [each for sqnr, each in sorted(known, key=lambda pair: pair[0]) if sqnr < math.inf][:count]


def _finite(value: Any) -> Any:
    """Plain values; JSON has no infinity and no NaN, which become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def _channels(channels: Channels) -> dict[str, Any]:
    return {
        "layers": list(channels.names),
        "rms": channels.rms,
        "peak": channels.peak,
        "maxima": [float(f"{value:.3g}") for value in channels.binned(BINS)],
    }


def to_dict(report: Report) -> dict[str, Any]:
    """Plain values for JSON. SQNR is in dB, and null where it is infinite or undefined; KL is in nats.

    `maxima` are the largest magnitudes of channels over the root mean square of all, of neighbouring ones the largest.
    """
    rows = []
    for row in report.rows:
        evaluation = row.evaluation
        rows.append(
            {
                "name": row.name,
                "scheme": row.scheme,
                **asdict(evaluation.quality),
                "weight_bytes": evaluation.weight_bytes,
                "bits": row.evaluation.bits,
                "seconds": row.seconds,
                "speed": None if row.speed is None else asdict(row.speed),
                "tasks": row.tasks,
                "notes": row.notes,
                "layers": [asdict(layer) for layer in evaluation.layers],
                "blocks": [asdict(block) for block in evaluation.blocks],
            }
        )
    return _finite(
        {
            "model": report.model,
            "reference": report.reference,
            "text": report.text,
            "tokens": report.tokens,
            "window": report.window,
            "about": report.about,
            "rows": rows,
            "outliers": {
                "inputs": [_channels(c) for c in report.inputs],
                "weights": [_channels(c) for c in report.weights],
            },
        }
    )


def write(path: Path, text: str) -> None:
    """Write a file, all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
