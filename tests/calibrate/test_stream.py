"""Blocks run one at a time see what they see in the whole model, and an interrupted calibration goes on."""

from __future__ import annotations

import copy
import gc
import json
import re
import weakref

import pytest
import torch
from torch import nn

import qcompile
from qcompile import compat
from qcompile.calibrate import run
from qcompile.calibrate.stream import NotAStack, as_batches, find_stacks, record, run_whole
from qcompile.errors import CalibrationError, CheckpointError, ConfigError, LayerError
from qcompile.modules import QuantizedLinear
from tests import tolerance
from tests.calibrate.problems import Block, Decoder, batches, decoder

GPTQ = {"weight": {"format": "int4", "group_size": 16}, "method": "gptq"}
BLOCKS = {"rules": [{"layers": "layers.*", "scheme": GPTQ}]}


def inputs_seen(model: nn.Module, names: list[str]) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, a, n=name: seen[n].append(a[0].clone()))
        for name in names
    ]
    for batch in batches():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_see_what_they_see_in_the_model():
    model = decoder()
    names = [f"layers.{i}" for i in range(3)]
    expected = inputs_seen(model, [f"{name}.down" for name in names] + ["head"])
    found: dict[str, list[torch.Tensor]] = {name: [] for name in expected}
    for name in expected:
        model.get_submodule(name).register_forward_pre_hook(lambda _, a, n=name: found[n].append(a[0].clone()))
    given = as_batches(batches())
    stack = record(model, names, given, [])
    for index, name in enumerate(names):
        stack.advance(index, model.get_submodule(name), torch.device("cpu"))
    assert list(run_whole(model, given, [stack])) == [0, 1, 2, 3]
    del found["layers.0.down"][:1]  # the first block runs once more, to see what it returns
    for name in expected:
        assert len(found[name]) == 4
        assert all(torch.equal(a, b) for a, b in zip(found[name], expected[name], strict=True)), name


def test_only_one_blocks_originals_are_alive(monkeypatch):
    """Each original weight is freed before the next block is observed."""
    model = decoder()
    alive = [weakref.ref(layer.down.weight) for layer in model.layers]
    seen = []
    original = run._Calibration._block

    def watched(self, block, own, stack, index, device):
        gc.collect()
        seen.append([ref() is not None for ref in alive])
        original(self, block, own, stack, index, device)

    monkeypatch.setattr(run._Calibration, "_block", watched)
    qcompile.quantize_(model, BLOCKS, calibration=batches())
    assert seen == [[True, True, True], [False, True, True], [False, False, True]]


def test_results_and_batches_of_unequal_length():
    model, results = decoder(), []
    expected = [decoder()(b) for b in batches()]
    qcompile.quantize_(model, BLOCKS, calibration=batches(), report=results.append)
    assert [r.name for r in results] == [f"layers.{i}.{n}" for i in range(3) for n in _LINEARS]
    tokens = sum(batch.shape[1] for batch in batches())
    for result in results:
        assert result.tokens == tokens
        assert result.error is not None
        assert 0 < result.error < 10 ** (-tolerance.uniform_sqnr_floor(4, 16) / 10)
        assert result.method == "gptq"
    assert isinstance(model.layers[0].down, QuantizedLinear)
    assert type(model.head) is nn.Linear
    for batch, y in zip(batches(), expected, strict=True):
        assert tolerance.sqnr(y, model(batch)) > 15.0


_LINEARS = ("query", "key_value", "out", "gate_up", "down")


def test_gptq_of_a_model_beats_rounding():
    expected = torch.cat([decoder()(b) for b in batches()], 1)
    found = {}
    for method in ("rtn", "gptq", "awq"):
        model = decoder()
        scheme = {"weight": {"format": "int3", "group_size": 16}, "method": method}
        config = {"rules": [{"layers": "layers.*", "scheme": scheme}]}
        qcompile.quantize_(model, config, calibration=batches())
        found[method] = tolerance.sqnr(expected, torch.cat([model(b) for b in batches()], 1))
    assert found["gptq"] > found["rtn"]
    assert found["awq"] > found["rtn"]


def test_layers_outside_of_blocks():
    model, results = decoder(), []
    qcompile.quantize_(
        model, {"rules": [{"layers": "*", "scheme": GPTQ}]}, calibration=batches(), report=results.append
    )
    assert results[-1].name == "head"
    assert results[-1].error is not None
    awq = {"rules": [{"layers": "head", "scheme": {**GPTQ, "method": "awq"}}]}
    model, results = decoder(), []
    qcompile.quantize_(model, awq, calibration=batches(), report=results.append)
    assert results[0].folded == ()
    assert results[0].declined


class Skips(Decoder):
    """Blocks that are not called one after the other."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.layers[2](x) + self.layers[0](self.layers[1](x)))


class Between(Decoder):
    """Something happens between blocks."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x * 0.5)
        return self.head(x)


