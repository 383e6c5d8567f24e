"""`qcompile quantize`: a model's weights quantized with calibration, saved for other programs and for qcompile."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.calibrate.assign import Chosen, check_name, label, solver
from qcompile.calibrate.report import LayerResult
from qcompile.calibrate.stream import Waiting, find_stacks
from qcompile.checkpoint.gguf import load_decoded
from qcompile.checkpoint.imatrix import read_imatrix
from qcompile.checkpoint.loader import load_pending
from qcompile.checkpoint.saving import FORMATS, Saved
from qcompile.checkpoint.saving.base import refusal
from qcompile.checkpoint.saving.save import check_writable, formats_for, layer_like, objection, with_stored_scales
from qcompile.cli.options import DeviceOption, choose_device, config_of, errors_told, float_dtype, parse_schemes
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import AUTO, Auto, QuantConfig, Rule
from qcompile.errors import CheckpointError, ConfigError, suggestion
from qcompile.evaluate.models import load_tokenizer_of
from qcompile.experts import expert_modules
from qcompile.linears import linear_modules, shape_of
from qcompile.methods import parse_method
from qcompile.presets import ALIASES, PRESETS
from qcompile.quantize import planned, quantize_waiting, sensitivities_beside
from qcompile.scheme import Scheme

STEPS = 4


def quantize(
    model: Annotated[Path, typer.Argument(help="A folder with a checkpoint, or a GGUF file to decode.")],
    output: Annotated[Path | None, typer.Option(help="The folder to write.", show_default=False)] = None,
    scheme: Annotated[str, typer.Option(help="A preset, a configuration file, or auto: a scheme for each layer.")] = (
        "int4"
    ),
    method: Annotated[
        str,
        typer.Option(help="rtn, importance, hqq, gptq, awq, smoothquant, hadamard, or several: smoothquant,gptq."),
    ] = "rtn",
    calibration: Annotated[
        Path | None, typer.Option(help="A text, for methods and scales that look at activations.", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's importance matrix (GGUF), instead of a text, for method importance.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of calibration text, at most.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, awq, bitsandbytes or gguf.")] = (
        "compressed-tensors"
    ),
    dtype: Annotated[
        str | None,
        typer.Option(help="To compute in; by default the checkpoint's own.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    bits: Annotated[
        float | None, typer.Option(help="For auto: stored bits a weight, at most.", show_default=False)
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="For auto: bytes of packed weights, at most.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="For auto: KL divergence in nats, at most; least size.", show_default=False)
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="For auto: presets, separated by commas.", show_default=False)
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(
            help="For auto: write what was chosen here, .yaml or .json; without --output only that.", show_default=False
        ),
    ] = None,
    allow_rounding: Annotated[bool, typer.Option("--allow-rounding", help="Round scales, and say how far.")] = False,
) -> None:
    """Quantize a model, block by block, and save it. An interrupted run goes on when the command is given again."""
    with errors_told():
        target = choose_device(device)
        kept = None if dtype is None else float_dtype(dtype)
        quiet_imports()
        names = [name.strip() for name in method.split(",")]
        methods = [] if names == ["rtn"] else names
        if imatrix is not None:
            if methods not in ([], ["importance"]) or calibration is not None or scheme == AUTO:
                raise ConfigError("--imatrix is for method importance alone, without --calibration, and not for auto")
            methods = ["importance"]
        budget = {"bits": bits, "bytes": max_bytes, "kl": max_kl}
        given = {name: value for name, value in budget.items() if value is not None}
        if output is None and write_config is None:
            raise ConfigError("name a folder to write, --output, or with --scheme auto a file, --write-config")
        if scheme == AUTO:
            listed = [] if candidates is None else parse_schemes([candidates])
            config = auto_configuration(given, methods, listed, None if output is None else format)
        else:
            config = configuration(scheme, methods, format)
        if not config.undecided and (given or candidates is not None or write_config is not None):
            raise ConfigError("--bits, --max-bytes, --max-kl, --candidates and --write-config go with --scheme auto")
        with Steps(STEPS + config.undecided) as steps, warnings.catch_warnings():
            if allow_rounding:
                warnings.simplefilter("ignore", UserWarning)  # the table says it
            done = run(
                model,
                output,
                config,
                calibration,
                samples=samples,
                length=length,
                format=format,
                device=target,
                dtype=kept,
                allow_rounding=allow_rounding,
                steps=steps,
                write_config=write_config,
                imatrix=imatrix,
            )
        show(done, Console())


@dataclass(frozen=True)
class Quantized:
    """What was done.

    Attributes:
        layers: what became of those that calibration saw; empty where nothing needed it.
        saved: see `Saved`; None if only a configuration was asked for.
        chosen: where scheme auto was asked for.
    """

    layers: tuple[LayerResult, ...]
    saved: Saved | None
    chosen: Chosen | None = None


def configuration(scheme: str, method: Sequence[str], format: str = "compressed-tensors") -> QuantConfig:
    """What `--scheme` and `--method` say together.

    Args:
        scheme: a preset (below 8 bits the output head gets 8, or none where `format` has no place for them), or a
            configuration file, which states methods itself.
        method: names of steps; empty for rounding to nearest.
        format: to save in; a preset's scales are of the type that it stores.

    Raises:
        ConfigError: unknown names, or a method beside a file.
    """
    config = config_of(scheme)
    if scheme not in (*PRESETS, *ALIASES):
        if method:
            raise ConfigError(f"--method goes with a preset; state the method in {scheme}, in each rule's scheme")
        return config
    chosen = parse_method(list(method)) if method else None
    rules = []
    for rule in config.rules:
        if rule.layers != "*":
            rules.append(replace(rule, scheme=_head(_scheme(rule), format)))
            continue
        stored = with_stored_scales(_scheme(rule), format)
        rules.append(replace(rule, scheme=stored if chosen is None else replace(stored, method=chosen)))
    return QuantConfig(tuple(rules))


def _head(scheme: Scheme, format: str) -> Scheme | None:
    """The scheme of an output head as a format stores it; None, which leaves it as it was, without a place for it."""
    stored = with_stored_scales(scheme, format)
    return stored if format in formats_for(stored) else None


def auto_configuration(
    budget: Mapping[str, float], method: Sequence[str], candidates: Sequence[str], format: str | None
) -> QuantConfig:
    """What `--scheme auto` and its options say together; an output head called `lm_head` gets 8 bits, or stays.

    Args:
        budget: `bits`, `bytes` or `kl`; exactly one.
        candidates: presets; empty for the usual ones, of which those that `format` cannot hold are left out.
        format: to save in; None if nothing is saved.

    Raises:
        ConfigError: unknown names; none or several budgets.
    """
    auto: dict[str, Any] = {"preset": AUTO, **budget}
    if method:
        auto["method"] = list(method)
    if candidates:
        auto["candidates"] = list(candidates)
    parsed = Auto.from_dict(auto)
    if not candidates and format is not None:
        parsed = replace(parsed, candidates=tuple(s for s in parsed.candidates if format in formats_for(s)))
    head = _head(PRESETS["int8_weight_only"], format or "compressed-tensors")
    return QuantConfig((Rule(layers="lm_head", scheme=head, optional=True), Rule(layers="*", scheme=parsed)))


def _scheme(rule: Rule) -> Scheme:
    assert isinstance(rule.scheme, Scheme)
    return rule.scheme


def run(
    source: Path,
    output: Path | None,
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
    write_config: Path | None = None,
    imatrix: Path | None = None,
) -> Quantized:
    """Load, quantize and save a model. Interrupted, it goes on from `<output>.resume` when it is called again.

    That folder is removed when the model is saved. Blocks of a checkpoint are read when their turn comes: the peak of
    memory is the result and one block.

    Args:
        source: a folder with a checkpoint that is not quantized, or a GGUF file, whose weights are decoded.
        output: None to choose schemes only.
        calibration: a text file; None where no scheme looks at activations.
        samples, length: at most so many sequences of so many tokens are taken from its beginning.
        dtype: to compute in; None for the checkpoint's own, or float32 for GGUF.
        write_config: where the configuration goes that scheme auto chooses.
        imatrix: an importance matrix of llama.cpp's, in place of `calibration`.

    Raises:
        CheckpointError: a model that cannot be read, or is quantized; a format that cannot hold the schemes.
        ConfigError: a calibration file that is missing, or too short.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r} cannot be written; {suggestion(format, FORMATS)}")
    if output is not None:
        check_writable(output)
        if output.exists() and any(output.iterdir()):
            raise CheckpointError(f"{output}: is not empty; name another folder")
    if config.undecided:
        solver()  # before the model is read
    if config.undecided and calibration is None:
        raise ConfigError("scheme auto measures what each layer's quantization changes: name a text, --calibration")
    if write_config is not None:
        check_name(write_config)
    steps.next(f"loading {source}")
    model, waiting = _load(source, device, dtype)
    resume = None if output is None else output.with_name(f"{output.name}.resume")
    batches, chosen = None, None
    if config.undecided:
        assert calibration is not None
        if waiting is not None:  # the whole model is run
            for block in list(waiting.blocks):
                waiting.fill(block)
        for each in each_candidate(config) if output is not None else ():
            check_format(model, planned(model, each), format)
        steps.next(f"reading {calibration}")
        batches = [batch.to(device) for batch in sequences(source, calibration, samples, length)]
        steps.next("measuring how much each layer matters")
        steps.pause()
        beside = resume or (None if write_config is None else write_config.with_suffix(".resume"))
        keep = None if beside is None else sensitivities_beside(beside)
        chosen = qcompile.choose_schemes(model, config, batches, keep=keep)
        config = chosen.config
        if write_config is not None:
            chosen.write(write_config)
        if output is None:
            if keep is not None:
                keep.unlink(missing_ok=True)
            return Quantized((), None, chosen)
    assert output is not None
    assert resume is not None
    schemes = planned(model, config)
    check_format(model, schemes, format)
    importance = None
    if imatrix is not None:
        steps.next(f"reading {imatrix}")
        importance = read_imatrix(imatrix, getattr(model, "config", None), schemes)
    elif any(scheme.needs_data for scheme in schemes.values()) and batches is None:
        if calibration is None:
            name, scheme = next((n, s) for n, s in schemes.items() if s.needs_data)
            raise ConfigError(f"{name}: {scheme}, by {scheme.method}, looks at activations: name a text, --calibration")
        steps.next(f"reading {calibration}")
        batches = [batch.to(device) for batch in sequences(source, calibration, samples, length)]
    results: list[LayerResult] = []
    steps.next(f"quantizing {len(schemes)} layers")
    steps.pause()
    kept = resume if batches is not None else None
    quantize_waiting(
        model, config, waiting, calibration=batches, importance=importance, resume=kept, report=results.append
    )
    steps.next(f"writing {output}")
    saved = qcompile.save(model, output, format, allow_rounding=allow_rounding)
    if resume.exists():
        shutil.rmtree(resume)
    sensitivities_beside(resume).unlink(missing_ok=True)
    return Quantized(tuple(results), saved, chosen)


