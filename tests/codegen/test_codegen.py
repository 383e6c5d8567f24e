"""Printing, specs, rendering, the cost model and the cache of generated kernels."""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import multiprocessing
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen.cost_model import candidates, rank, seconds, shared_bytes
from qcompile.codegen.decoders import decode_formula, pair_decoder, scale_decoder, scale_word_decoder
from qcompile.codegen.devices import device_of
from qcompile.codegen.field_decoders import quad_decoder, quad_unit
from qcompile.codegen.printers import HELPERS, operations, to_triton
from qcompile.codegen.render import render
from qcompile.codegen.spec import (
    TEMPLATES,
    KernelSpec,
    Tile,
    decode_kernel_spec,
    kernel_spec,
    native_fp8,
    warps_multiply,
)
from qcompile.codegen.templates import fragment_weights
from qcompile.expr import DTYPES, Expr, var
from qcompile.flags import override
from qcompile.formats import FORMATS
from qcompile.gates import ACTIVATIONS
from qcompile.layouts import choose_layout
from qcompile.linear_spec import LinearSpec
from qcompile.presets import PRESETS, preset
from qcompile.runtime import cache, gpu, tuning
from qcompile.runtime import measure as timing
from tests import oracle, tolerance
from tests.cross_compile import measure
from tests.kernels.test_gemm import shipped
from tests.strategies import epilogues
from tests.triton_interpreter import interpret

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
COUNT = 1024


def function_of(source: str, folder: Path, **names: object) -> Any:
    """The Triton function `run(x, y, n)` of a source, loaded from a file."""
    path = folder / "generated.py"
    path.write_text(source)
    namespace: dict[str, object] = {"triton": triton, "tl": tl, **names}
    linecache.checkcache(str(path))
    exec(compile(source, str(path), "exec"), namespace)
    return namespace["run"]


RUN = """
@triton.jit
def run(x, y, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    value = tl.load(x + i)
    tl.store(y + i, {})
"""


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, tmp_path: Path) -> None:
    formula = ACTIVATIONS[name](var("value"))
    helpers = "\n\n".join(HELPERS[op] for op in HELPERS if op in operations(formula))
    run = function_of(helpers + RUN.format(to_triton(formula)), tmp_path)
    x = torch.cat([torch.linspace(-12, 12, COUNT - 8), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 1e4, -1e4, 88.8, -88.8])])
    y = torch.empty(COUNT)
    interpret(run)[(1,)](x, y, COUNT)
    bound = tolerance.epilogue_bound(x.double()[None], torch.zeros(1, COUNT, dtype=torch.float64), None, (name,))
    tolerance.assert_within(y[None], oracle.epilogue(x.double()[None], steps=(name,)), bound)


def test_activations_keep_nan(tmp_path: Path) -> None:
    for name, function in ACTIVATIONS.items():
        formula = function(var("value"))
        helpers = "\n\n".join(HELPERS[op] for op in HELPERS if op in operations(formula))
        y = torch.zeros(4)
        run = function_of(helpers + RUN.format(to_triton(formula)), tmp_path)
        interpret(run)[(1,)](torch.full((4,), torch.nan), y, 4)
        assert y.isnan().all(), name


