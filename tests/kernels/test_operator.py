"""What compilers see of `qcompile::gemm` when the device is a GPU: one call, without copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from qcompile.codegen.spec import Tile
from qcompile.errors import DeviceError
from qcompile.flags import override
from qcompile.presets import preset
from qcompile.runtime import cache, gpu
from tests.kernels.problems import problem
from tests.triton_interpreter import interpret


class CompileOnlyDriver:
    """Enough of a driver for Triton to lower kernels on a machine without a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(gpu, "target_of", lambda device: "sm_90")
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(CompileOnlyDriver())
    with override(cache_dir=tmp_path):
        yield
    triton.runtime.driver._active = before


@pytest.mark.parametrize(
    ("name", "layout", "m"), [("int4", "fragment", 4), ("int8", "rows8", 4), ("int4", "fragment", 1)]
)
def test_traced_product_is_one_call_that_changes_nothing(sm_90: None, name: str, layout: str, m: int) -> None:
    given = problem(preset(name).fit("layer", (128, 512)), layout, m, 128, 512, epilogue=("bias", "silu", "mul"))
    x, x_scale, weight, bias, operands = given.arguments()
    encoded = given.spec.encode()
    with FakeTensorMode():
        real = (x, x_scale, *weight.tensors, bias, *operands)
        fake = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real]

        def call(x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, operand: Tensor) -> Tensor:
            assert not gpu.torch_multiplies(given.spec, x.shape[0], x.dtype, torch.bfloat16, x.device)
            result: Tensor = torch.ops.qcompile.gemm(
                x, x_scale, [codes, scale], bias, [operand], encoded, torch.bfloat16
            )
            return result

        graph = make_fx(dispatch_functionalize(call), tracing_mode="fake")(*fake).graph
    (node,) = [node for node in graph.nodes if node.op == "call_function"]
    assert node.target is torch.ops.qcompile.gemm.default
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert output.args[0] is node
    assert node.meta["val"].shape == (m, 128)


@pytest.mark.parametrize("name", ["int3", "nf4", "nvfp4", "q4_1"])
def test_source_that_compilers_copy_is_whole(name: str, tmp_path: Path) -> None:
    """Inductor copies a kernel, its functions and its constants into a file of its own."""
    steps = ("bias", "gelu_tanh", "mul")
    given = problem(preset(name).fit("layer", (128, 256)), "fragment", 4, 128, 256, epilogue=steps)
    kernel = given.kernel("sm_90", Tile(m=16, n=64, k=64, split=2, warps=4, stages=2))
    with override(cache_dir=tmp_path):
        text = user_defined_triton_kernel_transitive_closure_source_code(cache.load(kernel).kernel)
        expected = given.interpret("sm_90", kernel.tile)
    path = tmp_path / "copied.py"
    path.write_text("import triton\nimport triton.language as tl\n" + text)
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    function = interpret(triton.jit(namespace["qcompile_gemm_fragment"]))
    y = gpu.launch(kernel, function, *given.arguments(), given.out_dtype)
    assert torch.equal(y, expected)


def test_layout_without_a_kernel_is_decoded() -> None:
    given = problem(preset("int4_asym").fit("layer", (70, 64)), "logical", 5, 70, 64, epilogue=("bias", "silu", "mul"))
    x, x_scale, weight, bias, operands = given.arguments()
    y = gpu.gemm(x, x_scale, list(weight.tensors), bias, operands, given.spec, given.out_dtype)
    given.check(y, torch.float32)


def test_unsupported_dtypes_are_refused() -> None:
    given = problem(preset("int4").fit("layer", (70, 64)), "fragment", 5, 70, 64)
    x, x_scale, weight, bias, operands = given.arguments()
    rest = (x_scale, list(weight.tensors), bias, operands, given.spec)
    with pytest.raises(DeviceError, match="float64"):
        gpu.gemm(x.double(), *rest, torch.bfloat16)
    with pytest.raises(DeviceError, match="float64"):
        gpu.gemm(x, *rest, torch.float64)
