"""The kernel that searches ranges, in Triton's interpreter: as good as plain torch, group by group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qcompile.calibrate import ranges as module
from qcompile.calibrate.ranges import ranges_spec
from qcompile.calibrate.search import search_grid
from qcompile.codegen.spec import decode_kernel_spec
from qcompile.flags import override
from qcompile.presets import PRESETS
from qcompile.reference import Grid
from qcompile.runtime import cache
from qcompile.scheme import WeightScheme
from qcompile.scheme_config import parse_scheme
from tests import tolerance
from tests.calibrate.problems import layer, statistics
from tests.cross_compile import measure
from tests.triton_interpreter import interpret

SCHEMES: dict[str, WeightScheme] = {
    "int4": PRESETS["int4"].weight,
    "int4_asym": PRESETS["int4_asym"].weight,
    "nf4": PRESETS["nf4"].weight,
    "int3, half": parse_scheme({"weight": {"format": "int3", "group_size": 32, "scale_dtype": "float16"}}).weight,
    "fp6": parse_scheme({"weight": {"format": "fp6_e2m3", "group_size": 16}}).weight,
}


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def errors(grid: Grid, w: Tensor, weight: Tensor) -> Tensor:
    """Weighted squares of each group, float64."""
    off = w.double() - grid.decode(grid.encode(w)).double()
    return (off.square() * weight.double()).unflatten(1, (-1, grid.scheme.granularity.columns)).sum(-1)


@pytest.mark.parametrize("name", SCHEMES)
def test_as_plain_torch(name: str) -> None:
    """Sums in another order prefer another range only where both are as good."""
    w, x = layer(13, 256)
    w[2, :128] = 0
    w[3] = w[3].abs()
    scheme, gram = SCHEMES[name].fit("layer", (13, 256)), statistics(x).hessian
    plain = search_grid(w, scheme, None, "layer", "importance", gram)
    spec = ranges_spec(scheme, "sm_90")
    ours = module.launch(spec, interpret(cache.load(spec).kernel), w, gram.diagonal(), scheme)
    assert ours.scale.dtype == plain.scale.dtype
    assert ours.scale.shape == plain.scale.shape
    assert (ours.zero_point is None) == (plain.zero_point is None)
    assert torch.equal(ours.scale[2, :2].float(), plain.scale[2, :2].float())
    found, expected = (errors(grid, w, gram.diagonal()) for grid in (ours, plain))
    # Each compares sums of so many products, of three roundings each.
    room = 1 + 2 * tolerance.gamma(scheme.granularity.columns + 3, tolerance.unit(torch.float32))
    assert (found <= expected * room).all()
    assert (expected <= found * room).all()


def test_kernels_compile_without_spills() -> None:
    kernels = [ranges_spec(SCHEMES["int4"], target) for target in ("sm_80", "sm_100", "gfx942")]
    kernels += [ranges_spec(SCHEMES[name], "sm_90") for name in ("int4", "int4_asym", "nf4")]
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert decode_kernel_spec(kernel.encode()) == kernel