@pytest.mark.parametrize("format_name", FORMATS)
def test_decode_every_code(format_name: str, tmp_path: Path) -> None:
    fmt = FORMATS[format_name]
    run = function_of(decode_formula(fmt) + RUN.format("decode(value)"), tmp_path)
    codes = torch.arange(2**fmt.bits, dtype=torch.int32)
    y = torch.empty(len(codes))
    interpret(run)[(1,)](codes, y, len(codes))
    assert torch.equal(y.double().nan_to_num(nan=-1e9), oracle.decode_values(format_name).nan_to_num(nan=-1e9))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_pair_decoder_equals_decode(format_name: str, dtype: str, tmp_path: Path) -> None:
    fmt = FORMATS[format_name]
    run = function_of(
        f"COMPUTE = tl.constexpr(tl.{dtype})\n"
        + pair_decoder(fmt, dtype)
        + RUN.format("decode_pair(value)[0].to(tl.float32)")
        + "    tl.store(y + COUNT + i, decode_pair(value)[1].to(tl.float32))\n",
        tmp_path,
    )
    given_ = codes = torch.arange(2**fmt.bits, dtype=torch.int32)
    if format_name == "fp4_e2m1":  # whose bits are taken out of words to where bfloat16 has them
        given_ = (codes & 7) << 6 | (codes & 8) << 12
    y = torch.empty(2, len(codes))
    interpret(run)[(1,)](given_ | given_.flip(0) << 16, y, len(codes))
    expected = oracle.decode_values(format_name).to(getattr(torch, dtype)).double()
    for half, values in zip(y.double(), (expected, expected.flip(0)), strict=True):
        assert torch.equal(half.nan_to_num(nan=-1e9), values.nan_to_num(nan=-1e9))


POWERS = torch.pow(2.0, torch.arange(-127, 129, dtype=torch.float64))
POWERS[-1] = torch.nan
"""The numbers that the 256 codes of E8M0 stand for; the least is subnormal in float32 and bfloat16."""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_power_of_two(target: str, tmp_path: Path) -> None:
    """Exactly, by both functions that decode scales; words hold them twice."""
    text = "COMPUTE = tl.constexpr(tl.bfloat16)\n\n\n"
    text += inspect.getsource(fragment_weights.half_words.fn) + "\n\n"
    text += scale_decoder("float8_e8m0fnu", target) + "\n\n"
    text += scale_word_decoder("float8_e8m0fnu", "bfloat16", target)
    run = function_of(
        text
        + RUN.format("decode_scale(value)")
        + "    word = scale_words(value)\n"
        + "    for half in tl.static_range(2):\n"
        + "        found = (word >> 16 * half).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)\n"
        + "        tl.store(y + (half + 1) * COUNT + i, found)\n",
        tmp_path,
    )
    codes, y = torch.arange(256).to(torch.uint8), torch.empty(3, 256)
    interpret(run)[(1,)](codes, y, 256)
    for found in y.double():
        assert torch.equal(found.nan_to_num(nan=-1), POWERS.nan_to_num(nan=-1))


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("scale_dtype", ["float8_e8m0fnu", "float8_e4m3fn", "int8", "uint8"])
def test_every_scale_of_a_quad(scale_dtype: str, target: str, compute: str, tmp_path: Path) -> None:
    """All bytes in each place of a word, exactly; float16 has not the exponents of E8M0."""
    if (scale_dtype, compute) == ("float8_e8m0fnu", "float16"):
        return
    text = f"COMPUTE = tl.constexpr(tl.{compute})\n\n\n"
    text += inspect.getsource(fragment_weights.half_words.fn) + "\n\n"
    text += scale_decoder(scale_dtype, target) + "\n\n" + scale_word_decoder(scale_dtype, compute, target) + "\n\n"
    text += quad_decoder(scale_dtype, compute, target)
    run = function_of(
        text
        + RUN.format("0.0")
        + "    words = quad_words(value)\n"
        + "    for place in tl.static_range(4):\n"
        + "        for half in tl.static_range(2):\n"
        + f"            found = (words[place] >> 16 * half).to(tl.int16).to(tl.{compute}, bitcast=True)\n"
        + "            tl.store(y + (2 * place + half) * COUNT + i, found.to(tl.float32))\n",
        tmp_path,
    )
    scales = torch.stack([torch.arange(256).roll(31 * place) for place in range(4)], -1).to(torch.uint8)
    y = torch.empty(8, 256)
    interpret(run)[(1,)](scales.view(torch.int32).flatten(), y, 256)
    integers = torch.arange(256).to(getattr(torch, scale_dtype)).double() if "int" in scale_dtype else None
    values = POWERS if scale_dtype == "float8_e8m0fnu" else oracle.decode_values("fp8_e4m3")
    values = values if integers is None else integers / quad_unit(scale_dtype, compute, target)
    for place, half in itertools.product(range(4), range(2)):
        expected = values[scales[:, place].int()]
        assert torch.equal(y[2 * place + half].double().nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


def test_unknown_operation_is_refused() -> None:
    with pytest.raises(KeyError):
        to_triton(Expr("sqrt", (var("x"),)))


def test_every_cast_is_printed() -> None:
    assert all(to_triton(Expr("cast", (var("x"),), name)).startswith("x.to(tl.") for name in DTYPES)


@st.composite
def specs(draw: st.DrawFn) -> tuple[LinearSpec, KernelSpec]:
    n, k = 2 * draw(st.integers(1, 20000)), draw(st.integers(1, 40000))
    scheme = preset(draw(st.sampled_from(sorted(PRESETS)))).fit("layer", (n, k))
    layout = choose_layout(scheme, (n, k), "cuda").name
    steps = draw(epilogues())
    linear = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=layout, epilogue=steps)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    x_dtype = dtype if scheme.activation is None else scheme.activation.format.native_dtype
    assert x_dtype is not None
    tile = Tile(m=16, n=64, k=64, split=1, warps=4, stages=3)
    return linear, kernel_spec(linear, x_dtype, dtype, draw(st.sampled_from(TARGETS)), tile)


