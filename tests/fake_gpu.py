"""Make Inductor generate code for a GPU that is not there: an sm_90 device of fake tensors. Nothing is launched.

It replaces functions of torch for good, so it runs in a process of its own: `python -m tests.fake_gpu PRESET static`
(or `dynamic`) compiles RMSNorm and a quantized linear with an epilogue, of the M, N and K that follow, or if `experts`
follows, those of a mixture (by torch's products if `torch` follows that), or if `mlp` follows, a gated one, or for
`quantize` and what comes before it (`BEFORE`) three linears that share a quantization. It prints the calls of the
generated wrapper. Several such are divided by `and`, and their calls by an empty line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._dynamo import device_interface
from torch._subclasses.fake_tensor import FakeTensorMode


class Properties:
    """Of an H100, as far as Inductor asks."""

    name, major, minor, warp_size, gcnArchName = "fake sm_90", 9, 0, 32, ""
    total_memory, multi_processor_count, L2_cache_size = 80 << 30, 132, 50 << 20
    max_threads_per_multi_processor, max_threads_per_block, regs_per_multiprocessor = 2048, 1024, 65536
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472


class Interface(device_interface.CudaInterface):
    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: Properties)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    set_device = staticmethod(lambda device: None)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_dtype_supported = staticmethod(lambda dtype, including_emulation=False: True)
    get_device_properties = staticmethod(lambda device=None: Properties)
    synchronize = staticmethod(lambda device=None: None)
    get_raw_stream = staticmethod(lambda index: 0)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)


class Driver:
    """Triton's view of the device."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_current_device = lambda *_: 0
        self.get_current_stream = lambda *_: 0
        self.get_active_torch_device = lambda: torch.device("cuda:0")
        self.get_device_interface = lambda: torch.cuda
        self.get_device_capability = lambda *_: (9, 0)
        self.set_current_device = lambda *_: None


class Generated(Exception):
    """Carries the wrapper's source out of Inductor."""


_python_getitem = torch.Tensor.__getitem__


def _getitem(self: torch.Tensor, key: object) -> torch.Tensor:
    """Indexing without the switch to the device that Python's indexing makes."""
    if self.device.type != "cuda":
        return _python_getitem(self, key)
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * (self.dim() - taken)
    found, dim, tensors = self, 0, []
    for part in parts:
        if isinstance(part, int):
            found = found.select(dim, part)
            continue
        if part is None:
            found = found.unsqueeze(dim)
        elif isinstance(part, slice) and part != slice(None):
            found = torch.ops.aten.slice(found, dim, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, torch.Tensor) else None)
        dim += 1
    return torch.ops.aten.index.Tensor(found, tensors) if any(t is not None for t in tensors) else found


def install() -> None:
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch.utils._triton as torch_triton
    import triton
    from torch._inductor.graph import GraphLowering

    device_interface.init_device_reg()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)
    torch.cuda.get_device_properties = lambda device=None: Properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch_triton.has_triton = torch_triton.has_triton_package = lambda *_, **__: True
    triton.runtime.driver.set_active(Driver())
    # Both would run small tensors on the device.
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None
    torch.Tensor.__getitem__ = _getitem
    torch.Tensor.copy_ = lambda self, source, non_blocking=False: torch.ops.aten.copy_(self, source, non_blocking)
    inductor_config.joint_graph_constant_folding = False
    inductor_config.force_disable_caches = True
    inductor_config.compile_threads = 1

    def stop(self: GraphLowering) -> None:
        raise Generated(self.codegen()[0].value)

    GraphLowering.compile_to_module = GraphLowering._compile_to_module = stop


def _linear(preset: str, n: int, k: int, *steps: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The spec of a linear, and its packed weight's tensors."""
    import qcompile.ops  # noqa: F401
    from qcompile.layouts import choose_layout
    from qcompile.linear_spec import LinearSpec
    from qcompile.presets import PRESETS
    from qcompile.reference import quantize_weight

    scheme = PRESETS[preset].fit("linear", (n, k))
    layout = choose_layout(scheme, (n, k), "cuda")
    packed = layout.pack(quantize_weight(torch.randn(n, k), scheme.weight))
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout.name, epilogue=steps)
    return spec, packed.tensors


