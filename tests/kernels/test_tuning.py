"""Tables of choices: what is looked up, what is believed, what is written; and timing, with a clock of its own."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.spec import KernelSpec, Tile
from qcompile.flags import override
from qcompile.linear_spec import decode_spec, generation
from qcompile.presets import PRESETS, preset
from qcompile.report.explain import Explanation, LayerReport, _plan
from qcompile.runtime import cache, clock, gpu, gpu_grouped, measure, tuning
from tests.triton_interpreter import interpret

GPU = "nvidia-h100"
BF16 = torch.bfloat16
LOAD = cache.load


@pytest.fixture(autouse=True)
def empty_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "shipped", lambda gpu: {})
    tuning.choose.cache_clear()
    generation.cache_clear()
    with override(cache_dir=tmp_path):
        yield tmp_path
    generation.cache_clear()
    tuning.choose.cache_clear()
    LOAD.cache_clear()


def job(name: str = "int4", shape: tuple[int, int] = (4096, 4096), m: int = 16, dtype: torch.dtype = BF16) -> Any:
    return measure.job(name, preset(name), shape, m, dtype)


def kernel(name: str = "int4", shape: tuple[int, int] = (4096, 4096), **given: Any) -> KernelSpec:
    like: KernelSpec = job(name, shape, **given).like("sm_90")
    return like


def choose(name: str = "int4", shape: tuple[int, int] = (4096, 4096), m: int = 16) -> tuning.Chosen:
    given = job(name, shape, m)
    like = given.like("sm_90")
    return tuning.choose(given.spec, m, getattr(torch, like.x_dtype), BF16, "sm_90", GPU)


def tiles(like: KernelSpec, m: int = 16) -> list[Tile]:
    return [choice for choice in tuning.options(like, m) if isinstance(choice, Tile)]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("AMD Instinct MI300X", "amd-instinct-mi300x"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_gpu_family(name: str, family: str) -> None:
    assert tuning.gpu_family(name) == family


def test_a_family_is_all_but_shape_epilogue_and_tile() -> None:
    like = kernel("int8")
    same = [
        kernel("int8", (512, 1024)),
        replace(like, epilogue=("bias", "silu")),
        replace(like, tile=tiles(like)[1]),
        kernel("int8", dtype=torch.float16),
    ]
    assert {tuning.family(each) for each in same} == {tuning.family(like)}
    others = [kernel("fp8"), kernel("fp8_static"), kernel("int4"), replace(like, target="sm_80")]
    others += [kernel("int8", dtype=torch.float32), kernel("int4_asym"), kernel("mxfp4"), kernel("nvfp4")]
    assert len({tuning.family(each) for each in [like, *others]}) == 9


def test_what_was_tuned_is_chosen() -> None:
    like = kernel()
    first, other = tiles(like)[:2]
    assert choose().kernel.tile == first
    assert choose().origin == tuning.PREDICTED
    tuning.record(GPU, like, 16, other, 7.25)
    assert choose() == tuning.Chosen(kernel=replace(like, tile=other), vendor=None, origin=tuning.TUNED, us=7.25)
    assert tuning.is_tuned(like, 16, GPU)
    assert choose(m=32).origin == tuning.PREDICTED
    assert not tuning.is_tuned(like, 16, "nvidia-a100")


def test_a_vendors_product_is_chosen() -> None:
    like = kernel("fp8")
    tuning.record(GPU, like, 16, "scaled_mm", 5.0)
    assert choose("fp8").vendor == choose("fp8").name == "scaled_mm"


DAMAGED = [
    "",
    "[]",
    "null",
    '{"family": 1}',
    "\0" * 100,
    '{"family": "x", "n": 4096, "k": 4096, "m": 16, "choice": "scaled_mm", "us": 1.0, "made_by": "another version"}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_and_old_entries_are_passed_over_and_replaced(content: str) -> None:
    like = kernel()
    path = tuning.record(GPU, like, 16, tiles(like)[1], 7.0)
    entry = json.loads(path.read_text())
    path.write_text(content.replace('"x"', json.dumps(tuning.family(like))))
    tuning.choose.cache_clear()
    assert choose().origin == tuning.PREDICTED
    tuning.record(GPU, like, 16, tiles(like)[1], 7.0)
    assert json.loads(path.read_text()) == entry
    assert choose().origin == tuning.TUNED
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change",
    [{"m": 48}, {"warps": 1024}, {"n": "64"}, {"more": 1}, {"k": 10**9}, None, "scaled_mm", "int_mm", "eval", 3, []],
    ids=str,
)
def test_a_choice_that_is_not_legal_here_is_not_believed(change: Any) -> None:
    like = kernel()
    path = tuning.record(GPU, like, 16, tiles(like)[1], 7.0)
    entry = json.loads(path.read_text())
    entry["choice"] = entry["choice"] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(entry))
    tuning.choose.cache_clear()
    assert choose().origin == tuning.PREDICTED
    assert not tuning.is_tuned(like, 16, GPU)


@pytest.mark.parametrize(
    ("known", "wanted", "taken"),
    [
        ([(4096, 4096)], (4096, 8192), (4096, 4096)),
        ([(4096, 4096), (8192, 8192)], (5000, 4096), (4096, 4096)),
        ([(4096, 4096), (8192, 8192)], (8192, 6144), (8192, 8192)),
        ([(4096, 4096)], (8192, 8192), (4096, 4096)),  # 2: just near enough
        ([(4096, 4096)], (16384, 8192), None),
        ([(4096, 4096)], (256, 4096), None),
    ],
)
def test_the_nearest_shape(
    known: list[tuple[int, int]], wanted: tuple[int, int], taken: tuple[int, int] | None
) -> None:
    for position, shape in enumerate(known):
        like = kernel(shape=shape)
        tuning.record(GPU, like, 16, tiles(like)[1 + position], 7.0)
    found = choose(shape=wanted)
    if taken is None:
        assert found.origin == tuning.PREDICTED
        return
    assert found.origin == f"{tuning.TUNED}, {taken[0]} x {taken[1]}"
    assert found.us is None
    assert found.kernel.tile == tiles(kernel(shape=taken))[1 + known.index(taken)]
    assert (found.kernel.n, found.kernel.k) == wanted


def test_the_nearest_shape_counts_only_where_its_choice_is_legal() -> None:
    """K in eight parts needs a long K, and fp8 products of torch's need multiples of 16."""
    split = next(tile for tile in tiles(kernel(shape=(4096, 2048))) if tile.split == 8)
    tuning.record(GPU, kernel(shape=(4096, 2048)), 16, split, 7.0)
    assert choose(shape=(4096, 512)).origin == tuning.PREDICTED
    tuning.record(GPU, kernel("fp8"), 16, "scaled_mm", 7.0)
    assert choose("fp8", (4104, 4096)).origin == tuning.PREDICTED
    assert choose("fp8", (4112, 4096)).vendor == "scaled_mm"


