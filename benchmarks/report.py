"""docs/performance.md, its plots, and what `qcompile recommend` knows, from the files of results.

    python benchmarks/report.py            writes all; plots need matplotlib (`pip install ".[plots]"`)
    python benchmarks/report.py --tables   writes no plots

Every number of the page comes from `benchmarks/results`. Files are read by their names, `<machine>.<bench>.json`;
`<machine>.peers.json` holds what others' libraries took in another run, beside what torch took there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
MEASURED = ROOT / "qcompile" / "evaluate" / "measured.json"
OURS = "qcompile"

HEAD = """# Performance

Written by `benchmarks/report.py` from the files in `benchmarks/results`; do not edit. To measure again on a GPU:

```
python benchmarks/linear.py && python benchmarks/linear.py --gate && python benchmarks/grouped.py
python benchmarks/attention.py && python benchmarks/decode.py && python benchmarks/calibrate.py --machine nvidia-h100
python benchmarks/report.py
```

and on a CPU `python benchmarks/cpu.py && python benchmarks/attention_cpu.py`; `qcompile bench --shape 4096x14336
--scheme int4` measures any shape.

"The limit" is the longer of reading every byte once and of multiplying, at the rates that the same run reached in a
large copy and in products of 8192 x 8192; other shapes may multiply a little faster than those, and then have more than
100%. Results of ours are compared with float64 in the same run. Rows marked † are other libraries', measured in another
run on a GPU of the same kind; what torch took there is among them, to compare the runs by.
"""

Row = dict[str, Any]
File = dict[str, Any]


def load(folder: Path, bench: str) -> list[File]:
    """The files of a benchmark, by machine."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*.{bench}.json"))]


