"""What Inductor makes of a quantized linear on a GPU, seen in the code that it generates for one that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def calls(*arguments: str) -> list[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.fake_gpu", *arguments],
        capture_output=True, text=True, cwd=root, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("\n")


@pytest.mark.parametrize("preset", ["int4", "nf4", "int8", "fp8"])
def test_quantization_joins_the_norm_and_the_product_is_one_call(preset):
    norm, product = calls(preset, "static")
    assert norm.startswith("triton_")
    assert "rsqrt" in norm or "rms_norm" in norm
    assert ("amax" in norm) == (preset in ("int8", "fp8"))
    assert "torch.ops.qcompile.gemm" in product


def test_a_long_input_decodes_the_weight_and_the_epilogue_follows_torchs_product():
    decode, norm, product, epilogue = calls("int4", "static", "2048", "4096", "4096")
    assert decode.startswith("qcompile_")
    assert "rsqrt" in norm
    assert product.startswith("extern_kernels.mm(")
    assert epilogue.startswith("triton_poi_")
    assert "sigmoid" in epilogue
    assert "mul" in epilogue


def test_long_fp8_inputs_are_multiplied_by_torch_between_two_fused_kernels():
    norm, product, epilogue = calls("fp8", "static", "2048", "4096", "4096")
    assert "rsqrt" in norm
    assert "amax" in norm
    assert product.startswith("extern_kernels._scaled_mm(")
    assert "use_fast_accum=False" in product
    assert "sigmoid" in epilogue


def test_any_length_takes_one_graph_that_chooses_at_run_time():
    norm, product = calls("fp8", "dynamic")
    assert "rsqrt" in norm or "rms_norm" in norm
    assert "amax" in norm
    assert "torch.ops.qcompile.gemm" in product


def test_experts_are_one_kernel_a_projection_and_nothing_is_read_back():
    sort, offsets, gather, up, gate, down, combine = calls("mxfp4", "static", "experts")
    assert "sort" in sort
    assert "searchsorted" in offsets
    assert "index_select" in gather
    assert up.startswith("qcompile_")
    assert "silu" in gate
    assert down.startswith("qcompile_")
    assert "index_select" in combine
    assert "sum" in combine
