"""Rows of several processes that are added in the kernel of a norm, in Triton's interpreter over shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcompile.codegen.norm_kernel_spec import norm_kernel_spec
from qcompile.norm_spec import NormSpec, largest_sum
from tests.cross_compile import measure
from tests.kernels.test_norms import LLAMA, inputs, kernels_in, run
from tests.parallel import work
from tests.parallel.ranks import Ranks

assert kernels_in  # where `run` keeps its kernels
SIZE = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(SIZE, tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


ALONE = NormSpec(k=360, number="", columns=360, powers=False, keep_sum=True)
CASES = {
    "the sum alone": ALONE,
    "a norm": replace(LLAMA, number="", columns=256, keep_norm=True),
    "codes by groups": LLAMA,
    "codes by rows": replace(LLAMA, k=200, columns=200, number="int8", norm="layer", bias=True, early=False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_are_added(ranks: Ranks, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In float32, rounded once: what the kernel makes of that sum on one GPU, by calls of different rows and widths."""
    words = 2 * SIZE * largest_sum(SIZE) // 4
    memories = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(SIZE)]
    calls, expected = [], []
    for count, spec in enumerate([CASES[name], replace(ALONE, k=34, columns=34), CASES[name], CASES[name]]):
        x, *rest = inputs(spec, 1 + count % 3, dtype)
        assert x is not None
        xs = [x, *(torch.randn_like(x) * 2**part for part in range(1, SIZE))]
        calls.append((spec, xs, rest))
        total = xs[0].float()
        for other in xs[1:]:
            total = total + other.float()
        expected.append(run(spec, total.to(dtype), *rest))
    for found in ranks.call(work.exchanged, memories, calls, tmp_path):
        for call, wanted in zip(found, expected, strict=True):
            for one, other in zip(call, wanted, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_spill_nothing(target: str) -> None:
    like = [replace(LLAMA, k=4096, columns=4096, number=number, keep_norm=not number) for number in ("", "int8")]
    kernels = [norm_kernel_spec(norm, "bfloat16", target, parts) for norm in like for parts in (2, 8)]
    for found in measure([*kernels, norm_kernel_spec(like[0], "float32", target, 2)]):
        assert "error" not in found, found
        assert found["spills"] == 0, found
