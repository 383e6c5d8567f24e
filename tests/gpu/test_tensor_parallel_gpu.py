"""Two GPUs against one: layers bit for bit, whole models eagerly and compiled, and the memory that loading takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.codegen.norm_kernel_spec import WIDEST
from qcompile.norm_spec import largest_sum
from qcompile.presets import PRESETS
from tests.kernels.test_norms import LLAMA, inputs
from tests.parallel import work
from tests.parallel.ranks import Ranks
from tests.parallel.test_parts import ordered, quantized
from tests.tolerance import rounded_sqnr_floor, sqnr

pytest.importorskip("transformers")
from tests.checkpoint import tiny_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GPU = torch.device("cuda", 0)
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
FLOOR = rounded_sqnr_floor(2 * 24 + 4, torch.bfloat16)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(2, tmp_path_factory.mktemp("ranks"), "cuda")
    yield found
    found.close()


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """As many as there are GPUs."""
    found = Ranks(torch.cuda.device_count(), tmp_path_factory.mktemp("all"), "cuda")
    yield found
    found.close()


NORMS = {
    "norm": replace(LLAMA, k=4096, columns=4096, number="", keep_norm=True),
    "codes by groups": replace(LLAMA, k=2048),
    "codes by rows": replace(LLAMA, k=2880, columns=2880, number="int8"),
}
FAMILIES = ("int4_asym", "int8", "fp8_static", "fp8_block", "nvfp4", "q4_k", "int4_24")
OTHERS = tuple(name for name in PRESETS if name not in FAMILIES)


@pytest.mark.parametrize(
    ("style", "rows", "names"),
    [
        pytest.param("rowwise", 1, FAMILIES, id="families"),
        pytest.param("rowwise", 1, OTHERS, id="others"),
        pytest.param("rowwise", 48, tuple(PRESETS), id="many rows"),
        pytest.param("rowwise_split_input", 1, FAMILIES, id="split"),
        pytest.param("colwise_gather_output", 48, FAMILIES, id="gathered"),
    ],
)
def test_layers(ranks: Ranks, style: str, rows: int, names: tuple[str, ...]) -> None:
    """Two terms have one sum, which is rounded once, whoever adds them."""
    linears = {name: quantized(PRESETS[name], (512, 1024)) for name in names}
    linears["act_order"] = ordered(quantized(PRESETS["int4_asym"], (512, 1024)))
    x = torch.randn(rows, 1024).to(torch.bfloat16)
    first, second = ranks.call(work.layers, linears, x, style)
    wrong = []
    for name, linear in linears.items():
        y = work.Parts(linear, style, 2, GPU)(x.to(GPU)).cpu()
        wrong += [name] * (not torch.equal(first[name], y) or not torch.equal(second[name], y))
    assert not wrong


def checkpoint(name: str, folder: Path) -> Path:
    model = tiny_models.quantized(name, kind="qwen2", dtype=torch.bfloat16, **SIZES)
    if name == "q4_k":
        pytest.importorskip("gguf")
        qcompile.save(model, folder, "gguf")
        return folder / "model.gguf"
    qcompile.save(model, folder / "model", tiny_models.CT)
    return folder / "model"


@pytest.mark.parametrize("name", ["int4", "int8_weight_only", "mxfp4", "q4_k"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kv": "fp8"}, id="eager"),
        pytest.param({"compiled": True}, id="compiled"),
        pytest.param({"compiled": True, "mode": "reduce-overhead"}, id="graphs"),
    ],
)
def test_checkpoints(ranks: Ranks, name: str, options: dict[str, object], tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    whole = work.outputs(qcompile.load(path, device=GPU, dtype=torch.bfloat16, progress=False))
    first, second = ranks.call(work.loaded, path, torch.bfloat16, options)
    assert torch.equal(first["logits"], second["logits"])
    assert torch.equal(first["tokens"], second["tokens"])
    assert sqnr(whole["logits"], first["logits"]) >= FLOOR
    assert first["bytes"] < 0.52 * whole["bytes"]


CODES = {"fp8": torch.float8_e4m3fn, "int4_fp8": torch.float8_e4m3fn}
"""What inputs are rounded to; a code that bfloat16's roundings tip over is another there."""


@pytest.mark.parametrize("name", CODES)
def test_inputs_have_scales_of_their_part(ranks: Ranks, name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    model = qcompile.load(path, device=GPU, dtype=torch.bfloat16, progress=False)
    expected = work.outputs(work.in_parts(model, 2))
    for options in ({}, {"compiled": True}):
        first, second = ranks.call(work.loaded, path, torch.bfloat16, options)
        assert torch.equal(first["logits"], second["logits"])
        floor = rounded_sqnr_floor(4 * 2, CODES[name])
        assert sqnr(expected["logits"], first["logits"]) >= floor


def terms(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One for each GPU and their sum, in float32 in their order, which is rounded once.

    Beyond what the kernel adds they are whole numbers, since NCCL adds in an order of its own.
    """
    count = torch.cuda.device_count()
    size = dtype.itemsize * math.prod(shape)
    by_kernel = size <= largest_sum(count) and shape[-1] % 2 == 0 and shape[-1] <= WIDEST
    drawn = torch.randn(count, *shape) if by_kernel or count == 2 else torch.randint(-8, 9, (count, *shape))
    x = drawn.to(dtype)
    total = x[0].float()
    for other in x[1:]:
        total = total + other.float()
    return x, total.to(dtype)


SHAPES = [(8,), (1, 4096), (2, 8, 2880), (33, 4096), (256, 4096), (257, 4096), (1 << 17,), (3, 101)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(all_ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within the memory that GPUs share and beyond it, of different sizes one after the other."""
    x, total = terms(*shape, dtype=dtype)
    for found in all_ranks.call(work.sums, x):
        assert torch.equal(found, total.expand(20, *shape))


@pytest.mark.parametrize("rows", [1, 7, 32, 600])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_sums(all_ranks: Ranks, name: str, rows: int) -> None:
    """What the kernel makes of the sum on one GPU; of the most rows the sum is NCCL's."""
    norm = NORMS[name]
    _, *rest = inputs(norm, rows, torch.bfloat16)
    xs, total = terms(rows, norm.k, dtype=torch.bfloat16)
    given = [None if tensor is None else tensor.to(GPU) for tensor in (total, *rest)]
    wanted = torch.ops.qcompile.norm_quantize(*given, norm.encode())
    for found in all_ranks.call(work.norms, norm, xs, rest):
        for call in found:
            for one, other in zip(call, wanted, strict=True):
                assert torch.equal(one.float(), other.cpu().float())


def test_loading_takes_half(ranks: Ranks, tmp_path: Path) -> None:
    """Beside what loading a layer takes for a moment."""
    path = checkpoint("int4", tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = work.stored_bytes(qcompile.load(path, device=GPU, dtype=torch.bfloat16, progress=False))
    peak = torch.cuda.max_memory_allocated() - before
    for found in ranks.call(work.loaded, path, torch.bfloat16, {}):
        assert found["peak"] <= peak - 0.48 * whole
