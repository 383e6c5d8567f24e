"""Mixtures of experts: stacks of quantized linears, and the module that stands where a model's experts were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import qcompile.grouped  # noqa: F401  (registers the operator)
from qcompile.errors import LayerError
from qcompile.gating import Gating, gate_step
from qcompile.layouts import LAYOUTS, Layout, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.modules import PackedModule
from qcompile.packed import LOGICAL, PackedLinear, PackedWeight
from qcompile.reference import dequantize, quantize_weight
from qcompile.scheme import Scheme
from qcompile.stacks import expert, stack, stack_layout, stacked_scheme


class GroupedLinear(PackedModule):
    """One projection of all experts: `y[i] = x[i] @ weight[e[i]].T + bias[e[i]]`, and a gate behind it if one is set.

    Args:
        weights: each expert's, packed [N, K] in the logical layout; all of one scheme.
        scheme: each expert's.
        bias: [experts, N] or None.
        input_scale: float32 [experts], exactly for static activations.
        dtype: of the original weights.
        pre_quant_scale: [experts, K], by which the input is multiplied before all else.
        layer: named in errors.

    Raises:
        LayerError: experts that are quantized in different ways.
    """

    input_scale: Tensor | None
    pre_quant_scale: Tensor | None
    perm: Tensor | None

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        scheme: Scheme,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        pre_quant_scale: Tensor | None = None,
        layer: str = "experts",
    ) -> None:
        self.gate = ""
        self.experts = len(weights)
        self.out_features, self.in_features = weights[0].shape
        perms = [weight.perm for weight in weights if weight.perm is not None]
        beside = {
            "input_scale": input_scale,
            "pre_quant_scale": pre_quant_scale,
            "perm": torch.stack(perms) if perms else None,
        }
        stacked = replace(scheme, weight=stacked_scheme(scheme.weight, self.out_features))
        super().__init__(stack(weights, layer), stacked, dtype, bias, beside)

    def _layout_on(self, device_type: str) -> Layout:
        return stack_layout(self.scheme, self.packed_shape, device_type)

    def _spec(self) -> LinearSpec:
        spec = LinearSpec(
            in_features=self.in_features, out_features=self.out_features, scheme=self.scheme, layout=self.layout
        )
        steps = [*(["bias"] if self.bias is not None else []), *([self.gate] if self.gate else [])]
        return spec.with_epilogue(*steps)

    def end_with(self, gate: str) -> None:
        """Return one column of each two of the product, by a step of `qcompile.gates`."""
        self.gate = gate
        self.spec = self._spec().encode()

    @classmethod
    def of(cls, linears: Sequence[PackedLinear], layer: str = "experts") -> GroupedLinear:
        """The projection that consists of these experts', on the device of their weights.

        Raises:
            LayerError: experts that are quantized in different ways, or of which some have more than others.
        """
        first = linears[0]
        for index, linear in enumerate(linears):
            if linear.scheme != first.scheme:
                raise LayerError(f"{layer}: expert {index} is {linear.scheme}, expert 0 is {first.scheme}")

        def stacked(name: str) -> Tensor | None:
            there = [tensor for linear in linears if (tensor := getattr(linear, name)) is not None]
            if len(there) not in (0, len(linears)):
                raise LayerError(f"{layer}: {len(there)} of {len(linears)} experts have a {name}")
            return torch.stack(there) if there else None

        bias, input_scale, pre_quant_scale = map(stacked, ("bias", "input_scale", "pre_quant_scale"))
        weights = [linear.weight for linear in linears]
        return cls(weights, first.scheme, bias, input_scale, first.dtype, pre_quant_scale, layer)

    def linear(self, index: int) -> PackedLinear:
        """One expert's, with its weight [N, K] in the logical layout."""
        weight = to_layout(expert(self.packed(), index, self.out_features), LAYOUTS[LOGICAL])
        if self.perm is not None:
            weight = replace(weight, scheme=replace(weight.scheme, act_order=True), perm=self.perm[index])
        bias, input_scale, pre_quant_scale = (
            None if tensor is None else tensor[index] for tensor in (self.bias, self.input_scale, self.pre_quant_scale)
        )
        return PackedLinear(
            weight=weight,
            scheme=replace(self.scheme, weight=weight.scheme),
            bias=bias,
            input_scale=input_scale,
            dtype=self.dtype,
            pre_quant_scale=pre_quant_scale,
        )

    @property
    def weight(self) -> Tensor:
        """The weights [experts, N, K] that the codes stand for, decoded anew at each reading."""
        decoded = dequantize(self.logical()).unflatten(0, (self.experts, -1))[:, : self.out_features]
        if self.perm is not None:
            index = self.perm.to(torch.int64).argsort(1)[:, None].expand_as(decoded)
            decoded = decoded.gather(2, index)
        return decoded.to(self.dtype)

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """x [S, K] and the ascending numbers of its rows' experts, int64 [S], to [S, N], or [S, N / 2] with a gate."""
        return torch.ops.qcompile.grouped_linear.default(
            x,
            expert_ids,
            self._tensors(),
            self.bias,
            self.input_scale,
            self.pre_quant_scale,
            self.perm,
            self.experts,
            self.spec,
        )

    def extra_repr(self) -> str:
        shape = f"{self.experts} x ({self.in_features}, {self.out_features})"
        gate = f", {self.gate}" if self.gate else ""
        return f"{shape}, {self.scheme}, bias={self.bias is not None}{gate}"


