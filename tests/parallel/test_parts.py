"""What each process keeps: its parts against parts of the whole weight, bit for bit, without processes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qcompile
from qcompile.checkpoint.kv_scales import KVScales
from qcompile.checkpoint.loader import fill, skeleton
from qcompile.checkpoint.source import open_checkpoint
from qcompile.errors import ConfigError, LayerError
from qcompile.linear_spec import decode_spec
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.parallel import Sharding
from qcompile.parts import GatheredQuantizedLinear, Place, RowwiseQuantizedLinear
from qcompile.plans import OTHER_NAMES, STYLES
from qcompile.presets import PRESETS
from qcompile.reference import quantize_weight
from qcompile.scheme import Granularity, Scheme
from tests import oracle

CPU = torch.device("cpu")


def quantized(scheme: Scheme, shape: tuple[int, int]) -> PackedLinear:
    """A random layer with everything that a layer can have."""
    fitted = scheme.fit("fc", shape)
    weight = torch.randn(shape)
    if scheme.weight.sparsity:
        weight.view(-1, 4)[:, :2] = 0
    static = fitted.activation is not None and not fitted.activation.dynamic
    input_scale = torch.tensor(0.5) if static else None
    packed = quantize_weight(weight, fitted.weight, "fc")
    return PackedLinear(
        weight=packed,
        scheme=fitted,
        bias=torch.randn(shape[0]),
        input_scale=input_scale,
        pre_quant_scale=torch.rand(shape[1]) + 0.5,
    )


def ordered(linear: PackedLinear) -> PackedLinear:
    """The same codes, in another order of columns."""
    perm = torch.randperm(linear.weight.shape[1]).to(torch.int32)
    scheme = replace(linear.weight.scheme, act_order=True)
    return linear.with_weight(replace(linear.weight, scheme=scheme, perm=perm))


def parts(linear: PackedLinear, style: str, size: int) -> list[QuantizedLinear]:
    """What each of `size` processes keeps; the same error in all, if there is one."""
    n, k = linear.weight.shape
    found, errors = [], set()
    for rank in range(size):
        model = nn.ModuleDict({"fc": nn.Linear(k, n, device="meta")})
        try:
            sharding = Sharding(model, Place(rank, size, "0"), {"fc": style})
            found.append(sharding.linear("fc", linear, CPU))
        except LayerError as error:
            errors.add(str(error))
    assert len(errors) <= 1
    assert not (errors and found)
    if errors:
        raise LayerError(errors.pop())
    return found


def decoded(packed: PackedWeight) -> torch.Tensor:
    return oracle.dequantize(packed)


SCHEMES = PRESETS | {
    "block": Scheme(weight=replace(PRESETS["fp8_block"].weight, granularity=Granularity.block(4, 8))),
    "uint4 tensor": Scheme(weight=replace(PRESETS["int4_asym"].weight, granularity=Granularity.tensor())),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_each_scheme_is_divided_exactly(name, style):
    whole = quantized(SCHEMES[name], (256, 1024))
    weight = decoded(whole.weight)
    for rank, part in enumerate(parts(whole, style, 2)):
        dim = 0 if style == "colwise" else 1
        assert torch.equal(decoded(part.logical()), weight.chunk(2, dim)[rank])
        part.logical().check()
        assert part.scheme == whole.scheme
        assert part.input_scale is None if whole.input_scale is None else part.input_scale.equal(whole.input_scale)
        assert part.bias.equal(whole.bias.chunk(2)[rank] if dim == 0 else whole.bias)
        assert part.pre_quant_scale.equal(whole.pre_quant_scale if dim == 0 else whole.pre_quant_scale.chunk(2)[rank])
        stored = sum(t.untyped_storage().nbytes() for t in part.packed().tensors)
        assert stored <= 0.51 * whole.weight.nbytes + 4096


@pytest.mark.filterwarnings("ignore:every process keeps the whole")
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    style=st.sampled_from(["colwise", "rowwise", "packed_colwise", "colwise_gather_output"]),
    n=st.integers(1, 40),
    k=st.integers(1, 20).map(lambda count: 16 * count),
    size=st.integers(1, 4),
    act_order=st.booleans(),
)
def test_shapes_are_divided_exactly_or_refused(name, style, n, k, size, act_order):
    try:
        SCHEMES[name].fit("fc", (n, k))
    except LayerError:
        return
    whole = quantized(SCHEMES[name], (n, k))
    if act_order and whole.weight.scheme.sparsity is None:
        whole = ordered(whole)
    weight = decoded(whole.weight)
    try:
        found = parts(whole, style, size)
    except LayerError as error:
        assert str(error).startswith("fc: ")  # noqa: PT017
        rows = whole.weight.scheme.granularity.rows
        units = max(whole.weight.scheme.column_units.values()) if style == "rowwise" else max(rows, 1)
        extent = k if style == "rowwise" else n // 2 if style == "packed_colwise" else n
        assert style != "colwise_gather_output"
        assert extent % size or (extent // size) % units or n % 2
        return
    if size == 1 or (style == "colwise_gather_output" and not isinstance(found[0], GatheredQuantizedLinear)):
        assert all(torch.equal(decoded(part.logical()), weight) for part in found)
        return
    x = torch.rand(k)
    for rank, part in enumerate(found):
        if style == "rowwise":
            assert isinstance(part, RowwiseQuantizedLinear)
            first, last = Place(rank, size, "0").part(k)
            features = torch.arange(first, last) if part.features is None else part.features
            assert torch.equal(decoded(part.logical()), weight[:, features])
            assert torch.equal(x[features] * part.pre_quant_scale, (x * whole.pre_quant_scale)[features])
            continue
        halves = 2 if style == "packed_colwise" else 1
        expected = torch.cat([half.chunk(size)[rank] for half in weight.chunk(halves)])
        assert torch.equal(decoded(part.logical()), expected)
        assert part.bias.equal(torch.cat([half.chunk(size)[rank] for half in whole.bias.chunk(halves)]))
    if style == "rowwise":
        columns = [torch.arange(k).chunk(size)[r] if p.features is None else p.features for r, p in enumerate(found)]
        assert torch.equal(torch.cat(columns).sort().values, torch.arange(k))


class Attention(nn.Module):
    head_dim = 8

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(32, heads * 8), nn.Linear(heads * 8, 32)


def sharded(model: nn.Module, plan: dict[str, str] | None, size: int = 2) -> Sharding:
    return Sharding(model, Place(0, size, "0"), plan)


PLAN = {"*.q_proj": "colwise", "*.o_proj": "rowwise"}


@pytest.mark.parametrize(
    ("plan", "size", "message"),
    [
        (None, 2, "Sequential brings no plan"),
        ({"*.q_proj": "columns"}, 2, r"'\*.q_proj' has style 'columns'; there are colwise"),
        ({"*.q_prj": "colwise"}, 2, r"'\*.q_prj' matches no layer that an earlier entry leaves; there are 0.q_proj"),
        ({"*": "replicate"}, 2, "nothing is divided"),
        ({"*": "replicate", "0.q_proj": "colwise"}, 2, "'0.q_proj' matches no layer that an earlier entry leaves"),
        ({"0": "colwise"}, 2, "0: style colwise is for linears, .* and this is a Attention"),
        (PLAN, 3, "0.q_proj: 3 processes cannot share its 4 times 8 output features equally; take a number"),
        ("colwise", 2, "plan is a mapping"),
        ({"*.q_proj": ["colwise"]}, 2, r"has style \['colwise'\]; there are"),
    ],
)
def test_mistakes_in_plans(plan, size, message):
    with pytest.raises((ConfigError, LayerError), match=message):
        sharded(nn.Sequential(Attention()), plan, size)


def test_heads_are_not_divided():
    with pytest.raises(LayerError, match=r"0\.q_proj: 2 processes cannot share its 3 times 8 output features"):
        sharded(nn.Sequential(Attention(3)), PLAN)


def test_what_is_whole_outside_may_stay_whole():
    model = nn.Sequential(Attention(), nn.Linear(32, 5), nn.Embedding(7, 32))
    plan = PLAN | {"1": "colwise_gather_output", "2": "embedding_rowwise"}
    with pytest.warns(UserWarning, match="every process keeps the whole of [12]: "):
        assert sharded(model, plan).styles == {"0.q_proj": "colwise", "0.o_proj": "rowwise"}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("int4", (16, 128), "fc: 2 parts of 128 columns divide its groups of 128 columns; take fewer"),
        ("q4_k", (16, 256), "fc: 2 parts of 256 columns divide its super-blocks of 256"),
        ("int8_24", (16, 12), "fc: 2 parts of 12 columns divide its 2:4 sparse fours of 4"),
        ("int4_int4", (16, 6), "fc: 2 parts of 6 columns divide its bytes of codes of 2"),
    ],
)
def test_parts_that_divide_what_belongs_together(name, shape, message):
    with pytest.raises(LayerError, match=message):
        parts(quantized(PRESETS[name], shape), "rowwise", 2)


def test_blocks_of_rows_are_not_divided():
    with pytest.raises(LayerError, match="fc: 2 parts of 192 rows divide its blocks of 128 rows"):
        parts(quantized(PRESETS["fp8_block"], (192, 256)), "colwise", 2)


def test_a_mesh_is_a_mesh():
    with pytest.raises(ConfigError, match=r"mesh is a DeviceMesh of one dimension.*, not 2"):
        qcompile.parallelize(nn.Sequential(Attention()), 2, PLAN)


def test_styles_are_those_of_transformers():
    pytest.importorskip("transformers")
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    assert {*STYLES, *OTHER_NAMES} <= set(ALL_PARALLEL_STYLES.keys())


def test_a_part_is_a_module():
    """It deep-copies, moves, keeps its bias out of the product when its inputs are quantized, and says what it is."""
    whole = ordered(quantized(PRESETS["int8_weight_only"], (32, 64)))
    part = copy.deepcopy(parts(whole, "rowwise", 2)[1])
    part.change_activation(PRESETS["int8"].activation)
    assert decode_spec(part.spec).epilogue == ()
    assert str(part).endswith("int8 channel, activations int8 dynamic per token, bias=True, part 2 of 2)")
    state = part.state_dict()
    assert torch.equal(state["features"], part.features)
    moved = part.to(torch.bfloat16).to("meta")
    assert moved.bias.dtype == torch.bfloat16
    assert moved.features.dtype == torch.int64
    assert moved.features.is_meta


def tiny(**changes):
    pytest.importorskip("transformers")
    from tests.checkpoint import tiny_models

    return tiny_models.llama(**changes)


def divided(model: nn.Module, rank: int = 1, size: int = 2) -> nn.Module:
    """One process's part, which only the others lack to run."""
    Sharding(model, Place(rank, size, "0")).divide(model)
    return model


