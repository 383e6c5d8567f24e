"""How much a model's output changes when some of its layers alone are quantized, for each of several schemes.

The measure is the mean KL divergence of the model's output distributions, KL(unquantized || one group quantized), in
nats a position, on some tokens of the calibration. Groups are the linears that were seen to read the same tensor: those
that `merge_projections` makes one product of, which is why they stay on one scheme. Codes are chosen by the scheme's
own method from what arrives at a layer in the unquantized model. Folds are left out: they change layers together.

Of candidates that differ in their weights alone, the one in the middle by size is measured. To second order, the first
that does not vanish, the divergence is a quadratic form of the layer's error E x. So that of another candidate is to it
as tr(E H E^T), with H the mean of x x^T over inputs, is to that; rounding to nearest gives the ratio, for every method.

Where a model's blocks run one after the other, what arrives at a block is kept, and a group of that block is measured
by running this block and those after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.calibrate.codes import choose_codes
from qcompile.calibrate.gptq import hessian_error
from qcompile.calibrate.resume import calibration_key
from qcompile.calibrate.statistics import Collector, observed
from qcompile.calibrate.stream import Batch, NotAStack, Stack, find_stacks, record, run_whole, without_cache
from qcompile.errors import CalibrationError, CheckpointError
from qcompile.linears import is_conv1d, linear_modules, matrix_of
from qcompile.methods import Method
from qcompile.packed import stored_bytes
from qcompile.progress import Bar
from qcompile.reference import dequantize, dequantize_activation, quantize_activation, quantize_weight
from qcompile.scheme import Scheme

Candidates = tuple[Scheme, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Layers that stay on one scheme.

    Attributes:
        layers: their names.
        kl: mean divergence of the model's outputs in nats, a number for each candidate.
        measured: the candidates whose divergence was measured; the others' follow from theirs.
    """

    layers: tuple[str, ...]
    kl: tuple[float, ...]
    measured: tuple[int, ...]


def measure(
    model: nn.Module,
    candidates: Mapping[str, Candidates],
    batches: Sequence[Batch],
    tokens: int,
    *,
    progress: bool = True,
    keep: Path | None = None,
) -> list[Sensitivity]:
    """The sensitivity of each group of layers to each of its candidates; see above. The model is left as it was.

    Args:
        candidates: of `linear_modules`, by name, fitted to their shapes. Layers with other candidates are apart.
        batches: layers' inputs are observed on all.
        tokens: divergences are measured on the first batches that have so many tokens together.
        keep: a file for what is measured, from which an interrupted call goes on. It stays.

    Raises:
        CalibrationError: batches that do not reach a layer, or outputs that are not finite, or no tensor.
        CheckpointError: a file of another calibration.
    """
    with torch.no_grad(), without_cache(model):
        return _Measurement(model, candidates, batches, tokens, progress, keep).run()


