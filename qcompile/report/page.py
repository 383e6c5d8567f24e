"""An evaluation as one HTML page that needs nothing else: no network, no scripts, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from qcompile.evaluate.layers import Channels, Distance
from qcompile.report import plots
from qcompile.report.evaluation import Report, columns_of, worst_layers

WORST = 8
"""Rows of the tables of the worst layers and of the largest outliers."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #ffffff; --line: #d5dae0; --soft: #5a6672; --shade: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #15191d; --line: #38414a; --soft: #9aa6b2; --shade: #1d2329 }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2.2rem }
p, li { max-width: 48rem } .soft, figcaption { color: var(--soft) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9em }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child, .text { text-align: left }
thead th { color: var(--soft); font-weight: 600 } tbody tr:hover { background: var(--shade) }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto } svg image { image-rendering: pixelated }
summary { cursor: pointer }
"""


def to_html(report: Report) -> str:
    """The page; where matplotlib is not installed, its tables alone."""
    title = f"{report.model}: quantized and measured" if report.reference else f"{report.model}, measured"
    parts = [f"<h1>{escape(title)}</h1>", _about(report), "<h2>Models</h2>", _models(report), _notes(report)]
    plotted = plots.installed()
    if not plotted:
        parts.append(
            '<p class="soft">There are no plots, since matplotlib is not installed: '
            "<code>pip install &quot;qcompile[plots]&quot;</code>.</p>"
        )
    if plotted and len(report.rows) > 1:
        timed = any(row.speed for row in report.rows)
        caption = "Below is better; to the left is smaller" + (
            ", in the second plot to the right faster." if timed else "."
        )
        parts += ["<h2>Size, quality, speed</h2>", _drawn(plots.quality(report), caption)]
    if any(row.evaluation.layers or row.evaluation.blocks for row in report.rows):
        parts.append("<h2>Layers</h2>")
        if plotted and any(layer.output for row in report.rows for layer in row.evaluation.layers):
            caption = (
                "Outputs of layers on the original's inputs, by block: each layer's own error. Above is better; 6 dB "
                "more halve the error."
            )
            parts.append(_drawn(plots.outputs(report), caption))
        if plotted:
            parts.append(_drawn(plots.depth(report), "Errors of weights, and of the model as it runs."))
        parts += [_worst(report), _all_layers(report)]
    for what, channels in (("inputs", report.inputs), ("weights", report.weights)):
        if channels:
            parts.append(f"<h2>Outliers of {what}</h2>")
            if plotted:
                parts.append(_drawn(plots.outliers(channels, what), _map_caption(what)))
            parts.append(_peaks(channels))
    parts.append(_meaning(report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _about(report: Report) -> str:
    facts = [f"{report.tokens} tokens of {report.text}, in windows of {report.window}"]
    facts += [f"{key} {value}" for key, value in report.about.items()]
    return f'<p class="soft">{escape("; ".join(facts))}.</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns are words and the others numbers; the text of all cells is escaped."""

    def cells(kind: str, row: Sequence[str]) -> str:
        texts = (f'<{kind} class="text">' if 0 < i < words else f"<{kind}>" for i in range(len(row)))
        return "".join(f"{start}{escape(cell)}</{kind}>" for start, cell in zip(texts, row, strict=True))

    titles = cells("th", head)
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _models(report: Report) -> str:
    columns = columns_of(report)
    rows = [[row.name, *(column.text(row) for column in columns)] for row in report.rows]
    return _table(["model", *(column.title for column in columns)], rows)


def _notes(report: Report) -> str:
    notes = [f"<li>{escape(row.name)}: {escape(note)}</li>" for row in report.rows for note in row.notes]
    return f"<ul>{''.join(notes)}</ul>" if notes else ""


def _drawn(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def decibels(found: Distance | None) -> str:
    """An SQNR for a table; "exact" where nothing differs."""
    if found is None:
        return ""
    return "exact" if found.sqnr_db == math.inf else f"{found.sqnr_db:.1f}"


def _cosine(found: Distance | None) -> str:
    return "" if found is None else f"{found.cosine:.5f}"


def _worst(report: Report) -> str:
    rows = [
        [
            layer.name,
            row.name,
            layer.scheme,
            decibels(layer.weight),
            _cosine(layer.weight),
            decibels(layer.output),
            _cosine(layer.output),
        ]
        for row in report.rows
        for layer in worst_layers(row, WORST)
    ]
    head = ["layer", "model", "scheme", "weight dB", "weight cosine", "output dB", "output cosine"]
    return f"<p>The layers whose outputs err most, of each model:</p>\n{_table(head, rows, 3)}" if rows else ""


def _all_layers(report: Report) -> str:
    models = [row for row in report.rows if row.evaluation.layers]
    if not models:
        return ""
    by_name = [{layer.name: layer for layer in row.evaluation.layers} for row in models]
    names = dict.fromkeys(name for layers in by_name for name in layers)
    rows = []
    for name in names:
        cells = []
        for layers in by_name:
            layer = layers.get(name)
            cells += [decibels(layer.weight), decibels(layer.output)] if layer is not None else ["", ""]
        rows.append([name, *cells])
    head = ["layer", *(f"{row.name}, {what}" for row in models for what in ("weight dB", "output dB"))]
    return f"<details><summary>All layers</summary>\n{_table(head, rows)}\n</details>"


def _map_caption(what: str) -> str:
    return (
        f"The largest magnitude in each input channel of the {what}, over the root mean square of all. A row is a "
        "layer (the first block at the top), a column some neighbouring channels; layers that read the same input are "
        "one."
    )


def _peaks(channels: Sequence[Channels]) -> str:
    largest = sorted(channels, key=lambda c: -c.peak)[:WORST]
    rows = [[", ".join(c.names), f"{c.peak:.1f}", str(int(c.maxima.argmax())), f"{c.rms:.3g}"] for c in largest]
    return _table(["layers", "largest / RMS", "in channel", "RMS"], rows)


_READING = """
Perplexity is exp of the mean negative log-likelihood of the predicted tokens; the contexts of a window's tokens begin
with the window. ± is the standard error, as if tokens were independent.
"""
_COMPARING = (
    """
KL is the mean of KL(original || model) over next-token distributions, of whole vocabularies, in nats; same token is how
often both find the same one most likely.
""",
    """
SQNR is 10 log10 of the squares of the original's numbers over those of the differences; the cosine is the mean over a
weight's rows, or over an output's tokens. Outputs are of the quantized layer on inputs that the original's layer had,
some for each layer, without the first tokens of windows.
""",
)


def _meaning(report: Report) -> str:
    texts = (_READING,) if report.reference is None else (_READING, *_COMPARING)
    lines = "".join(f"<li>{escape(text.strip())}</li>" for text in texts)
    return f"<h2>What the numbers mean</h2>\n<ul>{lines}</ul>"
