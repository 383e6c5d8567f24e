"""What `cpu.py` runs in a process of its own: SmolLM2 by torch, one implementation.

It says `{"runtime_mb": ...}` once it has read the prompt and decoded two tokens, then answers lines of its input:
`run`, `peak` and `perplexity`, until that ends.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def memory_mb(name: str) -> float:
    """Megabytes that this process has (`VmRSS`) or had at most (`VmHWM`)."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return round(int(found[1]) * 1024 / 1e6, 1)


def build(job: str, path: Path) -> Any:
    """The model that a job's name means, not yet compiled."""
    import qcompile
    from qcompile.checkpoint.gguf import load_decoded
    from qcompile.cli.options import config_of

    impl, _, scheme = job.partition("-")
    if job.startswith("qcompile-gguf"):
        return qcompile.load(path, dtype=torch.bfloat16, progress=False)
    model = load_decoded(path, torch.float32 if scheme == "fp32" else torch.bfloat16, torch.device("cpu"))
    if impl == "qcompile":
        return qcompile.quantize_(model, config_of(scheme), progress=False)
    if impl == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

        configs = {
            "int8-weights": Int8WeightOnlyConfig,
            "int8": Int8DynamicActivationInt8WeightConfig,
            "int4": lambda: PrototypeInt4WeightOnlyConfig(group_size=32),
        }
        quantize_(model, configs[scheme]())
    return model


def compiled(job: str, model: Any) -> Any:
    """The model as its users compile it; freezing, where that is what makes torch pack weights."""
    impl = job.partition("-")[0]
    if impl == "eager":
        return model
    if impl == "qcompile":
        options = {"cpp_wrapper": job.endswith("-cpp_wrapper")}
        return torch.compile(model, backend="qcompile", fullgraph=True, dynamic=False, options=options)
    return torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})


class Session:
    """A prompt and what is decoded after it, in one static cache."""

    def __init__(self, job: str, path: Path, text: dict[str, Any]) -> None:
        from transformers import StaticCache

        self.model = build(job, path)
        self.run = compiled(job, self.model)
        self.prompt, self.tokens = torch.tensor([text["prompt"]]), int(text["tokens"])
        config = self.model.config
        self.cache = StaticCache(config=config, max_cache_len=self.prompt.shape[1] + self.tokens)
        # Else the first prompt is another graph than all later ones, which would be compiled while they are timed.
        shape = (1, config.num_key_value_heads, config.head_dim)
        self.cache.early_initialization(*shape, dtype=self.model.dtype, device=torch.device("cpu"))

    def step(self, ids: Tensor) -> Tensor:
        logits = self.run(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def time(self, tokens: int) -> dict[str, float]:
        """Seconds of reading the prompt, and of decoding after it."""
        self.cache.reset()
        begun = time.perf_counter()
        ids = self.step(self.prompt)
        read = time.perf_counter()
        for _ in range(tokens):
            ids = self.step(ids)
        return {"prefill_s": read - begun, "decode_s": time.perf_counter() - read}


def main(job: str, path: str, text_path: str, threads: str) -> None:
    """Serve one implementation."""
    import transformers  # noqa: F401  (part of the runtime)

    torch.set_num_threads(int(threads))
    text = json.loads(Path(text_path).read_text())
    runtime = memory_mb("VmRSS")
    with torch.no_grad():
        session = Session(job, Path(path), text)
        session.time(2)
        print(json.dumps({"runtime_mb": runtime}), flush=True)
        for line in sys.stdin:
            if line.strip() == "run":
                answer = session.time(session.tokens)
            elif line.strip() == "peak":
                answer = {"peak_mb": memory_mb("VmHWM")}
            else:
                from qcompile.evaluate import perplexity

                found = perplexity(session.model, torch.tensor(text["ids"]), int(text["window"]))
                answer = {"perplexity": round(found, 3)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
