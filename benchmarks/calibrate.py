"""GPTQ of layers as large as those of an 8B model, beside llm-compressor's on the same matrices.

    python benchmarks/calibrate.py --machine nvidia-h100 [--device cuda] [--hidden 4096 --inner 14336 --kv 1024]

writes benchmarks/results/<machine>.calibrate.json: for each of the seven linears of a decoder layer the seconds that
choosing int4 codes takes (symmetric, groups of 128, act_order in static groups, damping 0.01, blocks of 128), and the
error of the output over the output, for qcompile, llm-compressor and rounding to nearest. Weights and inputs are
random, inputs correlated and with outlier channels. What is timed begins with the weight and the mean of x x^T, and
ends with decoded weights; a first call, on another weight, is not timed.

Then a stack of `--layers` such layers is quantized from calibration batches by `qcompile.quantize_`, where transformers
is installed, and the seconds a layer noted, statistics and running the blocks included.

llm-compressor is needed as its package `llmcompressor` with `compressed_tensors`, `loguru` and `pydantic`; only its
function `quantize_weight` is imported. Without it, its columns are null.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qcompile
from qcompile.calibrate.gptq import gptq, hessian_error
from qcompile.methods import GPTQ
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme_config import parse_scheme

ROOT = Path(__file__).resolve().parents[1]
GROUP, DAMPING, BLOCK = 128, 0.01, 128
SCHEME = parse_scheme({"weight": {"format": "int4", "group_size": GROUP, "scale_dtype": "bfloat16"}, "method": "gptq"})
Quantize = Callable[[Tensor, Tensor], Tensor]
"""From a weight [N, K] and its Hessian [K, K] to the decoded weight."""


def shapes(hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    """(N, K) of a decoder layer's linears."""
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def hessian_of(columns: int, tokens: int, device: torch.device) -> Tensor:
    """The mean of x x^T over correlated inputs of which one in 64 is large."""
    gram = torch.zeros(columns, columns, device=device)
    mixing = torch.randn(columns // 8, columns, device=device) * (8 / columns) ** 0.5
    outliers = torch.where(torch.rand(columns, device=device) < 1 / 64, 10.0, 1.0)
    for part in torch.arange(tokens).split(4096):
        x = torch.randn(len(part), columns // 8, device=device) @ mixing
        x = (x + 0.5 * torch.randn_like(x)) * outliers
        gram.addmm_(x.t(), x)
    return gram / tokens


def ours(weight: Tensor, hessian: Tensor, clip: str) -> Tensor:
    packed = gptq(weight, hessian, SCHEME.weight, GPTQ(damping=DAMPING, block_size=BLOCK, clip=clip))
    return dequantize(packed)


def reference() -> Quantize | None:
    """llm-compressor's `quantize_weight`, imported without the package around it; None where it is not installed."""
    found = importlib.util.find_spec("llmcompressor")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations)))
    for name, inside in (("", ""), (".modifiers", "modifiers"), (".modifiers.gptq", "modifiers/gptq")):
        package = types.ModuleType(f"llmcompressor{name}")
        package.__path__ = [str(folder / inside)]
        sys.modules[package.__name__] = package
    module = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    utils: Any = importlib.import_module("compressed_tensors.quantization.utils")
    args = quantization.QuantizationArgs(
        num_bits=4, strategy="group", group_size=GROUP, symmetric=True, actorder="static", observer="minmax"
    )

    def quantize(weight: Tensor, hessian: Tensor) -> Tensor:
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale, zero = utils.calculate_qparams(low, high, args)
        done = module.quantize_weight(
            weight[None].clone(),
            hessian[None].clone(),
            scale[None],
            zero[None],
            None,
            args,
            blocksize=BLOCK,
            percdamp=DAMPING,
        )
        decoded: Tensor = done[0][0]
        return decoded

    return quantize


def timed(quantize: Quantize, weight: Tensor, hessian: Tensor, repeats: int) -> tuple[float, Tensor]:
    """The median of the seconds, and the result."""
    seconds = []
    for _ in range(repeats):
        synchronize(weight.device)
        start = time.perf_counter()
        result = quantize(weight, hessian)
        synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """Mean square of the output's error over that of the output."""
    noise = hessian_error(weight - decoded.float(), hessian).double().sum()
    return float((noise / hessian_error(weight, hessian).double().sum()).item())


def linears(chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each linear of a layer."""
    ways: dict[str, Quantize | None] = {
        "qcompile": lambda w, h: ours(w, h, "importance"),
        "qcompile, plain ranges": lambda w, h: ours(w, h, "none"),
        "llm-compressor": reference(),
    }
    rows, known = [], {}
    for name, (n, k) in shapes(chosen.hidden, chosen.inner, chosen.kv).items():
        if k not in known:
            known.clear()
            known[k] = hessian_of(k, chosen.tokens, device)
            small = torch.randn(256, k, device=device) * 0.02
            for way in ways.values():
                if way is not None:
                    way(small, known[k])
        hessian, weight = known[k], torch.randn(n, k, device=device) * 0.02
        row: dict[str, Any] = {"linear": name, "n": n, "k": k}
        for way_name, way in ways.items():
            if way is None:
                row[way_name] = None
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            seconds, decoded = timed(way, weight, hessian, chosen.repeats)
            row[way_name] = {"seconds": seconds, "error": relative_error(weight, decoded, hessian)}
            if device.type == "cuda":
                row[way_name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - held
        nearest = dequantize(quantize_weight(weight, SCHEME.weight))
        row["nearest"] = {"error": relative_error(weight, nearest, hessian)}
        rows.append(row)
        print(json.dumps(row))
    return rows


def stack(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """A whole calibration of some decoder layers."""
    try:
        import transformers
    except ImportError:
        return None
    config = transformers.LlamaConfig(
        hidden_size=chosen.hidden,
        intermediate_size=chosen.inner,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.hidden // 128 or 1,
        num_key_value_heads=max(1, chosen.kv // 128),
        vocab_size=1024,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    batches = [torch.randint(0, 1024, (1, chosen.length), device=device) for _ in range(chosen.tokens // chosen.length)]
    results: list[Any] = []
    synchronize(device)
    start = time.perf_counter()
    qcompile.quantize_(
        model,
        {"rules": [{"layers": "model.*", "scheme": SCHEME}]},
        calibration=batches,
        progress=False,
        report=results.append,
    )
    synchronize(device)
    seconds = time.perf_counter() - start
    return {
        "layers": chosen.layers,
        "tokens": len(batches) * chosen.length,
        "seconds_per_layer": seconds / chosen.layers,
        "choosing_codes_per_layer": sum(result.seconds for result in results) / chosen.layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = linears(chosen, device)
    gc.collect()
    result = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tokens": chosen.tokens,
        "linears": rows,
        "layer": summary(rows),
        "stack": stack(chosen, device),
    }
    path = chosen.output / f"{chosen.machine}.calibrate.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["layer"], indent=1))
    print(json.dumps(result["stack"], indent=1))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a layer by each way, and the greatest error over llm-compressor's."""
    ways = [way for way in rows[0] if isinstance(rows[0][way], dict) and "seconds" in rows[0][way]]
    found: dict[str, Any] = {f"seconds, {way}": sum(row[way]["seconds"] for row in rows) for way in ways}
    for way in ways:
        if way != "llm-compressor" and "llm-compressor" in ways:
            ratios = [row[way]["error"] / row["llm-compressor"]["error"] for row in rows]
            found[f"error over llm-compressor's at most, {way}"] = max(ratios)
    return found


if __name__ == "__main__":
    main()