class QuantizedExperts(nn.Module):
    """The experts of a mixture, instead of the module of transformers' that held them.

    Rows are sorted by expert, multiplied by one grouped product a projection, which applies the gate too if it is a
    step of `qcompile.gates`, and the results added with the router's weights. Shapes do not depend on the router's
    choice, so the whole compiles and is captured in CUDA graphs.

    Args:
        projections: "down_proj", and "gate_up_proj", or "gate_proj" and "up_proj", or "up_proj" alone.
        gating: what comes between.
    """

    down_proj: GroupedLinear

    def __init__(self, projections: Mapping[str, GroupedLinear], gating: Gating) -> None:
        super().__init__()
        self.first = tuple(name for name in projections if name != "down_proj")
        for name, projection in projections.items():
            self.add_module(name, projection)
        self.gating = gating
        self.gated = False
        step = gate_step(gating, projections[self.first[0]].out_features) if self.first == ("gate_up_proj",) else None
        if step is not None:
            projections["gate_up_proj"].end_with(step)
            self.gated = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the module that it replaces.

        Args:
            hidden_states: [tokens, H].
            top_k_index: int64 [tokens, top k], numbers of experts.
            top_k_weights: [tokens, top k].

        Returns:
            [tokens, H], of the type of `hidden_states`.
        """
        tokens, top_k = top_k_index.shape
        expert_ids, order = top_k_index.reshape(-1).sort(stable=True)
        rows = hidden_states.index_select(0, order // top_k)
        gated = self.gating.join([self.get_submodule(name)(rows, expert_ids) for name in self.first])
        y = self.down_proj(gated if self.gated else self.gating(gated), expert_ids)
        weighted = y * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(1)
        summed = weighted.index_select(0, order.argsort()).view(tokens, top_k, y.shape[1]).sum(1)
        return summed.to(hidden_states.dtype)


def projection_shapes(experts: nn.Module) -> dict[str, tuple[int, int, int]]:
    """(experts, N, K) of the weights of an experts module, by the names of its parameters."""
    shapes = {}
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        count, rows, columns = getattr(experts, name).shape
        shapes[name] = (count, columns, rows) if experts.is_transposed else (count, rows, columns)
    return shapes


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `QuantizedExperts` can replace, by qualified name: those that transformers' functions for
    experts run (`transformers.integrations.moe`), which say themselves how their weights are arranged.
    """
    return {name: module for name, module in model.named_modules() if name and _is_experts(module)}


def _is_experts(module: nn.Module) -> bool:
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    if not all(isinstance(getattr(module, mark, None), bool) for mark in marks):
        return False
    if getattr(module, "has_post_expert_norm", False):  # which older releases do not know
        return False
    weights = [getattr(module, name, None) for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)


def other_experts(model: nn.Module) -> list[str]:
    """Modules that hold stacked experts' weights in a way that `QuantizedExperts` does not know, by name."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        and not _is_experts(module)
        and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    ]


def rounded(_projection: str, _index: int, weight: Tensor, scheme: Scheme, layer: str) -> PackedWeight:
    """The nearest codes of an expert's weight."""
    scheme.check_rounded(layer)
    return quantize_weight(weight, scheme.weight, layer)


def quantize_experts(
    name: str,
    experts: nn.Module,
    scheme: Scheme,
    choose: Callable[[str, int, Tensor, Scheme, str], PackedWeight] = rounded,
) -> QuantizedExperts:
    """The module that takes the place of an experts module.

    Args:
        name: of the module, for errors.
        scheme: whose group is fitted to each projection.
        choose: from a projection's name, an expert's number, its weight [N, K], the fitted scheme and a name for errors
            to the packed weight.

    Raises:
        LayerError: weights that cannot be quantized so, or static activations whose scale is not stated.
    """
    projections = {}
    for projection, (count, n, k) in projection_shapes(experts).items():
        layer = f"{name}.{projection}"
        fitted = scheme.fit(layer, (n, k))
        input_scale = None
        if fitted.activation is not None and not fitted.activation.dynamic:
            check_scale(scheme, layer)
            assert fitted.activation.scale is not None
            input_scale = torch.full((count,), fitted.activation.scale)
        weight = getattr(experts, projection).detach()
        matrices = weight.transpose(1, 2) if experts.is_transposed else weight
        packed = [choose(projection, index, matrix, fitted, layer) for index, matrix in enumerate(matrices)]
        bias = getattr(experts, f"{projection}_bias") if experts.has_bias else None
        scale = None if input_scale is None else input_scale.to(weight.device)
        projections[projection] = GroupedLinear(packed, fitted, bias, scale, weight.dtype, layer=layer)
    return QuantizedExperts(projections, Gating(experts))


def check_scale(scheme: Scheme, layer: str) -> None:
    """Refuse static activations whose scale is not stated.

    Raises:
        LayerError: they are.
    """
    if scheme.needs_scale:
        raise LayerError(
            f'{layer}: static activation scales of experts are not calibrated; state "scale" in the configuration, or '
            "choose dynamic activations"
        )
