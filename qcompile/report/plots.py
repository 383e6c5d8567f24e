"""Plots of an evaluation as SVG for a page: text in the page's own colour, nothing from elsewhere. Needs matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.evaluate.layers import Channels, Distance
from qcompile.report.evaluation import BINS, Report, Row

COLORS = ("#2f7ebc", "#d9730d", "#3a9a4f", "#c2455b", "#8763c5", "#8a6d3b", "#159588", "#7a8290")
"""That stand out from white and from black."""
MARKERS = "osD^vPXh"
MOST_KINDS = 12
"""Kinds of layers that a plot has room for."""
_INK = "#010203"
"""Stands for the page's colour of text."""
_FRACTION = re.compile(r"(\.\d\d)\d+")
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


def _figure(rows: int, columns: int, width: float, height: float, **shared: bool) -> tuple[Any, Any]:
    """A figure without a background, and its axes [rows, columns]; sizes in inches."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
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
    text = re.sub(r' d="[^"]*"', lambda path: _FRACTION.sub(r"\1", path[0]), text)
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


def _lines(axis: Any, report: Report, found: Mapping[str, Sequence[Distance | None]]) -> None:
    """SQNR along a sequence of layers or blocks, of each model by its name."""
    for name, distances in found.items():
        kept = [(i, d.sqnr_db) for i, d in enumerate(distances) if d is not None and math.isfinite(d.sqnr_db)]
        if kept:
            xs, ys = zip(*kept, strict=True)
            color, marker = colors_of(report)[name]
            alone = {"marker": marker, "markersize": 5} if len(kept) == 1 else {}
            axis.plot(xs, ys, color=color, linewidth=1.0, label=_short(name), **alone)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if all(len(distances) < 2 for distances in found.values()):
        axis.set_xticks([])


def outputs(report: Report) -> str:
    """SQNR of layers' outputs on the original's inputs, by block, for each kind of layer."""
    kinds: dict[str, dict[str, list[Distance | None]]] = {}
    for row in report.rows:
        for layer in row.evaluation.layers:
            if layer.output is not None:
                kinds.setdefault(kind_of(layer.name), {}).setdefault(row.name, []).append(layer.output)
    worst = sorted(kinds, key=lambda kind: min(d.sqnr_db for found in kinds[kind].values() for d in found if d))
    kept = [kind for kind in kinds if kind in worst[:MOST_KINDS]]
    columns = min(4, len(kept))
    lines = -(-len(kept) // columns)
    with _style("outputs"):
        figure, axes = _figure(lines, columns, 8.5, 0.4 + 1.8 * lines, sharey=True)
        for axis in axes.flat[len(kept) :]:
            axis.set_axis_off()
        for axis, kind in zip(axes.flat, kept, strict=False):
            _lines(axis, report, kinds[kind])
            axis.set_title(_short(kind))
        for axis in axes[:, 0]:
            axis.set_ylabel("SQNR, dB")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return _svg(figure)


def depth(report: Report) -> str:
    """SQNR of weights and of hidden states after blocks, by depth."""
    layers = {r.name: [x.weight for x in r.evaluation.layers if x.shape is not None] for r in report.rows}
    blocks = {r.name: [block.hidden for block in r.evaluation.blocks] for r in report.rows}
    with _style("depth"):
        figure, axes = _figure(1, 2, 8.5, 2.8)
        for axis, found in ((axes[0, 0], layers), (axes[0, 1], blocks)):
            _lines(axis, report, found)
            axis.set_ylabel("SQNR, dB")
        axes[0, 0].set_title("weights")
        axes[0, 0].set_xlabel("layer, in the model's order")
        axes[0, 1].set_title("hidden states: errors of all blocks so far")
        axes[0, 1].set_xlabel("block")
        labelled = max(axes[0], key=lambda axis: len(axis.lines))
        figure.legend(*labelled.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
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
                table.clip(min=1.0), aspect="auto", norm=LogNorm(1.0, top), cmap="viridis", interpolation="none"
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


def kind_of(name: str) -> str:
    """What layers have in common whose names differ in numbers alone: the name within a block."""
    return _NUMBER.sub("*", name).rpartition(".*.")[2]


def kinds_of(channels: Sequence[Channels]) -> dict[str, list[Channels]]:
    """Channels by the kind of their layers; of the kinds those with the largest outliers."""
    found: dict[str, list[Channels]] = {}
    for each in channels:
        found.setdefault(kind_of(each.names[0]), []).append(each)
    largest = sorted(found, key=lambda kind: -max(c.peak for c in found[kind]))[:MOST_KINDS]
    return {kind: members for kind, members in found.items() if kind in largest}


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
