"""`qcompile.load`: a model from a quantized checkpoint, its codes as they are on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcompile import memory
from qcompile.checkpoint.experts import Experts, tensors_under
from qcompile.checkpoint.kv_scales import is_kv_scale, kv_scales
from qcompile.checkpoint.method import LayerTensors, Method
from qcompile.checkpoint.source import Source, check_installed, open_checkpoint
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError, ConfigError, DeviceError, LayerError, shown, suggestion
from qcompile.experts import QuantizedExperts, expert_modules
from qcompile.linears import linear_modules, quantize_inputs, shape_of
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.parallel import Sharding, check_device, device_of, place_in
from qcompile.progress import track
from qcompile.reference import dequantize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NEEDLESS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that old checkpoints hold and models compute."""


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    activation: Mapping[str, Any] | None = None,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """A model from a checkpoint, quantized or not, for inference.

    Linear layers that the checkpoint holds quantized become `QuantizedLinear` with the very codes and scales of the
    file. Tensors are read one after another: the peak of memory is the result and one layer. Compile the result with
    `torch.compile(model, backend="qcompile")`.

    Args:
        path: a folder with config.json and safetensors files, a .gguf file, or (with `model`) a .safetensors file.
        model: modules to fill, with parameters of any content, also on the meta device; by default made by
            transformers from the checkpoint's config.json (or a GGUF file's metadata).
        device: where the tensors go; by default to the CPU, or to this process's device of `mesh`.
        dtype: of what is not quantized; by default what the configuration says, or else bfloat16.
        activation: how inputs of linears whose weights alone are quantized, to integers, are quantized too (by default
            not at all): `{"format": "int8"}` for a scale a token, with `"granularity": "group"` for one a group of the
            weight, as llama.cpp multiplies GGUF types.
        mesh: the processes that share the model, each of which calls this and keeps its part of each layer, as
            `qcompile.parallelize` divides them.
        plan: how, where transformers does not say so; see `qcompile.parallelize`.
        progress: show a progress bar on a terminal.

    Returns:
        the model, in evaluation mode, without gradients.

    Raises:
        CheckpointError: a file that is missing, damaged, hostile or of an unknown kind; names the file and tensor.
        ConfigError: a dtype that is none, or that the method cannot compute in; a mesh or plan that cannot be.
        LayerError: a layer that the processes of the mesh cannot divide.
        DeviceError: an unknown device, or a GPU where there is none.
    """
    if plan is not None and mesh is None:
        raise ConfigError("a plan divides layers among processes: pass their mesh=init_device_mesh(...) too")
    device = _device(device or ("cpu" if mesh is None else device_of(mesh)))
    if mesh is not None:
        check_device(device, mesh)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is what torch computes in, such as torch.bfloat16, not {shown(dtype)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"{path} was to be loaded to {device}, and torch sees no GPU here; choose cpu")
    source = open_checkpoint(path)
    if model is None:
        if source.config is None:
            raise CheckpointError(
                f"{path}: no config.json says what its modules are; give them: qcompile.load(path, model=...)"
            )
        dtype = dtype or getattr(source.config, "dtype", None) or torch.bfloat16
        model = skeleton(source.config, dtype)
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.bfloat16)
    sharding = None if mesh is None else Sharding(model, place_in(mesh), plan)
    fill(model, source, device, dtype, sharding=sharding, progress=progress)
    if activation is not None:
        quantize_inputs(model, activation)
    if hasattr(model, "name_or_path"):
        model.name_or_path = str(path)  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


def _device(given: str | torch.device) -> torch.device:
    try:
        return torch.device(given)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device {shown(given)} is unknown; {suggestion(given, ('cpu', 'cuda', 'meta'))}") from None


def skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """transformers' model for a configuration: parameters on the meta device, buffers computed."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    known = next((c for name in names if (c := getattr(transformers, name, None)) is not None), None)
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with _parameters_on_meta():
        build = transformers.AutoModelForCausalLM.from_config if known is None else known._from_config
        model: nn.Module = build(plain, dtype=dtype)
    return model


def skeleton_of(path: Path) -> nn.Module:
    """The model that a file describes, in bfloat16, with parameters on the meta device; no weights are read.

    Args:
        path: a folder with a `config.json`, such a file, or a GGUF file.

    Raises:
        CheckpointError: something else, or no description that transformers makes a language model of.
    """
    check_installed(path)
    import transformers

    if path.suffix == ".gguf":
        from qcompile.checkpoint.gguf import gguf_source

        return skeleton(gguf_source(path, decode=True).config, torch.bfloat16)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".json":
        raise CheckpointError(
            f"{path}: there is no config.json; name a model's folder, its config.json, or a GGUF file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(file, trust_remote_code=False)
        return skeleton(config, torch.bfloat16)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: transformers makes no language model of it: {error}") from None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def fill(
    model: nn.Module,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sharding: Sharding | None = None,
    progress: bool = True,
) -> None:
    """Give every parameter and buffer of a model what the checkpoint holds for it, and quantized linears their codes.

    Args:
        sharding: what of them this process keeps; None for all.

    Raises:
        CheckpointError, LayerError: see `load`.
    """
    if source.method is not None:
        _check_supported(source.method, device, dtype)
    used: set[str] = set()
    _fill(model, source, device, dtype, used, lambda _: True, sharding, progress=progress)
    _finish(model, source.store, used)
    if sharding is not None:
        sharding.finish(model)


class Pending:
    """Blocks of a model on the meta device that get their parameters when their turn comes.

    Attributes:
        blocks: names of the modules that wait.
    """

    def __init__(
        self, model: nn.Module, source: Source, device: torch.device, dtype: torch.dtype, blocks: Iterable[str]
    ) -> None:
        self._model, self._source, self._device, self._dtype = model, source, device, dtype
        self._used: set[str] = set()
        self.blocks = list(blocks)
        waiting = tuple(f"{name}." for name in self.blocks)
        self._read(lambda name: not name.startswith(waiting))

    def fill(self, block: str) -> None:
        """Read a block's parameters, if they wait.

        Raises:
            CheckpointError: see `load`.
        """
        if block not in self.blocks:
            return
        self._read(lambda name: name.startswith(f"{block}."))
        self.blocks = [name for name in self.blocks if name != block]
        if not self.blocks:
            _finish(self._model, self._source.store, self._used)

    def peek(self, name: str) -> Tensor:
        """A parameter that waits, as its file has it, mapped into memory; empty if it has another name there."""
        store = self._source.store
        return store.read(name) if name in store.names() else torch.empty(0)

    def _read(self, within: Callable[[str], bool]) -> None:
        _fill(self._model, self._source, self._device, self._dtype, self._used, within, progress=False)


def load_pending(
    path: str | Path, blocks: Callable[[nn.Module], Iterable[str]], device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, Pending]:
    """A model of a checkpoint that is not quantized, for inference, whose blocks wait for their parameters.

    Args:
        blocks: names of a model's modules that shall wait.
        dtype: by default what the configuration says, or else bfloat16.

    Raises:
        CheckpointError: see `load`; a checkpoint that is quantized, or says not what its modules are.
    """
    source = open_checkpoint(path)
    if source.method is not None:
        raise CheckpointError(f"{path}: is quantized already; take the original, or `qcompile convert` this one")
    if source.config is None:
        raise CheckpointError(f"{path}: no config.json says what its modules are")
    dtype = dtype or getattr(source.config, "dtype", None) or torch.bfloat16
    model = skeleton(source.config, dtype).requires_grad_(False).eval()
    pending = Pending(model, source, device, dtype, blocks(model))
    model.name_or_path = str(path)  # type: ignore[assignment]
    return model, pending


def _fill(
    model: nn.Module,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    used: set[str],
    within: Callable[[str], bool],
    sharding: Sharding | None = None,
    *,
    progress: bool,
) -> None:
    """Give what is `within` what the checkpoint holds for it; what was read is added to `used`."""
    store, method = source.store, source.method
    linears = linear_modules(model) if method else {}
    for name, module in track([entry for entry in linears.items() if within(entry[0])], "Loading", progress):
        tensors = LayerTensors(store, name)
        assert method is not None
        try:
            found = method.linear(tensors, shape_of(module))
        except LayerError as error:
            raise CheckpointError(f"{store.path}: {error}") from None
        if isinstance(found, Tensor):
            weight = found if type(module) is nn.Linear else found.t()
            weight = _part(weight, f"{name}.weight", sharding).to(device, dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
            used |= tensors.taken
        elif found is not None:
            model.set_submodule(name, _quantized(found, module, tensors, device, dtype, sharding))
            used |= tensors.taken
            _check_rest(tensors)
    experts = {name: module for name, module in expert_modules(model).items() if within(name)}
    tensors_of = tensors_under(store, experts)
    for name in track(list(experts), "Loading experts", progress):
        reader = Experts(name, experts[name], store, tensors_of[name], method)
        loaded = reader.load(device, dtype, sharding)
        if isinstance(loaded, QuantizedExperts):
            model.set_submodule(name, loaded)
        else:
            for attribute, value in loaded.items():
                setattr(experts[name], attribute, nn.Parameter(value, requires_grad=False))
        for tensors in (reader.whole, *reader.layers):
            used |= tensors.taken
        for tensors in reader.layers:
            _check_rest(tensors)
    memory.give_back()
    if method is not None:
        _load_embeddings(model, method, store, used, device, dtype, sharding)
    _load_plain(model, store, used, device, dtype, within, sharding)
    memory.give_back()


def _finish(model: nn.Module, store: TensorStore, used: set[str]) -> None:
    """What belongs to no parameter: scales of KV caches; the rest is warned of."""
    for name, scales in kv_scales(store, used).items():
        if name in dict(model.named_modules()):
            model.get_submodule(name).kv_scales = scales  # type: ignore[assignment]
    left = [n for n in store.names() if n not in used and not is_kv_scale(n) and not n.endswith(_NEEDLESS)]
    if left:
        warnings.warn(
            f"{store.path}: the model has no place for {len(left)} tensors: {', '.join(left[:5])}"
            + (", ..." if len(left) > 5 else ""),
            stacklevel=4,
        )


def _check_supported(method: Method, device: torch.device, dtype: torch.dtype) -> None:
    """Enforce what a method says of itself.

    Raises:
        ConfigError: a dtype or a GPU that it cannot compute with.
    """
    if dtype not in method.activation_dtypes:
        names = ", ".join(map(str, method.activation_dtypes))
        raise ConfigError(f"{method.name} models cannot compute in {dtype}; pass dtype=, one of {names}")
    if device.type == "cuda" and torch.version.cuda is not None:
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < method.min_capability:
            least = f"{method.min_capability // 10}.{method.min_capability % 10}"
            raise ConfigError(
                f"{method.name} models need a GPU of compute capability {least}, and {device} has {major}.{minor}"
            )


def _quantized(
    found: PackedLinear,
    module: nn.Module,
    tensors: LayerTensors,
    device: torch.device,
    dtype: torch.dtype,
    sharding: Sharding | None,
) -> QuantizedLinear:
    found.weight.check(tensors.name)
    bias = None
    if module.bias is not None or "bias" in tensors:
        floats = (torch.float32, torch.bfloat16, torch.float16)
        bias = tensors.take("bias", *floats, shape=(found.weight.shape[0],)).to(dtype)
    whole = replace(found, bias=bias, dtype=dtype)
    return QuantizedLinear.of(whole.to(device)) if sharding is None else sharding.linear(tensors.name, whole, device)


def _load_embeddings(
    model: nn.Module,
    method: Method,
    store: TensorStore,
    used: set[str],
    device: torch.device,
    dtype: torch.dtype,
    sharding: Sharding | None,
) -> None:
    """Token embeddings that are quantized, as torchao's may be: decoded, since their rows are looked up."""
    plain = set(store.names())
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or f"{name}.weight" in plain:
            continue
        tensors = LayerTensors(store, name)
        rows, columns = module.weight.shape
        found = method.linear(tensors, (rows, columns)) if tensors.suffixes() else None
        if found is None:
            continue
        weight = found if isinstance(found, Tensor) else dequantize(found.weight, dtype)
        weight = _part(weight, f"{name}.weight", sharding)
        module.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        used |= tensors.taken


