"""What `decode.py` runs in a process of its own: one implementation, measured."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode import OURS, USUAL, Job, Row, Turns, parse, store
from decode_steps import composition, kernels_of, synchronize
from torch import Tensor, nn

CHECKED = 16
"""Tokens that compiled and eager logits are compared on."""
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TOY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}


# ---- the model


def materialize(module: nn.Module, device: str) -> None:
    """Give a module on the meta device random matrices of deviation 0.02, and vectors of ones."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)


def quantize(module: nn.Module, job: Job) -> None:
    """Quantize the linears of a module in place, as the job says."""
    if job.impl == OURS:
        import qcompile

        qcompile.quantize_(module, job.scheme, progress=False)
    elif job.impl == "torchao":
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            PerRow,
            quantize_,
        )

        configs: dict[str, Callable[[], Any]] = {
            "int4": lambda: Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"),
            "int8": Int8WeightOnlyConfig,
            "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        }
        quantize_(module, configs[job.scheme]())


def build(job: Job, shape: dict[str, Any], head: str | None, device: str) -> Any:
    """The model, quantized; no more than one layer of it is ever in memory unquantized."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given = dict(shape)
    if "rope_theta" in given:
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
    config = LlamaConfig(tie_word_embeddings=False, **given)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    inner = model.model
    with torch.device(device):
        inner.rotary_emb = type(inner.rotary_emb)(config)
    for layer in inner.layers:
        materialize(layer, device)
        quantize(layer, job)
    for module in (inner.embed_tokens, inner.norm, model.lm_head):
        materialize(module, device)
    if head is not None and job.impl == OURS:
        import qcompile

        qcompile.quantize_(model, {"rules": [{"layers": "lm_head", "scheme": head}]}, progress=False)
    return model


def bytes_a_step(model: nn.Module) -> int:
    """Of parameters and buffers, the embedding aside, of which a step reads little."""
    sizes = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        inner = getattr(tensor, "__tensor_flatten__", None)
        parts = [getattr(tensor, field) for field in inner()[0]] if inner else [tensor]
        if "embed_tokens" not in name:
            sizes.update({id(part): part.nbytes for part in parts if isinstance(part, Tensor)})
    return sum(sizes.values())


# ---- decoding


READ = 2048
"""Tokens of a prompt that are read."""


@dataclass
class Prompted:
    """A model with a cache that holds a prompt.

    Attributes:
        first: the token after the prompt, int64 [B, 1].
    """

    model: Any
    cache: Any
    prompt: int
    first: Tensor

    @classmethod
    @torch.no_grad()
    def start(cls, model: Any, batch: int, prompt: int, length: int, kv: str | None, device: str) -> Prompted:
        """Read a random prompt eagerly into a cache for `length` tokens; of a long one keys and values are drawn."""
        from transformers import StaticCache

        if kv is None:
            cache = StaticCache(config=model.config, max_cache_len=length)
        else:
            import qcompile

            cache = qcompile.TransformersCache(model, kv, max_cache_len=length)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(device)
        logits = model(input_ids=ids[:, :READ], past_key_values=cache, logits_to_keep=1).logits
        for layer in cache.layers:
            for begin in range(READ, prompt, READ):
                size = model.config.num_key_value_heads, min(READ, prompt - begin), model.config.head_dim
                layer.update(*torch.randn(2, batch, *size, device=device, dtype=logits.dtype))
        return cls(model, cache, prompt, logits[:, -1].argmax(-1, keepdim=True))

    def rewind(self) -> None:
        """Forget what was decoded: later tokens overwrite it."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)

    def logits(self, run: Any, ids: Tensor) -> Tensor:
        """Of the token after ids [B, 1]: [B, V]."""
        return run(input_ids=ids, past_key_values=self.cache).logits[:, -1]

    @torch.no_grad()
    def follow(self, run: Any, tokens: list[Tensor]) -> list[Tensor]:
        """Float32 logits after each of the tokens."""
        self.rewind()
        return [self.logits(run, ids).float() for ids in tokens]

    @torch.no_grad()
    def greedy(self, run: Any, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens that greedy decoding feeds, and the float32 logits after each."""
        self.rewind()
        ids, tokens, logits = self.first, [], []
        for _ in range(count):
            tokens.append(ids)
            logits.append(self.logits(run, ids).float())
            ids = logits[-1].argmax(-1, keepdim=True)
        return tokens, logits


GATED_POWER = 2.1
"""Relative error of silu(a) * b for an error of 1 in power of a and of b, which are normal of deviation 1.28 here."""
GREATEST = {"normal": 4, "gated": 13}
"""Greatest of thousands of numbers over their deviation: of normal ones, and of silu(a) * b."""


def logits_bound(layers: int, job: Job) -> float:
    """Greatest `error` that two evaluations of the model may have between them, which round in different places.

    Roundings are taken as independent, of mean zero and variance u^2 / 3 relative to what is rounded, on both sides.
    The weights are random: what attention adds to the residual stream, a mean over many tokens, is a tenth of what an
    MLP adds, and MLPs add equally much. An MLP's branch rounds at most 18 times to bfloat16 (u = 2^-8). With 8-bit
    activations it rounds twice to those: u = 2^-4 for E4M3; for int8 by up to half a step, which is the greatest number
    of a token / 127.

    With E_n the error of the stream after n branches, in power, a branch's own e, and `GATED_POWER` times of what the
    stream brought into it, the stream after it errs by E_(n+1) = (n E_n + 2.1 E_n + e) / (n + 1). A quarter more in
    norm is for chance.
    """
    steps = sum((greatest / 127) ** 2 / 12 for greatest in GREATEST.values())
    codes = {"fp8": 2 * 2.0**-8 / 3, "int8": steps}
    activation = 0.0
    if job.impl == OURS:
        from qcompile.config import parse_config

        scheme = parse_config(job.scheme).scheme_for("layers.0.mlp.up_proj")
        if scheme is not None and scheme.activation is not None:
            activation = codes["fp8" if "fp8" in scheme.activation.format.name else "int8"]
    branch = 2 * (18 * 2.0**-16 / 3 + activation)
    error = branch
    for n in range(1, layers):
        error = ((n + GATED_POWER) * error + branch) / (n + 1)
    return 1.25 * math.sqrt(error)


def difference(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Relative error (Frobenius) of logits, and the share of equal argmaxes.

    Raises:
        AssertionError: something is not finite.
    """
    y, given = torch.stack(actual), torch.stack(expected)
    assert bool(y.isfinite().all()), "compiled logits are not finite"
    assert bool(given.isfinite().all()), "eager logits are not finite"
    return float((y - given).norm() / given.norm()), float((y.argmax(-1) == given.argmax(-1)).float().mean())


def compiled(model: Any, job: Job, mode: str | None, options: dict[str, bool]) -> Any:
    """The model compiled by the job's backend; one compilation for each shape."""
    torch._dynamo.reset()
    backend = "qcompile" if job.impl == OURS else "inductor"
    if options and mode is not None:  # which `torch.compile` does not take together
        options, mode = torch._inductor.list_mode_options(mode) | options, None
    return torch.compile(model, backend=backend, mode=mode, options=options or None, fullgraph=True, dynamic=False)


def time_loop(prompted: Prompted, run: Any, count: int, device: str) -> float:
    """Microseconds a token of a Python loop."""
    ids = prompted.first
    with torch.no_grad():
        for timed in (False, True):
            prompted.rewind()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count if timed else 4):
                ids = prompted.logits(run, ids).argmax(-1, keepdim=True)
            synchronize(device)
    return (time.perf_counter() - start) * 1e6 / count


class Captured:
    """A step and its argmax as one CUDA graph; `replay` decodes a token."""

    def __init__(self, prompted: Prompted, run: Any) -> None:
        self.prompted, self.ids, self.graph = prompted, prompted.first.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                self.advance(run)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.advance(run)

    def advance(self, run: Any) -> None:
        self.ids.copy_(self.prompted.logits(run, self.ids).argmax(-1, keepdim=True))

    def replay(self) -> None:
        self.graph.replay()

    def time(self, count: int) -> float:
        """Microseconds a token."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(4):
            self.replay()
        self.prompted.rewind()
        start.record()
        for _ in range(count):
            self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / count


# ---- one implementation


@dataclass(frozen=True)
class Worker:
    """Measures one job; runs in a process of its own."""

    job: Job
    options: argparse.Namespace
    turns: Turns

    @property
    def device(self) -> str:
        return "cpu" if self.options.toy else "cuda"

    @property
    def inductor(self) -> dict[str, bool]:
        """Options of Inductor's to switch on."""
        return dict.fromkeys(self.options.inductor, True)

    def run(self) -> None:
        """Build the model, then measure every batch and mode, and prefill."""
        torch.manual_seed(0)
        shape = (TOY if self.options.toy else LLAMA_8B) | {"num_hidden_layers": self.options.layers}
        with self.turns.building():
            start = time.perf_counter()
            with torch.no_grad():
                model = build(self.job, shape, self.options.head, self.device)
            synchronize(self.device)
            build_gb = self.peak()
            size = bytes_a_step(model) / 1e9
            print(
                f"{self.job.name}: built in {time.perf_counter() - start:.1f} s, {size:.2f} GB a step, "
                f"peak {build_gb:.2f} GB",
                flush=True,
            )
        common = {"weight_gb": round(size, 3), "build_gb": round(build_gb, 3)}
        if self.options.compile_only:
            self.warm(model)
            return
        caches = "empty"
        for batch in self.options.batch:
            with self.turns.building():
                prompted = self.prompted(model, batch)
                tokens, expected = prompted.greedy(model, min(CHECKED, self.options.tokens))
            for mode in self.options.modes:
                self.decode(prompted, batch, mode, tokens, expected, common | {"caches": caches})
                caches = "used"
            del prompted, tokens, expected
        if self.options.prefill:
            self.prefill(model, common)

    def prompted(self, model: Any, batch: int) -> Prompted:
        length = self.options.prompt + self.options.tokens + 8
        kv = self.options.kv if self.job.impl == OURS else None
        return Prompted.start(model, batch, self.options.prompt, length, kv, self.device)

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0

    def row(self, bench: str, batch: int) -> Row:
        row: Row = {"bench": bench, "impl": self.job.impl, "scheme": self.job.scheme, "batch": batch}
        row["layers"] = self.options.layers
        lengths = f"{self.options.prompt}+{self.options.tokens}"
        if bench == "decode" and lengths != USUAL:
            row["lengths"] = lengths
        if self.options.inductor:
            row["inductor"] = "+".join(self.options.inductor)
        if self.job.impl == OURS:
            row |= {"head": self.options.head or "bfloat16", "kv": self.options.kv or "bfloat16"}
        return row

    def store(self, row: Row) -> None:
        store(self.options.out, row, torch.device(self.device), Path(f"{self.options.turns}.store"))

    def compile_step(self, prompted: Prompted, mode: str) -> tuple[Any, float]:
        """The compiled model, and the seconds of its first call."""
        named = "reduce-overhead" if mode == "reduce-overhead" else None
        run = compiled(prompted.model, self.job, named, self.inductor)
        synchronize(self.device)
        start = time.perf_counter()
        prompted.follow(run, [prompted.first])
        synchronize(self.device)
        return run, time.perf_counter() - start

    def warm(self, model: Any) -> None:
        """Seconds of compiling with the caches that another process left."""
        batch, mode = self.options.batch[0], self.options.modes[0]
        with self.turns.building():
            _, seconds = self.compile_step(self.prompted(model, batch), mode)
        print(f"{self.job.name}: compiled from caches in {seconds:.1f} s", flush=True)
        self.store(self.row("decode", batch) | {"mode": mode, "warm_compile_s": round(seconds, 1)})

    def decode(
        self, prompted: Prompted, batch: int, mode: str, tokens: list[Tensor], expected: list[Tensor], common: Row
    ) -> None:
        """One row: a batch in a mode."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self.turns.building():
            run, seconds = self.compile_step(prompted, mode)
            error, same = difference(prompted.follow(run, tokens), expected)
        bound = logits_bound(self.options.layers, self.job)
        count = self.options.tokens
        extra: Row = {}
        if mode == "graph" and self.device == "cuda":
            with self.turns.building():
                captured = Captured(prompted, run)
            with self.turns.measuring():
                step_us = captured.time(count)
                prompted.rewind()
                extra = composition(kernels_of(captured.replay, self.device), batch, step_us)
        else:
            with self.turns.measuring():
                step_us = time_loop(prompted, run, count, self.device)
                if self.device == "cpu":
                    kernels = kernels_of(lambda: prompted.follow(run, tokens[:1]), self.device)
                    extra = composition(kernels, batch, step_us)
        row = self.row("decode", batch) | {
            "mode": mode,
            "tok_s": round(batch * 1e6 / step_us, 1),
            "step_us": round(step_us, 1),
            "peak_gb": round(self.peak(), 3),
            "compile_s": round(seconds, 1),
            "error": float(f"{error:.3g}"),
            "same": round(same, 4),
        }
        print(json.dumps(row), flush=True)
        self.check(error, bound)
        self.store(row | common | {"jobs": self.options.jobs} | extra)

    def check(self, error: float, bound: float) -> None:
        """Raises: AssertionError: a result of ours is wrong."""
        if self.job.impl == OURS:
            assert error <= bound, f"{self.job.name}: logits differ by {error:.3g} from eager ones, bound {bound:.3g}"

    @torch.no_grad()
    def prefill(self, model: Any, common: Row) -> None:
        """One row: a prompt of `--prefill` tokens, compiled, into an empty static cache."""
        count = self.options.prefill
        kv = self.options.kv if self.job.impl == OURS else None
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self.turns.building():
            prompted = Prompted.start(model, 1, count, count + 8, kv, self.device)
            ids = torch.randint(model.config.vocab_size, (1, count)).to(self.device)
            run = compiled(model, self.job, None, self.inductor)

            def once(function: Any) -> Tensor:
                for layer in prompted.cache.layers:
                    layer.cumulative_length.zero_()
                return function(input_ids=ids, past_key_values=prompted.cache, logits_to_keep=1).logits[:, -1]

            synchronize(self.device)
            start = time.perf_counter()
            logits = once(run).float()
            synchronize(self.device)
            seconds = time.perf_counter() - start
            error, _ = difference([logits], [once(model).float()])
        times = []
        with self.turns.measuring():
            for _ in range(6):
                synchronize(self.device)
                start = time.perf_counter()
                once(run)
                synchronize(self.device)
                times.append((time.perf_counter() - start) * 1e3)
            ms = statistics.median(times)
            extra = composition(kernels_of(lambda: once(run), self.device), 1, 1e3 * ms)
        row = self.row("prefill", 1) | {
            "tokens": count,
            "tok_s": round(count * 1e3 / ms, 1),
            "ms": round(ms, 2),
            "peak_gb": round(self.peak(), 3),
            "compile_s": round(seconds, 1),
            "error": float(f"{error:.3g}"),
        }
        print(json.dumps(row), flush=True)
        self.check(error, logits_bound(self.options.layers, self.job))
        self.store(row | common | {"jobs": self.options.jobs} | extra)


def main(arguments: list[str]) -> None:
    """Measure the implementation that `--worker` names."""
    options = parse(arguments)
    Worker(Job(options.worker), options, Turns(Path(options.turns))).run()


if __name__ == "__main__":
    main(sys.argv[1:])
