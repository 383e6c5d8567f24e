"""What the processes of the tests do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import qcompile
from qcompile.codegen.norm_kernel_spec import norm_kernel_spec
from qcompile.codegen.spec import dtype_name
from qcompile.exchange import Shared
from qcompile.flags import override
from qcompile.norm_spec import NormSpec
from qcompile.ops import OP
from qcompile.packed import PackedLinear
from qcompile.parallel import Sharding, device_of, place_in
from qcompile.parts import Place, RowwiseQuantizedLinear
from qcompile.runtime import norm_gpu
from qcompile.runtime.cache import load
from tests import triton_interpreter

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@torch.no_grad()
def outputs(
    model: Any,
    *,
    compiled: bool = False,
    config: Any = None,
    mode: str | None = None,
    kv: str | None = None,
) -> dict[str, Any]:
    """Logits [2, 8, V] and the tokens that greedy decoding goes on with, on the CPU; and what the model is.

    Args:
        config: by which the compiler quantizes.
        kv: a format for the cache of decoding.
    """
    ids = IDS.to(next(model.parameters()).device)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if kv is not None:
        options["past_key_values"] = qcompile.TransformersCache(model, kv, max_cache_len=16)
    tokens = model.generate(ids, **options)[:, ids.shape[1] :]
    run = model
    if compiled:
        torch.compiler.reset()
        given = {} if config is None else {"config": config}
        run = torch.compile(model, backend="qcompile", fullgraph=True, mode=mode, options=given or None)
        for _ in range(2 if mode else 0):  # until CUDA graphs are recorded
            run(ids, use_cache=False)
    logits = run(ids, use_cache=False).logits.cpu()
    found = {"logits": logits, "tokens": tokens.cpu(), "bytes": stored_bytes(model), "text": str(model)}
    return found | ({} if kv is None else {"heads": options["past_key_values"].layers[0].keys.shape[1]})


def stored_bytes(model: nn.Module) -> int:
    """Of memory that the model keeps, each once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def loaded(mesh: DeviceMesh, path: Path, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """`outputs` of a checkpoint that all processes load together, and the peak of memory of a GPU meanwhile."""
    on_gpu = mesh.device_type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = qcompile.load(path, mesh=mesh, dtype=dtype, progress=False)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return outputs(model, **options) | {"peak": peak}


def loaded_to(mesh: DeviceMesh, path: Path, device: str) -> None:
    qcompile.load(path, mesh=mesh, device=device, progress=False)


def parallelized(
    mesh: DeviceMesh, model: nn.Module, plan: dict[str, str] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """`outputs` of a model that all processes have."""
    return outputs(qcompile.parallelize(model.to(device_of(mesh)), mesh, plan), **options)


def whole_module(shape: tuple[int, int]) -> nn.ModuleDict:
    """A model of one linear, "fc", without values."""
    return nn.ModuleDict({"fc": nn.Linear(shape[1], shape[0], device="meta")})


@torch.no_grad()
def layers(mesh: DeviceMesh, linears: dict[str, PackedLinear], x: Tensor, style: str) -> dict[str, Tensor]:
    """y [M, N] of each linear, divided by a style; x [M, K] is the whole input."""
    device, place = device_of(mesh), place_in(mesh)
    given = own_input(x, style, place).to(device)
    found = {}
    for name, linear in linears.items():
        sharding = Sharding(whole_module(linear.weight.shape), place, {"fc": style})
        found[name] = sharding.linear("fc", linear, device)(given).cpu()
    return found


def own_input(x: Tensor, style: str, place: Place) -> Tensor:
    """What a process is given of a whole input."""
    return x[..., slice(*place.part(x.shape[-1]))] if style == "rowwise" else x


class Parts(nn.Module):
    """A linear as the parts of `size` processes, in one: what they return together.

    Args:
        linear: the whole.
    """

    def __init__(self, linear: PackedLinear, style: str, size: int, device: torch.device) -> None:
        super().__init__()
        places = [Place(rank, size, "") for rank in range(size)]
        model = whole_module(linear.weight.shape)
        made = [Sharding(model, place, {"fc": style}).linear("fc", linear, device) for place in places]
        self.style, self.places, self.parts = style, places, nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        products = [self.product(place, part, x) for place, part in zip(self.places, self.parts, strict=True)]
        if self.style.startswith("colwise"):
            return torch.cat(products, -1)
        bias, y = self.parts[0].bias, products[0]
        for product in products[1:]:
            y = y + product
        return y if bias is None else y + bias

    def product(self, place: Place, part: Any, x: Tensor) -> Tensor:
        row = isinstance(part, RowwiseQuantizedLinear)
        if row and part.features is not None:
            x = x.index_select(-1, part.features)
        elif row:
            x = x[..., slice(*place.part(x.shape[-1]))]
        bias = None if row else part.bias
        return OP(x, part._tensors(), bias, part.input_scale, part.pre_quant_scale, [], part.spec)


def in_parts(model: nn.Module, size: int) -> nn.Module:
    """A model whose linears with inputs of other layers' parts compute as `size` processes do, in place."""
    for name, module in list(model.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            model.set_submodule(name, Parts(module.linear(), "rowwise", size, module.codes.device))
    return model


def sums(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """20 times the sum of the rows of x [size, K], of which each process has one."""
    place = place_in(mesh)
    own = x[place.rank].to(device_of(mesh))
    found = []
    for count in range(20):
        other = torch.full((1 << (count % 16),), 1.0, device=own.device, dtype=own.dtype)
        assert bool((place.add_up(other) == place.size).all())
        found.append(place.add_up(own))
    return torch.stack(found).cpu()


def norms(mesh: DeviceMesh, norm: NormSpec, x: Tensor, rest: list[Tensor | None]) -> list[list[Tensor]]:
    """20 times a norm of the sum of x [size, ..., K], of which each process has one."""
    place, device = place_in(mesh), device_of(mesh)
    given = [None if tensor is None else tensor.to(device) for tensor in (x[place.rank], *rest)]
    text = replace(norm, group=place.group).encode()
    calls = [torch.ops.qcompile.norm_quantize(*given, text) for _ in range(20)]
    return [[tensor.cpu() for tensor in call] for call in calls]


def exchanged(
    mesh: DeviceMesh, memories: list[Tensor], calls: list[tuple[NormSpec, list[Tensor], tuple[Any, ...]]], cache: Path
) -> list[list[Tensor]]:
    """Results of a norm's kernel for each (spec, x of each process, what else it takes), over memory that all share."""
    triton_interpreter.REACHED[:] = memories
    rank = mesh.get_local_rank()
    addresses = torch.tensor([memory.data_ptr() for memory in memories])
    shared = Shared(memories[rank], addresses, torch.zeros(2, dtype=torch.int32), rank)
    found = []
    with override(cache_dir=cache):
        for spec, xs, rest in calls:
            kernel = norm_kernel_spec(spec, dtype_name(xs[rank].dtype), "sm_90", mesh.size())
            function = triton_interpreter.interpret(load(kernel).kernel)
            found.append(norm_gpu.launch(kernel, function, xs[rank], *rest, shared))
    return found
