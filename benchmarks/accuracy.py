"""Perplexity and KL divergence of SmolLM2-135M under each scheme and method, on text that calibration has not seen.

    python benchmarks/accuracy.py --machine intel-xeon-amx-2core [--only NAME ...]

writes benchmarks/results/<machine>.accuracy.json, row by row, and the table of docs/accuracy.md from it. Rows that are
there stay, so that an interrupted run goes on; remove the file to measure anew.

Calibration: the first 4,096 tokens of the language reference that comes with Python (`pydoc_data.topics`), in windows
of 256. Evaluation: the essay in `qcompile.evaluate` and benchmarks/held_out.txt, both written for this project, in
windows of 256. The reference is the float32 model. Below 8 bits the output head has int8 weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import resource
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import qcompile
from qcompile.attention import reference
from qcompile.calibrate.assign import label
from qcompile.calibrate.rotate_heads import rotate_heads_
from qcompile.calibrate.stream import Batch
from qcompile.checkpoint.gguf import smollm2_path
from qcompile.config import QuantConfig, Rule, parse_config
from qcompile.evaluate import compare, load_language_model, sample_text, weight_bytes
from qcompile.kv_cache import AttentionSpec
from qcompile.linears import linear_modules
from qcompile.presets import PRESETS
from qcompile.scheme import Scheme

ROOT = Path(__file__).resolve().parents[1]
WINDOW, CALIBRATION = 256, 4096

FLOAT_ZERO = {"weight": {"format": "uint4", "group_size": 64, "symmetric": False, "offset": True}}
INT4_32 = {"weight": {"format": "int4", "group_size": 32}}
"""4.5 bits a weight, as NF4 with float32 scales of 64."""
INT8_STATIC = {
    "weight": {"format": "int8", "granularity": "channel"},
    "activation": {"format": "int8", "dynamic": False},
}

ONLINE = {"name": "hadamard", "online": True}
GROUPS_4 = {
    "weight": {"format": "int4", "group_size": 64},
    "activation": {"format": "int4", "symmetric": False, "group_size": 64},
}
"""4 bits on both sides, scales of groups, and zero points of the activations."""

ROWS: dict[str, Any] = {
    "float32": None,
    "int8 (W8A8, dynamic)": "int8",
    "int8 (W8A8, dynamic), SmoothQuant": {"preset": "int8", "method": "smoothquant"},
    "int8 (W8A8, static)": INT8_STATIC,
    "int8 (W8A8, static), SmoothQuant": {**INT8_STATIC, "method": "smoothquant"},
    "int8 (W8A8, static), Hadamard": {**INT8_STATIC, "method": "hadamard"},
    "int8 (W8A8, static), percentile": {
        **INT8_STATIC,
        "activation": {**INT8_STATIC["activation"], "observer": {"name": "percentile", "percentile": 99.99}},
    },
    "int8 (W8A8, static), MSE": {**INT8_STATIC, "activation": {**INT8_STATIC["activation"], "observer": "mse"}},
    "int8 (W8A8, static), KL": {**INT8_STATIC, "activation": {**INT8_STATIC["activation"], "observer": "kl"}},
    "int8 weights": "int8_weight_only",
    "fp8 (dynamic)": "fp8",
    "fp8 (static)": "fp8_static",
    "int4 RTN": "int4",
    "int4 RTN, MSE clipping": {"preset": "int4", "method": {"name": "rtn", "clip": "mse"}},
    "int4 RTN, importance matrix": {"preset": "int4", "method": {"name": "rtn", "clip": "importance"}},
    "int4 AWQ": {"preset": "int4", "method": "awq"},
    "int4 GPTQ": {"preset": "int4", "method": "gptq"},
    "int4 AWQ + GPTQ": {"preset": "int4", "method": ["awq", "gptq"]},
    "int4, float zero, RTN": FLOAT_ZERO,
    "int4, float zero, HQQ": {**FLOAT_ZERO, "method": "hqq"},
    "int3 RTN": "int3",
    "int3 GPTQ": {"preset": "int3", "method": "gptq"},
    "int2 RTN": "int2",
    "int2 GPTQ": {"preset": "int2", "method": "gptq"},
    "int4 x int4 RTN": "int4_int4",
    "int4 x int4, Hadamard": {"preset": "int4_int4", "method": "hadamard"},
    "int4 x int4, Hadamard online": {"preset": "int4_int4", "method": ONLINE},
    "int4 x int4, GPTQ": {"preset": "int4_int4", "method": "gptq"},
    "int4 x int4, Hadamard online + GPTQ": {"preset": "int4_int4", "method": [ONLINE, "gptq"]},
    "int4 x int4, groups, RTN": GROUPS_4,
    "int4 x int4, groups, Hadamard online + GPTQ": {**GROUPS_4, "method": [ONLINE, "gptq"]},
    "nf4 RTN": "nf4",
    "nf4 GPTQ": {"preset": "nf4", "method": "gptq"},
    "int4, groups of 32, RTN": INT4_32,
    "int4, groups of 32, GPTQ": {**INT4_32, "method": "gptq"},
    "auto, 4.5 bits, RTN": {"preset": "auto", "bits": 4.5},
    "auto, 4.5 bits, GPTQ": {"preset": "auto", "bits": 4.5, "method": "gptq"},
    "mxfp4 RTN": "mxfp4",
    "mxfp4 GPTQ": {"preset": "mxfp4", "method": "gptq"},
    "Q4_0 RTN": "q4_0",
    "Q4_0 RTN, importance matrix": {"preset": "q4_0", "method": "importance"},
    "Q4_K RTN": "q4_k",
    "Q4_K RTN, importance matrix": {"preset": "q4_k", "method": "importance"},
    "Q4_K GPTQ": {"preset": "q4_k", "method": "gptq"},
}
CACHES: dict[str, Any] = {
    "KV fp8": "fp8",
    "KV fp8, FP8 compute": {"format": "fp8_e4m3", "compute": "fp8"},
    "KV int8": "int8",
    "KV int4": "int4",
    "KV int4, Hadamard": "int4",
}
"""The last of a model whose values are rotated (R2)."""


class WithCache:
    """A model that reads a text through a quantized KV cache.

    Where the cache says how attention multiplies, that is done as `qcompile.attention.reference` has it.
    """

    def __init__(self, model: torch.nn.Module, kind: Any) -> None:
        self.model, self.kind = model, kind
        AttentionInterface.register("codes", self.attend)
        AttentionMaskInterface.register("codes", sdpa_mask)

    def __call__(self, ids: torch.Tensor) -> Any:
        self.cache = qcompile.TransformersCache(self.model, self.kind, max_cache_len=ids.shape[1])
        model: Any = self.model
        model.set_attn_implementation("codes" if "compute" in self.kind else "sdpa")
        try:
            return model(ids, past_key_values=self.cache)
        finally:
            model.set_attn_implementation("sdpa")

    def attend(
        self, module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention to the codes of a layer, for transformers."""
        layer: Any = self.cache.layers[module.layer_idx]
        spec = AttentionSpec(key=layer.key_spec, value=layer.value_spec, scale=scaling, causal=mask is None)
        tensors = [layer.keys, layer.key_scale, layer.values, layer.value_scale]
        return reference(query, tensors, mask, None, spec.encode()).transpose(1, 2), None


