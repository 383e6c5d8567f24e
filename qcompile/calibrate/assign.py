"""Mixed precision: which layer gets which scheme, so that a budget holds and the model's output changes least.

Divergences of layers that are quantized alone add up well, as independent errors do, so the choice is a
multiple-choice knapsack: one candidate for each group of layers, the least sum of divergences whose bytes stay within a
budget, or the least bytes whose divergences do. It is solved exactly as an integer program by HiGHS, through
`scipy.optimize.milp`. The result is an ordinary configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.calibrate.codes import check_codes
from qcompile.calibrate.sensitivity import measure
from qcompile.calibrate.stream import as_batches
from qcompile.config import Auto, QuantConfig, Rule, parse_config
from qcompile.errors import ConfigError
from qcompile.experts import expert_modules
from qcompile.linears import linear_modules, matrix_of, shape_of
from qcompile.packed import stored_bytes
from qcompile.presets import PRESETS
from qcompile.scheme import Scheme
from qcompile.torchao_tensors import is_torchao


@dataclass(frozen=True)
class Choice:
    """What was decided for layers that stay on one scheme.

    Attributes:
        layers: their names.
        schemes: the candidates, as the configuration names them.
        kl: divergence of each candidate, in nats.
        measured: the candidates whose divergence was measured; see `qcompile.calibrate.sensitivity`.
        nbytes: packed weights of all layers, by candidate.
        chosen: the index of a candidate.
    """

    layers: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    kl: tuple[float, ...]
    measured: tuple[int, ...]
    nbytes: tuple[int, ...]
    chosen: int


@dataclass(frozen=True)
class Chosen:
    """The result of `choose_schemes`.

    Attributes:
        config: a rule for each layer in the place of each rule with scheme auto.
        choices: of all groups of layers, in the model's order.
        weights: how many weights they have.
    """

    config: QuantConfig
    choices: tuple[Choice, ...]
    weights: int

    @property
    def nbytes(self) -> int:
        """Of packed weights."""
        return sum(choice.nbytes[choice.chosen] for choice in self.choices)

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.nbytes / self.weights

    @property
    def kl(self) -> float:
        """The sum of the groups' divergences, in nats: what is expected of the whole model."""
        return sum(choice.kl[choice.chosen] for choice in self.choices)

    def to_yaml(self) -> str:
        """The configuration, a line for each layer, with what was measured as comments."""
        import yaml

        def line(value: Any) -> str:
            return yaml.safe_dump(value, default_flow_style=True, width=2**31, sort_keys=False).strip()

        of = {escape(name): choice for choice in self.choices for name in choice.layers}
        plain = self.config.to_dict()
        lines = [
            f"# {self.bits:.3f} bits a weight, {self.nbytes:,} bytes; KL divergence expected: {self.kl:.3g} nats.",
            "# Behind each layer: the divergence that each candidate makes alone, of all layers that share its input;",
            "# ~ is of one that follows from a measured one's.",
            "rules:",
        ]
        for entry in plain["rules"]:
            choice = of.get(entry["layers"])
            text = f"- {line(entry)}"
            if choice is not None:
                each = enumerate(zip(choice.schemes, choice.kl, strict=True))
                told = [f"{label(s)} {'' if i in choice.measured else '~'}{kl:.1e}" for i, (s, kl) in each]
                text += f"  # KL {', '.join(told)}"
            lines.append(text)
        rest = {key: value for key, value in plain.items() if key != "rules"}
        return "\n".join(lines) + "\n" + (yaml.safe_dump(rest, sort_keys=False) if rest else "")

    def write(self, path: str | Path) -> None:
        """Write the configuration as YAML with comments, or as JSON if the file is called so.

        Raises:
            ConfigError: a name of neither, or a file that cannot be written.
        """
        path = Path(path)
        check_name(path)
        text = json.dumps(self.config.to_dict(), indent=1) + "\n" if path.suffix == ".json" else self.to_yaml()
        temporary = path.with_name(f"{path.name}.part")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error})") from None