class _Measurement:
    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, Candidates],
        batches: Sequence[Batch],
        tokens: int,
        progress: bool,
        keep: Path | None,
    ) -> None:
        modules = linear_modules(model)
        self.model, self.candidates, self.batches = model, candidates, batches
        self.modules = {name: modules[name] for name in candidates}
        self.found: dict[str, Sensitivity] = {}
        self.kept = _Kept(keep, model, candidates, batches, tokens)
        self.references = _references(model, batches, tokens)
        self.bar = Bar(len(candidates), "measuring", progress)

    def run(self) -> list[Sensitivity]:
        with self.bar:
            stack = self._stack()
            for index, name in enumerate(stack.names if stack else ()):
                assert stack is not None
                block = self.model.get_submodule(name)
                device = next((p.device for p in block.parameters()), torch.device("cpu"))
                own = [layer for layer in self.modules if layer.startswith(f"{name}.")]
                self._groups(
                    own,
                    lambda block=block, index=index, device=device: stack.run(index, block, device),  # type: ignore[misc]
                    lambda number, index=index, device=device: stack.run_from(  # type: ignore[misc]
                        index, self.model, self.batches[number], number, device
                    ),
                )
                stack.advance(index, block, device)
            rest = [layer for layer in self.modules if layer not in self.found]
            self._groups(rest, lambda: run_whole(self.model, self.batches, []), self._whole)
        return list(dict.fromkeys(self.found[name] for name in self.modules))

    def _whole(self, number: int) -> Any:
        batch = self.batches[number]
        return self.model(*batch.args, **batch.kwargs)

    def _stack(self) -> Stack | None:
        """The first stack of blocks that can be run apart."""
        for names in find_stacks(self.model, list(self.modules)):
            try:
                return record(self.model, names, self.batches, [])
            except NotAStack:
                continue
        return None

    def _groups(self, names: list[str], run: Callable[[], Any], output: Callable[[int], Any]) -> None:
        """Measure some layers.

        Args:
            run: runs what contains them, on all batches.
            output: of the model, for a batch's number.
        """
        for found in self.kept.of(names):
            self._note(found)
        left = [name for name in names if name not in self.found]
        if not left:
            return
        collector = Collector()
        with observed({name: self.modules[name] for name in left}, collector.observe):
            for _ in run():
                collector.next_batch()
        groups: dict[tuple[int, Candidates], list[str]] = {}
        for name in left:
            seen = collector.of.get(name)
            if seen is None or seen.tokens == 0:
                raise CalibrationError(
                    f"{name}: calibration batches never reached it, so its sensitivity is unknown; give more batches, "
                    "or a rule of its own"
                )
            groups.setdefault((id(seen), self.candidates[name]), []).append(name)
        for (_, candidates), layers in groups.items():
            found = self._sensitivity(layers, candidates, collector.of[layers[0]].hessian, output)
            self.kept.add(found)
            self._note(found)

    def _sensitivity(
        self, layers: list[str], candidates: Candidates, hessian: Tensor, output: Callable[[int], Any]
    ) -> Sensitivity:
        weights = [matrix_of(self.modules[name]) for name in layers]
        alike: dict[Any, list[int]] = {}
        for index, scheme in enumerate(candidates):
            alike.setdefault((scheme.activation, scheme.method), []).append(index)
        kl, measured = [0.0] * len(candidates), []
        for indices in alike.values():
            size = {i: stored_bytes(candidates[i].weight, (len(weights[0]), len(hessian))) for i in indices}
            middle = sorted(indices, key=size.__getitem__)[len(indices) // 2]
            error = {i: rounding_error(weights, candidates[i], hessian, layers) for i in indices if len(indices) > 1}
            for index in sorted(indices, key=middle.__ne__):  # the middle one first
                if index == middle or error[middle] == 0:
                    kl[index] = self._divergence(layers, candidates[index], hessian, output)
                    measured.append(index)
                else:
                    kl[index] = kl[middle] * error[index] / error[middle]
        return Sensitivity(tuple(layers), tuple(kl), tuple(sorted(measured)))

    def _note(self, found: Sensitivity) -> None:
        for name in found.layers:
            self.found[name] = found
            self.bar.advance(name)

    def _divergence(
        self, layers: Sequence[str], scheme: Scheme, hessian: Tensor, output: Callable[[int], Any]
    ) -> float:
        modules = [self.modules[name] for name in layers]
        weights = quantized_weights([matrix_of(m) for m in modules], scheme, hessian, layers)
        total, count = 0.0, 0
        with replaced(modules, weights, scheme):
            for number, reference in enumerate(self.references):
                log_p = log_probabilities(output(number))
                total += F.kl_div(log_p, reference, reduction="sum", log_target=True).double().item()
                count += len(reference)
        found = max(total / count, 0.0)
        if found != found or found == float("inf"):
            raise CalibrationError(f"{layers[0]}: as {scheme} it makes the model's output NaN or infinite")
        return found


def log_probabilities(output: Any) -> Tensor:
    """float32 [positions, classes] of what a model returned: `logits`, a tensor, or the first of a tuple.

    Raises:
        CalibrationError: there is no such tensor.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise CalibrationError(
            f"scheme auto compares what a model predicts, and {type(output).__name__} has no logits [..., classes]"
        )
    return F.log_softmax(found.flatten(0, -2).float(), dim=-1)


def _references(model: nn.Module, batches: Sequence[Batch], tokens: int) -> list[Tensor]:
    """What the unquantized model makes of the first batches, up to a number of positions."""
    found: list[Tensor] = []
    for batch in batches:
        if sum(map(len, found)) >= tokens:
            break
        found.append(log_probabilities(model(*batch.args, **batch.kwargs)))
        if not bool(torch.isfinite(found[-1]).all()):
            raise CalibrationError(
                "the unquantized model's output holds NaN or infinity; run it in float32 or bfloat16"
            )
    return found


def quantized_weights(
    weights: Sequence[Tensor], scheme: Scheme, hessian: Tensor, layers: Sequence[str]
) -> list[Tensor]:
    """What weights [N, K] of one K stand for when they are quantized, in their own dtypes."""
    plain = replace(scheme, method=Method(scheme.method.codes))
    if scheme.weight.granularity.rows == 1 and scheme.weight.super_scale is None:  # rows do not know of each other
        together = dequantize(choose_codes(torch.cat(list(weights)), plain, hessian, layers[0]))
        parts = list(together.split([len(w) for w in weights]))
    else:
        parts = [dequantize(choose_codes(w, plain, hessian, n)) for w, n in zip(weights, layers, strict=True)]
    return [part.to(w.dtype) for part, w in zip(parts, weights, strict=True)]


def rounding_error(weights: Sequence[Tensor], scheme: Scheme, hessian: Tensor, layers: Sequence[str]) -> float:
    """tr(E H E^T) of weights [N, K] that are rounded to nearest, summed over them."""
    total = 0.0
    for weight, layer in zip(weights, layers, strict=True):
        error = weight.float() - dequantize(quantize_weight(weight, scheme.weight, layer))
        total += hessian_error(error, hessian).sum().item()
    return total


@contextmanager
def replaced(modules: Sequence[nn.Module], weights: Sequence[Tensor], scheme: Scheme) -> Iterator[None]:
    """Give linears other weights [N, K], and inputs as a scheme quantizes them, for a while."""
    activation = scheme.activation

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert activation is not None
        x = args[0]
        codes, scale = quantize_activation(x, activation)
        return dequantize_activation(codes, scale, activation).to(x.dtype), *args[1:]

    originals = [module.weight for module in modules]
    with ExitStack() as stack:
        try:
            for module, weight in zip(modules, weights, strict=True):
                matrix = weight.t() if is_conv1d(module) else weight
                module.weight = nn.Parameter(matrix, requires_grad=False)
                if activation is not None:
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.weight = original


class _Kept:
    """What was measured, in a file.

    Raises:
        CheckpointError: the file is of another calibration, or damaged.
    """

    def __init__(
        self,
        path: Path | None,
        model: nn.Module,
        candidates: Mapping[str, Candidates],
        batches: Sequence[Batch],
        tokens: int,
    ) -> None:
        self.path = path
        self.found: list[Sensitivity] = []
        if path is None:
            return
        each = {f"{name} {index}": s for name, schemes in candidates.items() for index, s in enumerate(schemes)}
        self.key = f"{calibration_key(model, each, batches)} {tokens}"
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            key = content["key"]
            for entry in content["groups"]:
                layers, kl = tuple(entry["layers"]), tuple(float(number) for number in entry["kl"])
                if not all(name in candidates and len(kl) == len(candidates[name]) for name in layers):
                    raise ValueError("its layers are others")
                self.found.append(Sensitivity(layers, kl, tuple(int(index) for index in entry["measured"])))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); remove it to measure anew") from None
        if key != self.key:
            raise CheckpointError(
                f"{path}: was begun with another model, configuration, calibration or version of qcompile; remove it "
                "to measure anew"
            )

    def of(self, names: Sequence[str]) -> list[Sensitivity]:
        """What was measured of some layers."""
        wanted = set(names)
        return [found for found in self.found if wanted.issuperset(found.layers)]

    def add(self, found: Sensitivity) -> None:
        self.found.append(found)
        if self.path is None:
            return
        groups = [{"layers": list(f.layers), "kl": list(f.kl), "measured": list(f.measured)} for f in self.found]
        temporary = self.path.with_name(f"{self.path.name}.part")
        temporary.write_text(json.dumps({"key": self.key, "groups": groups}, indent=1), encoding="utf-8")
        temporary.replace(self.path)
