"""Generated kernels in Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qcompile.codegen.cost_model import candidates
from qcompile.codegen.spec import Tile, scales_of
from qcompile.flags import override
from qcompile.formats import FORMATS, IntegerFormat, get_format
from qcompile.layouts import choose_layout
from qcompile.linear_spec import STORES, gate_of
from qcompile.presets import PRESETS, preset
from qcompile.reference import quantize_activation
from qcompile.runtime import cache
from qcompile.scheme import FLOAT_SCALES, SCALE_DTYPES, ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme
from tests.kernels.problems import problem
from tests.strategies import epilogues

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NATIVE = [name for name, fmt in FORMATS.items() if fmt.native_dtype is not None]
COLUMNS = [16, 32, 48, 64, 128, 192]
MX_SCALES = {name: SCALE_DTYPES[name] for name in ("float8_e8m0fnu", "float8_e4m3fn")}
SMALL = Tile(m=16, n=64, k=64, split=1, warps=4, stages=2)


@pytest.fixture(autouse=True, scope="module")
def kernels_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder: Path = tmp_path_factory.mktemp("cache")
    with override(cache_dir=folder):
        yield folder
    cache.load.cache_clear()


def weight_scheme(format_name: str, granularity: Granularity, scale_dtype: str = "float32") -> WeightScheme:
    fmt = get_format(format_name)
    symmetric = not (isinstance(fmt, IntegerFormat) and not fmt.signed)
    return WeightScheme(format=fmt, granularity=granularity, symmetric=symmetric, scale_dtype=scale_dtype)


def super_scheme(format_name: str, columns: int, scale_dtype: str, above: int = 256) -> WeightScheme:
    """Groups of `columns` with integer scales in super-blocks, as GGUF's K-quants have them; unsigned with offsets."""
    symmetric = not format_name.startswith("uint")
    return WeightScheme(
        format=get_format(format_name),
        granularity=Granularity.group(columns),
        symmetric=symmetric,
        offset=not symmetric,
        scale_dtype=scale_dtype,
        super_scale=SuperScale(columns=above, dtype="float16"),
    )


GGUF_LIKE = {
    "q2_k": super_scheme("uint2", 16, "uint8"),
    "q3_k": super_scheme("int3", 16, "int8"),
    "q4_k": super_scheme("uint4", 32, "uint8"),
    "q6_k": super_scheme("int6", 16, "int8"),
    "iq4_xs": super_scheme("iq4_nl", 32, "int8"),
}
"""Schemes that no preset has, by the name of the GGUF type that has them."""


