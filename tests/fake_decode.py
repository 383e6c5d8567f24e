"""A decoding step of a small Llama on a GPU that is not there: `python -m tests.fake_decode SCHEME BATCH [--source]`.

Prints how many kernels a layer takes, how many of them attend to the cache themselves, and how many are torch's own;
with `--source` the calls of Inductor's wrapper instead.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fake_gpu import generated, install

HEADS, GROUP, SIZE, LENGTH = 2, 4, 128, 264


def move(model: nn.Module) -> None:
    """Every tensor of a model to the device."""
    from qcompile.layouts import choose_layout, to_layout
    from qcompile.modules import QuantizedLinear

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            packed = to_layout(module.logical(), choose_layout(module.scheme, module.packed_shape, "cuda"))
            module._store(packed.map(lambda _, t: torch.empty(t.shape, dtype=t.dtype, device="cuda")))
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(moved, requires_grad=False)
                else:
                    module._buffers[name] = moved


def calls(scheme: str, batch: int, layers: int) -> list[str]:
    """The launches and calls of a step's wrapper."""
    import transformers

    import qcompile

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        vocab_size=2048,
        num_hidden_layers=layers,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    qcompile.quantize_(model.model, scheme, progress=False)
    cache = transformers.StaticCache(config=config, max_cache_len=LENGTH)

    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache).logits
        return logits

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        move(model)
        states = torch.empty(batch, HEADS, 1, SIZE, dtype=torch.bfloat16, device="cuda")
        for layer in cache.layers:
            layer.cumulative_length = torch.empty((), dtype=torch.int64, device="cuda")
            layer.lazy_initialization(states, states)
        source = generated(step, torch.empty(batch, 1, dtype=torch.int64, device="cuda"), cache, backend="qcompile")
    lines = [line.strip() for line in source[source.index("def call(") :].split("\n")]
    return [line for line in lines if ".run(" in line or "extern_kernels." in line or " = torch.ops." in line]


if __name__ == "__main__":
    install()
    scheme, batch = sys.argv[1], int(sys.argv[2])
    found = [calls(scheme, batch, layers) for layers in (2, 3)]
    if "--source" in sys.argv:
        print("\n".join(found[0]))
    else:
        for name, part in (
            ("kernels", ""),
            ("attention", "torch.ops.qcompile.attention_"),
            ("torch", "extern_kernels.bmm"),
        ):
            print(name, sum(part in line for line in found[1]) - sum(part in line for line in found[0]))
