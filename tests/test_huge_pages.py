"""Where large weights lie on CPUs."""

from __future__ import annotations

import copy
import gc
import re
from pathlib import Path

import pytest
import torch

from qcompile import huge_pages
from qcompile.layouts import LAYOUTS, to_layout
from qcompile.presets import PRESETS
from qcompile.reference import quantize_weight

CPU = torch.device("cpu")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _kilobytes_in_huge_pages() -> int:
    return sum(map(int, re.findall(r"^AnonHugePages:\s*(\d+)", Path("/proc/self/smaps").read_text(), re.MULTILINE)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bfloat16])
def test_tensors_are_as_any_other(dtype: torch.dtype) -> None:
    tensor = huge_pages.empty((3, 1 << 20), torch.empty(0, dtype=dtype))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor._is_view()) == ((3, 1 << 20), dtype, True, False)
    assert tensor.data_ptr() % huge_pages.PAGE == 0
    tensor.view(torch.uint8)[:] = 3
    assert torch.equal(copy.deepcopy(tensor).view(torch.uint8), tensor.view(torch.uint8))
    other = torch.empty(0, dtype=dtype).set_(tensor[1:])
    del tensor
    gc.collect()
    assert bool((other.view(torch.uint8) == 3).all())


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no transparent huge pages"
)
def test_a_weight_lies_in_huge_pages_which_go_with_it() -> None:
    before = _kilobytes_in_huge_pages()
    weight = torch.randn(512, 16384).to(torch.bfloat16)
    packed = to_layout(quantize_weight(weight, PRESETS["int8_weight_only"].weight), LAYOUTS["rows16"])
    assert packed.codes.data_ptr() % huge_pages.PAGE == 0
    if _kilobytes_in_huge_pages() - before < 8192:
        pytest.skip("the system has none free")
    del packed
    gc.collect()
    assert _kilobytes_in_huge_pages() - before < 8192


def test_small_tensors_and_other_devices_stay_as_they_are() -> None:
    assert huge_pages.empty((4, 5), torch.empty(0, dtype=torch.int8)).shape == (4, 5)
    assert huge_pages.empty((4, 1 << 21), torch.empty(0, dtype=torch.int8, device="meta")).device.type == "meta"
