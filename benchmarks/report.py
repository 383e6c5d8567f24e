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
from collections.abc import Callable, Iterator
from pathlib import Path

import plots
from tables import (
    OURS,
    File,
    Row,
    context,
    filled,
    layer_sums,
    lines_of,
    load,
    number,
    peers_of,
    run_of,
    summed,
    table,
    time_of,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
TUNED = ROOT / "codegen" / "tuned"
SHAPES = 4
"""Linears of a Llama-3-8B layer."""
MEASURED = ROOT / "qcompile" / "evaluate" / "measured.json"

HEAD = """# Performance

Written by `benchmarks/report.py` from the files in `benchmarks/results`; do not edit. To measure again on a GPU:

```
python benchmarks/linear.py && python benchmarks/linear.py --gate
python benchmarks/grouped.py && python benchmarks/grouped.py --gate
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

# ---- linears


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


def tuned(folder: Path) -> str:
    """The section of products as `tune.py` found them, of the folder's machines."""
    text = ""
    for machine in dict.fromkeys(file["machine"] for file in load(folder, "linear")):
        table_of = json.loads((TUNED / f"{machine}.json").read_text())
        times: dict[str, dict[int, list[float]]] = {}
        for entry in table_of["entries"]:
            named = _family(entry["family"])
            if named is not None:
                times.setdefault(named, {}).setdefault(entry["m"], []).append(entry["us"])
        tokens = sorted({m for by_m in times.values() for m, found in by_m.items() if len(found) == SHAPES})
        cells = {
            named: [number(sum(by_m[m])) if len(by_m.get(m, ())) == SHAPES else "" for m in tokens]
            for named, by_m in times.items()
        }
        text += f"### As they were tuned\n\n{run_of(table_of | {'machine': machine})}\n\n"
        text += filled(
            "Microseconds of the same products, alone: activations of 8 bits come quantized. These are the times at "
            "which `benchmarks/tune.py` chose the kernels that the package names for this GPU (`codegen/tuned`), in "
            "several runs; where they are below those of the table above, the kernel is newer than its measurement "
            "there."
        )
        lines = [[f"**{named}**", *row] for named, row in cells.items() if any(row)]
        text += table(["weights", *(f"M={m}" for m in tokens)], lines) + "\n"
    return text


def _family(text: str) -> str | None:
    """What a family of kernels multiplies, in words; None for experts."""
    given = dict(part.split("=") for part in text.split())
    if "experts" in given:
        return None
    rows, columns = given["rows"], given["columns"]
    shared = "a scale a row" if (rows, columns) == ("1", "all") else f"a scale for {columns}"
    shared = f"a scale for {rows} x {columns}" if rows != "1" else shared
    beside = ["2:4 sparse"] if "sparse" in given else []
    beside += [f"{given['activation']} activations"] if "activation" in given else []
    return ", ".join([given["weight"], shared, *beside])


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
        for head, rows in _models(file):
            sums = summed(rows)
            tokens = sorted({row["M"] for row in sums})
            lines = lines_of(sums, [], _linear_name, lambda row: row["M"], tokens, time_of)
            text += table([head, *map(str, tokens)], lines) + "\n"
    return text


def _models(file: File) -> Iterator[tuple[str, list[Row]]]:
    """Each model's mixture in words, and its rows."""
    for name in dict.fromkeys(row["model"] for row in file["rows"]):
        rows = [row for row in file["rows"] if row["model"] == name]
        shapes = ", ".join(f"{n} x {k}" for n, k in dict.fromkeys((row["N"], row["K"]) for row in rows))
        yield f"{name}: {rows[0]['chosen']} of {rows[0]['experts']} experts, {shapes}", rows


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


def grouped_gate(folder: Path) -> str:
    """The section of experts' gate and up, with the gate in the product and after it."""
    text = ""
    for file in load(folder, "grouped_gate"):
        text += f"## Experts' gate and up on {file['machine']}\n\n{run_of(file)}\n\n"
        text += filled(
            "Microseconds of the first product of a mixture's layer with the gate behind it, by tokens, in brackets "
            "the share of the limit: by the product's own epilogue, and by a kernel of Inductor's after the product."
        )
        for head, rows in _models(file):
            tokens = sorted({row["M"] for row in rows})
            lines = lines_of(rows, [], _linear_name, lambda row: row["M"], tokens, time_of)
            text += table([head, *map(str, tokens)], lines) + "\n"
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
            "beside `config`: its\nkernels then begin while those before end, and small ones run side by side. "
            "Both are experimental there, so neither is\non unless it is asked for.\n"
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
            others = [row for row in peers if _shape(row) == shape]
            text += _attention_table(of_shape, others, shape, title, lambda row: (row["batch"], row["context"]))
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
                "(`gguf`); the other schemes are of its decoded weights. With `cpp_wrapper`, an option of Inductor's, "
                "the calls of kernels are compiled too."
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


SECTIONS: tuple[Callable[[Path], str], ...] = (
    linear,
    tuned,
    gate,
    grouped,
    grouped_gate,
    decode,
    attention,
    cpu,
    calibrate,
    demo,
)


def page(folder: Path = RESULTS) -> str:
    """The text of docs/performance.md for the files in a folder."""
    texts = [section(folder).rstrip() for section in SECTIONS]
    return HEAD + "\n" + "\n".join(text + "\n" for text in texts if text)


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
        plots.plot_linear(RESULTS, PAGE.parent / "performance")
        plots.plot_attention(RESULTS, PAGE.parent / "performance")
        plots.plot_cpu(RESULTS, PAGE.parent / "performance")
    PAGE.write_text(page())
    MEASURED.write_text(measured())


if __name__ == "__main__":
    main()