class Remembered:
    """A model whose answers are kept, since every row is compared with them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.answers = model, {}

    def __call__(self, ids: torch.Tensor) -> Any:
        key = tuple(ids[0].tolist())
        if key not in self.answers:
            self.answers[key] = self.model(ids).logits
        return SimpleNamespace(logits=self.answers[key])


def config_of(scheme: Any) -> QuantConfig:
    (rule,) = parse_config(scheme).rules
    wide = isinstance(rule.scheme, Scheme) and rule.scheme.weight.format.bits >= 8
    head = () if wide else (Rule(layers="lm_head", scheme=PRESETS["int8_weight_only"]),)
    return QuantConfig((*head, rule))


def calibration_text() -> str:
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--only", nargs="*", default=None)
    chosen = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"{chosen.machine}.accuracy.json"
    language_model = load_language_model(smollm2_path(), torch.device("cpu"), torch.float32)
    text = sample_text() + "\n\n" + (ROOT / "benchmarks" / "held_out.txt").read_text(encoding="utf-8")
    ids = language_model.encode(text)
    batches = list(language_model.encode(calibration_text())[:CALIBRATION].reshape(-1, 1, WINDOW))
    result: dict[str, Any] = {
        "model": language_model.name,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "calibration": f"{CALIBRATION} tokens of pydoc_data.topics, windows of {WINDOW}",
        "window": WINDOW,
        "rows": [],
    }
    remembered = Remembered(language_model.model)
    if path.is_file():
        result["rows"] = json.loads(path.read_text())["rows"]
    for name in [*ROWS, *CACHES]:
        if (chosen.only and name not in chosen.only) or any(row["name"] == name for row in result["rows"]):
            continue
        result["rows"].append(row(name, language_model.model, remembered, ids, batches))
        order = [*ROWS, *CACHES]
        result["rows"].sort(key=lambda r: order.index(r["name"]))
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(result["rows"][-1] if name == order[-1] else next(r for r in result["rows"] if r["name"] == name))
        write_table(result)


def row(
    name: str, original: torch.nn.Module, remembered: Remembered, ids: torch.Tensor, batches: list[torch.Tensor]
) -> dict[str, Any]:
    """Quantize a copy of the model, and measure it."""
    results: list[Any] = []
    model: Any = original
    start = time.perf_counter()
    decided: dict[str, Any] = {}
    if ROWS.get(name) is not None:
        config = config_of(ROWS[name])
        model = copy.deepcopy(original)
        if config.undecided:
            chosen = qcompile.choose_schemes(model, config, batches)
            config = chosen.config
            counts = Counter(label(choice.schemes[choice.chosen]) for choice in chosen.choices for _ in choice.layers)
            decided = {"bits": chosen.bits, "kl_expected": chosen.kl, "layers": dict(counts)}
        qcompile.quantize_(model, config, calibration=batches, progress=False, report=results.append)
    seconds = time.perf_counter() - start
    size = weight_bytes(model)
    if name in CACHES:
        if name.endswith("Hadamard"):
            model = copy.deepcopy(original)
            rotate_heads_(model, Batch((ids[:WINDOW][None],), {"use_cache": False}), list(linear_modules(model)), 0)
        model = WithCache(model, CACHES[name])
    quality = compare(model, remembered, ids, WINDOW)
    errors = [result.error for result in results if result.error is not None]
    return {
        "name": name,
        "config": ROWS.get(name, CACHES.get(name)),
        **decided,
        "tokens": quality.tokens,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1": quality.top1,
        "weight_bytes": size,
        "quantize_seconds": seconds,
        "mean_layer_error": sum(errors) / len(errors) if errors else None,
        "declined": sorted({f"{r.declined}" for r in results if r.declined}),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def write_table(result: dict[str, Any]) -> None:
    """The table of docs/accuracy.md, between its marks."""
    path = ROOT / "docs" / "accuracy.md"
    if not path.is_file():
        return
    lines = [
        "| | weights MB | perplexity | KL, nats | same token | to quantize, s |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['name']} | {r['weight_bytes'] / 1e6:.1f} | {r['perplexity']:.2f} | {r['kl']:.4f} | "
            f"{r['top1']:.1%} | {r['quantize_seconds']:.0f} |"
        )
    before, _, rest = path.read_text(encoding="utf-8").partition("<!-- table -->")
    after = rest.partition("<!-- end -->")[2]
    path.write_text(f"{before}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
