"""`qcompile quantize`: a model's weights quantized with calibration, saved for other programs and for qcompile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.calibrate.report import LayerResult
from qcompile.checkpoint.gguf import load_decoded
from qcompile.checkpoint.loader import open_checkpoint
from qcompile.checkpoint.saving import FORMATS, Saved
from qcompile.checkpoint.saving.base import refusal
from qcompile.checkpoint.saving.layers import Layer
from qcompile.checkpoint.saving.save import fits
from qcompile.cli.demo import config_of
from qcompile.cli.steps import Steps
from qcompile.config import QuantConfig, Rule, parse_config
from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate.models import load_tokenizer_of
from qcompile.linears import linear_modules, matrix_of
from qcompile.methods import ROUND, parse_method
from qcompile.quantize import planned
from qcompile.reference import quantize_weight
from qcompile.scheme import ALIASES, PRESETS, Scheme

STEPS = 4


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        layers: what became of those that calibration saw; empty where nothing needed it.
        saved: see `Saved`.
    """

    layers: tuple[LayerResult, ...]
    saved: Saved


def configuration(scheme: str, method: Sequence[str]) -> QuantConfig:
    """What `--scheme` and `--method` say together.

    Args:
        scheme: a preset (below 8 bits the output head gets 8), or a configuration file, which states methods itself.
        method: names of steps; empty for rounding to nearest.

    Raises:
        ConfigError: unknown names, or a method beside a file.
    """
    if not method:
        return config_of(scheme)
    if scheme not in (*PRESETS, *ALIASES):
        parse_config(scheme)
        raise ConfigError(f"--method goes with a preset; state the method in {scheme}, in each rule's scheme")
    chosen = parse_method(list(method))
    rules = []
    for rule in config_of(scheme).rules:
        head = rule.scheme is None or rule.layers != "*"
        rules.append(rule if head else Rule(layers="*", scheme=replace(_scheme(rule), method=chosen)))
    return QuantConfig(tuple(rules))


def _scheme(rule: Rule) -> Scheme:
    assert rule.scheme is not None
    return rule.scheme


def run(
    source: Path,
    output: Path,
    config: QuantConfig,
    calibration: Path | None,
    *,
    samples: int,
    length: int,
    format: str,
    device: torch.device,
    dtype: torch.dtype | None,
    allow_rounding: bool,
    steps: Steps,
) -> Quantized:
    """Load, quantize and save a model. Interrupted, it goes on from `<output>.resume` when it is called again.

    That folder is removed when the model is saved.

    Args:
        source: a folder with a checkpoint that is not quantized, or a GGUF file, whose weights are decoded.
        calibration: a text file; None where no scheme looks at activations.
        samples, length: at most so many sequences of so many tokens are taken from its beginning.
        dtype: to compute in; None for the checkpoint's own, or float32 for GGUF.

    Raises:
        CheckpointError: a model that cannot be read, or is quantized; a format that cannot hold the schemes.
        ConfigError: a calibration file that is missing, or too short.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r} cannot be written; there are {', '.join(FORMATS)}")
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output}: is not empty; name another folder")
    steps.next(f"loading {source}")
    model = _load(source, device, dtype)
    schemes = planned(model, config)
    check_format(model, schemes, format)
    batches = None
    if any(scheme.needs_data for scheme in schemes.values()):
        if calibration is None:
            name, scheme = next((n, s) for n, s in schemes.items() if s.needs_data)
            raise ConfigError(f"{name}: {scheme}, by {scheme.method}, looks at activations: name a text, --calibration")
        steps.next(f"reading {calibration}")
        batches = [batch.to(device) for batch in sequences(source, calibration, samples, length)]
    results: list[LayerResult] = []
    resume = output.with_name(f"{output.name}.resume") if batches is not None else None
    steps.next(f"quantizing {len(schemes)} layers")
    steps.pause()
    qcompile.quantize_(model, config, calibration=batches, resume=resume, report=results.append)
    steps.next(f"writing {output}")
    saved = qcompile.save(model, output, format, allow_rounding=allow_rounding)
    if resume is not None and resume.exists():
        shutil.rmtree(resume)
    return Quantized(tuple(results), saved)


def _load(source: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    if source.suffix == ".gguf":
        model = load_decoded(source, dtype or torch.float32, device)
        model.name_or_path = str(source)  # type: ignore[assignment]
        return model
    if open_checkpoint(source).method is not None:
        raise CheckpointError(f"{source}: is quantized already; take the original, or `qcompile convert` this one")
    return qcompile.load(source, device=device, dtype=dtype, progress=False)


def check_format(model: nn.Module, schemes: dict[str, Scheme], format: str) -> None:
    """Refuse before the work what could not be saved after it.

    Raises:
        CheckpointError: naming a layer, the reason, and formats that hold it.
    """
    modules, known = linear_modules(model), set()
    for name, scheme in schemes.items():
        n, k = matrix_of(modules[name]).shape
        if (scheme, n, k) in known:
            continue
        known.add((scheme, n, k))
        zeros = partial(torch.zeros, n, k)
        static = scheme.activation is not None and not scheme.activation.dynamic
        layer = Layer(
            name=name,
            scheme=replace(scheme, method=ROUND),
            shape=(n, k),
            dtype=torch.float32,
            weight=lambda zeros=zeros, weight=scheme.weight: quantize_weight(zeros(), weight),  # type: ignore[misc]
            bias=None,
            input_scale=torch.ones(()) if static else None,
            pre_quant_scale=None,
        )
        if scheme.weight.act_order or fits(layer, format):  # sorted columns are there after the work
            continue
        raise refusal(layer, format, "of its scheme or shape", [f for f in FORMATS if fits(layer, f)])


def sequences(source: Path, text: Path, samples: int, length: int) -> list[Tensor]:
    """The beginning of a text as token ids [1, length] each, by a model's tokenizer; the last may be shorter.

    Raises:
        ConfigError: a text that cannot be read, or is empty.
        CheckpointError: a model without a tokenizer.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {text}: cannot be read as text ({error})") from None
    ids = torch.tensor(load_tokenizer_of(source).encode(content, add_special_tokens=False), dtype=torch.int64)
    if ids.numel() < 2:
        raise ConfigError(f"--calibration {text}: holds {ids.numel()} tokens; name a text of some thousand words")
    return [part[None] for part in ids[: samples * length].split(length)]


def show(done: Quantized, console: Console) -> None:
    """Print each layer's error, worst first, and the files."""
    if done.layers:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title, justify in (("layer", "left"), ("scheme", "left"), ("method", "left"), ("error", "right")):
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        table.add_column("note", overflow="fold")
        for layer in sorted(done.layers, key=lambda result: -(result.error or 0.0)):
            note = f"not folded: {layer.declined}" if layer.declined else ""
            error = "" if layer.error is None else f"{layer.error:.1e}"
            table.add_row(escape(layer.name), layer.scheme, layer.method, error, escape(note))
        console.print(table)
    for entry in done.saved.rounded:
        console.print(f"{escape(entry.layer)}: {entry.what} rounded to {entry.dtype}, by {entry.error:.1e} at most")
    for file in done.saved.files:
        console.print(f"{escape(str(file))}  {file.stat().st_size / 1e6:,.2f} MB", highlight=False, soft_wrap=True)