@given(specs())
def test_spec_round_trip_and_source(both: tuple[LinearSpec, KernelSpec]) -> None:
    spec = both[1]
    assert decode_kernel_spec(spec.encode()) == spec
    source = render(spec)
    assert source == render(decode_kernel_spec(spec.encode()))
    ast.parse(source)
    assert decode_kernel_spec(source.splitlines()[4].removeprefix("# ")) == spec


@given(specs(), st.sampled_from([1, 16, 17, 64, 100, 4096]))
def test_chosen_tile_fits_the_device(both: tuple[LinearSpec, KernelSpec], m: int) -> None:
    like = both[1]
    ranked = rank(candidates(like, m), m)
    assert ranked
    assert all(shared_bytes(k) <= device_of(k.target).shared for k in ranked)
    times = [seconds(k, m) for k in ranked]
    assert times == sorted(times)
    assert times[0] > 0


def test_small_m_is_split_and_large_m_is_not() -> None:
    spec = LinearSpec(in_features=4096, out_features=4096, scheme=preset("int4"), layout="fragment")
    assert gpu.choose(spec, 16, torch.bfloat16, torch.bfloat16, "sm_90").kernel.tile.split > 1
    assert gpu.choose(spec, 4096, torch.bfloat16, torch.bfloat16, "sm_90").kernel.tile.split == 1


@given(st.integers(1, 100000))
def test_bucket_covers(m: int) -> None:
    assert gpu.bucket(m) >= min(m, 4096)
    assert gpu.bucket(m) in [1, *(2**i for i in range(4, 13))]


def test_templates_exist_for_layouts() -> None:
    assert set(TEMPLATES.values()) == {"gemm_fragment", "gemm_rows8"}


def test_cache_rewrites_a_corrupt_entry(tmp_path: Path) -> None:
    with override(cache_dir=tmp_path / "cache", dump=tmp_path / "dump"):
        path = cache.store("x = 1\n")
        assert path.parent.name == cache.digest("x = 1\n")
        assert path.read_text() == "x = 1\n"
        path.write_text("x = 2\n")
        assert cache.store("x = 1\n").read_text() == "x = 1\n"
        assert [p.name for p in path.parent.iterdir()] == ["kernel.py"]
        assert (tmp_path / "dump" / "kernels" / f"{path.parent.name}.py").read_text() == "x = 1\n"


