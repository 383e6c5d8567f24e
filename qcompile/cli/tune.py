"""`qcompile tune`: which kernel is fastest for the linears of a model, or for shapes, on the GPU at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console

from qcompile.cli.options import errors_told
from qcompile.cli.shapes import Shape, parse_experts, parse_tokens, shapes_in
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import ConfigError, DeviceError
from qcompile.scheme import Scheme

if TYPE_CHECKING:
    from qcompile.linear_spec import LinearSpec
    from qcompile.runtime.measure import Job

KEEP = 8
"""Tiles that are timed for a linear and a number of tokens."""


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
    with errors_told():
        shapes, rows = shapes_in(what), parse_tokens([tokens])
        if shapes is not None and scheme is None:
            raise ConfigError("shapes need a --scheme, such as int4; `qcompile schemes` lists them")
        if experts is not None and shapes is None:
            raise ConfigError("--experts is for shapes; a model says itself what experts it has")
        mixture = (1, 0) if experts is None else parse_experts(experts)
        device = _a_gpu()
        quiet_imports()
        if shapes is not None and scheme is not None:
            jobs = jobs_of_shapes(shapes, scheme, rows, *mixture)
        else:
            jobs = jobs_of_model(Path(what), scheme, rows, device)
        left = missing(jobs, device)
        console = Console()
        if len(left) < len(jobs):
            console.print(f"{len(jobs) - len(left)} of {len(jobs)} are tuned already", highlight=False)
        with Steps(len(left)) as steps:
            run(left, device, steps, console)


def _a_gpu() -> torch.device:
    """
    Raises:
        DeviceError: there is none.
    """
    if not torch.cuda.is_available():
        raise DeviceError("tune times kernels of GPUs, and torch sees no GPU here; on CPUs there is nothing to tune")
    return torch.device("cuda")


def _one_scheme(config: QuantConfig) -> Scheme:
    """What a configuration makes of a layer of no name.

    Raises:
        ConfigError: a configuration whose answer depends on the name.
    """
    scheme = config.scheme_for("") if len(config.rules) == 1 else None
    if scheme is None:
        raise ConfigError("shapes have no names for rules to match: give --scheme one preset, or a model")
    return scheme


def buckets(tokens: Sequence[int], chosen: int = 1, experts: int = 0) -> list[int]:
    """The buckets of rows that decide the kernels for numbers of tokens.

    Args:
        chosen, experts: how many experts a token chooses, of how many; 0 for linears that are alone.
    """
    from qcompile.runtime import gpu, gpu_grouped

    return sorted({gpu_grouped.rows_bucket(m * chosen, experts) if experts else gpu.bucket(m) for m in tokens})


def jobs_of_shapes(
    shapes: Sequence[Shape], scheme: str, tokens: Sequence[int], chosen: int = 1, experts: int = 0
) -> list[Job]:
    """bfloat16 jobs, those of few tokens first.

    Args:
        chosen, experts: see `buckets`; `shapes` are each expert's.

    Raises:
        ConfigError, LayerError: a scheme that does not exist or does not fit a shape.
    """
    from qcompile.runtime import measure

    parsed = _one_scheme(parse_config(scheme))
    return [
        measure.job(scheme, parsed, shape, m, torch.bfloat16, experts)
        for m in buckets(tokens, chosen, experts)
        for shape in shapes
    ]


def jobs_of_model(path: Path, scheme: str | None, tokens: Sequence[int], device: torch.device) -> list[Job]:
    """A job for each kind of linear that the compiled model has, and each bucket, those of few tokens first.

    Stacks of experts come last.

    Raises:
        CheckpointError, ConfigError, LayerError: a model that cannot be read, or quantized as the scheme says.
    """
    from qcompile.checkpoint.loader import load
    from qcompile.report.explain import linear_specs
    from qcompile.runtime import gpu, measure

    model = load(path, device=device)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    config = None if scheme is None else parse_config(scheme)
    specs = linear_specs(model, ids, config=config, use_cache=False)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    kinds = {replace(spec, epilogue=()): name for name, spec in reversed(specs.items()) if gpu.has_kernel(spec)}
    jobs = [
        measure.Job(name=name, spec=spec, m=m, dtype=dtype) for m in buckets(tokens) for spec, name in kinds.items()
    ]
    return jobs + _jobs_of_experts(model, tokens, dtype)


def _jobs_of_experts(model: torch.nn.Module, tokens: Sequence[int], dtype: torch.dtype) -> list[Job]:
    """
    Raises:
        ConfigError: a configuration that does not say how many experts a token chooses.
    """
    from qcompile.experts import GroupedLinear
    from qcompile.linear_spec import decode_spec
    from qcompile.runtime import gpu, measure

    kinds: dict[tuple[LinearSpec, int], str] = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            spec = replace(decode_spec(module.spec), epilogue=())
            if gpu.has_kernel(spec):
                kinds.setdefault((spec, module.experts), name)
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    if kinds and not isinstance(chosen, int):
        raise ConfigError(
            "the model has experts, and its configuration does not say how many a token chooses "
            "(num_experts_per_tok): time shapes instead, with --experts"
        )
    return [
        measure.Job(name=name, spec=spec, m=m, dtype=dtype, experts=experts)
        for (spec, experts), name in kinds.items()
        for m in buckets(tokens, chosen or 1, experts)
    ]


def run(jobs: Sequence[Job], device: torch.device, steps: Steps, console: Console) -> int:
    """Time the jobs that the user's table lacks, put each result there at once, and print it.

    Returns:
        how many were timed; fewer than there are if the user interrupted.

    Raises:
        OSError: the table cannot be written.
    """
    from qcompile.runtime import gpu, measure, tuning

    target, name = gpu.target_of(device), gpu.name_of(device)
    done = 0
    outcomes = measure.tune_all(jobs, device, keep=KEEP)
    try:
        for job in jobs:
            steps.next(job.title)
            outcome = next(outcomes)
            done += 1
            if outcome.best is not None:
                tuning.record(name, job.like(target), job.m, outcome.best.choice, round(outcome.best.us, 3))
            console.print(outcome.describe(), highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"interrupted after {done} of {len(jobs)}; the same command goes on", highlight=False)
    finally:
        outcomes.close()
    return done


def missing(jobs: Sequence[Job], device: torch.device) -> list[Job]:
    """The jobs that the user's table lacks."""
    from qcompile.runtime import gpu, tuning

    target, name = gpu.target_of(device), gpu.name_of(device)
    return [job for job in jobs if not tuning.is_tuned(job.like(target), job.m, name)]
