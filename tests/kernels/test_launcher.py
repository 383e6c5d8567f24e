"""Compiled kernels are launched again exactly for arguments that Triton would compile alike."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qcompile.codegen.spec import Tile
from qcompile.flags import override
from qcompile.presets import preset
from qcompile.runtime import cache, gpu, launcher
from tests.kernels.problems import problem


class Compiled:
    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Function:
    """Stands for one of Triton's: "compiles" at each launch."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Compiled:
            assert options == {"num_warps": 4}
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_kept", {})


@pytest.fixture
def _a_function_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_is_triton", lambda function: type(function) is Function)


@pytest.mark.usefixtures("_a_function_of_triton")
def test_equal_arguments_are_launched_without_the_function() -> None:
    function, x = Function(), torch.empty(64)
    for grid, m in (((3,), 5), ((4, 2), 7), ((5,), 9)):
        launcher.launch(function, grid, x, m, num_warps=4)
    (compiled,) = function.compiled
    assert compiled.launches == [((4, 2, 1), (x, 7)), ((5, 1, 1), (x, 9))]
    launcher.launch(function, (1,), x[4:], 3, num_warps=4)  # aligned as x is
    assert len(compiled.launches) == 3


@pytest.mark.usefixtures("_a_function_of_triton")
def test_others_are_left_to_triton() -> None:
    function, x = Function(), torch.empty(64)
    unlike: list[tuple[torch.Tensor, int]] = [(x, 5), (x, 1), (x, 48), (x, 1 << 40), (x.to(torch.int8), 5)]
    for _ in range(2):
        for tensor, m in unlike:
            launcher.launch(function, (1,), tensor, m, num_warps=4)
    assert [len(compiled.launches) for compiled in function.compiled] == [1] * len(unlike)
    launcher.launch(function, (1,), x[1:], 5, num_warps=4)  # not aligned
    launcher.launch(Function(), (1,), x, 5, num_warps=4)
    assert [len(compiled.launches) for compiled in function.compiled] == [1] * len(unlike) + [0]


class Driver:
    """Stands for that of an H100; what it would launch is in `launched`."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232448}
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.launched.append(args)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def h100(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    monkeypatch.setattr(driver, "_active", found)
    cache.load.cache_clear()
    with override(cache_dir=tmp_path):
        yield found
    cache.load.cache_clear()


def test_what_triton_launches_is_launched(h100: Driver) -> None:
    given = problem(preset("int4"), "fragment", 3, 64, 128)
    kernel = given.kernel("sm_90", Tile(m=16, n=64, k=64, split=1, warps=4, stages=2))
    function = cache.load(kernel).kernel
    for _ in range(2):
        gpu.launch(kernel, function, *given.arguments(), given.out_dtype)
    first, second = h100.launched
    grid, metadata, arguments = slice(0, 5), 5, slice(9, None)
    assert first[grid] == second[grid]
    assert first[metadata] == second[metadata]
    before, after = first[arguments], second[arguments]
    assert len(before) == len(after) == len(function.arg_names)
    for name, one, other in zip(function.arg_names, before, after, strict=True):
        assert one is other if name != "y" else one.shape == other.shape, name
