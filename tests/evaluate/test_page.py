"""The page and the JSON of an evaluation: escaped, whole, and in need of nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from qcompile.evaluate.layers import Channels, Distance, LayerError
from qcompile.evaluate.quality import Quality
from qcompile.evaluate.run import BlockError, Evaluation
from qcompile.report import plots
from qcompile.report.evaluation import Report, Row, Speed, columns_of, to_dict, worst_layers, write
from qcompile.report.page import to_html

HOSTILE = '</svg><script src="http://a.example/x.js">alert(1)</script> $\\frac{1}$ & "quoted"'
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects them, their attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def layer(name, scale=1.0):
    return LayerError(name, "int4 group 64", (64, 64), 4.25, Distance(20.0 * scale, 0.99), Distance(15.0 * scale, 0.98))


def row(name, kl, scale=1.0, **more):
    quality = Quality(100, 12.5, kl, 0.9, 0.5, 0.01, 3 * kl)
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("q_proj", HOSTILE)]
    blocks = tuple(BlockError(f"model.layers.{i}", Distance(18.0 - i, 0.99)) for i in range(3))
    layers = tuple(layer(each, scale * (1 + i / 10)) for i, each in enumerate(names))
    return Row(name, None, Evaluation(quality, 10**6, 4.25, layers, blocks), 1.0, **more)


def channels(count=3):
    generator = torch.Generator().manual_seed(0)
    kinds = ("q_proj", HOSTILE, "down_proj")
    return tuple(
        Channels((f"model.layers.{i}.{kind}",), torch.rand(200, generator=generator) * 9 + 1, 2.0)
        for kind in kinds
        for i in range(count)
    )


def report(*rows):
    original = Row("unquantized", None, Evaluation(Quality(100, 12.0), 4 * 10**6), 1.0, Speed(100.0, 10.0, 3.0))
    about = {"device": HOSTILE, "dtype": "float32", "torch": "2"}
    text = "text " + HOSTILE
    return Report(HOSTILE, "unquantized", text, 101, 32, about, (original, *rows), channels(), channels())


@pytest.fixture
def full():
    scores = {HOSTILE: {"acc": 0.5, "acc_stderr": 0.1, "acc,strict": 0.4, "acc_stderr,strict": 0.2}}
    broken = Evaluation(
        Quality(100, math.inf, math.nan, 0.0), 10**6, 4.25, (layer("a", math.nan), layer("b", math.inf))
    )
    return report(
        row("int4", 0.2, speed=Speed(90.0, 20.0, 3.0), tasks=scores),
        row(HOSTILE, 0.01, 2.0, note=HOSTILE),
        Row("broken", None, broken, 1.0),
    )


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_page(full, with_matplotlib, monkeypatch):
    if with_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    text = to_html(full)
    page = Page(text)
    assert page.tags.count("svg") == (5 if with_matplotlib else 0)
    assert ("pip install" in text) != with_matplotlib
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("img") == 0
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    styles = re.findall(r"url\(([^)]*)\)|@import", text)
    assert all(target.startswith("#") for target in styles)
    assert HOSTILE in page.texts  # as text, in a table
    assert "prefers-color-scheme: dark" in text
    assert len(text.encode()) < 300_000


def test_plots_have_no_colours_that_one_scheme_hides(full):
    pytest.importorskip("matplotlib")
    for svg in (plots.quality(full), plots.outputs(full), plots.depth(full), plots.outliers(full.inputs, "inputs")):
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        texts = re.findall(r"<text[^>]*style=\"([^\"]*)\"", svg)
        assert texts
        assert all("fill: currentColor" in style for style in texts)
        assert "#ffffff" not in svg
    assert plots.quality(full) == plots.quality(full)  # the same file for the same numbers


def test_ids_of_plots_do_not_meet(full):
    pytest.importorskip("matplotlib")
    one, other = (
        set(re.findall(r"url\(#(\w+)\)", plots.outliers(full.inputs, salt))) for salt in ("inputs", "weights")
    )
    assert one
    assert not one & other


def test_columns(full):
    titles = {column.title: column for column in columns_of(full)}
    assert list(titles)[:6] == ["bits", "weights MB", "perplexity", "KL nats", "KL p99", "same token"]
    int4, broken = full.rows[1], full.rows[3]
    assert titles["bits"].text(int4) == "4.25"
    assert titles["bits"].text(full.rows[0]) == ""
    assert titles["decode tok/s"].text(int4) == "20.0"
    assert titles["decode tok/s"].text(broken) == ""
    assert titles[f"{HOSTILE} acc"].text(int4) == "0.5000 ± 0.1000"
    assert titles[f"{HOSTILE} acc,strict"].text(int4) == "0.4000 ± 0.2000"
    assert titles["perplexity"].text(broken).startswith("inf")
    assert [each.name for each in worst_layers(int4, 2)] == [each.name for each in int4.evaluation.layers[:2]]


def test_a_model_alone():
    pytest.importorskip("matplotlib")
    evaluation = Evaluation(Quality(100, 12.0), 10**6, inputs=channels(1), weights=channels(1))
    about = {"device": "cpu", "dtype": "float32", "torch": "2"}
    made = Report("m", None, "text", 101, 32, about, (Row("m", None, evaluation, 1.0),), channels(1), channels(1))
    page = Page(to_html(made))
    assert page.tags.count("svg") == 2
    assert not any("KL" in text for text in page.texts)


def test_json(full):
    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(json.dumps(to_dict(full)), parse_constant=refuse)
    assert found["model"] == HOSTILE
    assert [each["name"] for each in found["rows"]] == ["unquantized", "int4", HOSTILE, "broken"]
    int4, broken = found["rows"][1], found["rows"][3]
    assert int4["kl"] == 0.2
    assert int4["layers"][0]["weight"] == {"sqnr_db": 20.0, "cosine": 0.99}
    assert int4["blocks"][2]["hidden"]["sqnr_db"] == 16.0
    assert broken["perplexity"] is None
    assert broken["layers"][1]["output"]["sqnr_db"] is None
    inputs = found["outliers"]["inputs"]
    assert len(inputs) == 9
    assert len(inputs[0]["maxima"]) == 64
    assert max(inputs[0]["maxima"]) == pytest.approx(inputs[0]["peak"], rel=5e-3)


def test_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    write(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write(path, "\ud800")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
