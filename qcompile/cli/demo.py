"""`qcompile demo`: the same language model under several schemes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qcompile
from qcompile.cli.options import (
    UNQUANTIZED,
    DeviceOption,
    ModelOption,
    RandomOption,
    check_folder,
    check_model,
    choose_device,
    config_of,
    errors_told,
    load_model,
    parse_schemes,
)
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.evaluate import LanguageModel, compare, compiled_decoder, prefill_rate, sample_text, weight_bytes

STEPS_PER_SCHEME = 4
WINDOW = 256
PREFILL = 512
WARM_UP = 4
UNDISTURBED = 0.8
"""Of a processor a thread, where nothing else runs."""


def demo(
    scheme: Annotated[
        list[str], typer.Option(help="Presets or configuration files; repeat the option, or separate by commas.")
    ] = [f"{UNQUANTIZED},int8,int4,fp8"],  # noqa: B006  (typer reads the default, nobody changes it)
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = "What is a compiler? Answer briefly.",
    tokens: Annotated[int, typer.Option(min=1, max=2048, help="How many tokens each model writes.")] = 64,
    device: DeviceOption = "auto",
    model: ModelOption = None,
    random: RandomOption = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the table here.", show_default=False)
    ] = None,
) -> None:
    """Quantize a language model with each scheme, compile it, let it write, and compare size, speed and quality."""
    with errors_told():
        names = parse_schemes(scheme)
        target = choose_device(device)
        check_model(model, random)
        check_folder(json_path)
        quiet_imports()
        console = Console()
        with Steps(1 + STEPS_PER_SCHEME * len(names)) as steps:
            result = run(load_model(model, random, target, steps), names, prompt, tokens, target, steps)
        show(result, console)
        if json_path is not None:
            json_path.write_text(json.dumps(to_dict(result), indent=1) + "\n")


@dataclass(frozen=True)
class Row:
    """A scheme's results; rates in tokens a second, KL in nats, processors as `Generation` has them."""

    scheme: str
    weight_bytes: int
    quantize_seconds: float
    compile_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_processors: float
    perplexity: float
    kl: float
    top1_agreement: float
    text: str


@dataclass(frozen=True)
class Result:
    """The demonstration's table and what it was measured on."""

    model: str
    device: str
    torch_version: str
    threads: int
    prompt: str
    text_tokens: int
    window: int
    prefill_tokens: int
    decode_tokens: int
    rows: tuple[Row, ...]


def to_dict(result: Result) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(result)


def run(
    language_model: LanguageModel, schemes: Sequence[str], prompt: str, tokens: int, device: torch.device, steps: Steps
) -> Result:
    """Measure each scheme on copies of a model.

    Args:
        schemes: "unquantized", or anything that a configuration can be.
        tokens: to decode after the prompt, at most.
        steps: told of `STEPS_PER_SCHEME` steps a scheme.
    """
    text_ids = language_model.encode(sample_text()).to(device)
    prompt_ids = language_model.encode_prompt(prompt).to(device)
    prefill_ids = text_ids[None, :PREFILL]
    rows = []
    for scheme in schemes:
        rows.append(_row(language_model, scheme, prompt_ids, prefill_ids, text_ids, tokens, steps))
    return Result(
        model=language_model.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        prompt=prompt,
        text_tokens=text_ids.numel(),
        window=WINDOW,
        prefill_tokens=prefill_ids.numel(),
        decode_tokens=tokens,
        rows=tuple(rows),
    )


def _row(
    language_model: LanguageModel,
    scheme: str,
    prompt: torch.Tensor,
    prefill: torch.Tensor,
    text: torch.Tensor,
    tokens: int,
    steps: Steps,
) -> Row:
    original = language_model.model
    quantized = scheme != "unquantized"
    steps.next(f"{scheme}: quantizing" if quantized else f"{scheme}: preparing")
    start = time.perf_counter()
    model = qcompile.quantize_(copy.deepcopy(original), config_of(scheme), progress=False) if quantized else original
    quantize_seconds = time.perf_counter() - start

    steps.next(f"{scheme}: reading a text of {text.numel()} tokens")
    quality = compare(model, original if quantized else None, text, WINDOW)
    prefill_tokens_per_second = prefill_rate(model, prefill)

    steps.next(f"{scheme}: compiling (about a minute)")
    decoder = compiled_decoder(model, prompt.numel() + max(tokens, WARM_UP))
    compile_seconds = decoder.generate(prompt, WARM_UP).first_step

    steps.next(f"{scheme}: writing {tokens} tokens")
    generation = decoder.generate(prompt, tokens, language_model.stop)
    return Row(
        scheme=scheme,
        weight_bytes=weight_bytes(model),
        quantize_seconds=quantize_seconds,
        compile_seconds=compile_seconds,
        prefill_tokens_per_second=prefill_tokens_per_second,
        decode_tokens_per_second=generation.decode_rate,
        decode_processors=generation.processors,
        perplexity=quality.perplexity,
        kl=quality.kl,
        top1_agreement=quality.top1,
        text=language_model.decode(generation.ids),
    )


def show(result: Result, console: Console) -> None:
    """Print what each model wrote, and the table."""
    console.print(f"\n[bold]{escape(result.prompt)}[/]", highlight=False)
    for row in result.rows:
        console.print(f"\n[bold cyan]{escape(row.scheme)}[/]: {escape(row.text.strip())}", highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{result.model} on {result.device}, {result.threads} threads, torch {result.torch_version}",
        caption="Weights of the whole model, embeddings included; below 8 bits the output head has 8. "
        f"Prefill: {result.prefill_tokens} tokens, not compiled. Decode: one token a call, compiled, after a prompt; "
        f"at most {result.decode_tokens} tokens. Perplexity, KL(unquantized || scheme) and agreement of the likeliest "
        f"token: {result.text_tokens} tokens of the essay in the package, in windows of {result.window}.",
    )
    table.add_column("scheme", min_width=len("unquantized"))
    for title in (
        "weights\nMB",
        "prefill\ntok/s",
        "decode\ntok/s",
        "perplexity",
        "KL\nnats",
        "same\ntoken",
        "compile\ns",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.scheme,
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.prefill_tokens_per_second:.0f}",
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
            f"{row.compile_seconds:.0f}",
        )
    console.print()
    console.print(table)
    if slowed := disturbed(result):
        console.print(
            f"Other processes occupied the machine while {', '.join(slowed)} decoded, which makes threads that wait "
            "for each other many times slower: run it again, or beside them with OMP_PROC_BIND=true.",
            style="yellow",
        )


def disturbed(result: Result) -> list[str]:
    """The schemes that had fewer processors than threads while they decoded on a CPU."""
    enough = UNDISTURBED * result.threads
    return [row.scheme for row in result.rows if result.device == "cpu" and row.decode_processors < enough]
