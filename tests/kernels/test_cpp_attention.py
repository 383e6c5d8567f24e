"""Generated C++ kernels of attention, of every instruction set that this machine has, against float64."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen.cpp import ISAS, template_text
from qcompile.codegen.cpp_attention import CppAttentionSpec, render_attention
from qcompile.flags import override
from qcompile.kv_cache import SCALES
from qcompile.runtime import attention_cpu, cpp, cpp_attention, cpu
from tests import oracle, tolerance
from tests.kernels.attention_problems import FORMATS, MASKS, Plain, Problem, plain_problem, problem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KERNELS: dict[str, list[tuple[str, torch.dtype]]] = {
    "amx": [("fp8_e4m3", BF16), ("fp8_e5m2", BF16), ("int8", BF16), ("int4", BF16), ("plain", BF16)],
    "avx512_bf16": [("fp8_e4m3", BF16), ("int4", BF16), ("plain", BF16)],
    "avx512": [("fp8_e5m2", F32), ("int8", BF16), ("int4", F32), ("plain", F16)],
    "avx2": [("fp8_e4m3", F32), ("int8", F16), ("int4", BF16), ("plain", BF16), ("plain", F16)],
    "portable": [("fp8_e4m3", F32), ("int4", F32), ("plain", F32), ("plain", F16)],
}
"""What is built, each in a second: caches and types of queries by instruction sets."""
HERE = [isa for isa in cpp.available() if isa in KERNELS]
BEST = HERE[0]
QUANTIZED = [(isa, kv, dtype) for isa in HERE for kv, dtype in KERNELS[isa] if kv != "plain"]
LENGTHS = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 300]), st.integers(1, 300))
SIZES = st.sampled_from([2, 16, 24, 64, 80, 128, 130])
QUERIES = st.sampled_from([1, 1, 2, 5, 8, 60])  # of groups of 8 not too many for kernels without a matrix unit
reaches = st.sampled_from([{}, {}, {"causal": True}, {"causal": True, "window": 1}, {"causal": True, "window": 150}])
WITHOUT_SQUARES = next(isa for isa in HERE if "amx_bf16" not in ISAS[isa])

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cpp_attention.load.cache_clear()
    cpu.forget_kernels()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(given_: Problem | Plain, isa: str = BEST) -> Tensor:
    with override(cpu_isa=isa):
        if isinstance(given_, Plain):
            return given_.operator()
        spec = given_.spec.encode()
        y: Tensor = torch.ops.qcompile.attention(given_.query, given_.cache, given_.mask, given_.length, spec)
        return y


def check(given_: Problem, isa: str = BEST) -> None:
    """With the types that the kernel multiplies in."""
    paired = given_.query.dtype == BF16 and "avx512_bf16" in ISAS[isa] and not given_.spec.scheme.compact
    multiplied = BF16 if paired else F32
    given_.check(run(given_, isa), weights=multiplied, compute=multiplied)


@st.composite
def problems(draw: st.DrawFn, isa: str) -> Problem:
    context = draw(LENGTHS)
    kv, dtype = draw(st.sampled_from([kernel for kernel in KERNELS[isa] if kernel[0] != "plain"]))
    scales = draw(st.sampled_from(SCALES))
    compact = scales == "token" and draw(st.booleans())
    sizes = st.sampled_from([32, 96, 128]) if compact else SIZES
    return problem(
        kv,
        scales,
        shared=draw(st.sampled_from([0, 16])) if compact else 0,
        symmetric=not (compact and kv.startswith("int") and draw(st.booleans())),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 7, 8])),
        queries=draw(QUERIES),
        context=context,
        size=draw(sizes),
        value_size=draw(st.none() | sizes),
        dtype=dtype,
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        **draw(reaches),
    )


@st.composite
def plain_problems(draw: st.DrawFn, isa: str) -> Plain:
    context = draw(LENGTHS)
    return plain_problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 3, 8])),
        queries=draw(QUERIES),
        context=context,
        size=draw(SIZES),
        value_size=draw(st.none() | SIZES),
        dtype=draw(st.sampled_from([dtype for kv, dtype in KERNELS[isa] if kv == "plain"])),
        mask=draw(st.sampled_from(MASKS)),
        length=draw(st.none() | st.integers(0, context)),
        **draw(reaches),
    )


@pytest.mark.parametrize("isa", HERE)
@given(data=st.data())
def test_a_quantized_cache(isa: str, data: st.DataObject) -> None:
    check(data.draw(problems(isa)), isa)


@pytest.mark.parametrize("isa", HERE)
@given(data=st.data())
def test_a_cache_that_is_not_quantized(isa: str, data: st.DataObject) -> None:
    given_ = data.draw(plain_problems(isa))
    given_.check(run(given_, isa))


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask: str) -> None:
    check(problem("int4", mask=mask, queries=3, context=150, dtype=BF16))


@pytest.mark.parametrize(("isa", "kv", "dtype"), QUANTIZED)
def test_every_code(isa: str, kv: str, dtype: torch.dtype) -> None:
    """One position attended to by each query gives its value, rounded once."""
    count, size = 8, 66
    given_ = problem(kv, "tensor", batch=1, heads=1, group=1, queries=count, context=count, size=size, dtype=dtype)
    for codes in (given_.cache[0], given_.cache[2]):
        codes.view(-1).copy_(torch.arange(codes.numel()) % 256)
    values = oracle.kv_values(given_.cache[2], torch.ones(()), kv, size)
    for codes in (given_.cache[0], given_.cache[2]):
        codes.masked_fill_(~values.isfinite() if codes.shape[-1] == size else torch.tensor(False), 0)
    for scale in given_.cache[1::2]:
        scale.fill_(0.03125)
    values = oracle.kv_values(given_.cache[2], given_.cache[3], kv, size)
    attended = replace(given_, mask=torch.eye(count, dtype=torch.bool))
    assert torch.equal(run(attended, isa).double(), values.to(dtype).double())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("index", [0, -1])
def test_what_lies_behind_the_length_is_not_read(index: int, isa: str) -> None:
    kv, dtype = KERNELS[isa][index]
    options = {"length": 17, "mask": "none", "context": 200, "dtype": dtype}
    given_ = plain_problem(**options) if kv == "plain" else problem(kv, "token", **options)
    before = run(given_, isa)
    tensors = (given_.key, given_.value) if isinstance(given_, Plain) else given_.cache
    for tensor in tensors:
        tensor[:, :, 17:] = torch.nan if tensor.is_floating_point() else 0x7F  # NaN
    assert torch.equal(run(given_, isa), before)


@pytest.mark.parametrize("isa", HERE)
def test_what_is_not_finite_stays_so(isa: str) -> None:
    kv, dtype = KERNELS[isa][0]
    given_ = problem(kv, mask="none", context=70, size=64, dtype=dtype)
    given_.cache[2][0, 0, 40, 3] = 0x7F
    y = run(given_, isa)
    assert y[0, :2, :, 3].isnan().all()
    assert y.isnan().sum() == y[0, :2, :, 3].numel()
    given_.cache[0][1, 1, 40, 3] = 0x7F
    assert run(given_, isa)[1, 2:].isnan().all()


@pytest.mark.parametrize("kv", FORMATS)
def test_the_number_of_threads_changes_nothing(kv: str, threads: Callable[[int], None]) -> None:
    given_ = problem(kv, context=1500, size=64, heads=3, batch=1, group=3, dtype=BF16, mask="padding")
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(run(given_))
    assert all(torch.equal(y, results[0]) for y in results)
    check(given_)


def test_keys_as_a_projection_leaves_them() -> None:
    """Positions before heads: read where they lie."""
    given_ = plain_problem(context=150, size=64, batch=2)
    expected = run(given_)
    turned = replace(
        given_,
        key=given_.key.transpose(1, 2).contiguous().transpose(1, 2),
        value=given_.value.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(run(turned), expected)
    assert torch.equal(run(replace(given_, key=given_.key.mT.contiguous().mT)), expected)


def test_scores_far_apart_do_not_overflow() -> None:
    given_ = problem("int8", context=200, dtype=BF16)
    given_ = replace(given_, query=given_.query * 1e4)
    check(given_)
    assert run(given_).isfinite().all()


def refuse(*_: object) -> None:
    raise AssertionError("a kernel was looked for")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "compiler", lambda: None)
    monkeypatch.setattr(attention_cpu, "kernel_of", refuse)
    for kv in FORMATS:
        for queries in (3, 40):
            given_ = problem(kv, context=50, queries=queries, dtype=BF16)
            given_.check(run(given_), weights=BF16, compute=BF16)
    given_ = problem("int8", context=50, queries=40, softcap=5.0)
    given_.check(run(given_))
    plain = plain_problem(context=50, length=45)
    plain.check(run(plain))


@pytest.mark.parametrize("mask", MASKS)
def test_many_queries_go_to_torch(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "kernel_of", refuse)
    for length in (None, 0, 70):
        given_ = problem("fp8_e4m3", "head", context=90, queries=80, group=7, dtype=BF16, mask=mask, length=length)
        y = run(given_, WITHOUT_SQUARES)
        given_.check(y, weights=BF16, compute=BF16)
        assert y.transpose(1, 2).is_contiguous()
    for causal in (False, True):
        plain = plain_problem(context=50, queries=40, length=45, mask=mask, causal=causal, window=7 if causal else 0)
        y = run(plain, WITHOUT_SQUARES)
        plain.check(y)
        assert y.transpose(1, 2).is_contiguous()


def test_queries_lie_as_a_projection_leaves_them() -> None:
    given_ = problem("int8", queries=3, size=64, dtype=BF16)
    expected = run(given_)
    turned = replace(given_, query=given_.query.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(run(turned), expected)
    assert torch.equal(run(replace(given_, query=given_.query.mT.contiguous().mT)), expected)


@pytest.mark.parametrize("window", [0, 60])
@pytest.mark.parametrize("group", [1, 7, 130])
def test_blocks_of_queries(group: int, window: int) -> None:
    """A last block of fewer queries, blocks of single ones, and queries before the first position."""
    for length in (150, 20):
        options = {"context": 150, "queries": 41, "group": group, "heads": 1, "causal": True, "window": window}
        given_ = problem("fp8_e4m3", size=64, dtype=BF16, length=length, **options)
        given_.check(run(given_), weights=BF16, compute=BF16)  # torch's, without a matrix unit
        plain = plain_problem(size=64, length=length, mask="none", **options)
        plain.check(run(plain))


def test_specs_name_registered_things_only() -> None:
    spec = CppAttentionSpec(number="int8", query="float32", isa="portable")
    for change in ({"number": "int8;"}, {"query": "float;"}):
        with pytest.raises(KeyError):
            render_attention(replace(spec, **change))


FUNCTIONS = """
extern "C" void evaluate(const float* x, float* exps, float* tanhs, i64 count) {
  for (i64 i = 0; i < count; i += LANES) {
    store(exps + i, exp_of(load<f32>(x + i)), LANES);
    store(tanhs + i, tanh_of(load<f32>(x + i)), LANES);
  }
}
"""


@pytest.mark.parametrize("isa", HERE)
def test_exp_and_tanh_are_as_good_as_they_say(isa: str, tmp_path: Path) -> None:
    (tmp_path / "all.cpp").write_text(template_text("vector.h") + template_text("functions.h") + FUNCTIONS)
    command = cpp._command(CppAttentionSpec(number="int8", query="float32", isa=isa))
    assert command is not None
    options = [option for option in command if option.startswith("-")]
    subprocess.run([command[0], *options, str(tmp_path / "all.cpp"), "-o", str(tmp_path / "all.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "all.so"))
    x = torch.cat([-torch.logspace(-30, 1.93951925, 1 << 18), -torch.linspace(0, 87, 1 << 18)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, -87.0, -87.1, -1e30, -torch.inf, torch.nan] + [0.0] * 9)])
    exps, tanhs = torch.empty_like(x), torch.empty_like(x)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, exps, tanhs))
    library.evaluate(*pointers, ctypes.c_int64(len(x)))
    exact = x.double().exp()
    inside = x >= -87
    error = (exps.double() / exact - 1).abs()
    assert (error <= (3 + 2 * x.double().abs()) * tolerance.U32)[inside].all()
    assert exps[-13:-10].tolist() == [0.0, 0.0, 0.0]
    assert exps[-10].isnan()
    assert ((tanhs.double() - x.double().tanh()).abs().nan_to_num(0) <= 4 * tolerance.U32).all()