def shipped(name: str, shape: tuple[int, int]) -> Scheme:
    """A preset, or one of `GGUF_LIKE`."""
    return Scheme(weight=GGUF_LIKE[name]) if name in GGUF_LIKE else preset(name).fit("layer", shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format_name", FORMATS)
def test_fragment_identity_returns_the_weights(format_name: str, dtype: torch.dtype) -> None:
    scheme = Scheme(weight=weight_scheme(format_name, Granularity.channel()))
    given_ = problem(scheme, "fragment", 64, 72, 64, dtype, identity=True)
    expected = given_.weight.to(dtype).double()  # NF4's and FP4's values are rounded to what multiplies
    assert torch.equal(given_.interpret("sm_90", SMALL).double(), expected.T)


@pytest.mark.parametrize("format_name", FORMATS)
def test_fragment_identity_with_scales_on_the_weights(format_name: str) -> None:
    scheme = Scheme(weight=weight_scheme(format_name, Granularity.group(16)))
    given_ = problem(scheme, "fragment", 128, 64, 128, identity=True)
    assert torch.equal(given_.interpret("sm_90", SMALL).double(), given_.weight.to(torch.bfloat16).double().T)


@pytest.mark.parametrize(("target", "dtype"), [("sm_80", FLOATS[0]), ("sm_90", FLOATS[1]), ("gfx942", FLOATS[2])])
@pytest.mark.parametrize("name", ["int4_24", "int8_24"])
def test_fragment24_identity_returns_the_weights(name: str, target: str, dtype: torch.dtype) -> None:
    given_ = problem(preset(name).fit("layer", (72, 64)), "fragment24", 64, 72, 64, dtype, identity=True)
    assert torch.equal(given_.interpret(target, SMALL).double(), given_.weight.T)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("activation", [None, *NATIVE])
@pytest.mark.parametrize("format_name", NATIVE)
def test_rows8_identity_returns_the_weights(format_name: str, activation: str | None, target: str) -> None:
    quantized = None
    if activation is not None:
        quantized = ActivationScheme(format=get_format(activation), granularity=Granularity.tensor(), dynamic=False)
    scheme = Scheme(weight=weight_scheme(format_name, Granularity.tensor()), activation=quantized)
    given_ = problem(scheme, "rows8", 64, 72, 64, identity=True)
    assert torch.equal(given_.interpret(target, SMALL).double(), given_.weight.T)


@pytest.mark.parametrize("name", [*PRESETS, *GGUF_LIKE])
def test_identity_of_every_preset(name: str) -> None:
    """Scales of 1 and offsets of 0 leave every value as it is decoded."""
    scheme = replace(shipped(name, (72, 128)), activation=None)
    layout = choose_layout(scheme, (72, 128), "cuda").name
    given_ = problem(scheme, layout, 128, 72, 128, identity=True)
    expected = given_.weight.to(torch.bfloat16).double()
    assert torch.equal(given_.interpret("sm_90", replace(SMALL, m=128, k=128)).double(), expected.T)


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["q4_1", "q4_k"])
def test_offsets_of_few_rows(name: str, dtype: torch.dtype, rows: int) -> None:
    """They are added to products there, not to weights."""
    scheme = shipped(name, (72, 256))
    given_ = problem(scheme, "fragment", 5, 72, 256, dtype, ("bias",))
    tile = replace(SMALL, m=rows, k=128)
    assert scales_of(given_.kernel("sm_90", tile), tile.scales) == "products"
    given_.check(given_.interpret("sm_90", tile), dtype)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("name", GGUF_LIKE)
def test_integer_scales_of_few_rows(name: str, dtype: torch.dtype, target: str) -> None:
    """They multiply weights, what is above them products, and so do offsets; also beside columns beyond K."""
    for shape, split in (((5, 72, 592), 1), ((16, 128, 512), 2), ((1, 64, 256), 1)):
        given_ = problem(shipped(name, shape[1:]), "fragment", *shape, dtype, ("bias",))
        for form in ("loop", "slab") if shape[2] % 256 == 0 else ("loop",):
            tile = replace(SMALL, k=128, split=split, form=form, scales="fragments")
            kernel = given_.kernel(target, tile)
            assert scales_of(kernel, "fragments") == "fragments"
            given_.check(given_.interpret(target, tile), dtype, kernel=kernel)