def check_name(path: Path) -> None:
    """Refuse a place that no configuration can be written to.

    Raises:
        ConfigError: another suffix than .yaml, .yml and .json, or no such folder.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: a configuration is called .yaml, .yml or .json")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}")


def label(scheme: Scheme) -> str:
    """A scheme in a word, without its method: a preset's name, or the format and what shares a scale."""
    name = next((n for n, s in PRESETS.items() if (s.weight, s.activation) == (scheme.weight, scheme.activation)), None)
    return name or str(scheme)


def choose_schemes(
    model: nn.Module,
    config: Any,
    calibration: Iterable[Any],
    *,
    progress: bool = True,
    keep: str | Path | None = None,
) -> Chosen:
    """Decide the rules of a configuration whose scheme is auto; see `qcompile.config.Auto`.

    Layers that read one tensor are quantized alone, and the model's output is compared with the unquantized one's
    (`qcompile.calibrate.sensitivity`). The model is left as it was.

    Args:
        model: floating point, with logits (or one tensor of scores) as its output.
        config: what `quantize_` takes, with at least one rule of scheme auto: `{"preset": "auto", "bits": 4.5}`.
        calibration: batches, as `quantize_` takes them.
        progress: show a progress bar on a terminal.
        keep: a file for what is measured, from which an interrupted call goes on when it is made again. It stays.

    Raises:
        ConfigError: no rule of scheme auto, a budget that no choice of candidates meets, or that all do, or scipy is
            not installed.
        LayerError: a candidate that does not go with a layer.
        CalibrationError: batches that do not show what is needed.
        CheckpointError: a file of another calibration.
    """
    parsed = parse_config(config)
    if not parsed.undecided:
        raise ConfigError(
            'no rule has scheme auto, such as {"preset": "auto", "bits": 4.5}: there is nothing to choose'
        )
    autos = {rule.scheme for rule in parsed.rules if isinstance(rule.scheme, Auto)}
    if len(autos) > 1:
        raise ConfigError("rules of scheme auto share one budget, so they must be the same but for their layers")
    auto = autos.pop()
    solver()
    modules, experts = linear_modules(model), expert_modules(model)
    parsed.check_used([*modules, *experts])
    owner = {n: r for n in (*modules, *experts) if (r := parsed.rule_for(n)) and isinstance(r.scheme, Auto)}
    if of_experts := next((name for name in experts if name in owner), None):
        raise ConfigError(f"{of_experts}: experts are not measured; put a rule for them before that of scheme auto")
    owner = {n: r for n, r in owner.items() if not is_torchao(modules[n].weight)}
    if not owner:
        raise ConfigError("rules of scheme auto decide no linear layer whose weight is floating point")
    fitted: dict[str, tuple[Scheme, ...]] = {}
    for name in owner:
        fitted[name] = tuple(scheme.fit(name, shape_of(modules[name])) for scheme in auto.schemes)
        for scheme in fitted[name]:
            check_codes(scheme, name)
    sizes = {name: tuple(_nbytes(modules[name], scheme) for scheme in schemes) for name, schemes in fitted.items()}
    weights = sum(matrix_of(modules[name]).numel() for name in owner)
    check_budget(auto, sizes.values(), weights)  # before the work
    path = None if keep is None else Path(keep)
    groups = measure(model, fitted, as_batches(calibration), auto.tokens, progress=progress, keep=path)
    nbytes = [tuple(sum(sizes[n][i] for n in g.layers) for i in range(len(auto.schemes))) for g in groups]
    indices = solve(auto, [g.kl for g in groups], nbytes, weights)
    choices = [
        Choice(g.layers, auto.schemes, g.kl, g.measured, size, index)
        for g, size, index in zip(groups, nbytes, indices, strict=True)
    ]
    scheme_of = {name: auto.schemes[choice.chosen] for choice in choices for name in choice.layers}
    rules: list[Rule] = []
    for rule in parsed.rules:
        mine = [Rule(layers=escape(n), scheme=scheme_of[n]) for n, by in owner.items() if by is rule]
        rules += mine if isinstance(rule.scheme, Auto) else [rule]
    return Chosen(replace(parsed, rules=tuple(rules)), tuple(choices), weights)