@pytest.mark.parametrize("kind", [Skips, Between])
def test_models_whose_blocks_cannot_run_apart_are_observed_whole(kind):
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    expected = [model(b) for b in batches()]
    with pytest.raises(NotAStack, match=r"is not called with what|in another order|another"):
        record(model, ["layers.0", "layers.1", "layers.2"], as_batches(batches()), [])
    assert all("forward" not in vars(m) for m in model.modules())
    results = []
    qcompile.quantize_(model, BLOCKS, calibration=batches(), report=results.append)
    assert len(results) == 15
    smooth = {"rules": [{"layers": "layers.*", "scheme": {**GPTQ, "method": ["smoothquant", "gptq"]}}]}
    declined: list = []
    qcompile.quantize_(kind().eval(), smooth, calibration=batches(), report=declined.append)
    for result in declined:
        assert result.declined.startswith("blocks cannot be run apart: ")
        assert re.search("is not called with what|in another order", result.declined)
    for batch, y in zip(batches(), expected, strict=True):
        assert tolerance.sqnr(y, model(batch)) > 15.0


def test_a_forward_of_a_blocks_own_comes_back():
    """Hooks of accelerate stand there; they are called whenever a block runs."""
    model, called = decoder(), []
    for number, block in enumerate(model.layers):

        def forward(*args, _number=number, _forward=block.forward, **kwargs):
            called.append(_number)
            return _forward(*args, **kwargs)

        block.forward = forward
    own = [block.forward for block in model.layers]
    qcompile.quantize_(model, {"rules": [{"layers": "*", "scheme": GPTQ}]}, calibration=batches())
    assert [vars(block).get("forward") for block in model.layers] == own
    assert set(called) == {0, 1, 2}
    called.clear()
    model(batches()[0])
    assert called == [0, 1, 2]