def test_tied_ends_stay_tied():
    model = tiny(tie_word_embeddings=True)
    weight = model.lm_head.weight.clone()
    divided(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weight[160:])


@pytest.mark.parametrize("end", ["lm_head", "model.embed_tokens"])
def test_tied_ends_are_divided_together(end):
    model = tiny(tie_word_embeddings=True)
    sharding = Sharding(model, Place(0, 2, "0"), {end: "replicate"})
    assert not {"lm_head", "model.embed_tokens"} & sharding.styles.keys()
    assert len(sharding.styles) == 14


def test_an_entry_of_the_user_comes_before_that_of_transformers():
    styles = Sharding(tiny(), Place(0, 2, "0"), {"*.mlp.*": "replicate"}).styles
    assert not [name for name in styles if "mlp" in name]
    assert styles["model.layers.1.self_attn.o_proj"] == "rowwise"


def test_the_embedding_is_divided_in_all_releases_of_transformers():
    model = tiny(tie_word_embeddings=True)
    model._tp_plan.pop("model.embed_tokens", None)
    assert Sharding(model, Place(0, 2, "0")).styles.keys() >= {"model.embed_tokens", "lm_head"}


def test_one_process_keeps_all():
    assert Sharding(tiny(), Place(0, 1, "0")).styles == {}


