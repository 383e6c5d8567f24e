"""Generated C++ kernels of attention, of every instruction set that this machine has, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen.cpp import ISAS
from qcompile.flags import override
from qcompile.runtime import attention_cpu, cpp, cpp_attention
from tests.kernels.test_attention import FORMATS, MASKS, Problem, problem
from tests.strategies import FLOATS

HERE = [isa for isa in ISAS if list(ISAS).index(isa) >= list(ISAS).index(cpp.available()[0])]
LENGTHS = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 300]), st.integers(1, 300))
SIZES = st.sampled_from([2, 16, 24, 64, 80, 128, 130])

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cpp_attention.load.cache_clear()
    attention_cpu._kernel_of.cache_clear()


def run(given_: Problem, isa: str = HERE[0]) -> Tensor:
    with override(cpu_isa=isa):
        y: Tensor = torch.ops.qcompile.attention(
            given_.query, given_.cache, given_.mask, given_.length, given_.spec.encode()
        )
    return y


def check(given_: Problem, isa: str = HERE[0]) -> None:
    """With the types that the kernel multiplies in."""
    paired = given_.query.dtype == torch.bfloat16 and "avx512_bf16" in ISAS[isa]
    given_.check(run(given_, isa), *([torch.bfloat16] * 2 if paired else []))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    context = draw(LENGTHS)
    return problem(
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(["tensor", "head", "token"])),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 7, 8])),
        queries=draw(st.sampled_from([1, 1, 2, 5, 8])),
        context=context,
        size=draw(SIZES),
        value_size=draw(st.none() | SIZES),
        dtype=draw(st.sampled_from(FLOATS)),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
    )


@pytest.mark.parametrize("isa", HERE)
@given(given_=problems())
def test_kernel(isa: str, given_: Problem) -> None:
    check(given_, isa)
