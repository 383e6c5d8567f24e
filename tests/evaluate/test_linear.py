"""What the benchmark of products measures, checked against float64 by the benchmark itself."""

from __future__ import annotations

import torch

from qcompile.evaluate.linear import measure_gate
from qcompile.presets import PRESETS


@torch.inference_mode()
def test_gates_are_measured_in_the_product_and_apart() -> None:
    rates = {"memory": 1e10, "16-bit": 1e12, "8-bit": 1e12}
    schemes = {"int8": PRESETS["int8"].fit("layer", (256, 128))}
    rows = list(measure_gate(256, 128, [1], schemes, rates, torch.device("cpu")))
    assert [row["impl"] for row in rows] == ["qcompile, gate in the product", "qcompile, gate apart"]
    assert rows[0]["floor_us"] == rows[1]["floor_us"]