def test_scales_of_caches_are_those_of_the_own_heads():
    model = tiny()
    per_head, per_layer = KVScales(torch.tensor([1.0, 2.0]), torch.ones(())), KVScales(torch.ones(()), torch.ones(()))
    first, second = (layer.self_attn for layer in model.model.layers)
    first.kv_scales, second.kv_scales = per_head, per_layer
    divided(model)
    assert first.kv_scales.k_scale.tolist() == [2.0]
    assert first.kv_scales.v_scale.dim() == second.kv_scales.k_scale.dim() == 0


def test_a_part_is_not_a_whole_model(tmp_path):
    model = divided(qcompile.quantize_(tiny(), "int8_weight_only", progress=False))
    with pytest.raises(ConfigError, match="a file holds a whole model, and this is a process's part of one"):
        qcompile.save(model, tmp_path / "saved")
    with pytest.raises(ConfigError, match="quantize_ takes a whole model"):
        qcompile.quantize_(model, "int4", progress=False)
    with pytest.raises(ConfigError, match="parallelize takes a whole model"):
        qcompile.parallelize(model, None)


def test_a_plan_goes_with_a_mesh():
    with pytest.raises(ConfigError, match="a plan divides layers among processes: pass their mesh"):
        qcompile.load("nowhere", plan=PLAN)


def test_experts_with_blocks_that_parts_divide(tmp_path):
    """In memory, and where a checkpoint is read: the layer's fault, not the file's."""
    pytest.importorskip("transformers")
    scheme = {"weight": {"format": "int4", "group_size": 128}}
    model = tiny(kind="mixtral", num_local_experts=2, num_experts_per_tok=1, intermediate_size=128)
    model = qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": scheme}]}, progress=False)
    qcompile.save(model, tmp_path)
    message = r"^model\.layers\.0\.mlp\.experts\.down_proj: 2 parts of 128 columns divide its groups of 128"
    with pytest.raises(LayerError, match=message):
        divided(model)
    source = open_checkpoint(tmp_path)
    empty = skeleton(source.config, torch.float32)
    with pytest.raises(LayerError, match=message):
        fill(empty, source, CPU, torch.float32, sharding=Sharding(empty, Place(0, 2, "0")), progress=False)