def test_the_users_table_goes_first_and_this_shape_before_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    like = kernel()
    one, two, three = tiles(like)[1:4]
    records = {(4096, 4096, 16): tuning.Record(choice=tuning.plain(one), us=5.0)}
    monkeypatch.setattr(tuning, "shipped", lambda gpu: {tuning.family(like): records} if gpu == GPU else {})
    assert (choose().kernel.tile, choose().origin, choose().us) == (one, tuning.SHIPPED, 5.0)
    tuning.record(GPU, kernel(shape=(4096, 8192)), 16, two, 7.0)
    assert choose().kernel.tile == one
    tuning.record(GPU, like, 16, three, 7.0)
    assert choose().kernel.tile == three


def test_tables_are_printed_and_parsed() -> None:
    like = kernel()
    records = {
        (4096, 4096, 16): tuning.Record(choice=tuning.plain(tiles(like)[0]), us=5.0),
        (4096, 14336, 4096): tuning.Record(choice="decode_mm", us=300.5),
    }
    table = {tuning.family(like): records}
    text = tuning.print_table(table, gpu=GPU, versions={"torch": "2"})
    assert tuning.parse_table(text) == table
    assert json.loads(text)["gpu"] == GPU
    assert len(text.splitlines()) == 4
    entries = json.loads(text)["entries"]
    damaged = json.dumps({"entries": [entries[0], {}, None, 3, entries[1] | {"n": 0}, entries[1] | {"us": "fast"}]})
    (kept,) = tuning.parse_table(damaged)[tuning.family(like)]
    assert kept == (entries[0]["n"], entries[0]["k"], entries[0]["m"])
    assert tuning.parse_table(tuning.print_table({})) == tuning.parse_table("no table") == {}