NARROW = [*GGUF_LIKE, "q4_0", "q4_1", "q5_k", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_sums_of_groups_of_one_row(name: str, dtype: torch.dtype) -> None:
    """Each group's is in a column of its own, and scaled in float32; also beside columns beyond K, and with a gate."""
    odd, even = ((72, 592), ("bias",)), ((256, 512), ("sigmoid(a)*b",))
    for ((n, k), steps), size, split, form, target in (
        (odd, 64, 1, "loop", "sm_80"),
        (even, 128, 2, "loop", "sm_90"),
        (even, 64, 1, "slab", "sm_90"),
    ):
        given_ = problem(shipped(name, (n, k)), "fragment", 1, n, k, dtype, steps)
        tile = replace(SMALL, m=8, n=size, k=128, split=split, form=form, scales="sums")
        assert scales_of(given_.kernel(target, tile), "sums") == "sums"
        given_.check(given_.interpret(target, tile), dtype)


@pytest.mark.parametrize("name", NARROW)
def test_one_element_of_a_row_returns_its_weights(name: str) -> None:
    """Scales of 1 and offsets of 0 leave every value as it is decoded."""
    given_ = problem(shipped(name, (72, 256)), "fragment", 1, 72, 256, identity=True)
    tile = replace(SMALL, m=8, k=128, scales="sums")
    for column in (0, 15, 47, 64, 129, 255):
        given_.x = torch.eye(256)[column : column + 1].to(torch.bfloat16)
        expected = given_.weight[:, column].to(torch.bfloat16).double()
        assert torch.equal(given_.interpret("sm_90", tile).double(), expected[None])


@pytest.mark.parametrize("scales", ["products", "fragments"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits not in (4, 8)])
def test_codes_that_are_gathered(name: str, dtype: torch.dtype, target: str, scales: str) -> None:
    """Codes of 64 columns lie in as many words as they have bits."""
    scheme = Scheme(weight=weight_scheme(name, Granularity.group(64), "bfloat16"))
    given_ = problem(scheme, "fragment", 3, 72, 200, dtype)
    given_.check(given_.interpret(target, replace(SMALL, k=128, scales=scales)), dtype)


@st.composite
def schemes(draw: st.DrawFn, layout: str) -> Scheme:
    """Any scheme that a template takes."""
    fragment = layout in ("fragment", "fragment24")
    size = draw(st.sampled_from([-1, *(COLUMNS if fragment else [16, 20, 64, 100, 128])]))
    names = ["int4", "int8"] if layout == "fragment24" else list(FORMATS) if fragment else NATIVE
    fmt = get_format(draw(st.sampled_from(names)))
    scale_dtype = draw(st.sampled_from(sorted(SCALE_DTYPES if fragment else FLOAT_SCALES | MX_SCALES)))
    offset = layout == "fragment" and draw(st.booleans())
    above = None
    if fragment and (scale_dtype in ("uint8", "int8") or draw(st.booleans())):
        dtype = draw(st.sampled_from(sorted(FLOAT_SCALES)))
        above = SuperScale(columns=draw(st.sampled_from([-1, 32, 48, 128, 256])), dtype=dtype)
    weight = WeightScheme(
        format=fmt,
        granularity=Granularity(1 if above else draw(st.sampled_from([-1, 1, 1, 1, 3, 128])), size),
        symmetric=not offset and not (isinstance(fmt, IntegerFormat) and not fmt.signed),
        offset=offset,
        scale_dtype=scale_dtype,
        super_scale=above,
        sparsity="2:4" if layout == "fragment24" else None,
    )
    if draw(st.booleans()):
        return Scheme(weight=weight)
    fmt = get_format(draw(st.sampled_from(NATIVE)))
    dynamic = draw(st.booleans())
    options = [Granularity.tensor()]
    if dynamic:
        options += [Granularity.channel()] + ([Granularity.group(size)] if size > 0 else [])
    power = dynamic and draw(st.booleans())
    activation = ActivationScheme(
        format=fmt,
        granularity=draw(st.sampled_from(options)),
        dynamic=dynamic,
        scale_dtype="float8_e8m0fnu" if power else "float32",
    )
    return Scheme(weight=weight, activation=activation)


tiles = st.builds(
    Tile,
    m=st.sampled_from([8, 16, 32]),
    n=st.sampled_from([64, 128]),
    k=st.sampled_from([64, 128]),
    split=st.sampled_from([1, 1, 2, 3]),
    warps=st.just(4),
    stages=st.just(2),
    form=st.sampled_from(["loop", "slab"]),
    scales=st.sampled_from(["sums", "products", "fragments"]),
    overlap=st.booleans(),
).map(lambda tile: replace(tile, overlap=tile.overlap and tile.k >= 128))
shapes = st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 300))
targets = st.sampled_from(["sm_80", "sm_90", "gfx942"])