def _nbytes(module: nn.Module, scheme: Scheme) -> int:
    return stored_bytes(scheme.weight, shape_of(module))


def check_budget(auto: Auto, sizes: Iterable[Sequence[int]], weights: int) -> None:
    """Refuse a budget of bits or bytes that no choice meets, or that every choice meets.

    Args:
        sizes: bytes of each layer, by candidate.
        weights: how many there are in all layers.

    Raises:
        ConfigError: saying which budgets there are.
    """
    if auto.kl is not None:
        return
    sizes = list(sizes)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    limit = _limit(auto, weights)
    if least <= limit <= most:
        return
    if auto.bits is not None:
        asked, low, high = f"{auto.bits:g} bits a weight", f"{8 * least / weights:.4f}", f"{8 * most / weights:.4f}"
    else:
        asked, low, high = f"{auto.bytes:,} bytes", f"{least:,}", f"{most:,}"
    what, way = (
        (f"below {low}, the least", "add a smaller one")
        if limit < least
        else (f"above {high}, the most", "take the largest for every layer, or add a larger one")
    )
    raise ConfigError(f"scheme auto: {asked} is {what} that its candidates take for these layers: {way}")


def _limit(auto: Auto, weights: int) -> int:
    """The budget in bytes."""
    if auto.bytes is not None:
        return auto.bytes
    assert auto.bits is not None
    return math.floor(auto.bits * weights / 8)


def solve(auto: Auto, kl: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]], weights: int) -> list[int]:
    """A candidate for each group, within the budget.

    Args:
        kl, nbytes: of each group, by candidate.
        weights: how many there are in all groups.

    Raises:
        ConfigError: no choice is within the budget.
    """
    check_budget(auto, nbytes, weights)
    chosen = least(kl, nbytes, _limit(auto, weights)) if auto.kl is None else least(nbytes, kl, auto.kl)
    if chosen is None:
        best = sum(map(min, kl))
        raise ConfigError(
            f"scheme auto: no choice stays within kl {auto.kl:g}; the least that its candidates reach is {best:.3g}: "
            "allow more, or add a candidate of more bits"
        )
    return chosen


def least(cost: Sequence[Sequence[float]], size: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """One candidate for each group, so that the sum of costs is least and that of sizes at most `limit`.

    Of equal costs either may be chosen. None where no choice is within the limit.

    Raises:
        ConfigError: scipy is not installed.
    """
    optimize, sparse, np = solver()
    groups = [(group, candidate) for group, row in enumerate(cost) for candidate in range(len(row))]
    rows = np.array([group for group, _ in groups])
    costs, sizes = (np.array([table[g][c] for g, c in groups], dtype=np.float64) for table in (cost, size))
    one_each = sparse.csr_array((np.ones(len(groups)), (rows, np.arange(len(groups)))))
    # What every choice costs is taken off, and numbers are brought near 1, where the solver's tolerances are small.
    costs -= np.array([min(cost[g]) for g, _ in groups])
    sizes -= np.array([min(size[g]) for g, _ in groups])
    room = limit - math.fsum(min(row) for row in size)
    if room < 0:
        return None
    unit, price = sizes.max() or 1.0, costs.max() or 1.0
    while True:
        answer = optimize.milp(
            costs / price,
            integrality=np.ones(len(groups)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(sizes[None] / unit, -np.inf, max(room, 0.0) / unit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        assert answer.success, answer.message  # each group's smallest is always within
        picked = answer.x.round().astype(bool)
        chosen = [candidate for (_, candidate), there in zip(groups, picked, strict=True) if there]
        over = math.fsum(size[group][candidate] for group, candidate in enumerate(chosen)) - limit
        if over <= 0:
            return chosen
        room -= over  # by the solver's tolerance


def solver() -> tuple[Any, Any, Any]:
    """scipy's optimizer and sparse arrays, and numpy.

    Raises:
        ConfigError: not installed.
    """
    try:
        import numpy as np
        from scipy import optimize, sparse
    except ImportError as error:
        remedy = '`pip install "qcompile[auto]"`'
        raise ConfigError(f"scheme auto solves an integer program with scipy ({error}): {remedy}") from None
    return optimize, sparse, np
