"""`qcompile tune` on shapes and on a model, timed by a clock of its own."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")
pytest.importorskip("transformers")

import qcompile
from qcompile.cli import app
from qcompile.cli import tune as command
from qcompile.cli.shapes import parse_experts, parse_shapes, parse_tokens, shapes_in
from qcompile.cli.steps import Steps
from qcompile.errors import ConfigError, LayerError
from qcompile.evaluate import random_language_model
from qcompile.flags import override
from qcompile.runtime import gpu, measure, tuning
from qcompile.scheme_config import parse_scheme
from tests.checkpoint.moe_files import make_moe
from tests.cli.test_cli import TINY, fails

DEVICE = torch.device("cpu")
GPU = "nvidia-h100"


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.fixture(autouse=True)
def an_h100(monkeypatch, tmp_path):
    """By name; nothing runs on it."""
    monkeypatch.setattr(gpu, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(gpu, "name_of", lambda device: GPU)
    monkeypatch.setattr(tuning, "shipped", lambda gpu: {})
    tuning.choose.cache_clear()
    with override(cache_dir=tmp_path):
        yield
    tuning.choose.cache_clear()


class Timed:
    """Stands for `measure.tune_all`: the second candidate is fastest, and the user may interrupt."""

    def __init__(self, monkeypatch, interrupt_after=None):
        self.seen = []
        self.interrupt_after = interrupt_after
        monkeypatch.setattr(measure, "tune_all", self.tune_all)

    def tune_all(self, jobs, device, *, keep):
        for job in jobs:
            if len(self.seen) == self.interrupt_after:
                raise KeyboardInterrupt
            self.seen.append(job)
            best = measure.Timing(measure.shortlist(job, "sm_90", keep)[1], 7.0)
            yield measure.Outcome(job, best, (best,))


def test_shapes_and_tokens():
    assert shapes_in("6144x4096, 64x64,6144x4096") == parse_shapes(["6144x4096", "64x64"]) == [(6144, 4096), (64, 64)]
    assert shapes_in("model.gguf") is shapes_in("64x64x64") is shapes_in("64x64,model") is shapes_in("") is None
    assert parse_tokens(["1, 16", "4096,1"]) == [1, 16, 4096]
    jobs = command.jobs_of_shapes([(256, 512), (512, 256)], "int4", [1, 4, 100])
    assert [(job.m, job.spec.shape) for job in jobs] == [
        (1, (256, 512)), (1, (512, 256)), (16, (256, 512)), (16, (512, 256)), (128, (256, 512)), (128, (512, 256)),
    ]  # fmt: skip
    assert jobs[0].spec.layout == "fragment"


def test_experts_are_timed_for_the_rows_that_they_get():
    assert parse_experts(" 2/8") == (2, 8)
    jobs = command.jobs_of_shapes([(256, 512)], "int4", [1, 16, 64, 1024], 2, 8)
    assert [(job.m, job.experts) for job in jobs] == [(1, 8), (16, 8), (32, 8), (512, 8)]
    assert command.missing(jobs, DEVICE) == jobs


def test_experts_of_a_model_are_jobs(monkeypatch, tmp_path):
    model = make_moe("mixtral")
    qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": "int4"}]}, progress=False)
    monkeypatch.setattr("qcompile.checkpoint.loader.load", lambda path, device: model)
    explain = importlib.import_module("qcompile.report.explain")
    monkeypatch.setattr(explain, "linear_specs", lambda *_, **__: {})  # its linears are not quantized
    monkeypatch.setattr(gpu, "has_kernel", lambda spec: True)  # the layout is that of CPUs here
    jobs = command.jobs_of_model(tmp_path, None, [1, 64], DEVICE)
    experts = model.model.layers[0].mlp.experts
    shapes = {(experts.gate_up_proj.out_features, 64), (64, experts.down_proj.in_features)}
    assert {(job.spec.shape, job.m, job.experts) for job in jobs} == {(s, m, 4) for s in shapes for m in (1, 64)}
    model.config = SimpleNamespace()
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        command.jobs_of_model(tmp_path, None, [1], DEVICE)


def test_mistakes():
    fails(run("64x64"), "shapes need a --scheme")
    fails(run("64x64", "--scheme", "int4", "--tokens", "many"), "--tokens 'many'")
    fails(run("64x64", "--scheme", "int4", "--tokens", ","), "--tokens names nothing")
    fails(run("0x64", "--scheme", "int4"), "'0x64'", "from 1 to")
    fails(run("64x1048577", "--scheme", "int4"), "'64x1048577'", "from 1 to")
    fails(run("64x64", "--scheme", "int4"), "torch sees no GPU", "nothing to tune")
    for wrong in ("8", "2/0", "9/8", "a/b"):
        fails(run("64x64", "--scheme", "int4", "--experts", wrong), f"--experts '{wrong}'")
    fails(run("model", "--experts", "2/8"), "--experts is for shapes")
    rules = {"rules": [{"layers": "a", "scheme": "int4"}, {"layers": "*", "scheme": "int8"}]}
    with pytest.raises(ConfigError, match="no names for rules"):
        command.jobs_of_shapes([(64, 64)], rules, [1])
    with pytest.raises(ConfigError, match="int44"):
        command.jobs_of_shapes([(64, 64)], "int44", [1])

    scheme = parse_scheme({"weight": {"format": "int4", "group_size": 128}})
    with pytest.raises(LayerError, match="layer"):
        measure.job("layer", scheme, (64, 100), 16, torch.bfloat16)


def test_results_are_kept_and_not_timed_again(monkeypatch, capsys):
    clock = Timed(monkeypatch)
    jobs = command.jobs_of_shapes([(256, 512), (512, 256)], "int4", [1, 100])
    assert command.missing(jobs, DEVICE) == jobs
    with Steps(len(jobs)) as steps:
        assert command.run(jobs, DEVICE, steps, Console()) == 4
    assert command.missing(jobs, DEVICE) == []
    assert clock.seen == jobs
    assert "int4 256 x 512 M=128: 7.00 us, m=" in capsys.readouterr().out
    chosen = tuning.choose(jobs[0].spec, 1, torch.bfloat16, torch.bfloat16, "sm_90", GPU)
    assert (chosen.origin, chosen.us) == (tuning.TUNED, 7.0)


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(monkeypatch, capsys):
    Timed(monkeypatch, interrupt_after=1)
    jobs = command.jobs_of_shapes([(256, 512), (512, 256)], "int4", [1])
    with Steps(2) as steps:
        assert command.run(jobs, DEVICE, steps, Console()) == 1
    assert "interrupted after 1 of 2" in capsys.readouterr().out
    left = command.missing(jobs, DEVICE)
    assert left == jobs[1:]
    Timed(monkeypatch)
    with Steps(1) as steps:
        assert command.run(left, DEVICE, steps, Console()) == 1
    assert command.missing(jobs, DEVICE) == []


@pytest.mark.parametrize("scheme", ["int4", None])
def test_jobs_of_a_model_are_its_merged_linears(monkeypatch, tmp_path, scheme):
    model = random_language_model(DEVICE, **TINY).model
    if scheme is None:
        qcompile.quantize_(model, "int4")
    monkeypatch.setattr("qcompile.checkpoint.loader.load", lambda path, device: model)
    monkeypatch.setattr(gpu, "has_kernel", lambda spec: True)  # the layout is that of CPUs here
    jobs = command.jobs_of_model(tmp_path, scheme, [1, 64], DEVICE)
    shapes = [(128, 64), (64, 64), (256, 64), (64, 128), (256, 64)]
    found = {(job.m, job.spec.shape) for job in jobs}
    assert found == {(m, shape) for m in (1, 64) for shape in shapes}
    assert len(jobs) == len(found)
    assert all(job.spec.epilogue == () and job.dtype == torch.bfloat16 for job in jobs)
    assert jobs[0].name.startswith("model.layers.0.")