def peers_of(folder: Path, machine: str, bench: str) -> list[Row]:
    """Rows of other libraries on a machine."""
    path = folder / f"{machine}.peers.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["bench"] == bench]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(text: str) -> str:
    """A paragraph."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def context(tokens: int) -> str:
    """A number of tokens, such as 256 or 16k."""
    return str(tokens) if tokens < 1024 else f"{tokens // 1024}k"


def run_of(file: File) -> str:
    """When, where and with what."""
    versions = file["versions"]
    named = [f"{name} {version}" for name, version in versions.items() if name not in ("gpu", "threads")]
    where = versions.get("gpu") or f"{file['machine']}, {versions.get('threads')} threads"
    return f"{where}, {', '.join(named)}, {file['date']}."


def lines_of(
    rows: list[Row],
    peers: list[Row],
    name: Callable[[Row], str],
    place: Callable[[Row], Any],
    places: Sequence[Any],
    cell: Callable[[Row], str],
) -> list[list[str]]:
    """Lines of a table: one for each `name`, ours in bold, others' of another run after them with a mark.

    Args:
        place: the column of a row, one of `places`.
    """
    found: dict[str, dict[Any, str]] = {}
    for source, mark in ((rows, ""), (peers, " †")):
        for row in source:
            label = f"**{name(row)}**" if row["impl"] == OURS else name(row) + mark
            found.setdefault(label, {})[place(row)] = cell(row)
    return [[label, *(cells.get(each, "") for each in places)] for label, cells in found.items()]


def time_of(row: Row) -> str:
    """Microseconds, and in brackets the share of the limit where it is known."""
    share = f" ({row['floor_us'] / row['us']:.0%})" if "floor_us" in row else ""
    return number(row["us"]) + share


# ---- linears


def layer_sums(rows: list[Row]) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """(scheme, implementation) to M to microseconds and limit, summed over the shapes; only of what has all shapes."""
    shapes = {(row["N"], row["K"]) for row in rows}
    found: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["scheme"], row["impl"]), {}).setdefault(row["M"], []).append(row)
    return {
        key: {
            m: (sum(r["us"] for r in part), sum(r["floor_us"] for r in part))
            for m, part in by_m.items()
            if len(part) == len(shapes)
        }
        for key, by_m in found.items()
    }


def summed(rows: list[Row]) -> list[Row]:
    """`layer_sums` as rows."""
    return [
        {"scheme": scheme, "impl": impl, "M": m, "us": us, "floor_us": least}
        for (scheme, impl), by_m in layer_sums(rows).items()
        for m, (us, least) in by_m.items()
    ]


def linear(folder: Path) -> str:
    """The section of quantized products."""
    text = ""
    for file in load(folder, "linear"):
        sums = layer_sums(file["rows"])
        tokens = sorted({m for by_m in sums.values() for m in by_m})
        shapes = sorted({(row["N"], row["K"]) for row in file["rows"]}, key=lambda s: s[0] * s[1])
        rates = file["ceilings"]
        text += f"## Linears on {file['machine']}\n\n{run_of(file)}\n\n"
        text += filled(
            "Microseconds of a Llama-3-8B layer's products together "
            f"({', '.join(f'{n} x {k}' for n, k in shapes)}) for M tokens, weights from memory, and in brackets the "
            f"share of the limit. Limits: {rates['memory'] / 1e9:.0f} GB/s, "
            f"{rates['16-bit'] / 1e12:.0f} T operations/s in bfloat16, {rates['8-bit'] / 1e12:.0f} T of 8 bits. "
            "8-bit activations (int8, fp8) are quantized from bfloat16 within the time."
        )
        rows = summed(file["rows"])
        peers, lines = peers_of(folder, file["machine"], "linear"), []
        for scheme in dict.fromkeys(row["scheme"] for row in file["rows"]):
            beside = [row for row in peers if row["scheme"] in {"int4": ("int4", "nf4")}.get(scheme, (scheme,))]
            own = [row for row in rows if row["scheme"] == scheme]
            lines += lines_of(own, beside, _linear_name, lambda row: row["M"], tokens, time_of)
        text += table(["scheme, kernel", *(f"M={m}" for m in tokens)], lines)
        text += f"\n![Speed over bfloat16 by M](performance/{file['machine']}.linear-speed.svg)\n"
        text += f"![Share of the limit by M](performance/{file['machine']}.linear-limit.svg)\n\n"
    return text


def _linear_name(row: Row) -> str:
    return f"{row['scheme']}, {row['impl']}"


# ---- mixtures of experts


def grouped(folder: Path) -> str:
    """The section of products with stacks of experts."""
    text = ""
    for file in load(folder, "grouped"):
        text += f"## Experts on {file['machine']}\n\n{run_of(file)}\n\n"
        text += filled(
            "Microseconds of the two products of a mixture's layer (gate and up merged, and down) together, by tokens, "
            "and in brackets the share of the limit, for which the weights of the experts that are chosen are read "
            "once. Tokens choose at random. `mm` multiplies for each expert that is chosen, which the host knows here "
            "and not in a model. 8-bit activations (fp8) are quantized from bfloat16 within the time."
        )
        for name in dict.fromkeys(row["model"] for row in file["rows"]):
            rows = [row for row in file["rows"] if row["model"] == name]
            lines = []
            sums = summed(rows)
            tokens = sorted({row["M"] for row in sums})
            for scheme in dict.fromkeys(row["scheme"] for row in rows):
                own = [row for row in sums if row["scheme"] == scheme]
                lines += lines_of(own, [], _linear_name, lambda row: row["M"], tokens, time_of)
            shapes = ", ".join(f"{n} x {k}" for n, k in dict.fromkeys((row["N"], row["K"]) for row in rows))
            head = f"{name}: {rows[0]['chosen']} of {rows[0]['experts']} experts, {shapes}"
            text += table([head, *map(str, tokens)], lines) + "\n"
    return text


def gate(folder: Path) -> str:
    """The section of gate and up on GPUs, with the gate in the product and after it."""
    text = ""
    for file in load(folder, "gate"):
        tokens = sorted({row["M"] for row in file["rows"]})
        n, k = file["rows"][0]["N"], file["rows"][0]["K"]
        text += f"## Gate and up on {file['machine']}\n\n{run_of(file)}\n\n"
        text += filled(
            f"Microseconds of silu(gate) * up for M tokens, both projections one weight of {n} x {k}, in brackets the "
            "share of the limit: by the product's own epilogue, and by a kernel of Inductor's after the product."
        )
        rows = lines_of(file["rows"], [], _linear_name, lambda row: row["M"], tokens, time_of)
        text += table(["scheme, kernel", *(f"M={m}" for m in tokens)], rows) + "\n"
    return text


# ---- decoding


def decode(folder: Path) -> str:
    """The section of whole models on GPUs."""
    text = ""
    for file in load(folder, "decode"):
        rows = [row for row in file["rows"] if row["bench"] == "decode" and "tok_s" in row]
        peers = peers_of(folder, file["machine"], "decode")
        columns = sorted({(row["batch"], row["mode"]) for row in rows})
        text += f"## Decoding on {file['machine']}\n\n{run_of(file)}\n\n"
        text += filled(
            "Tokens a second of a Llama-3-8B-shaped model of random weights (transformers, static cache, greedy, "
            "128 tokens after a prompt of 128), by batch. `graph`: a step captured by hand as one CUDA graph; "
            "`reduce-overhead`: `torch.compile`'s mode, in a Python loop."
        )
        lines = lines_of(
            rows, peers, _variant, lambda row: (row["batch"], row["mode"]), columns, lambda row: number(row["tok_s"])
        )
        text += table(["scheme, implementation", *(f"{b}, {mode}" for b, mode in columns)], lines)
        text += (
            "\n`triton.enable_pdl` and `combo_kernels` are options of Inductor's, which `options` take "
            "beside `config`: its\nkernels then begin while those before end, and small ones run side by side.\n"
            "\nWhat a step is made of, in microseconds, as one CUDA graph. Kernels that begin early count the time "
            "that they wait, so\nthat sums may exceed the step:\n\n"
        )
        made = [row for row in rows if "busy_us" in row]
        text += table(
            ["batch, scheme, implementation", "step", "in kernels", "in linears", "kernels", "peak GB", "compile s"],
            [
                [
                    f"{r['batch']}, {_variant(r)}",
                    *(number(r[key]) for key in ("step_us", "busy_us", "linear_us")),
                    str(r["kernel_count"]),
                    number(r["peak_gb"]),
                    number(r["compile_s"])
                    + (f" ({number(r['warm_compile_s'])} warm)" if "warm_compile_s" in r else ""),
                ]
                for r in made
            ],
        )
        text += "\n" + _prefill([row for row in file["rows"] if row["bench"] == "prefill"])
    return text


def _variant(row: Row) -> str:
    """Scheme and implementation, and what else differs from the usual."""
    parts = [f"{row['scheme']}, {row['impl']}"]
    parts += [f"head {row['head']}"] if row.get("head", "bfloat16") != "bfloat16" else []
    parts += [f"{row['kv']} cache"] if row.get("kv", "bfloat16") != "bfloat16" else []
    parts += [f"{row['inductor']}"] if "inductor" in row else []
    parts += [f"prompt+tokens {row['lengths']}"] if "lengths" in row else []
    parts += [f"{row['layers']} layers"] if row.get("layers", 32) != 32 else []
    return ", ".join(parts)


def _prefill(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [f"{row['tokens']}, {_variant(row)}", number(row["tok_s"]), number(row["ms"]), number(row["peak_gb"])]
        for row in rows
    ]
    head = ["tokens, scheme, implementation", "tok/s", "ms", "peak GB"]
    return "Reading a prompt of one sequence, compiled:\n\n" + table(head, lines) + "\n"


# ---- attention


def attention(folder: Path) -> str:
    """The section of attention over caches."""
    text = ""
    for file in load(folder, "attention"):
        rows, peers = file["rows"], peers_of(folder, file["machine"], "attention")
        text += f"## Attention over caches on {file['machine']}\n\n{run_of(file)}\n\n"
        limited = any("floor_us" in row for row in rows)
        share = ", and in brackets the share of the limit, which is reading the cache once" if limited else ""
        steps, prompts = ([row for row in rows if ("queries" in row) == many] for many in (False, True))
        for shape in dict.fromkeys(map(_shape, steps)):
            title = "Microseconds by batch x context {heads}, caches from memory" + share
            of_shape = [row for row in steps if _shape(row) == shape]
            text += _attention_table(of_shape, peers, shape, title, lambda row: (row["batch"], row["context"]))
        for shape in dict.fromkeys(map(_shape, prompts)):
            title = "Microseconds of prompts, or of their last tokens, by queries x context {heads}"
            title += ", and in brackets the share of the limit, which is the products" if limited else ""
            of_shape = [row for row in prompts if _shape(row) == shape and row["batch"] == 1]
            text += _attention_table(of_shape, [], shape, title, lambda row: (row["queries"], row["context"]))
        if limited:
            text += f"\n![Share of the limit](performance/{file['machine']}.attention-limit.svg)\n\n"
    return text


def _attention_table(
    rows: list[Row],
    peers: list[Row],
    shape: tuple[int, int, int],
    title: str,
    place: Callable[[Row], tuple[int, int]],
) -> str:
    """Of query heads, key heads and size; a column is what `place` says of a row."""
    heads = "({} query heads, {} key heads of {})".format(*shape)
    text = filled(
        f"{title.format(heads=heads)}. The error is relative, to float64 attention over what the cache stands for."
    )
    places = list(dict.fromkeys(map(place, rows)))
    worst: dict[str, float] = {}
    for row in [*rows, *peers]:
        worst[_attention_name(row)] = max(row["error"], worst.get(_attention_name(row), 0.0))
    lines = lines_of(rows, peers, _attention_name, place, places, time_of)
    lines = [[*line, f"{worst[line[0].removesuffix(' †').strip('*')]:.1g}"] for line in lines]
    return text + table(["cache, kernel", *(f"{b} x {context(c)}" for b, c in places), "error"], lines) + "\n"


def _shape(row: Row) -> tuple[int, int, int]:
    queries, keys, size = row.get("shape", (32, 8, 128))
    return queries, keys, size


def _attention_name(row: Row) -> str:
    return f"{row['kv']}, {row['impl']}"


# ---- CPUs


def cpu(folder: Path) -> str:
    """The section of a whole model, and of products by themselves, on CPUs."""
    text = ""
    for file in load(folder, "cpu"):
        models = [row for row in file["rows"] if row["bench"] == "cpu-model"]
        products = [row for row in file["rows"] if row["bench"] == "cpu-linear"]
        text += f"## SmolLM2-135M on {file['machine']}\n\n{run_of(file)}\n\n"
        if models:
            text += filled(
                "Tokens a second of reading 512 tokens and of decoding 128 after them, and in brackets the rate over "
                "llama.cpp's in the same rounds; the most memory of the process, and what of it the libraries take; "
                "seconds from the start of the process to the second token, with empty caches and with full ones; "
                "perplexity of the essay in the package in windows of 512. The file is Q4_1, its head Q8_0 "
                "(`gguf`); the other schemes are of its decoded weights."
            )
            head = ["scheme, implementation", "prefill", "decode", "MB", "libraries", "start s", "again", "perplexity"]
            text += table(head, [_cpu_line(row) for row in sorted(models, key=lambda row: -row["decode_tok_s"])])
            text += f"\n![Decoding and prefill](performance/{file['machine']}.cpu-model.svg)\n\n"
        for n, k in dict.fromkeys((row["N"], row["K"]) for row in products):
            rows = [row for row in products if (row["N"], row["K"]) == (n, k)]
            tokens = sorted({row["M"] for row in rows})
            text += f"Microseconds of a product with a weight of {n} x {k}, which comes from memory, for M tokens:\n\n"
            lines = lines_of(rows, [], _linear_name, lambda row: row["M"], tokens, time_of)
            text += table(["scheme, kernel", *(f"M={m}" for m in tokens)], lines) + "\n"
    return text


def _cpu_line(row: Row) -> list[str]:
    def rate(name: str) -> str:
        ratio = f" ({row[f'{name}_ratio']:.2f})" if f"{name}_ratio" in row else ""
        return number(row[f"{name}_tok_s"]) + ratio

    label = f"{row['scheme']}, {row['impl']}"
    return [
        f"**{label}**" if row["impl"] == OURS else label,
        rate("prefill"),
        rate("decode"),
        *(f"{row[name]:.0f}" for name in ("peak_mb", "runtime_mb")),
        *(number(row[name]) for name in ("cold_s", "warm_s")),
        f"{row['perplexity']:.2f}",
    ]


# ---- the demonstration


def demo(folder: Path) -> str:
    """The section of the demonstration."""
    text = ""
    for path in sorted(folder.glob("*.demo.json")):
        file = json.loads(path.read_text())
        text += f"## `qcompile demo` on {path.name.removesuffix('.demo.json')}\n\n"
        text += filled(
            f"{file['model']}, torch {file['torch_version']}. Perplexity and divergence (KL, nats) on "
            f"{file['text_tokens']} tokens of English."
        )
        lines = [
            [
                row["scheme"],
                f"{row['weight_bytes'] / 1e6:.0f}",
                number(row["decode_tokens_per_second"]),
                f"{row['prefill_tokens_per_second']:.0f}",
                f"{row['perplexity']:.2f}",
                f"{row['kl']:.3f}",
            ]
            for row in file["rows"]
        ]
        text += table(["scheme", "weights MB", "decode tok/s", "prefill tok/s", "perplexity", "KL"], lines) + "\n"
    return text


# ---- choosing codes


def calibrate(folder: Path) -> str:
    """The section of GPTQ's time."""
    text = ""
    for path in sorted(folder.glob("*.calibrate.json")):
        file = json.loads(path.read_text())
        ways = [way for way in ("qcompile", "qcompile, plain ranges", "llm-compressor") if file["linears"][0].get(way)]
        text += f"## GPTQ on {path.name.removesuffix('.calibrate.json')}\n\n"
        text += filled(
            f"{file['machine']}, torch {file['torch']}: int4 in groups of 128 for the linears of a decoder layer, from "
            "a weight and the mean of x x^T, random ones (`benchmarks/calibrate.py`). Seconds, and in brackets the "
            "mean square of the output's error, in thousandths of the output's."
        )
        lines = []
        for row in file["linears"]:
            cells = [f"{row[way]['seconds']:.3f} ({1000 * row[way]['error']:.2f})" for way in ways]
            lines.append([f"{row['linear']} {row['n']}x{row['k']}", *cells, f"({1000 * row['nearest']['error']:.2f})"])
        sums = [f"{sum(row[way]['seconds'] for row in file['linears']):.2f}" for way in ways]
        text += table(["linear", *ways, "rounding"], [*lines, ["a layer", *sums, ""]]) + "\n"
        if (stack := file["stack"]) is not None:
            text += filled(
                f"A whole calibration of {stack['layers']} such layers with {stack['tokens']:,} tokens took "
                f"{stack['seconds_per_layer']:.1f} s a layer."
            )
    return text


