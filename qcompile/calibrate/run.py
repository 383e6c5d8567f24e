"""Calibrating a model: blocks in their order, each observed, folded, quantized, and run for the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibrate.awq import awq_scales
from qcompile.calibrate.codes import choose_codes
from qcompile.calibrate.experts import ExpertStatistics, watched
from qcompile.calibrate.folds import Site, groups, owners_of, site
from qcompile.calibrate.gptq import hessian_error
from qcompile.calibrate.observers import Observed
from qcompile.calibrate.report import LayerResult
from qcompile.calibrate.resume import Progress
from qcompile.calibrate.rotate import rotate_
from qcompile.calibrate.rotate_heads import rotate_heads_
from qcompile.calibrate.smoothquant import smooth_scales
from qcompile.calibrate.statistics import Collector, InputStatistics, observed
from qcompile.calibrate.stream import (
    Batch,
    Call,
    NotAStack,
    Stack,
    Waiting,
    as_batches,
    call_of,
    find_stacks,
    record,
    run_whole,
    without_cache,
)
from qcompile.calibrate.trace import Illegal, LinearNode, Trace, trace_block
from qcompile.errors import CalibrationError, ConfigError
from qcompile.experts import expert_modules, quantize_experts
from qcompile.linears import linear_modules, matrix_of, quantized_linear
from qcompile.methods import AWQ, Rotation, SmoothQuant
from qcompile.packed import PackedWeight
from qcompile.progress import Bar
from qcompile.reference import dequantize
from qcompile.scheme import Scheme

Run = Callable[[], Iterable[object]]
"""Runs some modules on every batch, handing over control after each."""


def calibrate_(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    calibration: Iterable[Any],
    *,
    mixtures: Mapping[str, Scheme] | None = None,
    waiting: Waiting | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    report: Callable[[LayerResult], None] | None = None,
) -> None:
    """Quantize linear layers and experts in place with a look at their inputs; see `qcompile.quantize_`.

    Blocks of a decoder are taken one after another, each on what those before it, quantized already, make of all
    batches. Where a model's blocks cannot be run apart, its layers are observed while all of it runs.

    Args:
        schemes: of `linear_modules`, by name, fitted to their shapes.
        calibration: batches, see `as_batches`.
        mixtures: of `expert_modules`, by name.
        waiting: blocks that are not in memory yet. A rotation, or blocks that cannot be run apart, need them all.
        resume: a folder for what is done, from which an interrupted call goes on. It stays.
        report: told of each layer.

    Raises:
        CalibrationError: batches that do not show what a method needs.
        LayerError: a layer that cannot be quantized so.
    """
    batches = as_batches(calibration)
    mixtures = mixtures or {}
    done = Progress(resume, model, schemes, mixtures, batches, waiting)
    parts = len(schemes) + 2 * len(mixtures)  # experts have two projections
    with Bar(parts, "calibrating", progress) as bar, torch.no_grad():
        layers = _Calibration(model, {**schemes, **mixtures}, batches, bar, done, report, waiting)
        with without_cache(model):
            layers.run()


class _Calibration:
    """The layers that are left, and what happens to them."""

    def __init__(
        self,
        model: nn.Module,
        schemes: Mapping[str, Scheme],
        batches: Sequence[Batch],
        bar: Bar,
        done: Progress,
        report: Callable[[LayerResult], None] | None,
        waiting: Waiting | None,
    ) -> None:
        self.model, self.schemes, self.waiting = model, dict(schemes), waiting
        modules = linear_modules(model) | expert_modules(model)
        self.left = {name: module for name, module in modules.items() if name in schemes}
        self.mixtures = self.left.keys() & expert_modules(model).keys()
        self.batches, self.bar, self.done, self.report = batches, bar, done, report
        self.training = {name: module.training for name, module in self.left.items()}
        self.parents = parents_of(model)
        self.unturned: dict[str, list[str]] = {}
        self.apart: dict[str, str] = {}
        self.owners: dict[int, int] = {}

    def run(self) -> None:
        self._rotate()
        stacks: list[Stack] = []
        for names in find_stacks(self.model, [n for n in self.left if self.schemes[n].needs_data]):
            # The model runs up to these blocks, and the first of them, whose output says what blocks return.
            self._fill([*names[:1], *(n for n in (self.waiting.blocks if self.waiting else ()) if n not in names)])
            try:
                stack = record(self.model, names, self.batches, stacks)
            except NotAStack as reason:
                within = [layer for layer in self.left if any(layer.startswith(f"{name}.") for name in names)]
                self.apart |= dict.fromkeys(within, f"blocks cannot be run apart: {reason}")
                continue
            for index, name in enumerate(names):
                self._fill([name])
                block = self.model.get_submodule(name)
                device = next((p.device for p in block.parameters()), torch.device("cpu"))
                own = [layer for layer in self.left if layer.startswith(f"{name}.")]
                if own and not self._restored(name, block, own):
                    self._block(block, own, stack, index, device)
                    self.done.save(name, block)
                if index < len(names) - 1 or any(self.schemes[n].needs_data for n in self.left):
                    stack.advance(index, block, device)
            stacks.append(stack)
        rest = list(self.left)
        self._fill()
        call = None
        with suppress(NotAStack):  # called with token ids, say: its graph is not that of a block
            call = call_of(self.batches[0].args, self.batches[0].kwargs)
        if rest:
            whole = self.model if not stacks else None
            self._quantize(rest, lambda: run_whole(self.model, self.batches, stacks), whole, call)

    def _fill(self, names: Sequence[str] | None = None) -> None:
        """Let blocks (None: all) be in memory."""
        if self.waiting is not None:
            for name in list(self.waiting.blocks) if names is None else names:
                self.waiting.fill(name)
        self.owners = owners_of(self.model)

    def _rotate(self) -> None:
        """Turn the residual stream and values, if any layer's method says so; where it cannot be, note why."""
        wanted = {n: f for n in self.left for f in self.schemes[n].method.folds if isinstance(f, Rotation)}
        seeds = {fold.seed for fold in wanted.values()}
        if len(seeds) > 1:
            raise ConfigError(f"method hadamard: layers name different seeds, {sorted(seeds)}; a model has one")
        for seed in seeds:
            self._fill()
            self.unturned = {name: [] for name in wanted}
            turned: set[str] = set()
            try:
                turned |= rotate_(self.model, self.batches[0], list(self.left), seed)
            except Illegal as reason:
                for reasons in self.unturned.values():
                    reasons.append(f"hadamard: {reason}")
            for name, why in rotate_heads_(self.model, self.batches[0], list(self.left), seed).items():
                if not why:
                    turned.add(name)
                elif name in self.unturned:
                    self.unturned[name].append(f"hadamard of values: {why}")
            self._rotate_online([n for n, fold in wanted.items() if fold.online and n not in turned])

    def _rotate_online(self, names: Sequence[str]) -> None:
        """Let linears turn their inputs themselves, where the scheme can."""
        for name in names:
            scheme = self.schemes[name]
            if name in self.mixtures:
                self.unturned[name].append("online hadamard: experts' inputs are not turned")
                continue
            try:
                self.schemes[name] = replace(scheme, weight=replace(scheme.weight, rotated=True))
            except ConfigError as reason:
                self.unturned[name].append(f"online hadamard: {reason}")
        self.done.schemes = {name: self.schemes[name] for name in self.done.schemes}

    def _block(self, block: nn.Module, own: list[str], stack: Stack, index: int, device: torch.device) -> None:
        first = stack.calls[index][0].with_hidden(stack.hidden[0].to(device))
        self._quantize(own, lambda: stack.run(index, block, device), block, first)

    def _quantize(self, names: list[str], run: Run, block: nn.Module | None, call: Call | None) -> None:
        """Some layers, observed while `run` runs.

        Args:
            block: what is run, called as `call` says; None if it is more than can be traced.
        """
        mixtures = {n: self.left[n] for n in names if n in self.mixtures}
        names = [n for n in names if n not in mixtures]
        collector = Collector()
        routed = {n: ExpertStatistics(n, m) for n, m in mixtures.items() if self.schemes[n].needs_data}
        if routed or any(self.schemes[n].needs_data for n in names):
            with watched(mixtures, routed):
                self._observe(names, run, collector.observe, collector.next_batch)
        for name in names:
            if self.schemes[name].method.needs_data and (name not in collector.of or collector.of[name].tokens == 0):
                raise CalibrationError(
                    f"{name}: calibration batches never reached it, and method {self.schemes[name].method} needs its "
                    "inputs; give more batches, or a rule with method rtn for it"
                )
        folded, declined = self._fold(names, collector, block, call)
        scales = self._static_scales(names, run)
        for name in names:
            seen = collector.of.get(name)
            self._replace(name, seen, scales.get(name), folded.get(name, ()), declined.get(name, ""))
        for name in mixtures:
            self._replace_experts(name, routed.pop(name, None))

    def _observe(
        self, names: Sequence[str], run: Run, observe: Callable[[str, Tensor], None], after: Callable[[], None]
    ) -> None:
        with observed({n: self.left[n] for n in names}, observe):
            for _ in run():
                after()

    def _static_scales(self, names: Sequence[str], run: Run) -> dict[str, Tensor]:
        """Input scales (float32 scalars) of static layers: stated, or observed."""
        scales: dict[str, Tensor] = {}
        observers: dict[str, Observed] = {}
        for name in names:
            activation = self.schemes[name].activation
            if activation is not None and not activation.dynamic:
                if activation.scale is not None:
                    scales[name] = torch.tensor(activation.scale)
                else:
                    observers[name] = Observed(activation.observer, name)
        if observers:
            self._observe(list(observers), run, lambda name, x: observers[name].add(x), lambda: None)
        for name, observer in observers.items():
            activation = self.schemes[name].activation
            assert activation is not None
            scales[name] = observer.scale(activation.format)
        return scales

    def _fold(
        self, names: Sequence[str], collector: Collector, block: nn.Module | None, call: Call | None
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Carry out the folds that layers' methods name: where scales went, and why others stayed."""
        wanted = [n for n in names if _local_folds(self.schemes[n])]
        folded: dict[str, tuple[str, ...]] = {}
        declined = {n: self.apart.get(n, "it lies outside of the blocks of a decoder") for n in wanted}
        if not wanted or block is None or call is None:
            return folded, declined
        try:
            trace = trace_block(block, call)
        except Illegal as reason:
            return folded, {n: "; ".join(filter(None, (self.apart.get(n), str(reason)))) for n in wanted}
        declined = dict.fromkeys(wanted, "the block's graph has no product with its weight")
        parameters = {id(p): n for n, p in self.model.named_parameters()}
        for root, readers in groups(trace).items():
            layers = {parameters.get(id(reader.weight), "").removesuffix(".weight"): reader for reader in readers}
            own = [n for n in wanted if n in layers]
            if not own:
                continue
            try:
                found = self._site(trace, root, readers, own)
            except Illegal as reason:
                declined |= dict.fromkeys(own, str(reason))
                continue
            for fold in _local_folds(self.schemes[own[0]]):
                self._apply(fold, found, layers, collector)
            for name in own:
                del declined[name]
                folded[name] = tuple(parameters[id(source.parameter)] for source in found.sources)
        return folded, declined

    def _site(self, trace: Trace, root: torch.fx.Node, readers: list[LinearNode], own: list[str]) -> Site:
        if any(_local_folds(self.schemes[n]) != _local_folds(self.schemes[own[0]]) for n in own):
            raise Illegal("layers that read the same input name different folds")
        return site(trace, root, readers, self.owners)

    def _apply(
        self, fold: SmoothQuant | AWQ, found: Site, layers: Mapping[str, LinearNode], collector: Collector
    ) -> None:
        """Compute scales, fold them, and correct the statistics."""
        own = [n for n in layers if n in self.schemes and n in collector.of]
        seen = collector.of[own[0]]
        weights = [r.weight.detach().t() if r.transposed else r.weight.detach() for r in layers.values()]
        if isinstance(fold, SmoothQuant):
            scale = found.shared(smooth_scales(seen, weights, fold.strength))
        else:
            chosen = [self.schemes[n].weight if n in self.schemes else None for n in layers]
            scale = awq_scales(seen, weights, chosen, fold.grid, found.shared, own[0])
        found.apply(scale)
        for statistics in {id(collector.of[n]): collector.of[n] for n in own}.values():
            statistics.divide(scale)

    def _replace(
        self,
        name: str,
        seen: InputStatistics | None,
        input_scale: Tensor | None,
        folded: tuple[str, ...],
        declined: str,
    ) -> None:
        module, scheme, start = self.left[name], self.schemes[name], time.perf_counter()
        weight = matrix_of(module)
        hessian = None if seen is None else seen.hessian
        packed = choose_codes(weight, scheme, hessian, name)
        error = None
        if hessian is not None:
            error = relative_error(weight, dequantize(packed), hessian)
        scale = None if input_scale is None else input_scale.to(weight.device)
        self._put(name, quantized_linear(name, module, scheme, scale, packed))
        del module
        declined = "; ".join(filter(None, (*self.unturned.get(name, ()), declined)))
        result = LayerResult(
            name=name,
            scheme=str(scheme),
            method=str(scheme.method),
            error=error,
            tokens=0 if seen is None else seen.tokens,
            folded=folded,
            declined=declined,
            seconds=time.perf_counter() - start,
        )
        self._tell(result)

    def _replace_experts(self, name: str, seen: ExpertStatistics | None) -> None:
        module, scheme = self.left[name], self.schemes[name]
        noise: dict[str, float] = {}
        power: dict[str, float] = {}
        seconds: dict[str, float] = {}
        used: dict[str, Scheme] = {}

        def choose(projection: str, index: int, weight: Tensor, fitted: Scheme, layer: str) -> PackedWeight:
            start = time.perf_counter()
            hessian = None if seen is None else seen.hessian(projection, index)
            packed = choose_codes(weight, fitted, hessian, layer)
            used[projection] = fitted
            seconds[projection] = seconds.get(projection, 0.0) + time.perf_counter() - start
            if seen is not None:
                own = seen.of[projection][index]
                w, error = weight.float(), weight.float() - dequantize(packed)
                power[projection] = power.get(projection, 0.0) + hessian_error(w, own.gram).sum().item()
                noise[projection] = noise.get(projection, 0.0) + hessian_error(error, own.gram).sum().item()
            return packed

        self._put(name, quantize_experts(name, module, scheme, choose))
        unfolded = "experts take up no scales of their inputs" if _local_folds(scheme) else ""
        for projection in used:
            result = LayerResult(
                name=f"{name}.{projection}",
                scheme=str(used[projection]),
                method=str(scheme.method),
                error=(noise[projection] / power[projection] if power[projection] > 0 else 0.0) if power else None,
                tokens=0 if seen is None else sum(one.tokens for one in seen.of[projection]),
                declined="; ".join(filter(None, (*self.unturned.get(name, ()), unfolded))),
                note="" if seen is None else seen.note(projection),
                seconds=seconds[projection],
            )
            self._tell(result)

    def _restored(self, name: str, block: nn.Module, own: list[str]) -> bool:
        """Whether a block was done by an earlier call, and is now as it was then."""
        results = self.done.restore(name, block, {n: self.left[n] for n in own}, self._put)
        for result in results or ():
            self._tell(result)
        return results is not None

    def _put(self, name: str, new: nn.Module) -> None:
        """Let a quantized module take a linear's place."""
        new.train(self.training[name])
        for parent, child in self.parents[id(self.left.pop(name))]:
            setattr(parent, child, new)

    def _tell(self, result: LayerResult) -> None:
        self.done.note(result)
        self.bar.advance(result.name if result.error is None else f"{result.name} {result.error:.1e}")
        if self.report is not None:
            self.report(result)


def _local_folds(scheme: Scheme) -> tuple[SmoothQuant | AWQ, ...]:
    """Those that a block's graph decides on."""
    return tuple(fold for fold in scheme.method.folds if not isinstance(fold, Rotation))


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Mean square of (w - q) x over that of w x; 0 where both are 0."""
    w = weight.float()
    power = hessian_error(w, hessian).sum().item()
    noise = hessian_error(w - quantized.float(), hessian).sum().item()
    return noise / power if power > 0 else 0.0


def parents_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module of a model stands, by its id: parents, and its name in them."""
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, name))
    return parents
