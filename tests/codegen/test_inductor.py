"""What Inductor makes of a quantized linear on a GPU, seen in the code that it generates for one that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def calls(*arguments: str) -> list[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.fake_gpu", *arguments],
        capture_output=True, text=True, cwd=root, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("\n")


def is_norm(call: str) -> bool:
    """Whether a kernel computes RMSNorm, by its name: that of the operator, or, before torch 2.14, of what it does."""
    return any(name in call for name in ("rms_norm", "rsqrt", "mean"))


@pytest.mark.parametrize("preset", ["int4", "nf4", "int8", "fp8"])
def test_quantization_joins_the_norm_and_the_product_is_one_call(preset):
    norm, product = calls(preset, "static")
    assert norm.startswith("triton_")
    assert is_norm(norm)
    assert ("amax" in norm) == (preset in ("int8", "fp8"))
    assert "torch.ops.qcompile.gemm" in product


def test_a_long_input_decodes_the_weight_and_the_epilogue_follows_torchs_product():
    decode, norm, product, epilogue = calls("nf4", "static", "2048", "4096", "4096")
    assert decode.startswith("qcompile_")
    assert is_norm(norm)
    assert product.startswith("extern_kernels.mm(")
    assert epilogue.startswith("triton_poi_")
    assert "sigmoid" in epilogue
    assert "mul" in epilogue


def test_long_fp8_inputs_are_multiplied_by_torch_between_two_fused_kernels():
    norm, product, epilogue = calls("fp8", "static", "2048", "4096", "4096")
    assert is_norm(norm)
    assert "amax" in norm
    assert product.startswith("extern_kernels._scaled_mm(")
    assert "use_fast_accum=False" in product
    assert "sigmoid" in epilogue


def test_any_length_takes_one_graph_that_chooses_at_run_time():
    norm, product = calls("fp8", "dynamic")
    assert is_norm(norm)
    assert "amax" in norm
    assert "torch.ops.qcompile.gemm" in product


@pytest.mark.parametrize("length", ["static", "dynamic"])
def test_experts_are_one_call_a_projection_and_nothing_is_read_back(length):
    *_, gather, up, down, combine = calls("mxfp4", length, "experts")
    assert "index_select" in gather
    assert "torch.ops.qcompile.grouped_gemm" in up
    assert "'silu(a)*b'" in up
    assert "torch.ops.qcompile.grouped_gemm" in down
    assert "index_select" in combine
    assert "sum" in combine


def test_between_products_of_experts_gated_rows_are_quantized_by_one_kernel():
    *_, up, quantize, down, combine = calls("fp8", "static", "experts")
    assert "'silu(a)*b'" in up
    assert quantize.startswith("triton_")
    assert "amax" in quantize
    assert "torch.ops.qcompile.grouped_gemm" in down
    assert "sum" in combine


def test_torchs_products_with_experts_are_between_fused_kernels():
    sort, quantize, offsets, up, gate, down, combine = calls("fp8", "static", "experts", "torch")
    assert "sort" in sort
    assert "searchsorted" in offsets
    assert "amax" in quantize
    assert up.count("extern_kernels._scaled_grouped_mm(") == down.count("extern_kernels._scaled_grouped_mm(") == 1
    assert "use_fast_accum=False" in up
    assert "sigmoid" in gate
    assert "amax" in gate
    assert "sum" in combine
    decoding = calls("nf4", "static", "experts", "torch")
    assert sum(call.startswith("qcompile_decode_fragment") for call in decoding) == 2
    assert sum("extern_kernels._grouped_mm(" in call for call in decoding) == 2


def gemm_inputs(call: str) -> tuple[str, str]:
    """The names of the activations and of their scales in a call of our product."""
    x, scale = call.partition("torch.ops.qcompile.gemm.default(")[2].split(", ")[:2]
    return x, scale


QUANTIZED = [
    *[("int8", before) for before in ("rms_norm", "layer_norm", "residual", "silu")],
    *[("fp8_static", before) for before in ("residual", "silu")],
    ("fp8_block", "silu"),
    ("mxfp8", "silu"),
]
JOBS = {
    **{f"{preset} {before}": (preset, "static", "quantize", before) for preset, before in QUANTIZED},
    "groups": ("fp8_block", "static", "quantize", "rms_norm"),
    **{f"{preset} mlp": (preset, "static", "mlp") for preset in ("int4", "fp8_static")},
    **{f"{preset} long mlp": (preset, "static", "mlp", "2048", "8192", "4096") for preset in ("fp8", "fp8_static")},
}


@pytest.fixture(scope="module")
def generated() -> dict[str, list[str]]:
    """The calls of each of `JOBS`, which one process makes."""
    found = "\n".join(calls(*" and ".join(" ".join(job) for job in JOBS.values()).split(" "))).split("\n\n")
    return {name: lines.split("\n") for name, lines in zip(JOBS, found, strict=True)}


@pytest.mark.parametrize(("preset", "before"), QUANTIZED)
def test_activations_are_read_once_and_quantized_once_for_all_that_read_them(generated, preset, before):
    """One kernel from the activations' inputs to codes and scales, of which three products get the same."""
    if TORCH < (2, 12) and (preset, before) == ("fp8_block", "silu"):
        pytest.skip("torch 2.11 takes two kernels")
    quantize, *products = generated[f"{preset} {before}"]
    assert quantize.startswith("triton_")
    assert len(products) == 3
    assert len({gemm_inputs(product) for product in products}) == 1
    for name in gemm_inputs(products[0]):  # a static scale was there before, and is read
        assert f" {name}," in quantize or f"({name}," in quantize


@pytest.mark.skipif(not (2, 12) <= TORCH < (2, 15), reason="torch 2.11 and 2.15 join them")
def test_by_itself_inductor_takes_two_kernels_for_scales_of_groups_after_a_norm(generated):
    """It does not join the sum over a row and the maxima of its groups: hence the pass `quantize_norms`."""
    norm, quantize, *products = generated["groups"]
    assert is_norm(norm)
    assert "amax" in quantize
    assert len({gemm_inputs(product) for product in products}) == 1


@pytest.mark.parametrize("preset", ["int4", "fp8_static"])
def test_gate_and_up_are_one_product_with_nothing_between_it_and_the_next(generated, preset):
    norm, up, down = generated[f"{preset} mlp"]
    assert is_norm(norm)
    assert "'silu(a)*b'" in up
    assert ("'to_fp8_e4m3'" in up) == (preset == "fp8_static")
    assert ("'codes_of':'bfloat16'" in down) == (preset == "fp8_static")


@pytest.mark.parametrize("preset", ["fp8", "fp8_static"])
def test_after_torchs_product_gate_and_quantization_are_one_kernel(generated, preset):
    norm, up, gate, down = generated[f"{preset} long mlp"]
    assert is_norm(norm)
    assert up.startswith("extern_kernels._scaled_mm(")
    assert "sigmoid" in gate
    assert ("amax" in gate) == (preset == "fp8")
    assert down.startswith("extern_kernels._scaled_mm(")
