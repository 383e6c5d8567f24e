"""Decode sequences of unequal length together over a paged FP8 cache: each writes what it writes alone.

    python examples/paged_kv_cache.py [CHECKPOINT | smollm2]

More prompts than rows: when a sequence ends, its pages are free and the next prompt takes its row, while the others
go on. See fp8_kv_cache.py for CHECKPOINT.
"""

import sys
from collections import deque
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.checkpoint.gguf import smollm2_path

# Tokens of SmolLM2: "The capital of France is", "Once upon a time", "def add(a, b):", a chat, "The moon is a".
PROMPTS = (
    (504, 3575, 282, 4649, 314),
    (6403, 1980, 253, 655),
    (1604, 803, 24, 81, 28, 278, 727),
    (1, 4093, 198, 20796, 549, 260, 3575, 29, 2),
    (504, 6783, 314, 253),
)
TOKENS = (12, 24, 9, 16, 20)
ROWS = 3


def load(device: torch.device) -> torch.nn.Module:
    if len(sys.argv) == 1:
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
        return LlamaForCausalLM(config).to(device).eval().requires_grad_(False)
    path = smollm2_path() if sys.argv[1] == "smollm2" else Path(sys.argv[1])
    return qcompile.load(path, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


@torch.no_grad()
def alone(model: torch.nn.Module, prompt: tuple[int, ...], count: int) -> list[int]:
    """One sequence, over a cache of its own."""
    cache = qcompile.TransformersCache(model, "fp8", max_cache_len=64)
    ids, tokens = torch.tensor([prompt], device=model.device), []
    for _ in range(count):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@torch.no_grad()
def together(model: torch.nn.Module) -> tuple[list[list[int]], int]:
    """All sequences, at most ROWS at a time; and the most pages that were in use."""
    cache = qcompile.TransformersPagedCache(model, "fp8", batch=ROWS, max_length=64, page_size=16)
    pages = cache.pages

    # Lengths, pages and which rows have a sequence change from step to step; the graph is compiled once.
    @torch.compile(backend="qcompile", fullgraph=True)
    def step(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, **cache.inputs(1)).logits[:, -1].argmax(-1)

    waiting, written = deque(range(len(PROMPTS))), [[] for _ in PROMPTS]
    running: dict[int, int] = {}  # the prompt of each row
    last = torch.zeros(ROWS, 1, dtype=torch.int64, device=model.device)
    used = 0
    while waiting or running:
        while waiting and len(running) < ROWS:
            number, row = waiting.popleft(), pages.add()
            prompt = torch.tensor([PROMPTS[number]], device=model.device)
            pages.append(prompt.shape[1], rows=[row])
            last[row] = model(prompt, **cache.inputs(prompt.shape[1], [row])).logits[0, -1].argmax()
            written[number].append(int(last[row]))
            running[row] = number
        pages.append()  # room for a token of each sequence
        used = max(used, pages.pages - pages.free_pages)
        last = step(last)[:, None]
        for row, number in list(running.items()):
            written[number].append(int(last[row]))
            if len(written[number]) == TOKENS[number]:
                pages.free(row)
                del running[row]
    return written, used


def main() -> None:
    torch.manual_seed(0)
    model = load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    expected = [alone(model, prompt, count) for prompt, count in zip(PROMPTS, TOKENS, strict=True)]
    written, used = together(model)
    for prompt, tokens, one in zip(PROMPTS, written, expected, strict=True):
        print(f"{len(prompt)} tokens and {len(tokens)} more, as alone: {tokens == one}")
    print(f"{ROWS} sequences at a time took at most {used} pages of 16 tokens")
    if written != expected:
        sys.exit(1)


if __name__ == "__main__":
    main()
