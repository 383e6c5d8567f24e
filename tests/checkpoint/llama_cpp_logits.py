"""llama.cpp's logits for token ids: `python llama_cpp_logits.py MODEL.gguf IDS.npy LOGITS.npy`.

A program of its own: llama.cpp and torch bring different OpenMP libraries. Weights stay as they are in the file (its
repacked forms for AMX crash where a sandbox denies AMX), and keys and values are cached in float32.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np


def llama_cpp_logits(model: Path, ids: list[int], folder: Path) -> np.ndarray:
    """float32 [T, vocabulary] for the ids of one text, run in another process with files in `folder`."""
    given, taken = folder / "ids.npy", folder / "logits.npy"
    np.save(given, np.array(ids, dtype=np.int32))
    command = [sys.executable, __file__, str(model), str(given), str(taken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(taken)


def main() -> None:
    import llama_cpp

    path, given, taken = sys.argv[1:]
    ids = np.load(given)
    model_options = llama_cpp.llama_model_default_params()
    model_options.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
    assert model, f"llama.cpp cannot load {path}"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(ids)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # float32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.swa_full = True
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), i, 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(
        ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)), (len(ids), width)
    )
    np.save(taken, logits)


if __name__ == "__main__":
    main()
