"""Load a quantized checkpoint with its own codes, compile it, and save it in another format.

    python examples/load_checkpoint.py [CHECKPOINT]

CHECKPOINT is a folder with config.json and safetensors files (GPTQ, AWQ, compressed-tensors, FP8, NF4, ...) or a
GGUF file. Without one, a tiny model is made.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.errors import CheckpointError


def tiny_checkpoint(folder: Path) -> Path:
    """A random Llama of two layers, quantized and saved as GPTQ."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    qcompile.quantize_(model, {"rules": [{"layers": "*.layers.*", "scheme": "int4"}]})
    qcompile.save(model, folder, "gptq")
    return folder


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny_checkpoint(Path(folder) / "tiny")
        model = qcompile.load(path)  # nothing is decoded; the peak of memory is the result and one layer
        print(model)

        fast = torch.compile(model, backend="qcompile")
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            print("next token:", fast(ids).logits[0, -1].argmax().item())

        try:
            saved = qcompile.save(model, Path(folder) / "again", "compressed-tensors")  # for vLLM and transformers
        except CheckpointError as refusal:  # it names the formats that hold the codes
            print("not saved:", refusal)
            return
        print("saved, exactly:", ", ".join(file.name for file in saved.files))


if __name__ == "__main__":
    main()
