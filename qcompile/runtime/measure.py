"""Timing the choices for a linear on the GPU at hand: what fills the tables of `tuning`.

A choice counts if its kernel compiles without spilling registers, if its product is within `LIMIT` of float64's, and,
for the fastest, if many launches give the same bits. Weights come from memory, not from the cache: each call takes the
next of several copies. Times are those of a call in a CUDA graph.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.pool
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.spec import GroupedSpec, KernelSpec, Tile, decode_kernel_spec
from qcompile.flags import flags
from qcompile.layouts import LAYOUTS, choose_layout, to_layout
from qcompile.linear_spec import LinearSpec, decode_spec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize, dequantize_activation, leave_two_of_four, quantize_activation
from qcompile.runtime import cache, clock, gpu, gpu_grouped
from qcompile.runtime.tuning import Choice, Chosen, any_kernel, chosen, is_tuned, options, record, show
from qcompile.scheme import SCALE_DTYPES, Scheme, WeightScheme
from qcompile.stacks import expert, padded_rows, stack_layout, stacked_scheme

LIMIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-12}
"""Greatest |y - y'| / |y'| (Frobenius) by the output's type: twice the most that one rounding to it errs, and the sum;
float32 products are made of 16-bit or TF32 ones."""

LAUNCHES = 50
"""Launches of the fastest choice whose bits are compared."""

CHECKED = 64
"""Rows at either end of a product that are compared with float64."""

COMPILE_SECONDS = 120.0
"""A kernel that takes longer to compile is dropped."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A linear and a bucket of M to choose for.

    Attributes:
        name: what reports call it.
        dtype: of the activations before they are quantized, and of the output.
        experts: of a stack, of which `spec` is one and whose bucket of rows is `m`; 0 for a linear that is alone.
    """

    name: str
    spec: LinearSpec
    m: int
    dtype: torch.dtype
    experts: int = 0

    @property
    def title(self) -> str:
        """For reports."""
        (n, k), stack = self.spec.shape, f"{self.experts} experts " if self.experts else ""
        return f"{self.name} {stack}{n} x {k} M={self.m}"

    def like(self, target: str) -> KernelSpec:
        """See `tuning.any_kernel`."""
        activation = self.spec.scheme.activation
        x_dtype = self.dtype if activation is None else activation.dtype
        return any_kernel(self.spec, x_dtype, self.dtype, target, self.experts)


def job(name: str, scheme: Scheme, shape: tuple[int, int], m: int, dtype: torch.dtype, experts: int = 0) -> Job:
    """The job of a linear [N, K], or of a stack of such experts, with the layout that it has on GPUs.

    Raises:
        LayerError: a scheme whose groups do not divide K.
    """
    fitted = scheme.fit(name, shape)
    if experts:
        fitted = replace(fitted, weight=stacked_scheme(fitted.weight, shape[0]))
    layout = (stack_layout if experts else choose_layout)(fitted, shape, "cuda").name
    spec = LinearSpec(in_features=shape[1], out_features=shape[0], scheme=fitted, layout=layout)
    return Job(name=name, spec=spec, m=m, dtype=dtype, experts=experts)


@dataclass(frozen=True)
class Timing:
    """What became of a choice: its microseconds, or in a note why it does not count."""

    choice: Choice
    us: float = math.inf
    error: float = 0.0
    note: str = ""


@dataclass
class Problem:
    """Random tensors for a job; see `gpu.gemm` and, of a stack of experts, which has `offsets`, `grouped_gemm`."""

    x: Tensor
    x_scale: Tensor | None
    weight: PackedWeight
    offsets: Tensor | None
    expected: Tensor | None

    def call(self, what: Chosen, weight: PackedWeight, spec: LinearSpec, wrap: Callable[[Any], Any]) -> Tensor:
        """The product by a copy of the weight."""
        if self.offsets is not None:
            return gpu_grouped.execute(what, self.x, self.x_scale, self.offsets, weight, None, spec, wrap)
        return gpu.execute(what, self.x, self.x_scale, weight, None, [], spec, wrap)


def random_weight(scheme: WeightScheme, shape: tuple[int, int], device: str) -> PackedWeight:
    """A weight in the logical layout with finite codes of every kind, each row's scales its own."""
    n, k = shape
    values = scheme.format.decode(torch.arange(2**scheme.format.bits, dtype=torch.int32))
    assert isinstance(values, Tensor)
    finite = torch.arange(len(values), dtype=torch.uint8)[values.isfinite()].to(device)
    codes = finite[torch.randint(len(finite), (min(n, 1024), k), device=device)].repeat(-(-n // 1024), 1)[:n]
    if scheme.sparsity is not None:
        kept = leave_two_of_four(torch.rand(n, k, device=device), scheme) > 0
        codes = torch.where(kept, codes, scheme.zero_code)
    blocks = scheme.granularity.scale_shape(shape)
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    integer = not dtype.is_floating_point

    def scales(shape: tuple[int, ...], least: float, most: float, dtype: torch.dtype) -> Tensor:
        return (torch.rand(shape, device=device) * (most - least) + least).to(dtype)

    least = 16.0 if integer else 0.5 / scheme.format.absmax
    given: dict[str, Any] = {"offset": scales(blocks, least, 3 * least, dtype)}
    if scheme.super_scale is not None:
        above = (n, scheme.super_scale.count(k))
        unit = 1 / (32 * scheme.format.absmax) if integer else 1.0
        for name in ("super_scale", "super_offset"):
            given[name] = scales(above, 0.5 * unit, 1.5 * unit, SCALE_DTYPES[scheme.super_scale.dtype])
    fields = {name: tensor for name, tensor in given.items() if name in scheme.fields}
    zero = None
    if "zero_point" in scheme.fields:
        zero = torch.randint(2**scheme.format.bits, blocks, device=device).to(torch.uint8)
    perm = torch.arange(k, dtype=torch.int32, device=device) if "perm" in scheme.fields else None
    return PackedWeight.from_codes(codes, scales(blocks, least, 3 * least, dtype), zero, scheme, perm=perm, **fields)


def problem(given: Job, device: str) -> Problem:
    """Random tensors; on the device "meta" without values, and without what is expected.

    For a stack of experts, 2 M tokens choose a quarter of them each.
    """
    spec, activation, experts = given.spec, given.spec.scheme.activation, given.experts
    chosen = max(1, experts // 4)
    rows = 2 * given.m * chosen if experts else given.m
    offsets = routed(2 * given.m, chosen, experts, device) if experts else None
    weight = random_stack(given, device) if experts else random_weight(spec.scheme.weight, spec.shape, device)
    x, x_scale = torch.randn(rows, spec.in_features, device=device).to(given.dtype), None
    inputs = x
    if activation is not None:
        static = None if activation.dynamic else torch.full((), 4 / activation.format.absmax, device=device)
        x, x_scale = quantize_activation(x, activation, static)
        inputs = dequantize_activation(x, x_scale, activation)
    expected = None
    if device != "meta":
        if offsets is None:
            expected = ends(inputs).double() @ dequantize(weight).double().t()
        else:
            expected = grouped_product(ends(inputs), ends(experts_of(offsets, rows)), weight, spec.out_features)
    return Problem(x, x_scale, to_layout(weight, LAYOUTS[spec.layout]), offsets, expected)


def random_stack(given: Job, device: str) -> PackedWeight:
    """`random_weight` of all experts of a job."""
    n, k = given.spec.shape
    return random_weight(given.spec.scheme.weight, (given.experts * padded_rows(n), k), device)


def routed(tokens: int, chosen: int, experts: int, device: str) -> Tensor:
    """Where each expert's rows begin, and the last end, if every token chooses some at random: int32 [experts + 1]."""
    ids = torch.rand(tokens, experts, device=device).topk(chosen).indices.flatten().sort().values
    return torch.searchsorted(ids, torch.arange(experts + 1, device=device), out_int32=True)


def experts_of(offsets: Tensor, rows: int) -> Tensor:
    """The expert of each row, the inverse of `routed`: int64 [rows]."""
    return torch.searchsorted(offsets[1:].long(), torch.arange(rows, device=offsets.device), right=True)


def grouped_product(rows: Tensor, expert_ids: Tensor, weight: PackedWeight, out_features: int) -> Tensor:
    """Rows [S, K], each times the weight of its expert in a stack in the logical layout, in float64: [S, N]."""
    y = rows.new_empty((len(rows), out_features), dtype=torch.float64)
    for index in expert_ids.unique().tolist():
        own = expert_ids == index
        y[own] = rows[own].double() @ dequantize(expert(weight, index, out_features)).double().t()
    return y


def ends(rows: Tensor) -> Tensor:
    """The first and the last `CHECKED` rows."""
    return rows if len(rows) <= 2 * CHECKED else torch.cat([rows[:CHECKED], rows[-CHECKED:]])


class _CompileOnly:
    """Stands for a Triton function; launching it compiles it for the launch's arguments."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.function.warmup(*args, grid=grid, **options)


class _Observed:
    """Stands for a Triton function and keeps what its launch returns, the compiled kernel."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: Any = None

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.compiled = self.function[grid](*args, **options)
            return self.compiled

        return launch


def compile_kernel(kernel: KernelSpec, spec: LinearSpec) -> None:
    """Compile a kernel for the current GPU into Triton's cache on disk, where its first launch finds it."""
    activation = spec.scheme.activation
    dtype = getattr(torch, kernel.out_dtype if activation is not None else kernel.x_dtype)
    experts = kernel.experts if isinstance(kernel, GroupedSpec) else 0
    shapes = problem(Job(name="", spec=spec, m=16, dtype=dtype, experts=experts), "meta")
    function, out_dtype = _CompileOnly(cache.load(kernel).kernel), getattr(torch, kernel.out_dtype)
    if isinstance(kernel, GroupedSpec):
        assert shapes.offsets is not None
        given = shapes.x, shapes.x_scale, shapes.offsets, shapes.weight, None
        gpu_grouped.launch(kernel, function, *given, out_dtype)
    else:
        gpu.launch(kernel, function, shapes.x, shapes.x_scale, shapes.weight, None, [], out_dtype)


def _compile_encoded(kernel: str, spec: str, cache_dir: str) -> str:
    """`compile_kernel` in a process of its own: "" or what went wrong."""
    flags.cache_dir = Path(cache_dir)
    given = decode_kernel_spec(kernel)
    assert isinstance(given, KernelSpec)
    try:
        compile_kernel(given, decode_spec(spec))
    except Exception as error:  # a compiler's error of any kind is the result
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


class Compilers:
    """Processes that compile kernels; one that crashes or takes too long is replaced, and its kernel is dropped."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._closed = False
        self._processes: list[multiprocessing.pool.Pool] = []

    def submit(self, kernel: KernelSpec, spec: LinearSpec) -> Future[str]:
        """A future of "", or of the reason why the kernel does not compile."""
        return self._threads.submit(self._compile, kernel.encode(), spec.encode(), str(flags.cache_dir))

    def _compile(self, *args: str) -> str:
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = multiprocessing.get_context("spawn").Pool(1, _ignore_interrupts)
            self._processes.append(process)
        result, begun = process.apply_async(_compile_encoded, args), time.monotonic()
        while not result.ready():
            if self._closed or time.monotonic() - begun > COMPILE_SECONDS:
                process.terminate()
                self._own.process = None
                return f"not compiled within {COMPILE_SECONDS:.0f} s"
            result.wait(0.1)
        note: str = result.get()
        return note

    def close(self) -> None:
        """End all processes; what is not compiled yet stays so."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.terminate()


@contextmanager
def compilers(workers: int) -> Iterator[Compilers]:
    """`Compilers` for the duration of a block."""
    running = Compilers(workers)
    try:
        yield running
    finally:
        running.close()


class Bench:
    """A job's tensors on the GPU, on which its choices are timed."""

    def __init__(self, given: Job, device: torch.device) -> None:
        self.job = given
        self.like = given.like(gpu.target_of(device))
        self.problem = problem(given, str(device))
        size = self.problem.weight.nbytes
        self.copies = [
            self.problem.weight.map(lambda _, t: t.clone()) for _ in range(max(2, -(-clock.COLD_BYTES // size)))
        ]

    def call(self, what: Chosen, weight: PackedWeight, wrap: Callable[[Any], Any] = lambda f: f) -> Tensor:
        """The product."""
        return self.problem.call(what, weight, self.job.spec, wrap)

    def time(self, choice: Choice) -> Timing:
        """Run, check and time a choice."""
        what = chosen(choice, self.like, self.job.m, "")
        observed: list[_Observed] = []

        def observe(function: Any) -> _Observed:
            observed.append(_Observed(function))
            return observed[-1]

        try:
            y = self.call(what, self.copies[0], observe)
            expected = self.problem.expected
            assert expected is not None
            error = float((ends(y).double() - expected).norm() / expected.norm())
            spills = sum(getattr(each.compiled, "n_spills", 0) or 0 for each in observed)
            if spills:
                return Timing(choice, error=error, note=f"spills {spills} registers")
            if not error <= LIMIT[self.job.dtype]:
                return Timing(choice, error=error, note=f"wrong: error {error:.2g}")
            calls: list[Callable[[], Tensor]] = [lambda w=w: self.call(what, w) for w in self.copies]  # type: ignore[misc]
            us = statistics.median(clock.times_in_graph(calls))
        except Exception as failure:  # a compiler's or driver's error of any kind is the result
            return Timing(choice, note=f"{type(failure).__name__}: {failure}"[:500])
        return Timing(choice, us, error)

    def repeats(self, choice: Choice) -> bool:
        """Whether `LAUNCHES` launches give the same bits."""
        what = chosen(choice, self.like, self.job.m, "")
        first = self.call(what, self.copies[0]).view(torch.uint8)
        return all(torch.equal(self.call(what, self.copies[0]).view(torch.uint8), first) for _ in range(LAUNCHES))


@dataclass(frozen=True)
class Outcome:
    """A job's fastest choice that counts, None if none does, and what became of each."""

    job: Job
    best: Timing | None
    timings: tuple[Timing, ...]

    def describe(self) -> str:
        """One line, and one for each choice that was dropped."""
        head = f"{self.job.title}: "
        head += "nothing counts" if self.best is None else f"{self.best.us:.2f} us, {show(self.best.choice)}"
        return "\n".join([head, *(f"  dropped {show(t.choice)}: {t.note}" for t in self.timings if t.note)])


def measure(given: Job, choices: Iterable[Choice], device: torch.device) -> Outcome:
    """Time choices for a job, one after another."""
    with torch.no_grad():
        bench = Bench(given, device)
        timings = [bench.time(choice) for choice in choices]
        for best in sorted((t for t in timings if not t.note), key=lambda t: t.us):
            if bench.repeats(best.choice):
                return Outcome(given, best, tuple(timings))
            timings[timings.index(best)] = replace(best, note="launches differ")
    return Outcome(given, None, tuple(timings))


def tune(given: Job, device: torch.device, keep: int = 5) -> Outcome | None:
    """Time the shortlist of a job here and now, and put the fastest into the user's table; None if that has the job.

    Raises:
        OSError: the table cannot be written.
    """
    target, name = gpu.target_of(device), gpu.name_of(device)
    like = given.like(target)
    if is_tuned(like, given.m, name):
        return None
    outcome = measure(given, shortlist(given, target, keep), device)
    if outcome.best is not None:
        record(name, like, given.m, outcome.best.choice, round(outcome.best.us, 3))
    return outcome


def shortlist(given: Job, target: str, keep: int) -> list[Choice]:
    """The `keep` tiles that are predicted fastest, and every path of torch's that takes the product."""
    legal = options(given.like(target), given.m)
    tiles = [choice for choice in legal if isinstance(choice, Tile)][:keep]
    return [choice for choice in legal if isinstance(choice, str) or choice in tiles]


def tune_all(
    jobs: Sequence[Job],
    device: torch.device,
    *,
    keep: int,
    workers: int | None = None,
    seconds: float = math.inf,
) -> Generator[Outcome, None, None]:
    """Time the shortlists of jobs in their order, while other processes compile the kernels of later ones.

    Args:
        keep: see `shortlist`.
        workers: processes; by default one less than there are processors.
        seconds: no job is begun after as many.
    """
    begun = time.monotonic()
    target = gpu.target_of(device)
    with compilers(workers or max(1, (os.cpu_count() or 2) - 1)) as running:
        waiting: list[list[tuple[Choice, Future[str] | None]]] = []
        for each in jobs:
            like = each.like(target)
            waiting.append(
                [
                    (c, None if isinstance(c, str) else running.submit(replace(like, tile=c), each.spec))
                    for c in shortlist(each, target, keep)
                ]
            )
        for each, compiling in zip(jobs, waiting, strict=True):
            if time.monotonic() - begun > seconds:
                return
            notes = [(choice, "" if future is None else future.result()) for choice, future in compiling]
            outcome = measure(each, [choice for choice, note in notes if not note], device)
            dropped = tuple(Timing(choice, note=note) for choice, note in notes if note)
            yield replace(outcome, timings=outcome.timings + dropped)


def to_lines(outcome: Outcome) -> str:
    """All timings of an outcome, a JSON object a line."""
    n, k = outcome.job.spec.shape
    head = {"scheme": outcome.job.name, "N": n, "K": k, "M": outcome.job.m, "experts": outcome.job.experts}
    rows = [
        head
        | {"choice": t.choice if isinstance(t.choice, str) else vars(t.choice)}
        | ({"note": t.note} if t.note else {"us": round(t.us, 3), "error": float(f"{t.error:.3g}")})
        for t in outcome.timings
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