@given(schemes("fragment"), shapes, st.sampled_from(FLOATS), tiles, targets, st.integers(0, 9))
def test_fragment(
    scheme: Scheme, shape: tuple[int, int, int], dtype: torch.dtype, tile: Tile, target: str, seed: int
) -> None:
    m, n, k = shape
    given_ = problem(scheme, "fragment", 1 if tile.scales == "sums" else m, n, k, dtype, seed=seed)
    compute = torch.bfloat16 if scheme.activation else dtype
    given_.check(given_.interpret(target, tile), compute, kernel=given_.kernel(target, tile))


@given(schemes("fragment24"), shapes, st.sampled_from(FLOATS), tiles, targets, st.integers(0, 9))
def test_fragment24(
    scheme: Scheme, shape: tuple[int, int, int], dtype: torch.dtype, tile: Tile, target: str, seed: int
) -> None:
    given_ = problem(scheme, "fragment24", *shape, dtype, seed=seed)
    given_.check(given_.interpret(target, tile), torch.bfloat16 if scheme.activation else dtype)


@given(
    st.sampled_from(["int4", "int8"]),
    st.sampled_from([-1, 64, 128, 192, 256]),
    st.sampled_from(["bfloat16", "float16", "float32", "float8_e8m0fnu"]),
    st.tuples(st.sampled_from([1, 2, 9, 16, 32]), st.integers(1, 260), st.sampled_from([64, 128, 192, 256, 512])),
    st.sampled_from(FLOATS[:2]),
    st.sampled_from(["sm_80", "sm_90"]),
    st.integers(0, 1000),
)
def test_sparse_tensor_cores(
    name: str, columns: int, scale: str, shape: tuple[int, int, int], dtype: torch.dtype, target: str, index: int
) -> None:
    """Any candidate for any shape."""
    weight = replace(weight_scheme(name, Granularity(1, columns), scale), sparsity="2:4")
    given_ = problem(Scheme(weight=weight), "fragment24", *shape, dtype, seed=index)
    like = given_.kernel(target, SMALL)
    tiles = [kernel.tile for kernel in candidates(like, shape[0]) if kernel.tile.form == "cores"]
    assume(tiles)
    given_.check(given_.interpret(target, tiles[index % len(tiles)]), dtype)


def test_sparse_tensor_cores_are_for_what_they_take() -> None:
    """They have no float32, no columns of 32 that share a scale, few rows of x, and are NVIDIA's from sm_80."""

    def forms(columns: int, dtype: torch.dtype, target: str, m: int = 16) -> set[str]:
        weight = replace(weight_scheme("int4", Granularity.group(columns)), sparsity="2:4")
        like = problem(Scheme(weight=weight), "fragment24", 16, 64, 256, dtype).kernel(target, SMALL)
        return {kernel.tile.form for kernel in candidates(like, m)}

    assert "cores" in forms(64, torch.bfloat16, "sm_80")
    assert "cores" not in forms(32, torch.bfloat16, "sm_90")
    assert "cores" not in forms(64, torch.float32, "sm_90")
    assert "cores" not in forms(64, torch.bfloat16, "sm_75")
    assert "cores" not in forms(64, torch.bfloat16, "gfx942")
    assert "cores" not in forms(64, torch.bfloat16, "sm_90", 64)


@given(schemes("rows8"), shapes, st.sampled_from(FLOATS), tiles, targets, st.integers(0, 9))
def test_rows8(
    scheme: Scheme, shape: tuple[int, int, int], dtype: torch.dtype, tile: Tile, target: str, seed: int
) -> None:
    given_ = problem(scheme, "rows8", *shape, dtype, seed=seed)
    given_.check(given_.interpret(target, tile), torch.bfloat16 if scheme.activation else dtype)


@pytest.mark.parametrize(("tile_m", "split"), [(16, 1), (16, 2), (64, 1)])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "nf4", "mxfp4", "int8", "fp8", "fp8_block"])
def test_even_shapes(name: str, tile_m: int, split: int) -> None:
    """Without masks, and with first weights that are sent ahead."""
    scheme = shipped(name, (192, 512))
    given_ = problem(scheme, "rows8" if scheme.activation else "fragment", 20, 192, 512)
    form = "slab" if (tile_m, split) == (16, 2) else "loop"
    scales = "fragments" if tile_m == 64 else "products"
    tile = Tile(m=tile_m, n=64, k=128, split=split, warps=4, stages=2, form=form, scales=scales, overlap=tile_m == 64)
    given_.check(given_.interpret("sm_90", tile), torch.bfloat16, 2.0**-13 if "fp8" in name else 2.0**-23)


