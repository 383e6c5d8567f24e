"""Tensor parallelism: each process of a group keeps a part of a model's layers, and they add or join what these give.

    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,))
    model = qcompile.load(path, mesh=mesh)     or     qcompile.parallelize(qcompile.quantize_(model, "int4"), mesh)

Parts are cut from the portable form of packed weights (`cuts`), before they are laid out for a device. So a part is a
linear as any other to kernels and passes; what two processes tell each other is an operator between such linears.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qcompile import cuts
from qcompile.errors import ConfigError, LayerError, shown
from qcompile.exchange import share
from qcompile.experts import GroupedLinear, QuantizedExperts
from qcompile.gating import Gating
from qcompile.linears import is_conv1d, shape_of
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.parts import (
    PARTS,
    GatheredLinear,
    GatheredQuantizedLinear,
    PartOfExperts,
    Place,
    RowwiseLinear,
    RowwiseQuantizedLinear,
    VocabularyEmbedding,
)
from qcompile.plans import COLWISE, EMBEDDING, EXPERTS, GATHERED, PACKED, REPLICATE, ROWWISE, SPLIT, planned
from qcompile.torchao_tensors import is_torchao

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)

_WHOLE_OUTSIDE = (GATHERED, SPLIT, EMBEDDING)
"""Styles of layers whose inputs and outputs all processes have: these may as well stay whole."""


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse what is done to whole models alone.

    Raises:
        ConfigError: the model is a process's part of one.
    """
    if any(isinstance(module, PARTS) for module in model.modules()):
        raise ConfigError(f"{what} a whole model, and this is a process's part of one; do so before it is parallelized")


def parallelize(model: Model, mesh: DeviceMesh, plan: Mapping[str, str] | None = None) -> Model:
    """Keep of a model that every process has whole this process's part, in place, layer by layer.

    Quantize first: `qcompile.quantize_` does not take parts. The result compiles and generates as the whole model did,
    in all processes alike, and has the same outputs in all.

    Args:
        model: the same in all processes, of `nn.Linear`s, quantized ones and quantized experts; on any device.
        mesh: of one dimension, the processes that share the model.
        plan: {glob on qualified names (`*` also crosses dots): style}, the first that matches counts; before the plan
            that transformers has for the model, if it has one. `STYLES` are transformers'.

    Returns:
        the model itself.

    Raises:
        ConfigError: a mesh of more dimensions or another device, a style that is unknown, a glob that matches no layer,
            or no plan.
        LayerError: a layer that cannot be divided; those before it are then.
    """
    check_whole(model, "parallelize takes")
    for parameter in model.parameters():
        check_device(parameter.device, mesh)
    Sharding(model, place_in(mesh), plan).divide(model)
    return model


