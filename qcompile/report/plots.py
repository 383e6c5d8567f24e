"""Plots of an evaluation as SVG for a page: text in the page's own colour, nothing from elsewhere. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from qcompile.evaluate.layers import Channels, Distance
from qcompile.report.evaluation import BINS, Report, Row

COLORS = ("#2f7ebc", "#d9730d", "#3a9a4f", "#c2455b", "#8763c5", "#8a6d3b", "#159588", "#7a8290")
"""That stand out from white and from black."""
MARKERS = "osD^vPXh"
_INK = "#010203"
"""Stands for the page's colour of text."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def installed() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(rows: int, columns: int, width: float, height: float, salt: str) -> tuple[Any, Any]:
    """A figure without a background, and its axes [rows, columns]."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,  # ids differ between plots, so that they can share a page
        "text.parse_math": False,  # names may hold dollar signs
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
        ),
        "legend.labelcolor": _INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    figure.patch.set_alpha(0)
    for each in axes.flat:
        each.patch.set_alpha(0)
        each.grid(color="#808080", alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, salt: str) -> str:
    """The figure as an element of HTML."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    )
    return text.replace(_INK, "currentColor")


def colors_of(report: Report) -> dict[str, tuple[str, str]]:
    """Each model's colour and marker, by its name."""
    return {row.name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(report.rows)}


def quality(report: Report) -> str:
    """Size and speed against quality: KL where there is a reference, and else perplexity."""
    timed = [row for row in report.rows if row.speed is not None]
    figure, axes = _figure(1, 2 if timed else 1, 8.5 if timed else 4.5, 3.2, "quality")
    known = report.reference is not None

    def draw(axis: Any, rows: Sequence[Row], xs: Sequence[float], label: str) -> None:
        values = [row.evaluation.quality.kl if known else row.evaluation.quality.perplexity for row in rows]
        shown = [(row, x, y) for row, x, y in zip(rows, xs, values, strict=True) if y < float("inf")]
        for row, x, y in shown:
            color, marker = colors_of(report)[row.name]
            axis.plot([x], [y], marker=marker, color=color, markersize=8, linestyle="none", clip_on=False)
            axis.annotate(_short(row.name), (x, y), xytext=(6, 6), textcoords="offset points", color=_INK)
        least = min((y for _, _, y in shown if y > 0), default=1.0)
        axis.set_yscale("symlog", linthresh=least) if known else axis.set_yscale("log")
        axis.set_ylabel("KL to the original, nats" if known else "perplexity")
        axis.set_xlabel(label)
        axis.margins(0.2)

    draw(axes[0, 0], report.rows, [row.evaluation.weight_bytes / 1e6 for row in report.rows], "weights, MB")
    if timed:
        draw(axes[0, 1], timed, [row.speed.decode for row in timed if row.speed], "decoded tokens a second")
    return _svg(figure, "quality")


def layers(report: Report) -> str:
    """SQNR of weights, of outputs, and of hidden states after blocks, by depth."""
    figure, axes = _figure(3, 1, 8.5, 7.5, "layers")
    for row in report.rows:
        color, marker = colors_of(report)[row.name]
        rows = [layer for layer in row.evaluation.layers if layer.shape is not None]
        series: tuple[list[tuple[int, Distance | None]], ...] = (
            [(i, layer.weight) for i, layer in enumerate(rows)],
            [(i, layer.output) for i, layer in enumerate(rows)],
            [(i, block.hidden) for i, block in enumerate(row.evaluation.blocks)],
        )
        for axis, points in zip(axes[:, 0], series, strict=True):
            kept = [(i, d.sqnr_db) for i, d in points if d is not None and abs(d.sqnr_db) < float("inf")]
            if kept:
                xs, ys = zip(*kept, strict=True)
                axis.plot(xs, ys, color=color, marker=marker, markersize=2.5, linewidth=0.9, label=_short(row.name))
    titles = (
        ("weights: each layer's own error", "layer, in the model's order"),
        ("outputs on the original's inputs: each layer's own error", "layer, in the model's order"),
        ("hidden states: errors of all blocks so far", "block"),
    )
    for axis, (title, label) in zip(axes[:, 0], titles, strict=True):
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel(label)
        axis.set_ylabel("SQNR, dB")
        if axis.lines:
            axis.legend(frameon=False, ncols=4, fontsize=8)
    return _svg(figure, "layers")


def outliers(channels: Sequence[Channels], salt: str) -> str:
    """A map for each kind of layer: blocks downwards, channels to the right, the largest magnitude over the RMS."""
    import numpy
    from matplotlib.colors import LogNorm

    kinds = kinds_of(channels)
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = _figure(lines, columns, 8.5, 0.5 + 2.1 * lines, salt)
    top = max(max(c.peak for c in channels), 2.0)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis, (kind, members) in zip(axes.flat, kinds.items(), strict=False):
        rows = [c.binned(BINS) for c in members]
        width = max(map(len, rows))
        table = numpy.full((len(rows), width), numpy.nan)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        image = axis.imshow(
            table.clip(min=1.0), aspect="auto", norm=LogNorm(1.0, top), cmap="viridis", interpolation="nearest"
        )
        axis.grid(visible=False)
        axis.set_title(_short(kind, 30), fontsize=8, loc="left")
        axis.set_xticks([])
        axis.set_yticks([0, len(rows) - 1] if len(rows) > 1 else [])
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="largest / RMS")
    bar.outline.set_visible(False)
    return _svg(figure, salt)


def kinds_of(channels: Sequence[Channels]) -> dict[str, list[Channels]]:
    """Channels of layers whose names differ in numbers alone; of the kinds the twelve with the largest outliers."""
    found: dict[str, list[Channels]] = {}
    for each in channels:
        found.setdefault(_NUMBER.sub("*", each.names[0]).rpartition(".*.")[2], []).append(each)
    largest = sorted(found, key=lambda kind: -max(c.peak for c in found[kind]))[:12]
    return {kind: members for kind, members in found.items() if kind in largest}


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