def _check_rest(tensors: LayerTensors) -> None:
    """A tensor of a quantized layer that nobody read may be one that changes what the others mean."""
    full = {f"{tensors.name}.{suffix}": suffix for suffix in tensors.suffixes()}
    rest = [suffix for name, suffix in full.items() if name not in tensors.taken and not is_kv_scale(name)]
    if rest:
        raise tensors.error(f"nothing reads its {', '.join(rest)}; this variant of the format is unknown")


def _load_plain(
    model: nn.Module,
    store: TensorStore,
    used: set[str],
    device: torch.device,
    dtype: torch.dtype,
    within: Callable[[str], bool],
    sharding: Sharding | None,
) -> None:
    """Parameters and buffers that are not quantized; those that are tied share what was loaded."""
    known = set(store.names()) - used
    quantized = {n + "." for n, m in model.named_modules() if isinstance(m, PackedModule)}
    names = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
    missing = []
    for name in names:
        if not within(name) or any(name.startswith(prefix) for prefix in quantized):
            continue
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        current: Tensor = getattr(module, attribute)
        if name not in known:
            if current.is_meta:
                missing.append(name)
            else:
                setattr(module, attribute, _like(current, current.to(device)))
            continue
        info = store.info(name)
        if info.shape != tuple(current.shape):
            raise CheckpointError(f"{info.file}: {name} has shape {info.shape}, the model's is {tuple(current.shape)}")
        if info.dtype.is_floating_point and info.dtype.itemsize == 1:
            raise CheckpointError(
                f"{info.file}: {name} is {info.dtype}, but its module is none that qcompile reads quantized"
            )
        target = dtype if current.is_floating_point() else current.dtype
        whole = store.copy(name, device if sharding is None else torch.device("cpu"), target)
        setattr(module, attribute, _like(current, _part(whole, name, sharding).to(device)))
        used.add(name)
    tie = getattr(model, "tie_weights", None)
    if missing and callable(tie):
        tie()
        missing = [n for n in missing if _tensor(model, n).is_meta]
    if missing:
        raise CheckpointError(
            f"{store.path}: has nothing for {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; the file is "
            "incomplete, or of another model"
        )


def _part(whole: Tensor, name: str, sharding: Sharding | None) -> Tensor:
    """What this process keeps of a parameter."""
    return whole if sharding is None else sharding.cut(name, whole)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), attribute)
    return found


def _like(current: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(current, nn.Parameter) else new