class Sharding:
    """What one process keeps of each layer of a model.

    Args:
        model: whole; its parameters may be on the meta device.
        place: this process's.
        plan: see `parallelize`.

    Attributes:
        styles: of the layers that are divided, by name, in the model's order.
        vectors: names of parameters of one dimension that are divided.
    """

    def __init__(self, model: nn.Module, place: Place, plan: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.styles: dict[str, str] = {}
        self.vectors: set[str] = set()
        modules = dict(model.named_modules())
        self._transposed = {name for name, module in modules.items() if is_conv1d(module)}
        self._parts: Any = WeakTensorKeyDictionary()
        styles = planned(model, plan)
        for name, style in styles.items() if place.size > 1 else ():
            if name not in modules:
                cuts.check_share(self.place, name, model.get_parameter(name).shape[0], "elements")
                self.vectors.add(name)
                continue
            try:
                self._check(name, modules[name], style, modules[name.rpartition(".")[0]])
                self.styles[name] = style
            except LayerError as error:
                self._keep_whole(name, style, error)
        self._keep_ties(model)

    def _keep_whole(self, name: str, style: str, error: LayerError) -> None:
        """For a layer that cannot be divided.

        Raises:
            LayerError: the given one, where others count on its division.
        """
        if style not in _WHOLE_OUTSIDE:
            raise error from None
        self.styles.pop(name, None)
        warnings.warn(f"every process keeps the whole of {error}", stacklevel=4)

    def _keep_ties(self, model: nn.Module) -> None:
        """A head that reads the embedding's weight is divided if the embedding is."""
        if not hasattr(model, "get_input_embeddings"):
            return
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        config: Any = getattr(model, "config", None)
        says = config is not None and any(
            getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())
        )
        if not isinstance(head, nn.Linear) or not (says or head.weight is embedding.weight):
            return
        names = {module: name for name, module in model.named_modules()}
        ends = {names[embedding]: EMBEDDING, names[head]: GATHERED}
        if any(self.styles.get(name) != style for name, style in ends.items()):
            for name in ends:
                self.styles.pop(name, None)

    def _check(self, name: str, module: nn.Module, style: str, parent: nn.Module) -> None:
        """
        Raises:
            LayerError: the layer is of a kind that the style is not for, or its shape cannot be divided.
        """
        if style == EXPERTS:  # their shapes are checked when they are cut
            return
        if style == EMBEDDING:
            if type(module) is not nn.Embedding:
                raise LayerError(f"{name}: a {type(module).__name__} may do more than look up rows")
            cuts.check_share(self.place, name, module.num_embeddings, "rows")
            return
        weight = getattr(module, "weight", None)
        if isinstance(module, QuantizedLinear):
            n, k = module.packed_shape
        elif (type(module) is nn.Linear or is_conv1d(module)) and isinstance(weight, Tensor):
            if is_torchao(weight):
                raise LayerError(f"{name}: is torchao's; qcompile.quantize_(model) takes it over first")
            n, k = shape_of(module)
        else:
            raise LayerError(
                f"{name}: style {style} is for linears, nn.Linear or quantized by qcompile, and this is a "
                f'{type(module).__name__}; leave it whole: plan={{"{name}": "{REPLICATE}"}}'
            )
        if style in (ROWWISE, SPLIT):
            cuts.check_share(self.place, name, k, "input features", _unit(parent, k) if style == ROWWISE else 1)
        elif style == PACKED:
            cuts.check_share(self.place, name, n, "output features", 2)
        else:
            cuts.check_share(self.place, name, n, "output features", _unit(parent, n) if style == COLWISE else 1)

    def divide(self, model: nn.Module) -> None:
        """Keep this process's part of a model that is in memory, in place.

        Raises:
            LayerError: see `parallelize`.
        """
        for name, style in list(self.styles.items()):
            module = model.get_submodule(name)
            if isinstance(module, QuantizedLinear):
                part = self.linear(name, module.linear(), module.codes.device)
                model.set_submodule(name, part.train(module.training))
            elif isinstance(module, QuantizedExperts):
                model.set_submodule(name, self._divided(name, module).train(module.training))
            elif style != EXPERTS:
                for attribute, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, attribute, self.parameter(f"{name}.{attribute}", parameter))
        for name in self.vectors:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, self.parameter(name, model.get_parameter(name)))
        self.finish(model)

    def linear(self, name: str, whole: PackedLinear, device: torch.device) -> QuantizedLinear:
        """This process's part of a quantized linear on a device, or the whole where the plan does not divide it.

        Raises:
            LayerError: a weight that cannot be divided so.
        """
        style = self.styles.get(name)
        if style is not None:
            try:
                divide = self._rowwise if style in (ROWWISE, SPLIT) else self._columnwise
                return divide(name, style, whole, device)
            except LayerError as error:
                self._keep_whole(name, style, error)
        return QuantizedLinear.of(whole.to(device))

    def _columnwise(self, name: str, style: str, whole: PackedLinear, device: torch.device) -> QuantizedLinear:
        own = cuts.rows(self.place, name, whole, 2 if style == PACKED else 1).to(device)
        if style != GATHERED:
            return QuantizedLinear.of(own)
        part = GatheredQuantizedLinear.of(own)
        part.place = self.place
        return part

    def _rowwise(self, name: str, style: str, whole: PackedLinear, device: torch.device) -> QuantizedLinear:
        weight, scheme = whole.weight, whole.weight.scheme
        if scheme.rotated and whole.pre_quant_scale is not None:
            raise LayerError(f"{name}: inputs that are scaled and then turned cannot be divided; leave the layer whole")
        first, last = self.place.part(weight.shape[1])
        features = None
        if weight.perm is not None:
            features = weight.perm[first:last].to(device, torch.int64)
        elif scheme.rotated or style == SPLIT:
            features = torch.arange(first, last, device=device)
        own = cuts.columns(self.place, name, whole).to(device)
        return RowwiseQuantizedLinear.of(
            own.with_weight(replace(own.weight, scheme=replace(own.weight.scheme, rotated=False))),
            place=self.place,
            features=features,
            gathers=scheme.arranges_inputs and style == ROWWISE,
            turns=scheme.rotated,
        )

    def _divided(self, name: str, whole: QuantizedExperts) -> QuantizedExperts:
        if self.styles[name] != EXPERTS:
            return whole
        projections = {}
        for projection in (*whole.first, "down_proj"):
            layer = whole.get_submodule(projection)
            assert isinstance(layer, GroupedLinear)
            linears = (layer.linear(index) for index in range(layer.experts))  # one unpacked at a time
            own = self.experts(name, projection, linears, bool(whole.gating.experts.is_concatenated))
            projections[projection] = GroupedLinear.of(own, f"{name}.{projection}")
        return self.joined(name, projections, whole.gating)

    def experts(
        self, name: str, projection: str, whole: Iterable[PackedLinear], concatenated: bool
    ) -> list[PackedLinear]:
        """This process's part of each expert in one projection, or the whole where the plan does not divide them.

        Args:
            name: of the module of experts.
            projection, concatenated: see `cuts.expert`.

        Raises:
            LayerError: a weight that cannot be divided so.
        """
        if self.styles.get(name) != EXPERTS:
            return list(whole)
        return [cuts.expert(self.place, f"{name}.{projection}", one, projection, concatenated) for one in whole]

    def joined(self, name: str, projections: Mapping[str, GroupedLinear], gating: Gating) -> QuantizedExperts:
        """The module of what `experts` gave."""
        if self.styles.get(name) != EXPERTS:
            return QuantizedExperts(projections, gating)
        part = PartOfExperts(projections, gating)
        part.place = self.place
        return part

    def parameter(self, name: str, whole: Tensor) -> nn.Parameter:
        """This process's part of a parameter of a layer that is not quantized.

        One that several layers have is divided once.
        """
        if whole not in self._parts:
            self._parts[whole] = nn.Parameter(self.cut(name, whole.detach()), requires_grad=whole.requires_grad)
        part: nn.Parameter = self._parts[whole]
        return part

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's part, in memory of its own, of a parameter of a layer that is not quantized.

        The whole itself if it is not divided.
        """
        if name in self.vectors:
            return cuts.piece(self.place, whole, 0)
        owner, _, attribute = name.rpartition(".")
        style = self.styles.get(owner)
        if style in (None, EXPERTS) or (attribute == "bias" and style in (ROWWISE, SPLIT)):
            return whole
        by_rows = style not in (ROWWISE, SPLIT)
        dim = 0 if attribute == "bias" or by_rows != (owner in self._transposed) else 1
        return cuts.piece(self.place, whole, dim, 2 if style == PACKED else 1)

    def finish(self, model: nn.Module) -> None:
        """Put modules that know how a part is used in the place of those that are not quantized and were cut.

        And leave of the scales of KV caches those of this process's heads.
        """
        for name, style in self.styles.items():
            module = model.get_submodule(name)
            if not isinstance(module, (PackedModule, QuantizedExperts)) and style != EXPERTS:
                model.set_submodule(name, self._plain(module, style).train(module.training))
        for name, module in model.named_modules():
            scales: Any = getattr(module, "kv_scales", None)
            if scales is not None and self.styles.get(f"{name}.k_proj") == COLWISE:
                own = {field: cuts.piece(self.place, t, 0) for field, t in vars(scales).items() if t.dim()}
                module.kv_scales = replace(scales, **own)

    def _plain(self, module: nn.Module, style: str) -> nn.Module:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        part: Any
        if style == EMBEDDING:
            part = VocabularyEmbedding(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
        else:
            if is_conv1d(module):
                weight = nn.Parameter(weight.t(), requires_grad=weight.requires_grad)
            n, k = weight.shape
            kind = {GATHERED: GatheredLinear, ROWWISE: RowwiseLinear, SPLIT: RowwiseLinear}.get(style, nn.Linear)
            part = kind(k, n, bias=module.bias is not None, device="meta", dtype=weight.dtype)
            part.bias = module.bias
            part.splits = style == SPLIT
        part.weight, part.place = weight, self.place
        return part


def _checked(mesh: Any) -> DeviceMesh:
    """
    Raises:
        ConfigError: no mesh of one dimension.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ConfigError(
            'mesh is a DeviceMesh of one dimension, as init_device_mesh("cuda", (2,)) makes it (of a larger one: '
            f'mesh["tp"]), not {shown(mesh)}'
        )
    return mesh


def place_in(mesh: DeviceMesh) -> Place:
    """This process's place in a mesh.

    Raises:
        ConfigError: no mesh of one dimension.
    """
    checked = _checked(mesh)
    group = checked.get_group()
    direct = checked.device_type == "cuda" and checked.size() > 1 and share(group, device_of(mesh))
    return Place(checked.get_local_rank(), checked.size(), str(group.group_name), direct)


def device_of(mesh: DeviceMesh) -> torch.device:
    """A process's own device of a mesh."""
    kind = _checked(mesh).device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def check_device(device: torch.device, mesh: DeviceMesh) -> None:
    """
    Raises:
        ConfigError: the processes of the mesh tell each other nothing that is on such a device.
    """
    kind = _checked(mesh).device_type
    if device.type != kind:
        raise ConfigError(f"the model is on {device}, and its mesh is of {kind}; move it there, or take another mesh")


def _unit(parent: nn.Module, extent: int) -> int:
    """How many features of a linear in an attention module are a head's."""
    head = getattr(parent, "head_dim", None)
    return head if isinstance(head, int) and head > 0 and extent % head == 0 else 1
