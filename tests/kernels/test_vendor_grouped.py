"""Torch's own products with stacks of experts in place of ours: what they take, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.codegen.spec import GroupedSpec
from qcompile.flags import override
from qcompile.presets import preset
from qcompile.reference import quantize_activation
from qcompile.runtime import cache, gpu_grouped, measure, tuning, vendor_grouped
from tests.kernels.test_grouped import GATES, SMALL, Problem, fitted, problem
from tests.triton_interpreter import interpret

BF16 = torch.bfloat16
VENDORED = [
    *(("decode_grouped_mm", name) for name in ("int4", "int4_asym", "mxfp4", "nf4", "int4_fp8", "fp8_weight_only")),
    *(("scaled_grouped_mm", name) for name in ("fp8", "fp8 tensor")),
]
COUNTS = [5, 0, 3, 30]


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def kernel_of(given: Problem, out_dtype: torch.dtype = BF16, target: str = "sm_90") -> GroupedSpec:
    activation = given.spec.scheme.activation
    x_dtype = given.x.dtype if activation is None else activation.format.native_dtype
    assert x_dtype is not None
    return given.kernel(target, SMALL, x_dtype, out_dtype)


def run(name: str, given: Problem, device: str = "cpu") -> Tensor:
    """A path's product, with its scales and the bias."""
    kernel, activation = kernel_of(given), given.spec.scheme.activation
    assert vendor_grouped.objection(name, kernel) is None
    x, x_scale = (given.x, None) if activation is None else quantize_activation(given.x, activation)
    x_scale, bias = (None if t is None else t.to(device) for t in (x_scale, given.bias))
    chosen = tuning.Chosen(kernel=kernel, vendor=name, origin="")
    arguments = x.to(device), x_scale, given.offsets.to(device), given.packed.to(device), bias, given.spec
    return gpu_grouped.execute(chosen, *arguments, interpret if device == "cpu" else lambda function: function)


def scaled_grouped_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """Stands for torch's on CPUs, which have none: checked as on GPUs, and multiplied expert by expert."""
    assert options == {"out_dtype": BF16, "use_fast_accum": False}
    y = REAL(*(t.to("meta") for t in (a, b, scale_a, scale_b)), offs=offs.to("meta"), **options).new_empty(
        (len(a), b.shape[2]), device="cpu"
    )
    first = 0
    for index, end in enumerate(offs.tolist()):
        product = a[first:end].float() @ b[index].float()
        y[first:end] = product * scale_a[first:end, None] * scale_b[index]
        first = end
    return y


REAL = torch._scaled_grouped_mm


@pytest.mark.parametrize("gate", ["", *GATES])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("path", "name"), VENDORED)
def test_products(path: str, name: str, bias: bool, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    given = problem(fitted(name, (80, 256)), COUNTS, 80, 256, bias=bias, gate=gate)
    given.check(run(path, given), BF16, between=BF16)


def test_no_rows() -> None:
    for path, name in (VENDORED[0], VENDORED[-1]):
        assert run(path, problem(fitted(name, (80, 256)), [0, 0], 80, 256)).shape == (0, 80)


def objections(name: str, shape: tuple[int, int] = (80, 256), **changed: Any) -> list[str | None]:
    """What each path says of a scheme, or of a kernel some of whose fields are changed."""
    kernel = replace(kernel_of(problem(fitted(name, shape), [1], *shape)), **changed)
    return [vendor_grouped.objection(path, kernel) for path in vendor_grouped.PATHS]


def test_objections_name_what_is_in_the_way() -> None:
    rows, fragments = "codes are not in fragments", "weights and activations are not both e4m3"
    assert objections("fp8") == [None, rows]
    assert objections("int4") == [fragments, None]
    assert objections("int8") == [fragments, rows]
    assert objections("fp8_block")[0] == "a scale is of less than a row"
    assert objections("fp8", target="sm_100")[0] == "not for sm_100"
    assert objections("fp8", out_dtype="float16")[0] == "float16 output"
    assert objections("fp8", (72, 256))[0] == "K or N is no multiple of 16"
    assert objections("fp8", rows=16)[0] == "a scale is of several rows"
    assert objections("int4", x_dtype="float16")[1] == "activations or output are not bfloat16"
    assert objections("int4", target="sm_89")[1] == "not for sm_89"
    assert objections("int4", (76, 256))[1] == "K or N is no multiple of 8"
    assert objections("int4", experts=60000)[1] == "the decoded stack takes more than 2147483648 bytes"
    assert objections("int4", activation_scale="group")[1] == "activations have a scale a group"


def pick(name: str, m: int, shape: tuple[int, int] = (4096, 14336)) -> str:
    """What runs a stack like Mixtral's, without tables."""
    given = measure.job(name, preset(name), shape, m, BF16, experts=8)
    activation = given.spec.scheme.activation
    x_dtype = BF16 if activation is None else activation.format.native_dtype
    assert x_dtype is not None
    return tuning.choose(given.spec, m, x_dtype, BF16, "sm_90", experts=8).name


def test_without_tables_a_stack_is_multiplied_by_what_is_predicted_fastest() -> None:
    assert pick("int4", 64) == pick("nf4", 256) == "gemm_grouped"
    assert pick("nf4", 4096) == "decode_grouped_mm"
    assert pick("fp8", 16) == pick("fp8_block", 4096) == pick("int8", 4096) == "gemm_grouped_rows8"
