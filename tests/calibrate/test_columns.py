"""The kernel of GPTQ's columns, in Triton's interpreter: bit for bit what plain torch computes; and on other GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.calibrate import columns as module
from qcompile.calibrate.columns import Columns, columns_spec
from qcompile.calibrate.gptq import gptq, inverse_factor
from qcompile.codegen.columns_spec import MOST_COLUMNS, ColumnsSpec
from qcompile.codegen.devices import device_of
from qcompile.codegen.nearest import has_nearest
from qcompile.codegen.spec import decode_kernel_spec
from qcompile.flags import override
from qcompile.formats import FORMATS, Format, IntegerFormat
from qcompile.methods import GPTQ
from qcompile.presets import PRESETS
from qcompile.reference import choose_grid, dequantize, super_scale
from qcompile.runtime import cache
from qcompile.scheme import WeightScheme
from qcompile.scheme_config import parse_scheme
from tests.calibrate.problems import layer, statistics
from tests.cross_compile import measure
from tests.triton_interpreter import interpret

SCHEMES = {
    **{
        name: PRESETS[name].weight
        for name in ("int4", "int4_asym", "int8_weight_only", "nf4", "mxfp4", "nvfp4", "q4_k")
    },
    "offset": parse_scheme({"weight": {"format": "uint3", "offset": True, "group_size": 32}}).weight,
    "tile": parse_scheme({"weight": {"format": "int4", "block_size": [16, 32]}}).weight,
    "tensor": parse_scheme({"weight": {"format": "fp6_e3m2", "granularity": "tensor"}}).weight,
}


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with override(cache_dir=tmp_path_factory.mktemp("cache")):
        yield
    cache.load.cache_clear()


def solved(
    weight: Tensor, factor: Tensor, scheme: WeightScheme, places: Tensor, *, kernel: bool
) -> tuple[Tensor, Tensor]:
    """The values that are chosen for some columns, and their errors, float32 [columns, N]."""
    grid = choose_grid(weight, scheme, super_scale([weight], scheme, "layer"), "layer")
    columns = Columns(grid, len(places))
    own = weight.t()[places].contiguous()
    codes = torch.empty(own.shape, dtype=torch.uint8)
    if kernel:
        spec = replace(columns_spec(scheme, "sm_90"), columns=32)
        function = interpret(cache.load(spec).kernel)
        errors = module.launch(spec, function, own, factor, columns.stored, places // columns.wide, columns.tall, codes)
    else:
        errors = columns.solve(own, factor, None, places, codes)
    every = torch.zeros(weight.shape, dtype=torch.uint8)
    every[:, places] = codes.t()
    return grid.decode(every)[:, places], errors


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=3)
@given(rows=st.integers(1, 40), count=st.integers(1, 24), seed=st.integers(0, 99))
def test_the_kernel_is_plain_torch_bit_for_bit(name: str, rows: int, count: int, seed: int) -> None:
    weight, x = layer(rows, 256, 64, seed)
    scheme = SCHEMES[name].fit("layer", (rows, 256))
    places = torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:count]
    factor = inverse_factor(statistics(x).hessian, 0.01, "layer")[:count, :count]
    ours, errors = solved(weight, factor, scheme, places, kernel=True)
    plain, plain_errors = solved(weight, factor, scheme, places, kernel=False)
    assert torch.equal(ours, plain)
    assert torch.equal(errors, plain_errors)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if has_nearest(fmt)], ids=lambda fmt: fmt.name)
def test_nearest_is_what_the_format_chooses(fmt: Format) -> None:
    """At every value, at the middles between them and next to those, beyond all, and for NaN."""
    values = fmt.decode(torch.arange(2**fmt.bits, dtype=torch.int32)).unique()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])])
    x = torch.cat([x, x.nextafter(torch.full_like(x, torch.inf)), x.nextafter(torch.full_like(x, -torch.inf))])
    unsigned = isinstance(fmt, IntegerFormat) and not fmt.signed
    spec = ColumnsSpec(number=fmt.name, zero_point=False, shift=unsigned, columns=16, target="sm_90")
    one, codes = torch.ones(1, 1), torch.empty(1, len(x), dtype=torch.uint8)
    stored = [one, None, torch.zeros(1, 1)]
    function = interpret(cache.load(spec).kernel)
    block = torch.zeros(1, dtype=torch.int64)
    errors = module.launch(spec, function, x[None].clone(), one, stored, block, len(x), codes)
    chosen = fmt.decode(fmt.encode(x).int())
    assert torch.equal(fmt.decode(codes[0].int()), chosen)
    finite = x.isfinite()
    assert torch.equal(errors[0, finite], (x - chosen)[finite])


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_gptq_by_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of columns, in the order of act_order, the last of them short."""
    weight, x = layer(24, 160, 512)
    hessian, scheme = statistics(x).hessian, PRESETS[name].weight.fit("layer", (24, 160))
    plain = gptq(weight, hessian, scheme, GPTQ(clip="none"))
    monkeypatch.setattr(module, "kernel_for", lambda scheme, device: replace(columns_spec(scheme, "sm_90"), columns=64))
    load = cache.load
    monkeypatch.setattr(cache, "load", lambda spec: SimpleNamespace(kernel=interpret(load(spec).kernel)))
    ours = gptq(weight, hessian, scheme, GPTQ(clip="none"))
    assert torch.equal(dequantize(ours), dequantize(plain))


def test_kernels_compile_without_spills() -> None:
    given_ = [("int4", False, False), ("uint4", True, False), ("uint4", False, True), ("nf4", False, False)]
    given_ += [("fp6_e3m2", False, False)]
    kernels = [
        ColumnsSpec(number=number, zero_point=zero, shift=shift, columns=MOST_COLUMNS, target=target)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for number, zero, shift in (given_ if target == "sm_90" else given_[:1])
    ]
    for kernel, found in zip(kernels, measure(kernels), strict=True):
        assert "error" not in found, found
        assert found["spills"] == 0, (kernel, found)
        assert found["shared"] <= device_of(kernel.target).shared
        assert decode_kernel_spec(kernel.encode()) == kernel
