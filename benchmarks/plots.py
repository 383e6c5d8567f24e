"""Plots of docs/performance.md; they need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tables import OURS, context, layer_sums, load, peers_of


def _axes(title: str, ylabel: str) -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "qcompile", "svg.fonttype": "none"}  # equal plots are equal, small files
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def plot_linear(folder: Path, out: Path) -> None:
    """Speed over bfloat16, and the share of the limit, against M; peers of int4 are dotted."""
    for file in load(folder, "linear"):
        sums = layer_sums(file["rows"])
        plain = {m: us for m, (us, _) in sums["bfloat16", "F.linear"].items()}
        ours = {scheme: by_m for (scheme, impl), by_m in sums.items() if impl == OURS}
        figure, axes = _axes("A Llama-3-8B layer's linears", "speed over bfloat16")
        for scheme, by_m in ours.items():
            axes.plot(list(by_m), [plain[m] / us for m, (us, _) in by_m.items()], marker="o", label=scheme)
        peers = peers_of(folder, file["machine"], "linear")
        there = {row["M"]: row["us"] for row in peers if row["scheme"] == "bfloat16"}
        for impl in dict.fromkeys(row["impl"] for row in peers if row["scheme"] == "int4"):
            points = {r["M"]: there[r["M"]] / r["us"] for r in peers if (r["impl"], r["scheme"]) == (impl, "int4")}
            axes.plot(list(points), list(points.values()), linestyle=":", label=f"int4, {impl} †")
        axes.axhline(1, color="black", linewidth=0.8)
        _finish_by_m(axes)
        _save(figure, out / f"{file['machine']}.linear-speed.svg")
        figure, axes = _axes("A Llama-3-8B layer's linears", "share of the limit")
        for scheme, by_m in {**ours, "bfloat16, F.linear": sums["bfloat16", "F.linear"]}.items():
            axes.plot(list(by_m), [least / us for us, least in by_m.values()], marker="o", label=scheme)
        axes.set_ylim(0, 1.05)
        _finish_by_m(axes)
        _save(figure, out / f"{file['machine']}.linear-limit.svg")


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _finish_by_m(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda m, _: f"{m:.0f}")
    axes.set_xlabel("tokens (M)")
    _legend(axes)


HEADS = [32, 8, 128]
"""Of queries and of keys, and their size, of the plot of attention: Llama-3-8B's."""


def plot_attention(folder: Path, out: Path) -> None:
    """The share of the limit for each batch and context."""
    for file in load(folder, "attention"):
        if not any("floor_us" in row for row in file["rows"]):
            continue
        figure, axes = _axes("Attention from one token", "share of the limit")
        steps = [row for row in file["rows"] if "queries" not in row and row.get("shape", HEADS) == HEADS]
        for kv, impl in dict.fromkeys((row["kv"], row["impl"]) for row in steps):
            mine = [row for row in steps if (row["kv"], row["impl"]) == (kv, impl)]
            names = [f"{row['batch']} x {context(row['context'])}" for row in mine]
            axes.plot(names, [row["floor_us"] / row["us"] for row in mine], marker="o", label=f"{kv}, {impl}")
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("batch x context")
        _legend(axes)
        _save(figure, out / f"{file['machine']}.attention-limit.svg")


def plot_cpu(folder: Path, out: Path) -> None:
    """Rates of decoding and prefill over llama.cpp's, or tokens a second where that was not measured."""
    for file in load(folder, "cpu"):
        rows = [row for row in file["rows"] if row["bench"] == "cpu-model"]
        if not rows:
            continue
        kind = "ratio" if all("decode_ratio" in row for row in rows) else "tok_s"
        rows.sort(key=lambda row: row[f"decode_{kind}"])
        figure, axes = _axes("SmolLM2-135M", "rate over llama.cpp's" if kind == "ratio" else "tokens a second")
        places = range(len(rows))
        for shift, name in ((-0.2, "prefill"), (0.2, "decode")):
            axes.bar([p + shift for p in places], [row[f"{name}_{kind}"] for row in rows], width=0.4, label=name)
        axes.set_xticks(list(places), [f"{row['scheme']}\n{row['impl']}" for row in rows], fontsize=7, rotation=45)
        _legend(axes)
        _save(figure, out / f"{file['machine']}.cpu-model.svg")
