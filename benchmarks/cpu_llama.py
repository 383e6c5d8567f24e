"""What `cpu.py` runs for llama.cpp; as `cpu_worker.py`, but needs llama-cpp-python and no torch."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def memory_mb(name: str) -> float:
    """Megabytes that this process has (`VmRSS`) or had at most (`VmHWM`)."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return round(int(found[1]) * 1024 / 1e6, 1)


class Session:
    """A context of llama.cpp, which holds one sequence."""

    def __init__(self, path: str, text: dict[str, Any], threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self.prompt, self.tokens = text["prompt"], int(text["tokens"])
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = len(self.prompt) + self.tokens
        settings.n_batch = settings.n_ubatch = len(self.prompt)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, ids: list[int]) -> None:
        """Read tokens behind those that were read."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # which the batch only points to
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        assert llama_cpp.llama_decode(self.context, batch) == 0
        llama_cpp.llama_synchronize(self.context)

    def logits(self, position: int) -> np.ndarray:
        """Of a token of the last batch: float32 [V]."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, position)
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))

    def time(self, tokens: int) -> dict[str, float]:
        """Seconds of reading the prompt, and of decoding after it."""
        llama_cpp.llama_memory_clear(self.memory, False)
        begun = time.perf_counter()
        self.feed(self.prompt)
        chosen = int(self.logits(-1).argmax())
        read = time.perf_counter()
        for _ in range(tokens):
            self.feed([chosen])
            chosen = int(self.logits(-1).argmax())
        return {"prefill_s": read - begun, "decode_s": time.perf_counter() - read}

    def perplexity(self, windows: list[tuple[list[int], int]]) -> float:
        """Of tokens from each window's first on."""
        surprise = []
        for ids, first in windows:
            llama_cpp.llama_memory_clear(self.memory, False)
            batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            assert llama_cpp.llama_decode(self.context, batch) == 0
            for place in range(first, len(ids)):
                row = self.logits(place - 1).astype(np.float64)
                top = row.max()
                surprise.append(top + math.log(np.exp(row - top).sum()) - row[ids[place]])
            llama_cpp.llama_batch_free(batch)
        return math.exp(sum(surprise) / len(surprise))


def main(_: str, path: str, text_path: str, threads: str) -> None:
    """Serve llama.cpp."""
    text = json.loads(Path(text_path).read_text())
    runtime = memory_mb("VmRSS")
    session = Session(path, text, int(threads))
    session.time(2)
    found = {"llama-cpp-python": version("llama-cpp-python")}
    print(json.dumps({"runtime_mb": runtime, "versions": found}), flush=True)
    for line in sys.stdin:
        if line.strip() == "run":
            answer = session.time(session.tokens)
        elif line.strip() == "peak":
            answer = {"peak_mb": memory_mb("VmHWM")}
        else:
            answer = {"perplexity": round(session.perplexity(text["windows"]), 3)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
