"""docs/performance.md is what its script makes of the results that are committed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qcompile.evaluate.timing import versions

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    name, path = f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses look their module up
    found.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "benchmarks"))  # where scripts find each other
report = script("report")


def test_the_page_is_what_the_script_writes() -> None:
    assert report.PAGE.read_text() == report.page(), "run `python benchmarks/report.py`"


def test_the_packaged_table_is_what_the_script_writes() -> None:
    assert report.MEASURED.read_text() == report.measured(), "run `python benchmarks/report.py`"


def test_every_plot_of_the_page_is_there() -> None:
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", report.page())
    assert shown
    assert [name for name in shown if not (report.PAGE.parent / name).is_file()] == []


def test_a_sum_needs_every_shape() -> None:
    def row(n: int, m: int, us: float) -> dict[str, object]:
        return {"scheme": "int4", "impl": "qcompile", "N": n, "K": 64, "M": m, "us": us, "floor_us": us / 2}

    sums = report.layer_sums([row(32, 1, 3.0), row(64, 1, 5.0), row(32, 16, 4.0)])
    assert sums == {("int4", "qcompile"): {1: (8.0, 4.0)}}


def test_experts_are_shown_by_model(tmp_path: Path) -> None:
    def row(impl: str, scheme: str, n: int, m: int, us: float) -> dict[str, object]:
        about = {"bench": "grouped", "model": "mixtral", "chosen": 2, "experts": 8, "impl": impl, "scheme": scheme}
        return about | {"N": n, "K": 64, "M": m, "us": us, "floor_us": us / 2}

    rows = [row("qcompile", "int4", n, m, 10.0 * m) for n in (32, 64) for m in (1, 16)]
    rows += [row("_grouped_mm", "bfloat16", n, 16, 200.0) for n in (32, 64)]
    file = {"machine": "one", "date": "2026-01-01", "versions": {"torch": "2.11", "gpu": "a GPU"}, "rows": rows}
    (tmp_path / "one.grouped.json").write_text(json.dumps(file))
    page = report.page(tmp_path)
    assert "| mixtral: 2 of 8 experts, 32 x 64, 64 x 64 | 1 | 16 |" in page
    assert "| **int4, qcompile** | 20.0 (50%) | 320 (50%) |" in page
    assert "| bfloat16, _grouped_mm |  | 400 (50%) |" in page


def test_gates_are_shown_by_scheme_and_place(tmp_path: Path) -> None:
    shape = {"bench": "gate", "scheme": "int4", "N": 512, "K": 256, "M": 16}
    rows = [
        shape | {"impl": impl, "us": us, "floor_us": 4.0} for impl, us in (("in the product", 8.0), ("apart", 10.0))
    ]
    file = {"machine": "one", "date": "2026-01-01", "versions": {"torch": "2.11", "gpu": "a GPU"}, "rows": rows}
    (tmp_path / "one.gate.json").write_text(json.dumps(file))
    page = report.page(tmp_path)
    assert "one weight of 512 x 256" in page
    assert "| int4, in the product | 8.00 (50%) |" in page
    assert "| int4, apart | 10.0 (40%) |" in page


def test_decoding_is_shown_by_batch_and_mode(tmp_path: Path) -> None:
    ours = {"bench": "decode", "impl": "qcompile", "scheme": "int4", "batch": 1, "layers": 32, "kv": "fp8"}
    measured = {"tok_s": 412.3, "step_us": 2425.4, "peak_gb": 5.91, "compile_s": 41.2, "warm_compile_s": 8.6}
    made = {"busy_us": 2390.0, "linear_us": 1890.0, "kernel_count": 455}
    loop = ours | measured | {"mode": "reduce-overhead", "tok_s": 400.1}
    prompt = {"bench": "prefill", "impl": "inductor", "scheme": "bfloat16", "batch": 1, "tokens": 2048}
    prompt |= {"tok_s": 40878.2, "ms": 50.1, "peak_gb": 17.2}
    longer = ours | measured | {"mode": "graph", "tok_s": 398.2, "lengths": "1024+128"}
    rows = [ours | measured | made | {"mode": "graph"}, loop, longer, prompt]
    told = {"torch": "2.11", "gpu": "a GPU"}
    file = {"machine": "one", "date": "2026-01-01", "versions": told, "rows": rows}
    (tmp_path / "one.decode.json").write_text(json.dumps(file))
    peer = {"bench": "decode", "impl": "Marlin", "scheme": "int4", "batch": 1, "mode": "graph", "tok_s": 224.0}
    (tmp_path / "one.peers.json").write_text(json.dumps({"rows": [peer]}))
    page = report.page(tmp_path)
    assert "a GPU, torch 2.11, 2026-01-01." in page
    assert "| **int4, qcompile, fp8 cache** | 412 | 400 |" in page
    assert "| **int4, qcompile, fp8 cache, prompt+tokens 1024+128** | 398 |  |" in page
    assert "| int4, Marlin † | 224 |  |" in page
    assert "| 1, int4, qcompile, fp8 cache | 2425 | 2390 | 1890 | 455 | 5.91 | 41.2 (8.60 warm) |" in page
    assert "| 2048, bfloat16, inductor | 40878 | 50.1 | 17.2 |" in page


def test_a_decoding_benchmark_knows_its_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as where the worker is run from
    decode, worker, steps = (script(name) for name in ("decode", "decode_worker", "decode_steps"))
    assert [(job.impl, job.scheme) for job in map(decode.Job, ("bf16", "int4", "torchao-fp8"))] == [
        ("inductor", "bfloat16"),
        ("qcompile", "int4"),
        ("torchao", "fp8"),
    ]
    bounds = [
        worker.logits_bound(layers, decode.Job(name)) for layers, name in ((2, "int4"), (32, "int4"), (32, "fp8"))
    ]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.6  # of logits that have nothing to do with each other it is the root of 2
    for name in (
        "qcompile_gemm_fragment",
        "nvjet_sm90_tst_64x8",
        "void tinygemm_m16n8k16",
        "triton_red_fused_add_mm_7",
    ):
        assert steps.LINEAR.search(name)
    for name in ("triton_poi_fused_mul_silu_view_7", "qcompile_attention_decode", "cudnn_generated_sdpa_flash"):
        assert not steps.LINEAR.search(name)


def test_rows_of_other_lengths_stay_beside_the_usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    decode, worker = script("decode"), script("decode_worker")
    cpu = torch.device("cpu")
    for arguments in ((), ("--prompt", "1024"), ("--tokens", "64"), ("--prompt", "128", "--tokens", "128")):
        options = decode.parse(["--out", str(tmp_path), "--turns", str(tmp_path / "turns"), *arguments])
        own = worker.Worker(decode.Job("int4"), options, decode.Turns(tmp_path / "turns"))
        for bench in ("decode", "prefill"):
            decode.store(tmp_path, own.row(bench, 1), cpu, tmp_path / "lock")
    (path,) = tmp_path.glob("*.decode.json")
    file = json.loads(path.read_text())
    assert [(r["bench"], r.get("lengths")) for r in file["rows"]] == [
        ("decode", "1024+128"),
        ("decode", "128+64"),
        ("decode", None),
        ("prefill", None),
    ]
    assert file["versions"] == versions(cpu)


def test_models_on_cpus_are_shown_beside_each_other(tmp_path: Path) -> None:
    def row(impl: str, scheme: str, decoded: float) -> dict[str, object]:
        about = {"bench": "cpu-model", "impl": impl, "scheme": scheme, "prefill_tok_s": 800.0, "decode_tok_s": decoded}
        told = {"peak_mb": 420.2, "runtime_mb": 310.0, "cold_s": 61.2, "warm_s": 8.1, "perplexity": 21.26}
        return about | told | {"prefill_ratio": 3.2, "decode_ratio": decoded / 100}

    product = {"bench": "cpu-linear", "impl": "qcompile", "scheme": "int4", "N": 64, "K": 32, "M": 4}
    rows = [row("llama.cpp", "gguf", 100.0), row("qcompile", "gguf", 130.0), product | {"us": 8.0, "floor_us": 4.0}]
    file = {"machine": "one", "date": "2026-01-01", "versions": {"torch": "2.13", "threads": 2}, "rows": rows}
    (tmp_path / "one.cpu.json").write_text(json.dumps(file))
    page = report.page(tmp_path)
    ours, theirs = "| **gguf, qcompile** | 800 (3.20) | 130 (1.30) |", "| gguf, llama.cpp | 800 (3.20) | 100 (1.00) |"
    assert page.index(ours) < page.index(theirs)
    assert "| 420 | 310 | 61.2 | 8.10 | 21.26 |" in page
    assert "| **int4, qcompile** | 8.00 (50%) |" in page


def test_a_benchmark_of_cpus_keeps_what_is_about_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = script("cpu")
    monkeypatch.setattr(cpu.timing, "machine_name", lambda device: "a-machine-without-results")
    assert list(map(cpu.scheme_of, ("llama.cpp", "torchao-int8-weights", "eager-bf16"))) == [
        ("llama.cpp", "gguf"),
        ("torchao", "int8-weights"),
        ("eager", "bfloat16"),
    ]
    models = [{"bench": "cpu-model", "impl": impl, "scheme": "gguf"} for impl in ("llama.cpp", "qcompile")]
    cpu.store(tmp_path, [row | {"decode_tok_s": 1.0} for row in models], {"llama-cpp-python": "0.3"})
    path = cpu.store(tmp_path, [models[1] | {"decode_tok_s": 2.0}])
    file = json.loads(path.read_text())
    assert [row["decode_tok_s"] for row in file["rows"]] == [1.0, 2.0]
    assert file["versions"]["llama-cpp-python"] == "0.3"


@pytest.mark.parametrize("bench", ["linear", "attention", "decode"])
def test_peers_have_what_torch_took_in_their_run(bench: str) -> None:
    peers = report.peers_of(report.RESULTS, "nvidia-h100", bench)
    assert any("bfloat16" in (row.get("scheme"), row.get("kv")) for row in peers)