def test_cache_with_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_store_and_read, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def _store_and_read(folder: Path) -> None:
    source = "y = 1\n" * 1000
    with override(cache_dir=folder):
        for i in range(100):
            path = cache.store(source)
            try:
                assert path.read_text() == source, "a reader saw half a file"
            except FileNotFoundError:  # the other process removed it
                continue
            if i % 10 == 0:
                path.unlink(missing_ok=True)


_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SHIPPED = {
    **dict.fromkeys(["int4", "int4_fp8", "int8", "fp8", "fp8_block"], (16, 4096)),
    **dict.fromkeys(["int4_asym", "int3", "fp8_weight_only", "nf4", "nvfp4", "mxfp8"], (16,)),
    **dict.fromkeys(["q6_k", "q2_k", "q3_k", "q5_k"], (16,)),
    "mxfp4": (64,),
    "q4_k": (16, 64),
    "iq4_xs": (4096,),
    "int4_24": (16, 4096),
    "int8_24": (64,),
}
"""Presets and others by name, and M."""


@pytest.mark.parametrize("target", TARGETS)
def test_cross_compiled_kernels_do_not_spill(target: str) -> None:
    kernels: list[KernelSpec] = []
    for name, rows in SHIPPED.items():
        scheme = shipped(name, (4096, 4096))
        layout = choose_layout(scheme, (4096, 4096), "cuda").name
        spec = LinearSpec(in_features=4096, out_features=4096, scheme=scheme, layout=layout)
        spec = spec.with_epilogue("bias", "silu", "mul")
        x_dtype = torch.bfloat16 if scheme.activation is None else scheme.activation.format.native_dtype
        assert x_dtype is not None
        kernels += [gpu.choose(spec, m, x_dtype, torch.bfloat16, target).kernel for m in rows]
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        print(target, kernel.weight, kernel.activation, kernel.tile, found)
        assert "error" not in found, found
        assert found.get("looped", found["spills"]) == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["registers"] <= (512 if target.startswith("gfx") else 255)
        assert found["mma"], f"no matrix instruction in {kernel}"
        assert not found.get("flush"), "subnormals would be flushed, which decoding fp8 relies on"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_cross_compiled_kernels_with_gates_do_not_spill(target: str) -> None:
    kernels = []
    for name, rows, store in (("int4", (16, 64, 256), "to_int8"), ("int8", (16,), "to_int8"), ("fp8", (64,), "")):
        given_ = timing.job(name, preset(name), (28672, 4096), 16, torch.bfloat16)
        spec = given_.spec.with_epilogue("silu(a)*b", *([store] if store else []))
        if not store and native_fp8(target):
            spec = spec.with_epilogue("to_fp8_e4m3")
        x_dtype = getattr(torch, given_.like(target).x_dtype)
        kernels += [gpu.choose(spec, m, x_dtype, torch.bfloat16, target).kernel for m in rows]
    assert all(kernel.gated for kernel in kernels)
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found.get("looped", found["spills"]) == 0, (kernel, found)
        assert found["shared"] <= device_of(target).shared, (kernel, found)
        assert found["mma"], f"no matrix instruction in {kernel}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_sparse_tensor_cores_get_what_each_thread_has(target: str) -> None:
    """The fastest by the model of some cuts; no spills in loops, and element i of each operand is in thread i."""
    kernels = []
    for name, m in (("int4_24", 1), ("int4_24", 16), ("int8_24", 16), ("int4_24", 32)):
        like = timing.job(name, preset(name), (28672, 4096), m, torch.bfloat16).like(target)
        cuts: dict[tuple[int, ...], KernelSpec] = {}
        for kernel in rank(candidates(like, m), m, keep=1000):
            tile = kernel.tile
            if tile.form == "cores":
                cuts.setdefault((tile.n, tile.k, tile.warps), kernel)
        assert len(cuts) >= (5 if m < 32 else 4)  # of 32 rows fewer fit in the shared memory of sm_120
        kernels += [*cuts.values()][::4]
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, (kernel, found)
        assert found["looped"] == 0, (kernel, found)
        assert found["mma"].startswith("mma.sp"), (kernel, found)
        assert found["scattered"] == [], (kernel, found)
        assert found["shared"] <= shared_bytes(kernel), (kernel, found)