def _fakes(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The like on the device that is not there."""
    return [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers writes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


BEFORE: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, other, weight: (torch.nn.functional.rms_norm(x, x.shape[-1:], weight),),
    "layer_norm": lambda x, other, weight: (torch.nn.functional.layer_norm(x, x.shape[-1:], weight, weight),),
    "residual": lambda x, other, weight: (lambda sum: (_rms_norm(sum, weight), sum))(x + other),
    "silu": lambda x, other, weight: (torch.nn.functional.silu(x) * other,),
}
"""What activations come from; first the activations themselves."""


def quantize_source(preset: str, dynamic: bool, before: str, m: int = 7, k: int = 512) -> str:
    """Three linears that read one quantization of what `BEFORE` returns, as `share_quantization` writes them."""
    linears = [_linear(preset, n, k) for n in (128, 192, 256)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, other = (torch.empty(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight, scale = torch.empty(k, device="cuda", dtype=torch.bfloat16), torch.empty((), device="cuda")
        activation = linears[0][0].scheme.activation
        reading = [(spec.reading_codes_of(x.dtype).encode(), _fakes(tensors)) for spec, tensors in linears]
        quantizing = linears[0][0].encode()

        def run(x: torch.Tensor, other: torch.Tensor) -> Any:
            y, *more = BEFORE[before](x, other, weight)
            codes, scales = torch.ops.qcompile.quantize(y, None if activation.dynamic else scale, quantizing)
            multiply = torch.ops.qcompile.linear
            return [multiply(codes, tensors, None, scales, None, [], spec) for spec, tensors in reading] + more

        if dynamic:
            for tensor in (x, other):
                torch._dynamo.mark_dynamic(tensor, 0)
        return generated(run, x, other)


def mlp_source(preset: str, dynamic: bool, m: int = 7, n: int = 512, k: int = 256) -> str:
    """RMSNorm, gate and up as one linear, and the linear after them, which takes codes if its scale is static."""
    down, down_weight = _linear(preset, k, n // 2)
    static = down.scheme.activation is not None and not down.scheme.activation.dynamic
    stored = (f"to_{down.scheme.activation.format.name}",) if static else ()
    up, up_weight = _linear(preset, n, k, "silu(a)*b", *stored)
    if static:
        down = down.reading_codes_of(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = _fakes(up_weight), _fakes(down_weight)
        x, scale = torch.empty(m, k, device="cuda", dtype=torch.bfloat16), torch.empty((), device="cuda")
        scales, specs = scale if static else None, (up.encode(), down.encode())

        def run(x: torch.Tensor) -> torch.Tensor:
            normed = torch.nn.functional.rms_norm(x, (k,))
            multiply = torch.ops.qcompile.linear
            y = multiply(normed, weights[0], None, scales, None, [scale] * static, specs[0])
            return multiply(y, weights[1], None, scales, None, [], specs[1])

        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        return generated(run, x)


def wrapper_source(preset: str, dynamic: bool, m: int = 7, n: int = 256, k: int = 512) -> str:
    """Inductor's Python wrapper for `linear(rms_norm(x)).silu() * gate` with weights of a preset."""
    linear, tensors = _linear(preset, n, k, "silu", "mul")
    spec = linear.encode()

    def run(x: torch.Tensor, gate: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(x, (k,))
        return torch.ops.qcompile.linear(normed, list(weight), None, None, None, [gate], spec)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, gate = (torch.empty(m, width, device="cuda", dtype=torch.bfloat16) for width in (k, n))
        if dynamic:
            for tensor in (x, gate):
                torch._dynamo.mark_dynamic(tensor, 0)
        return generated(run, x, gate, *_fakes(tensors))


def generated(run: Callable[..., torch.Tensor], *inputs: Any, backend: str = "inductor") -> str:
    """The source of Inductor's wrapper for a function of fake tensors."""
    torch._dynamo.reset()
    try:
        torch.compile(run, fullgraph=True, backend=backend)(*inputs)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, Generated):
            found = getattr(found, "inner_exception", None) or found.__cause__ or found.__context__
        if found is None:
            raise
        return str(found)
    raise AssertionError("Inductor generated nothing")


def experts_source(preset: str, dynamic: bool, by_torch: bool) -> str:
    """Inductor's wrapper for the experts of a small Mixtral; `by_torch` chooses products of torch's."""
    from qcompile.experts import GroupedLinear, quantize_experts
    from qcompile.layouts import to_layout
    from qcompile.presets import PRESETS
    from qcompile.runtime import tuning
    from tests.checkpoint.moe_files import make_moe

    if by_torch:
        tuning.predicted = lambda like, m: tuning.vendors(like, m)[0]
    experts = quantize_experts("experts", make_moe("mixtral").model.layers[0].mlp.experts, PRESETS[preset])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for projection in experts.modules():
            if isinstance(projection, GroupedLinear):
                packed = to_layout(projection.logical(), projection._layout_on("cuda"))
                fake = packed.map(lambda _, t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
                projection._store(fake)
        x = torch.empty(7, 64, device="cuda", dtype=torch.bfloat16)
        chosen = torch.empty(7, 2, device="cuda", dtype=torch.int64)
        weights = torch.empty(7, 2, device="cuda", dtype=torch.bfloat16)
        if dynamic:
            for tensor in (x, chosen, weights):
                torch._dynamo.mark_dynamic(tensor, 0)
        return generated(experts, x, chosen, weights)


def calls_of(preset: str, length: str, *more: str) -> str:
    """The calls of the wrapper that the arguments of this program stand for, one a line."""
    dynamic = length == "dynamic"
    if more[:1] == ("experts",):
        source = experts_source(preset, dynamic, "torch" in more)
    elif more[:1] == ("mlp",):
        source = mlp_source(preset, dynamic, *map(int, more[1:]))
    elif more[:1] == ("quantize",):
        source = quantize_source(preset, dynamic, *more[1:])
    else:
        source = wrapper_source(preset, dynamic, *map(int, more))
    lines = [line.strip() for line in source.split("\n") if not line.strip().startswith("#")]
    called = (".run(", "= torch.ops.qcompile", "extern_kernels.")
    return "\n".join(line for line in lines if any(part in line for part in called) and "import" not in line)


if __name__ == "__main__":
    install()
    print("\n\n".join(calls_of(*job.split(" ")) for job in " ".join(sys.argv[1:]).split(" and ")))
