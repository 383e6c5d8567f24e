"""Sums over processes become a part of the norm behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qcompile.exchange import ADD_UP
from tests.passes.test_quantize_norms import NORMS, Block, on_cpus, run

if not distributed.is_available():
    pytest.skip("torch has no distributed package", allow_module_level=True)
assert on_cpus
GROUP: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    GROUP[:] = [distributed.group.WORLD.group_name]  # type: ignore[union-attr]
    yield
    distributed.destroy_process_group()


def add_up(x: Tensor) -> Tensor:
    total: Tensor = ADD_UP(x, GROUP[0])
    return total


FORWARDS: dict[str, Any] = {
    "before a residual": lambda m, x, other: (m.q(m.norm(other + add_up(x))),),
    "behind a residual": lambda m, x, other: (m.q(m.norm(add_up(x) + other)),),
    "two sums": lambda m, x, other: (m.q(m.norm(add_up(x) + add_up(other))),),
    "no residual": lambda m, x, other: (m.q(m.norm(add_up(x))),),
}


@pytest.mark.parametrize("scheme", ["int4", "mxfp8"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("where", FORWARDS)
def test_a_sum_and_a_norm(where: str, name: str, scheme: str) -> None:
    make, expected = NORMS[name]
    captured, (found,) = run(Block(make(), FORWARDS[where]).to(torch.bfloat16), scheme)
    assert captured.count(ADD_UP) == (where == "two sums")
    assert expected.items() <= found.items()
    quantized = scheme == "mxfp8"
    assert (found["group"], found["number"]) == (GROUP[0], "fp8_e4m3" if quantized else "")
    assert (found["residual"], found["keep_sum"]) == (where != "no residual", False)
    assert found["keep_norm"] != quantized
    assert len(captured.rewritten("fuse_sums")) == (not quantized)


@pytest.mark.parametrize("scheme", ["int4", "mxfp8"])
def test_a_sum_that_is_read_again(scheme: str) -> None:
    """As the hidden states of a decoder, from the embedding on."""

    def forward(m: Block, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        hidden = add_up(x)
        hidden = hidden + add_up(m.q(m.norm(hidden)))
        return m.k(m.norm(hidden)), hidden

    captured, found = run(Block(LlamaRMSNorm(128), forward).to(torch.bfloat16), scheme)
    assert captured.count(ADD_UP) == 0
    assert [(norm["residual"], norm["keep_sum"], norm["group"]) for norm in found] == [
        (False, True, GROUP[0]),
        (True, True, GROUP[0]),
    ]


@pytest.mark.parametrize("scheme", ["int4", "mxfp8"])
def test_a_term_that_is_read_again_stays(scheme: str) -> None:
    def forward(m: Block, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        total = add_up(x)
        return m.q(m.norm(other + total)), total * 2

    captured, found = run(Block(LlamaRMSNorm(128), forward).to(torch.bfloat16), scheme)
    assert captured.count(ADD_UP) == 1
    assert [norm["group"] for norm in found] == [""] * (scheme == "mxfp8")
