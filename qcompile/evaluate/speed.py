"""Greedy generation, and the rates of prefill and decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.modules import PackedModule

_LEAST_STEPS = 4


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what is shared counts once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def prefill_rate(model: Callable[..., Any], ids: Tensor, repeats: int = 3) -> float:
    """Tokens a second of a forward pass over a prompt, computing the last token's logits alone: the median.

    Args:
        model: as transformers' causal language models.
        ids: token ids [1, T].
        repeats: timed calls, after one that is not timed.
    """
    seconds = []
    for _ in range(repeats + 1):
        start = _now(ids.device)
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
        seconds.append(_now(ids.device) - start)
    return ids.shape[1] / statistics.median(seconds[1:])


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    Attributes:
        ids: the new tokens, without the one that ended the text.
        decode_rate: tokens a second, of all steps but the first two.
        first_step: seconds of the first decoding step, which compiles if nothing did before.
        processors: how many this process had on average during the steps that are timed. Threads that wait for each
            other count, so with nothing beside it these are as many as its threads.
    """

    ids: list[int]
    decode_rate: float
    first_step: float
    processors: float


class Decoder:
    """Generates greedily: the prompt through `model`, then one token a call through `step`, in one cache.

    Args:
        model: a causal language model of transformers; prompts of any length go through it uncompiled.
        step: the same model, compiled; it always sees one token and the same cache, so it compiles once.
        capacity: tokens that prompt and continuation may have together.
        cache: a KV cache for so many tokens; a StaticCache by default.
    """

    def __init__(self, model: nn.Module, step: Callable[..., Any], capacity: int, cache: Any = None) -> None:
        import transformers

        from qcompile.integrations.caches import cache_argument

        self.model, self.step, self.capacity = model, step, capacity
        self.cache = cache or transformers.StaticCache(config=model.config, max_cache_len=capacity)
        self.given = {cache_argument(model): self.cache}

    @torch.inference_mode()
    def generate(self, prompt: Tensor, tokens: int, stop: tuple[int, ...] = ()) -> Generation:
        """Continue a prompt.

        Args:
            prompt: token ids [T] on the model's device.
            tokens: how many to decode at most; a stop token ends the decoding, but not before 4 steps are timed.
            stop: token ids that end a text.

        Raises:
            ValueError: more tokens than the cache holds.
        """
        if prompt.numel() + tokens > self.capacity:
            raise ValueError(f"{prompt.numel()} + {tokens} tokens are more than the cache's {self.capacity}")
        self.cache.reset()
        logits = self.model(input_ids=prompt[None], logits_to_keep=1, **self.given).logits
        chosen: list[int] = []
        seconds: list[float] = []
        occupied: list[float] = []
        while len(chosen) < tokens and (len(chosen) < _LEAST_STEPS or not set(stop) & set(chosen)):
            token = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(int(token.item()))
            start, start_occupied = _now(prompt.device), time.process_time()
            logits = self.step(input_ids=token, **self.given).logits
            seconds.append(_now(prompt.device) - start)
            occupied.append(time.process_time() - start_occupied)
        steady = seconds[2:] or seconds
        processors = sum(occupied[-len(steady) :]) / sum(steady)
        end = next((i for i, token_id in enumerate(chosen) if token_id in stop), len(chosen))
        return Generation(chosen[:end], len(steady) / sum(steady), seconds[0], processors)


def compiled_decoder(model: nn.Module, capacity: int, cache: Any = None) -> Decoder:
    """A decoder whose step is compiled: by qcompile where a layer or the cache is quantized, and by Inductor elsewhere.

    What was compiled before is forgotten.
    """
    quantized = cache is not None or any(isinstance(module, PackedModule) for module in model.modules())
    torch.compiler.reset()
    step = torch.compile(model, backend="qcompile" if quantized else "inductor", fullgraph=True)
    return Decoder(model, step, capacity, cache)
