"""Attention over paged caches on a GPU, against float64, and bit for bit the same at every launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.runtime import attention_gpu, cache
from qcompile.runtime.gpu import target_of
from tests.kernels.attention_problems import FORMATS
from tests.kernels.test_paged_attention import Paged, paged
from tests.kv_cache.test_paged_models import begin, model_of

pytestmark = pytest.mark.gpu

LAUNCHES = 50


def moved(t: Any) -> Any:
    return t.cuda() if isinstance(t, Tensor) else t


def on_gpu(given: Paged) -> Paged:
    whole = replace(given.whole, query=moved(given.whole.query), mask=moved(given.whole.mask))
    tensors = [moved(t) for t in given.cache]
    places = {name: moved(getattr(given, name)) for name in ("lengths", "starts", "block_table")}
    return replace(given, whole=whole, cache=tensors, **places)


def run(given: Paged, launches: int = LAUNCHES) -> Tensor:
    """The operator's result, after calling it many times and comparing bits."""
    on_device = on_gpu(given)
    first = on_device.operator()
    for _ in range(launches):
        assert torch.equal(first.view(torch.uint8), on_device.operator().view(torch.uint8)), "launches differ"
    return first.cpu()


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("scales", ["tensor", "head", "token"])
def test_unequal_lengths(scales: str, kv: str, page: int) -> None:
    lengths = (777, 1, 0, 64, 2049, 130)
    given = paged(kv, scales, lengths, page=page, heads=4, group=4, size=128, dtype=torch.bfloat16, shared=2)
    given.check_kernel(run(given))


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("symmetric", "numbers"), [(False, 0), (True, 32), (False, 32)])
def test_four_bits_with_offsets_and_groups(symmetric: bool, numbers: int, size: int, page: int) -> None:
    lengths = (777, 1, 0, 64, 2049, 130)
    options = {"heads": 4, "group": 4, "size": size, "dtype": torch.bfloat16, "symmetric": symmetric}
    given = paged("int4", "token", lengths, page=page, numbers=numbers, **options)
    given.check_kernel(run(given))


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_as_they_are(dtype: torch.dtype, page: int) -> None:
    for queries in (1, 3, 64):
        mask, lengths = "causal" if queries > 1 else "none", (777, 1, 0, 64, 2049, 130)
        options = {"page": page, "heads": 4, "group": 4, "size": 128, "dtype": dtype, "queries": queries, "mask": mask}
        given = paged(str(dtype).removeprefix("torch."), "none", lengths, **options)
        given.check_plain_kernel(run(given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("in_pages", [True, False])
def test_parts_of_contexts(in_pages: bool, queries: int, dtype: torch.dtype) -> None:
    options = {"heads": 3, "group": 2, "size": 64, "dtype": dtype, "queries": queries, "mask": "per head"}
    given = paged("int8", "token", (500, 20, 300), page=32, starts=(400, 3, -5), in_pages=in_pages, **options)
    given.check_kernel(run(given))


@pytest.mark.parametrize("length", [1, 64, 5000])
def test_one_sequence(length: int) -> None:
    given = paged("fp8_e4m3", "tensor", (length,), page=64, heads=8, group=4, size=128, dtype=torch.bfloat16)
    given.check_kernel(run(given))


def test_many_sequences() -> None:
    lengths = tuple(int(n) for n in torch.randint(0, 700, (100,)))
    given = paged("fp8_e4m3", "token", lengths, page=64, heads=2, group=4, size=128, dtype=torch.bfloat16)
    given.check_kernel(run(given))


def test_many_queries_are_attended_from_by_torch() -> None:
    given = paged("fp8_e4m3", "token", (200, 64, 130), page=16, queries=40, mask="causal", size=64)
    given = replace(given, block_table=given.block_table % 10**6)  # type: ignore[operator]
    given.check(on_gpu(given).operator().cpu())


def test_every_split_gives_the_same_within_the_bound() -> None:
    given = paged("int8", "token", (2000, 3, 640), page=16, heads=2, group=2, size=128, dtype=torch.bfloat16)
    on_device, target = on_gpu(given), target_of(torch.device("cuda", 0))
    for split in (1, 2, 8, 64):
        for block in (16, 32, 64):
            tile = attention_gpu.tile_of(6, 2064, 128, 2, target, sequences=3)
            kernel = given.kernel(target, replace(tile, split=split, context=block))
            function = cache.load(kernel).kernel
            whole = on_device.whole
            places = (on_device.lengths, on_device.starts, on_device.block_table)
            y = attention_gpu.launch(kernel, function, whole.query, on_device.cache, whole.mask, *places)
            given.check_kernel(y.cpu())


def test_a_graph_serves_all_lengths() -> None:
    """A CUDA graph that is replayed after sequences have grown."""
    given = paged("fp8_e4m3", "tensor", (300, 20, 64), page=16, heads=4, group=4, size=128, dtype=torch.bfloat16)
    on_device = on_gpu(given)
    y = on_device.operator()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = on_device.operator()
    for lengths in ((300, 20, 64), (17, 1, 0), (299, 16, 33)):
        on_device.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        replace(given, lengths=torch.tensor(lengths)).check_kernel(y.cpu())


def test_compiled_steps_write_what_eager_ones_do() -> None:
    model = model_of("mistral", "sdpa").cuda()
    texts = []
    for compiled in (False, True):
        pages, ids = begin(model, "fp8")

        def step(ids: Tensor, pages: Any = pages) -> Tensor:
            logits: Tensor = model(ids, **pages.inputs(1)).logits
            return logits

        run_step = torch.compile(step, backend="qcompile", fullgraph=True) if compiled else step
        written = []
        with torch.no_grad():
            for _ in range(8):
                pages.pages.append()
                ids = run_step(ids).argmax(-1)
                written.append(ids)
        texts.append(torch.cat(written, 1).tolist())
        torch.compiler.reset()
    assert texts[0] == texts[1]