@given(st.sampled_from(["fragment", "rows8"]), epilogues(), st.sampled_from(FLOATS), tiles, st.integers(0, 9))
def test_epilogue(layout: str, steps: tuple[str, ...], dtype: torch.dtype, tile: Tile, seed: int) -> None:
    scheme = preset("int8" if layout == "rows8" else "int4_asym")
    # Halves of weights in fragments are multiples of a tile.
    n = 128 if layout == "fragment" and gate_of(steps) else 70
    given_ = problem(scheme.fit("layer", (n, 64)), layout, 5, n, 64, dtype, steps, seed=seed)
    given_.check(given_.interpret("sm_90", tile), torch.bfloat16 if scheme.activation else dtype)


@pytest.mark.parametrize("layout", ["fragment", "rows8"])
def test_no_rows(layout: str) -> None:
    given_ = problem(preset("int8" if layout == "rows8" else "int8_weight_only"), layout, 0, 70, 64)
    assert given_.interpret("sm_90", SMALL).shape == (0, 70)


@pytest.mark.parametrize("layout", ["fragment", "rows8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_no_other(layout: str, bad: float) -> None:
    given_ = problem(preset("int8" if layout == "rows8" else "int4"), layout, 3, 64, 128)
    whole = given_.interpret("sm_90", SMALL)
    if given_.x_scale is None:
        given_.x[1, 5] = bad
    else:
        given_.x_scale[1] = bad
    y = given_.interpret("sm_90", SMALL)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("layout", ["fragment", "fragment24", "rows8"])
def test_a_gate_multiplies_columns_of_the_product(layout: str, split: int, n: int) -> None:
    """Bit for bit what the same kernel without it returns in float32; the halves need not be multiples of tiles."""
    scheme = shipped({"fragment": "int4", "fragment24": "int4_24", "rows8": "int8"}[layout], (384, 256))
    shape = (180, 256) if layout == "rows8" else (384, 256)
    apart = problem(scheme, layout, 5, *shape)
    apart.out_dtype = torch.float32
    halves, pairs = (replace(apart, spec=apart.spec.with_epilogue(step)) for step in ("a*b", "pairs a*b"))
    for form in ("loop",) if layout == "rows8" else ("loop", "slab"):
        tile = Tile(m=16, n=n, k=128, split=split, warps=4, stages=2, form=form)
        y = apart.interpret("sm_90", tile)
        a, b = y.chunk(2, -1)
        assert torch.equal(halves.interpret("sm_90", tile), a * b)
        assert torch.equal(pairs.interpret("sm_90", tile), y[:, ::2] * y[:, 1::2])


@pytest.mark.parametrize("name", sorted(STORES))
@pytest.mark.parametrize("layout", ["fragment", "rows8"])
def test_stored_codes_are_those_of_the_activations(layout: str, name: str) -> None:
    """Bit for bit what the same kernel's result in float32 is quantized to, ends of the range included."""
    floating = problem(preset("int8" if layout == "rows8" else "int4"), layout, 5, 128, 256, epilogue=("silu(a)*b",))
    floating.out_dtype = torch.float32
    fmt, y = get_format(STORES[name]), floating.interpret("sm_90", SMALL)
    scale = y.abs().max() / (2 * fmt.absmax)
    stored = replace(floating, spec=floating.spec.with_epilogue(name), operands=[scale])
    codes = stored.interpret("sm_90", SMALL)
    scheme = ActivationScheme(format=fmt, granularity=Granularity.tensor(), dynamic=False)
    expected = quantize_activation(y, scheme, scale)[0]
    assert codes.dtype == expected.dtype
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