def each_candidate(config: QuantConfig) -> Iterator[QuantConfig]:
    """Configurations in which one candidate takes the place of scheme auto, for each of them."""
    autos = [rule.scheme for rule in config.rules if isinstance(rule.scheme, Auto)]
    for scheme in autos[0].schemes:
        yield QuantConfig(
            tuple(replace(r, scheme=scheme) if isinstance(r.scheme, Auto) else r for r in config.rules), config.kv_cache
        )


def _load(source: Path, device: torch.device, dtype: torch.dtype | None) -> tuple[nn.Module, Waiting | None]:
    """A model, and its blocks that are read from the files when they are quantized."""
    if source.suffix == ".gguf":
        model = load_decoded(source, dtype or torch.float32, device)
        model.name_or_path = str(source)  # type: ignore[assignment]
        return model, None
    return load_pending(source, _blocks, device, dtype)


def _blocks(model: nn.Module) -> list[str]:
    return [name for names in find_stacks(model, [*linear_modules(model), *expert_modules(model)]) for name in names]


def check_format(model: nn.Module, schemes: dict[str, Scheme], format: str) -> None:
    """Refuse before the work what could not be saved after it.

    Raises:
        CheckpointError: naming a layer, the reason, and formats that hold it.
    """
    modules, kinds = linear_modules(model), {}
    for name, scheme in schemes.items():
        shape = shape_of(modules[name])
        if (scheme, shape) not in kinds:
            kinds[scheme, shape] = layer_like(name, scheme, shape)
    layers = list(kinds.values())
    for layer in layers:
        reason = objection(layer, format, layers)
        if layer.scheme.weight.act_order or reason is None:  # sorted columns are there after the work
            continue
        raise refusal(layer, format, reason, [f for f in FORMATS if objection(layer, f, layers) is None])


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
    """Print what was chosen, each layer's error, worst first, and the files."""
    if done.chosen is not None:
        _show_chosen(done.chosen, console)
    if done.layers:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title, justify in (("layer", "left"), ("scheme", "left"), ("method", "left"), ("error", "right")):
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        table.add_column("note", overflow="fold")
        for layer in sorted(done.layers, key=lambda result: -(result.error or 0.0)):
            note = "; ".join(filter(None, (f"not folded: {layer.declined}" if layer.declined else "", layer.note)))
            error = "" if layer.error is None else f"{layer.error:.1e}"
            table.add_row(escape(layer.name), layer.scheme, layer.method, error, escape(note))
        console.print(table)
    for entry in done.saved.rounded if done.saved is not None else ():
        console.print(f"{escape(entry.layer)}: {entry.what} rounded to {entry.dtype}, by {entry.error:.1e} at most")
    for file in done.saved.files if done.saved is not None else ():
        console.print(f"{escape(str(file))}  {file.stat().st_size / 1e6:,.2f} MB", highlight=False, soft_wrap=True)


def _show_chosen(chosen: Chosen, console: Console) -> None:
    """How many layers and weights each candidate got."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("chosen", "left"), ("groups of layers", "right"), ("MB", "right"), ("KL", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for index, scheme in enumerate(chosen.choices[0].schemes):
        own = [choice for choice in chosen.choices if choice.chosen == index]
        size, kl = sum(c.nbytes[index] for c in own), sum(c.kl[index] for c in own)
        table.add_row(label(scheme), str(len(own)), f"{size / 1e6:,.2f}", f"{kl:.2g}")
    table.add_row(
        f"{chosen.bits:.3f} bits a weight", str(len(chosen.choices)), f"{chosen.nbytes / 1e6:,.2f}", f"{chosen.kl:.2g}"
    )
    console.print(table)
