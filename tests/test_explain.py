"""The table of `qcompile.explain`: one row for layers of blocks that are alike."""

from __future__ import annotations

import json

from rich.console import Console

from qcompile.report.explain import Explanation, LayerReport


def block(number: int, scheme: str = "int4", sqnr: float = 20.0) -> list[LayerReport]:
    name = f"model.layers.{number}"
    merged = " + ".join(f"{name}.self_attn.{part}_proj" for part in "qkv")
    return [
        LayerReport(merged, (384, 256), scheme, "gemv", 192 << 10, 54 << 10, sqnr, ("silu",)),
        LayerReport(f"{name}.mlp.experts.1.down_proj", (256, 512), scheme, "gemv", 256 << 10, 72 << 10, sqnr + number),
    ]


def table(*layers: LayerReport, width: int = 160) -> list[str]:
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(Explanation(layers, (), 1))
    return capture.get().splitlines()


def rows(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines if " x " in line and "N x K" not in line]


def test_blocks_alike_have_one_row() -> None:
    layers = [*block(0), *block(1, "fp8"), *block(2), *block(3), *block(5), LayerReport("lm_head", (9, 256), None)]
    lines = table(*layers)
    assert rows(lines) == [
        "model.layers.0,2-3,5.self_attn.q_proj + k_proj + v_proj 4 384 x 256 192 > 54 20.0",
        "model.layers.0,2-3,5.mlp.experts.1.down_proj 4 256 x 512 256 > 72 20.0..25.0",
        "model.layers.1.self_attn.q_proj + k_proj + v_proj 1 384 x 256 192 > 54 20.0",
        "model.layers.1.mlp.experts.1.down_proj 1 256 x 512 256 > 72 21.0",
        "lm_head 1 9 x 256",
    ]
    assert "int4, gemv, silu" in [line.strip() for line in lines]


def test_a_layer_in_several_graphs_is_named_once() -> None:
    lines = rows(table(*block(0), *block(1), *block(0), *block(1)))
    assert lines[0] == "model.layers.0-1.self_attn.q_proj + k_proj + v_proj 4 384 x 256 192 > 54 20.0"


def test_layers_that_differ_have_rows_of_their_own() -> None:
    lines = table(*block(0), LayerReport("head", (9, 256), "int8", "gemv", 9216, 5120, 40.0, note="kept [by hand]"))
    assert rows(lines)[-1] == "head 9 x 256 9 > 5 40.0"
    assert "  kept [by hand]" in [line.rstrip()[1:] for line in lines]


def test_lines_fit_80_columns() -> None:
    lines = table(*block(0), *block(1), width=80)
    assert max(map(len, lines)) <= 80
    assert any("384 x 256   192 > 54" in line for line in lines)


def test_all_layers_are_told_as_json() -> None:
    told = json.loads(Explanation((*block(0), *block(1)), (), 1).to_json())
    assert [layer["name"] for layer in told["layers"]] == [layer.name for layer in (*block(0), *block(1))]