def test_shared_memory_of_sparse_weights_is_no_more_than_estimated() -> None:
    kernels = []
    for name in ("int4_24", "int8_24"):
        like = timing.job(name, preset(name), (28672, 4096), 512, torch.bfloat16).like("sm_90")
        deepest = {(kernel.tile.m, kernel.tile.n): kernel for kernel in rank(candidates(like, 512), 512, keep=1000)}
        kernels += [*deepest.values()]
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert found["shared"] <= shared_bytes(kernel), (kernel, found)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_warps_that_multiply_for_themselves_do_not_exchange_weights(target: str) -> None:
    kernels = []
    names = ("int4", "nf4", "mxfp4", "nvfp4", "q4_k", "int3", "int5", "int6", "q2_k", "q3_k", "q6_k")
    for name, m in itertools.product(names, (1,) if target == "sm_90" else (1, 32)):
        like = timing.job(name, preset(name), (4096, 4096), m, torch.bfloat16).like(target)
        looped = [k for k in candidates(like, m) if k.tile.form == "loop" and k.tile.split == 1]
        kernels += rank([k for k in looped if warps_multiply(k)], m, keep=1)
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        added = 4 if kernel.tile.scales == "sums" else 0  # sums of two rows' groups, at the end
        assert (found["looped"], found["exchanges"]) == (0, added), (kernel, found)
        # Nor through shared memory, where weights would take 2 bytes each beside what is copied there. Of 32 rows of x
        # Triton may give each warp half, and then two warps share weights by it.
        if kernel.tile.m < 32:
            assert found["shared"] < shared_bytes(kernel) + kernel.tile.n * kernel.tile.k / 2, (kernel, found)


def test_many_rows_on_blackwell_are_summed_in_tensor_memory() -> None:
    kernels = []
    for name, shape, m in itertools.product(("int4", "nf4"), ((8192, 4096), (4096, 14336)), (256, 1024)):
        like = timing.job(name, preset(name), shape, m, torch.bfloat16).like("sm_100")
        kernels += rank(candidates(like, m), m, keep=1)
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert found["looped"] == 0, (kernel, found)
        assert found["mma"].startswith("tcgen05"), (kernel, found)


def shipped_kernels(gpu_name: str) -> dict[str, KernelSpec]:
    """The distinct kernels of a shipped table as they were timed, each as its first entry has it."""
    table, found = tuning.shipped(gpu_name), {}
    shapes = sorted({key[:2] for records in table.values() for key in records})
    for name, shape in itertools.product(PRESETS, shapes):
        like = timing.job(name, preset(name), shape, 16, torch.bfloat16).like("sm_90")
        for key, record in sorted(table.get(tuning.family(like), {}).items()):
            choice = tuning.resolve(record.choice, like, key[2]) if key[:2] == shape else None
            if isinstance(choice, Tile):
                kernel = f"{tuning.family(like)} {tuning.show(choice)}"
                found.setdefault(kernel, replace(like, tile=choice))
    return found