def _record_many(folder: Path, worker: int) -> None:
    with override(cache_dir=folder):
        for step in range(30):
            like = kernel(shape=(64 * (1 + step), 4096))
            tuning.record(GPU, like, 16 if step % 2 else 32 + worker, tiles(like)[0], float(worker))


def test_processes_that_tune_at_once_keep_each_others_entries(empty_tables: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_record_many, args=(empty_tables, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = tuning.recorded(GPU, tuning.family(kernel()))
    assert len(found) == 15 + 15 * 3
    assert not list(empty_tables.rglob("*.tmp"))


def test_shipped_tables_hold_legal_choices_only() -> None:
    folder = resources.files("qcompile.codegen").joinpath("tuned")
    for file in folder.iterdir() if folder.is_dir() else ():
        text = file.read_text()
        table = tuning.parse_table(text)
        assert sum(map(len, table.values())) == len(json.loads(text)["entries"])
        (target,) = {word for family in table for word in family.split() if word.startswith("target=")}
        stacks = {int(word.split("=")[1]) for family in table for word in family.split() if word.startswith("experts=")}
        for name, experts in itertools.product(PRESETS, (0, *stacks)):
            some = measure.job(name, preset(name), (4096, 4096), 16, BF16, experts).like("sm_90")
            for n, k, m in table.get(tuning.family(some), {}):
                like = measure.job(name, preset(name), (n, k), m, BF16, experts).like(target.removeprefix("target="))
                record = table[tuning.family(like)][n, k, m]
                assert tuning.resolve(record.choice, like, m) is not None, (file.name, name, n, k, m)


class Clock:
    """Stands for `clock.times_in_graph`: the tile's split is its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: tuning.Chosen | None = None

        def watched(execute: Any) -> Any:
            def watch(chosen: tuning.Chosen, *args: Any) -> torch.Tensor:
                self.last = chosen
                y: torch.Tensor = execute(chosen, *args)
                return y

            return watch

        def load(kernel: KernelSpec) -> SimpleNamespace:
            return SimpleNamespace(kernel=interpret(LOAD(kernel).kernel))

        for module in (gpu, gpu_grouped):
            monkeypatch.setattr(module, "execute", watched(module.execute))
        monkeypatch.setattr(cache, "load", load)
        monkeypatch.setattr(gpu, "target_of", lambda device: "sm_90")
        monkeypatch.setattr(clock, "times_in_graph", self.times)
        monkeypatch.setattr(clock, "COLD_BYTES", 0)
        monkeypatch.setattr(measure, "LAUNCHES", 2)

    def times(self, calls: Any) -> list[float]:
        for call in calls:
            call()
        assert self.last is not None
        return [float(self.last.kernel.tile.split)]


SMALL = (128, 512)


@pytest.mark.parametrize("name", ["int4", "int8", "nvfp4", "q4_1", "int4_asym"])
def test_the_fastest_choice_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    given = job(name, SMALL)
    choices = tiles(given.like("sm_90"))[:4]
    outcome = measure.measure(given, choices, torch.device("cpu"))
    assert [t.note for t in outcome.timings] == [""] * len(choices), outcome.describe()
    assert all(0 < t.error < measure.LIMIT[BF16] for t in outcome.timings)
    assert outcome.best is not None
    assert outcome.best.us == min(tile.split for tile in choices)
    rows = [json.loads(line) for line in measure.to_lines(outcome).splitlines()]
    assert [row["us"] for row in rows] == [tile.split for tile in choices]


def test_stacks_of_experts_are_timed_and_chosen_as_linears_are(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    given = measure.job("int4", preset("int4"), SMALL, 16, BF16, experts=4)
    legal = tiles(given.like("sm_90"))
    assert measure.shortlist(given, "sm_90", 100) == [*legal, "decode_grouped_mm"]
    outcome = measure.measure(given, legal[:2], torch.device("cpu"))
    assert [t.note for t in outcome.timings] == ["", ""], outcome.describe()
    assert all(0 < t.error < measure.LIMIT[BF16] for t in outcome.timings)
    assert outcome.best is not None
    assert outcome.describe().startswith("int4 4 experts 128 x 512 M=16: ")
    assert outcome.best.us == min(tile.split for tile in legal[:2])

    tuning.record(GPU, given.like("sm_90"), 16, legal[1], 3.0)
    around = given.spec, 16, BF16, BF16, "sm_90", GPU
    stack, alone, others = (tuning.choose(*around, experts=experts) for experts in (4, 0, 8))
    assert (stack.kernel.tile, stack.origin, stack.us) == (legal[1], tuning.TUNED, 3.0)
    assert alone.origin == others.origin == tuning.PREDICTED


def test_rows_of_experts_are_what_tokens_choose() -> None:
    offsets = measure.routed(64, 2, 8, "cpu")
    assert offsets.dtype == torch.int32
    assert offsets.tolist()[0::8] == [0, 128]
    ids = measure.experts_of(offsets, 128)
    assert ids.bincount(minlength=8).tolist() == offsets.diff().tolist()
    assert ids.tolist() == sorted(ids.tolist())


def test_wrong_and_failing_choices_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    launch = gpu.launch

    def spoiled(kernel: KernelSpec, *args: Any) -> torch.Tensor:
        if kernel.tile.split == 1:
            return launch(kernel, *args) * 1.01
        if kernel.tile.split == 2:
            raise RuntimeError("out of resources")
        return launch(kernel, *args)

    monkeypatch.setattr(gpu, "launch", spoiled)
    given = job("int4", (128, 1024))
    choices = [
        tile for tile in tiles(given.like("sm_90")) if (tile.n, tile.k, tile.stages, tile.form) == (64, 128, 3, "loop")
    ]
    assert sorted(tile.split for tile in choices) == [1, 2, 4]
    outcome = measure.measure(given, choices, torch.device("cpu"))
    assert outcome.best is not None
    assert isinstance(outcome.best.choice, Tile)
    assert outcome.best.choice.split == 4
    assert "wrong: error" in outcome.describe()
    assert "out of resources" in outcome.describe()


def test_a_choice_whose_launches_differ_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    launch = gpu.launch

    def restless(kernel: KernelSpec, *args: Any) -> torch.Tensor:
        y = launch(kernel, *args)
        return y if kernel.tile.split > 1 else y * (1 + 1e-5 * torch.randn(1)).to(y.dtype) + torch.rand(1).to(y.dtype)

    monkeypatch.setattr(gpu, "launch", restless)
    monkeypatch.setattr(measure, "LIMIT", {BF16: 1.0})
    given = job("int4", SMALL)
    outcome = measure.measure(given, tiles(given.like("sm_90"))[:4], torch.device("cpu"))
    assert "launches differ" in outcome.describe()
    assert outcome.best is not None
    assert outcome.best.us > 1


def test_jobs_are_timed_in_their_order_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU our kernels are not compiled, and torch's product is all that counts."""
    Clock(monkeypatch)
    jobs = [job("int4", SMALL), job("int4", (64, 512))]
    outcomes = list(measure.tune_all(jobs, torch.device("cpu"), keep=1, workers=1))
    assert [outcome.job for outcome in outcomes] == jobs
    for outcome in outcomes:
        assert outcome.best is not None
        assert outcome.best.choice == "decode_mm"
        assert [bool(timing.note) for timing in outcome.timings] == [False, True]
        assert "driver" in outcome.describe()
    assert not list(measure.tune_all(jobs, torch.device("cpu"), keep=1, workers=1, seconds=-1))


def test_a_kernel_that_does_not_compile_is_a_note() -> None:
    """There is no GPU to compile for: the process says so, and the next kernel is tried all the same."""
    given = job("int4", SMALL)
    with measure.compilers(1) as running:
        notes = [
            running.submit(replace(given.like("sm_90"), tile=t), given.spec) for t in tiles(given.like("sm_90"))[:2]
        ]
        assert all("driver" in note.result(120) for note in notes)


def test_a_kernel_that_takes_too_long_to_compile_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COMPILE_SECONDS", 0.01)
    given = job("int4", SMALL)
    with measure.compilers(1) as running:
        assert "not compiled within" in running.submit(given.like("sm_90"), given.spec).result(60)


def test_closing_waits_for_no_kernel() -> None:
    given = job("int4", SMALL)
    begun = time.monotonic()
    with measure.compilers(2) as running:
        futures = [running.submit(given.like("sm_90"), given.spec) for _ in range(8)]
    assert time.monotonic() - begun < 10
    assert all(future.done() for future in futures)


def test_graphs_on_disk_do_not_outlive_a_choice(empty_tables: Path) -> None:
    """Compilers know an operator by its arguments, so the spec says which choices it stands for."""
    spec = job().spec
    before = spec.encode()
    tuning.record(GPU, kernel(), 16, tiles(kernel())[1], 7.0)
    between = spec.encode()
    tuning.record(GPU, kernel(), 16, tiles(kernel())[2], 6.0)
    assert len({before, between, spec.encode()}) == 3
    assert decode_spec(before) == decode_spec(between) == decode_spec(spec.encode()) == spec
    (empty_tables / "tuned" / "generation").write_text('", "layout": "')
    generation.cache_clear()
    assert spec.encode() == before


def test_a_first_use_is_timed_if_asked_once_and_outside_of_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    monkeypatch.setattr(gpu, "name_of", lambda device: GPU)
    monkeypatch.setattr(gpu, "may_time", lambda x: allowed)
    gpu.tune.cache_clear()
    given = job("int4", SMALL)
    problem = measure.problem(given, "cpu")
    spec = given.spec.with_epilogue("relu")

    def run(x: torch.Tensor) -> torch.Tensor:
        return gpu.gemm(x, None, list(problem.weight.tensors), None, [], spec, BF16)

    allowed = True
    run(problem.x)
    assert not tuning.is_tuned(given.like("sm_90"), 16, GPU)
    with override(tune=True):
        allowed = False
        run(problem.x)
        assert not tuning.is_tuned(given.like("sm_90"), 16, GPU)
        allowed = True
        y = run(problem.x)
        assert tuning.is_tuned(given.like("sm_90"), 16, GPU)
        assert problem.expected is not None
        assert float((y.double() - problem.expected.relu()).norm() / problem.expected.norm()) < measure.LIMIT[BF16]
        monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("it was timed already"))
        run(problem.x)
        gpu.tune.cache_clear()
        run(problem.x)
    gpu.tune.cache_clear()
    chosen = tuning.choose(given.spec, 16, BF16, BF16, "sm_90", GPU)
    assert chosen.origin == tuning.TUNED
    assert chosen.us == chosen.kernel.tile.split


def test_nothing_is_timed_without_a_gpu_or_while_tracing() -> None:
    assert not gpu.may_time(torch.empty(1))
    with FakeTensorMode():
        assert not gpu.may_time(torch.empty(1))


def test_explain_tells_the_choice_its_origin_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(gpu, "name_of", lambda device: GPU)
    device = torch.device("cuda", 0)
    spec = job("int4").spec
    told = _plan(spec, 1, BF16, device)
    assert told["kernel"].startswith("gemm_fragment m=8 n=")
    assert (told["origin"], told["measured_us"]) == (tuning.PREDICTED, None)
    assert 0 < told["of_limit"] < 1
    tuning.record(GPU, kernel(), 16, tiles(kernel())[1], 8.0)
    told = _plan(spec, 16, BF16, device)
    assert (told["origin"], told["measured_us"]) == (tuning.TUNED, 8.0)
    # 8.4 MB of codes at 3.3 TB/s take 2.54 us, and 0.26 MB each of scales and of 16 rows of in- and outputs, 0.08 us.
    assert told["of_limit"] == pytest.approx(2.70 / 8.0, rel=0.01)
    long = _plan(job("nf4").spec, 4096, BF16, device)
    assert (long["kernel"], long["origin"]) == ("decode_mm", tuning.PREDICTED)
    assert _plan(replace(spec, layout="logical"), 1, BF16, device) == {}
    layers = (
        LayerReport("up", (4096, 4096), "int4", **told),
        LayerReport("down", (4096, 4096), "int4", **long),
        LayerReport("head", None, None, note="left"),
    )
    table = str(Explanation(layers, (), 1))
    assert "8.0" in table
    assert f"~{long['predicted_us']:.1f}" in table
    assert "cost model" in table
    assert "34%" in table
    assert "of limit" not in str(Explanation(layers[2:], (), 1))
