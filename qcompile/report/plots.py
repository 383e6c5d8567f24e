"""Plots of an evaluation as SVG for a page: text in the page's own colour, nothing from elsewhere. Needs matplotlib."""

from __future__ import annotations

import io
import math
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


def _style(salt: str) -> Any:
    """A context: settings of matplotlib; `salt` keeps ids of plots apart, so that they can share a page."""
    import matplotlib

    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: dict[str, Any] = dict.fromkeys(colors, _INK)
    settings |= {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "axes.titlesize": 9}
    settings |= {"text.parse_math": False}  # names may hold dollar signs
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    return matplotlib.rc_context(settings)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure without a background, and its axes [rows, columns]; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.patch.set_alpha(0)
    for each in axes.flat:
        each.patch.set_alpha(0)
        each.grid(color="#808080", alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an element of HTML."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(_INK, "currentColor")


def colors_of(report: Report) -> dict[str, tuple[str, str]]:
    """Each model's colour and marker, by its name."""
    return {row.name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(report.rows)}


def quality(report: Report) -> str:
    """Size and speed against quality: KL where there is a reference, and else perplexity."""
    timed = [row for row in report.rows if row.speed is not None]
    known = report.reference is not None

    def draw(axis: Any, rows: Sequence[Row], xs: Sequence[float], label: str) -> None:
        values = [row.evaluation.quality.kl if known else row.evaluation.quality.perplexity for row in rows]
        shown = [(row, x, y) for row, x, y in zip(rows, xs, values, strict=True) if y < math.inf]
        for row, x, y in shown:
            color, marker = colors_of(report)[row.name]
            axis.plot([x], [y], marker=marker, color=color, markersize=8, linestyle="none", clip_on=False)
            axis.annotate(_short(row.name), (x, y), xytext=(6, 6), textcoords="offset points", color=_INK)
        if known:
            axis.set_yscale("symlog", linthresh=min((y for _, _, y in shown if y > 0), default=1.0))
        else:
            axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("KL to the original, nats" if known else "perplexity")
        axis.set_xlabel(label)
        axis.margins(0.2)

    with _style("quality"):
        figure, axes = _figure(1, 2 if timed else 1, 8.5 if timed else 4.5, 3.2)
        draw(axes[0, 0], report.rows, [row.evaluation.weight_bytes / 1e6 for row in report.rows], "weights, MB")
        if timed:
            draw(axes[0, 1], timed, [row.speed.decode for row in timed if row.speed], "decoded tokens a second")
        return _svg(figure)


def layers(report: Report) -> str:
    """SQNR of weights, of outputs, and of hidden states after blocks, by depth."""
    titles = (
        ("weights: each layer's own error", "layer, in the model's order"),
        ("outputs on the original's inputs: each layer's own error", "layer, in the model's order"),
        ("hidden states: errors of all blocks so far", "block"),
    )
    with _style("layers"):
        figure, axes = _figure(3, 1, 8.5, 7.5)
        for row in report.rows:
            color, marker = colors_of(report)[row.name]
            rows = [layer for layer in row.evaluation.layers if layer.shape is not None]
            series: tuple[list[Distance | None], ...] = (
                [layer.weight for layer in rows],
                [layer.output for layer in rows],
                [block.hidden for block in row.evaluation.blocks],
            )
            for axis, found in zip(axes[:, 0], series, strict=True):
                kept = [(i, d.sqnr_db) for i, d in enumerate(found) if d is not None and math.isfinite(d.sqnr_db)]
                if kept:
                    xs, ys = zip(*kept, strict=True)
                    axis.plot(xs, ys, color=color, marker=marker, markersize=2.5, linewidth=0.9, label=_short(row.name))
        for axis, (title, label) in zip(axes[:, 0], titles, strict=True):
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.set_ylabel("SQNR, dB")
            axis.xaxis.get_major_locator().set_params(integer=True)
            if axis.lines:
                axis.legend(frameon=False, ncols=4, fontsize=8)
        return _svg(figure)


def outliers(channels: Sequence[Channels], salt: str) -> str:
    """A map for each kind of layer: blocks downwards, channels to the right, the largest magnitude over the RMS."""
    import numpy
    from matplotlib.colors import LogNorm

    kinds = kinds_of(channels)
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    top = max(max(c.peak for c in channels), 2.0)
    with _style(salt):
        figure, axes = _figure(lines, columns, 8.5, 0.9 + 1.9 * lines)
        for axis in axes.flat[len(kinds) :]:
            axis.set_axis_off()
        for axis, (kind, members) in zip(axes.flat, kinds.items(), strict=False):
            rows = [c.binned(BINS) for c in members]
            table = numpy.full((len(rows), max(map(len, rows))), numpy.nan)
            for i, row in enumerate(rows):
                table[i, : len(row)] = row
            image = axis.imshow(
                table.clip(min=1.0), aspect="auto", norm=LogNorm(1.0, top), cmap="viridis", interpolation="nearest"
            )
            axis.grid(visible=False)
            axis.set_title(_short(kind))
            axis.set_xticks([])
            axis.set_yticks([0, len(rows) - 1] if len(rows) > 1 else [])
        bar = figure.colorbar(
            image, ax=axes, location="bottom", shrink=0.5, aspect=40, format="{x:g}", label="largest / RMS"
        )
        bar.outline.set_visible(False)
        bar.ax.patch.set_alpha(0)
        return _svg(figure)


def kinds_of(channels: Sequence[Channels]) -> dict[str, list[Channels]]:
    """Channels of layers whose names differ in numbers alone; of the kinds the twelve with the largest outliers."""
    found: dict[str, list[Channels]] = {}
    for each in channels:
        found.setdefault(_NUMBER.sub("*", each.names[0]).rpartition(".*.")[2], []).append(each)
    largest = sorted(found, key=lambda kind: -max(c.peak for c in found[kind]))[:12]
    return {kind: members for kind, members in found.items() if kind in largest}


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