def test_kernels_of_the_shipped_table_do_not_spill() -> None:
    """A ninth of them, by the hash of what they are: all take nine minutes to compile."""
    every = shipped_kernels("nvidia-h100")
    assert len(every) > 60
    kernels = [kernel for name, kernel in every.items() if zlib.crc32(name.encode()) % 9 == 0]
    assert len(kernels) > len(every) // 10
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, (kernel, found)
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of("sm_90").shared, (kernel, found)
        of_eight = "wgmma" if _TRITON >= (3, 8) else "mma.sync"
        expected = "mma.sp" if kernel.tile.form == "cores" else of_eight if kernel.tile.m == 8 else "wgmma"
        assert found["mma"].startswith(expected), (kernel, found)
        assert not found["flush"], "subnormals would be flushed, which decoding fp8 relies on"


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "int2", "int3", "int6"])
def test_shared_memory_is_estimated_from_above(name: str) -> None:
    """Of the candidate that is nearest to what fits, whose scales have many blocks."""
    scheme = shipped(name, (256, 512))
    spec = LinearSpec(in_features=512, out_features=256, scheme=scheme, layout="fragment")
    small = Tile(m=16, n=64, k=64, split=1, warps=4, stages=3)
    like = kernel_spec(spec, torch.bfloat16, torch.bfloat16, "sm_90", small)
    loops = [kernel for kernel in candidates(like, 256) if kernel.tile.form == "loop"]
    (found,) = measure([kernel := max(loops, key=shared_bytes)])
    if "error" in found:  # Triton itself refuses what does not fit
        assert shared_bytes(kernel) > device_of("sm_90").shared, found
    else:
        assert found["shared"] <= shared_bytes(kernel), (kernel, found)


@pytest.mark.parametrize("n", [64, 128])
def test_a_gate_loads_as_many_bytes_at_once(n: int) -> None:
    """As the same kernel without: addresses in both halves of the weight are as plain to Triton."""
    spec = LinearSpec(in_features=1024, out_features=512, scheme=shipped("int4", (512, 1024)), layout="fragment")
    tile = Tile(m=16, n=n, k=128, split=1, warps=n // 16, stages=3)
    plain, gated = (
        kernel_spec(spec.with_epilogue(*steps), torch.bfloat16, torch.bfloat16, "sm_90", tile)
        for steps in ((), ("silu(a)*b",))
    )
    without, within = measure([plain, gated])
    assert set(without["copies"]) == {16}
    assert within["copies"] == without["copies"]


def test_no_candidate_for_blocks_spills() -> None:
    scheme = preset("fp8_block").fit("layer", (1024, 4096))
    spec = LinearSpec(in_features=4096, out_features=1024, scheme=scheme, layout="rows8")
    spec = spec.with_epilogue("bias", "silu", "mul", "add")
    small = Tile(m=16, n=64, k=64, split=1, warps=4, stages=3)
    like = kernel_spec(spec, torch.float8_e4m3fn, torch.bfloat16, "sm_90", small)
    kernels = [kernel for kernel in candidates(like, 128) if kernel.tile.split in (1, 8)]
    found = measure(kernels)
    assert [result["spills"] for result in found] == [0] * len(kernels), list(zip(kernels, found, strict=True))


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("overlap", [False, True])
def test_registers_of_products_under_way_are_not_written(overlap: bool, m: int) -> None:
    """The second chunk is decoded after the first one's product, and no chunk is while a product of its own goes on."""
    scheme = preset("int4").fit("layer", (4096, 4096))
    spec = LinearSpec(in_features=4096, out_features=4096, scheme=scheme, layout="fragment")
    tile = Tile(m=m, n=128, k=128, split=1, warps=8, stages=3, scales="fragments", overlap=overlap)
    (found,) = measure([kernel_spec(spec, torch.bfloat16, torch.bfloat16, "sm_90", tile)])
    # Decode, multiply, wait; with overlap the wait for the second product comes after the next turn's first.
    assert found["order"] == ("dm0dm0" if overlap else "dm0")


def test_sums_of_fp8_are_added_outside_of_the_tensor_cores() -> None:
    """Whose own sums keep few bits; one addition for each of a thread's sums at least."""
    scheme = preset("fp8").fit("layer", (1024, 4096))
    spec = LinearSpec(in_features=4096, out_features=1024, scheme=scheme, layout="rows8")
    tile = Tile(m=64, n=64, k=128, split=1, warps=4, stages=3)
    kernels = [kernel_spec(spec, torch.float8_e4m3fn, torch.bfloat16, f"sm_{sm}", tile) for sm in (89, 90, 100)]
    for found in measure(kernels):
        assert found["added"] >= tile.m * tile.n // (32 * tile.warps), found