SECTIONS: tuple[Callable[[Path], str], ...] = (linear, gate, grouped, decode, attention, cpu, calibrate, demo)


def page(folder: Path = RESULTS) -> str:
    """The text of docs/performance.md for the files in a folder."""
    texts = [section(folder).rstrip() for section in SECTIONS]
    return HEAD + "\n" + "\n".join(text + "\n" for text in texts if text)


# ---- plots


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


def plot_attention(folder: Path, out: Path) -> None:
    """The share of the limit for each batch and context."""
    for file in load(folder, "attention"):
        if not any("floor_us" in row for row in file["rows"]):
            continue
        figure, axes = _axes("Attention from one token", "share of the limit")
        steps = [row for row in file["rows"] if "queries" not in row]
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


def measured(folder: Path = RESULTS) -> str:
    """The text of qcompile/evaluate/measured.json: accuracy of weights and caches, and time between linears."""
    (file,) = load(folder, "accuracy")
    plain = next(row for row in file["rows"] if row["weight_bytes"] and row["config"] is None)

    def entry(row: Row) -> Row:
        return {"kl": round(row["kl"], 5), "loss": round(math.log(row["perplexity"] / plain["perplexity"]), 5)}

    rows = [
        {key: row[key] for key in ("name", "config", "layers") if key in row} | entry(row)
        for row in file["rows"]
        if not row["name"].startswith("KV ")
    ]
    # Caches by the names of their presets; others are known by a configuration.
    caches = {row["config"]: entry(row) for row in file["rows"] if row["name"] == f"KV {row['config']}"}
    between = [
        (row["step_us"] - row["linear_us"]) / row["layers"]
        for decoded in load(folder, "decode")
        for row in decoded["rows"]
        # Kernels that begin early count the time that they wait: their sum exceeds the step.
        if row["batch"] == 1 and "linear_us" in row and row.get("busy_us", math.inf) <= 1.02 * row.get("step_us", 0)
    ]
    content = {"model": file["model"], "between_us": round(statistics.median(between), 2), "caches": caches}
    lines = ",\n".join(json.dumps(row) for row in rows)
    return json.dumps(content, indent=1)[:-2] + f',\n "accuracy": [\n{lines}\n]}}\n'


def main() -> None:
    """Write the page, its plots and the package's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only the text, which needs no matplotlib")
    if not parser.parse_args().tables:
        plot_linear(RESULTS, PAGE.parent / "performance")
        plot_attention(RESULTS, PAGE.parent / "performance")
        plot_cpu(RESULTS, PAGE.parent / "performance")
    PAGE.write_text(page())
    MEASURED.write_text(measured())


if __name__ == "__main__":
    main()