class TwoStacks(nn.Module):
    """An encoder and a decoder, blocks that return tuples, and layers before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.encoder = nn.ModuleList(Returns() for _ in range(2))
        self.decoder = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for block in self.encoder:
            x = block(hidden=x)[0]
        x = self.between(x)
        for block in self.decoder:
            x = block(x)
        return self.after(x)


class Returns(Block):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
        return super().forward(hidden), 3


def test_two_stacks():
    torch.manual_seed(0)
    model = TwoStacks().eval().requires_grad_(False)
    x = [torch.randn(2, 6, 32), torch.randn(1, 9, 32)]
    expected = [model(part) for part in x]
    assert find_stacks(model, ["encoder.0.out", "decoder.1.out"]) == [
        ["encoder.0", "encoder.1"],
        ["decoder.0", "decoder.1"],
    ]
    results = []
    qcompile.quantize_(model, GPTQ, calibration=x, report=results.append)
    assert len(results) == 23
    assert all(result.tokens == 21 for result in results)
    for part, y in zip(x, expected, strict=True):
        assert tolerance.sqnr(y, model(part)) > 12.0


def test_interrupted_and_gone_on_with(tmp_path, monkeypatch):
    config = {"rules": [{"layers": "layers.*", "scheme": {**GPTQ, "method": ["awq", "gptq"]}}]}
    whole, results = decoder(), []
    qcompile.quantize_(whole, config, calibration=batches(), report=results.append)
    original, folder = run._Calibration._block, tmp_path / "resume"

    def interrupted(self, block, own, stack, index, device):
        if index == 2:
            raise KeyboardInterrupt
        original(self, block, own, stack, index, device)

    with monkeypatch.context() as patch:
        patch.setattr(run._Calibration, "_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qcompile.quantize_(decoder(), config, calibration=batches(), resume=folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.json",
        "layers.0.safetensors",
        "layers.1.safetensors",
    ]
    done = []

    def counted(self, block, own, stack, index, device):
        done.append(index)
        original(self, block, own, stack, index, device)

    monkeypatch.setattr(run._Calibration, "_block", counted)
    model, again = decoder(), []
    qcompile.quantize_(model, config, calibration=batches(), resume=folder, report=again.append)
    assert done == [2]
    for _ in range(2):  # once more, with all blocks done: what was not saved is not lost
        assert [(r.name, r.error, r.folded) for r in again] == [(r.name, r.error, r.folded) for r in results]
        states = zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)
        assert sorted(path.stem for path in folder.iterdir()) == ["calibration", "layers.0", "layers.1", "layers.2"]
        model, again = decoder(), []
        qcompile.quantize_(model, config, calibration=batches(), resume=folder, report=again.append)
    assert done == [2]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A folder in which one block is done."""
    original = run._Calibration._block

    def interrupted(self, block, own, stack, index, device):
        if index == 1:
            raise KeyboardInterrupt
        original(self, block, own, stack, index, device)

    with monkeypatch.context() as patch:
        patch.setattr(run._Calibration, "_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qcompile.quantize_(decoder(), BLOCKS, calibration=batches(), resume=tmp_path / "resume")
    return tmp_path / "resume"


def test_another_calibration_is_refused(begun):
    other = {"rules": [{"layers": "layers.*", "scheme": {**GPTQ, "method": {"name": "gptq", "damping": 0.1}}}]}
    for model, config, data in (
        (decoder(), other, batches()),
        (decoder(), BLOCKS, batches()[:2]),
        (decoder(seed=1), BLOCKS, batches()),
    ):
        with pytest.raises(CheckpointError, match="was begun with another model, configuration"):
            qcompile.quantize_(model, config, calibration=data, resume=begun)


def test_damaged_files_are_refused(begun):
    path = begun / "layers.0.safetensors"
    content = path.read_bytes()
    for damaged in (content[:100], b"", content[:-4]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"layers\.0\.safetensors: is damaged .* remove it"):
            qcompile.quantize_(decoder(), BLOCKS, calibration=batches(), resume=begun)
    path.write_bytes(content)
    (begun / "calibration.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"calibration\.json: is damaged"):
        qcompile.quantize_(decoder(), BLOCKS, calibration=batches(), resume=begun)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="holds other files"):
        qcompile.quantize_(decoder(), BLOCKS, calibration=batches(), resume=tmp_path)


def test_results_are_told_as_json(begun):
    kept = json.loads((begun / "calibration.json").read_text())
    assert [entry["name"] for entry in kept["results"]] == [f"layers.0.{name}" for name in _LINEARS]


class Dead(Decoder):
    """A layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(32, 32)


def test_what_calibration_cannot_show():
    config = {"rules": [{"layers": "*", "scheme": GPTQ}]}
    with pytest.raises(CalibrationError, match=r"unused: calibration batches never reached it, and method gptq needs"):
        qcompile.quantize_(Dead().eval(), config, calibration=batches())
    with pytest.raises(LayerError, match=r"layers\.0\.query: method gptq looks at the layer's inputs; pass"):
        qcompile.quantize_(decoder(), BLOCKS)
    model = decoder()
    model.embed.weight[7] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.0\.query: calibration gave it NaN or infinity; run"):
        qcompile.quantize_(model, BLOCKS, calibration=[torch.tensor([[1, 7, 3]])])
    with pytest.raises(CalibrationError, match="a calibration batch is a tensor, a tuple of arguments or a mapping"):
        qcompile.quantize_(decoder(), BLOCKS, calibration=["text"])
    with pytest.raises(CalibrationError, match="no batches"):
        qcompile.quantize_(decoder(), BLOCKS, calibration=[])


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"weight": {**GPTQ["weight"], "act_order": True}}, r"sorted \(act_order\) by gptq alone; leave act_order out"),
        (
            {"weight": {**GPTQ["weight"], "act_order": True}, "method": {"name": "rtn", "clip": "mse"}},
            r"sorted \(act_order\) by gptq alone; leave act_order out",
        ),
        ({"preset": "int4", "method": "checkpoint"}, "method checkpoint is of weights that were read; choose rtn"),
        ({"preset": "int4", "method": ["awq", "checkpoint"]}, "method checkpoint is of weights that were read"),
    ],
)
def test_methods_that_cannot_choose_codes(scheme, reason):
    """They are refused before any layer is quantized."""
    model = decoder()
    config = {"rules": [{"layers": "layers.0.*", "scheme": "int4"}, {"layers": "head", "scheme": scheme}]}
    with pytest.raises(LayerError, match=f"head: .*{reason}"):
        qcompile.quantize_(model, config, calibration=batches())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_kv_cache_that_cannot_be_calibrated_is_refused_before_the_work():
    model = decoder()
    with pytest.raises(ConfigError, match="are calibrated for transformers' models; leave kv_cache out"):
        qcompile.quantize_(model, {**BLOCKS, "kv_cache": "fp8"}, calibration=batches())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_one_token_of_calibration():
    model = decoder()
    qcompile.quantize_(model, BLOCKS, calibration=[torch.tensor([[3]])])
    assert torch.isfinite(model(batches()[0])).all()


def test_the_model_is_left_in_its_mode():
    model = decoder().train()
    state = copy.deepcopy({n: m.training for n, m in model.named_modules()})
    qcompile.quantize_(model, BLOCKS, calibration=batches())
    assert state == {n: m.training for n, m in model.named_modules()}


def test_methods_are_for_quantize_alone():
    refused = pytest.raises(LayerError, match=r"method gptq is for linear modules, by qcompile\.quantize_")
    with torch.no_grad(), refused, compat.plain_backend_errors():
        torch.compile(decoder(), backend="qcompile", options={"config": BLOCKS})(batches()[0])
