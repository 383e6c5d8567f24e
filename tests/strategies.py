"""Hypothesis strategies: tensors with awkward values and strides, schemes, configurations."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qcompile.config import QuantConfig, Rule
from qcompile.formats import FORMATS, IntegerFormat
from qcompile.gates import ACTIVATIONS
from qcompile.linear_spec import EPILOGUE_STEPS, STORES
from qcompile.presets import PRESETS
from qcompile.scheme import FLOAT_SCALES, ActivationScheme, Granularity, Scheme, WeightScheme
from tests.oracle import GPT_OSS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("contiguous", "transposed", "stepped", "offset")
_ROWS, _COLUMNS = st.integers(1, 40), st.integers(1, 80)


@st.composite
def matrices(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = _ROWS,
    columns: st.SearchStrategy[int] = _COLUMNS,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    *,
    nonfinite: bool = False,
) -> Tensor:
    """Gaussian [rows, columns] with zeros, outliers or subnormals in it, and any strides.

    Args:
        nonfinite: some element is also infinite or NaN.
    """
    shape = (draw(rows), draw(columns))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    kind = draw(st.sampled_from(["plain", "zeros", "zero row", "outlier", "small", "one sign"]))
    row, column = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
    if kind == "zeros":
        values.zero_()
    elif kind == "zero row":
        values[row] = 0
    elif kind == "outlier":
        values[row, column] = 1000.0
    elif kind == "small":
        values *= torch.finfo(dtype).smallest_normal
    elif kind == "one sign":
        values.abs_().add_(1)
    if nonfinite:
        values[row, column] = draw(st.sampled_from([float("inf"), float("-inf"), float("nan")]))
    return with_strides(values.to(dtype), draw(st.sampled_from(STRIDES)))


def with_strides(values: Tensor, kind: str) -> Tensor:
    """The same values in memory arranged as `kind` of `STRIDES` says."""
    if kind == "transposed":
        return values.mT.contiguous().mT
    if kind == "stepped":
        return torch.stack([values, torch.zeros_like(values)], -1)[..., 0]
    if kind == "offset":
        return torch.nn.functional.pad(values, (3, 2))[..., 3:-2]
    return values.contiguous()


@st.composite
def weight_schemes(draw: st.DrawFn) -> WeightScheme:
    """Any valid weight scheme, with explicit groups."""
    fmt = draw(st.sampled_from(sorted(FORMATS.values(), key=lambda f: f.name)))
    granularity = draw(
        st.sampled_from(
            [
                Granularity.tensor(),
                Granularity.channel(),
                Granularity.group(16),
                Granularity.group(128),
                Granularity.block(128, 128),
                Granularity.block(3, 16),
            ]
        )
    )
    symmetric = not (isinstance(fmt, IntegerFormat) and not fmt.signed)
    scale_dtype = draw(st.sampled_from(sorted(FLOAT_SCALES)))
    return WeightScheme(format=fmt, granularity=granularity, symmetric=symmetric, scale_dtype=scale_dtype)


@st.composite
def activation_schemes(draw: st.DrawFn, weight: WeightScheme) -> ActivationScheme:
    """Any activation scheme that goes with `weight`."""
    fmt = draw(st.sampled_from([f for f in FORMATS.values() if f.native_dtype is not None]))
    dynamic = draw(st.booleans())
    if not dynamic:
        scale = draw(st.none() | st.floats(2.0**-20, 2.0**20))
        return ActivationScheme(format=fmt, granularity=Granularity.tensor(), dynamic=False, scale=scale)
    options = [Granularity.tensor(), Granularity.channel()]
    if weight.granularity.columns > 0:
        options.append(Granularity.group(weight.granularity.columns))
    return ActivationScheme(format=fmt, granularity=draw(st.sampled_from(options)))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """A preset's scheme or any other valid one."""
    if draw(st.booleans()):
        return draw(st.sampled_from(list(PRESETS.values())))
    weight = draw(weight_schemes())
    return Scheme(weight=weight, activation=draw(st.none() | activation_schemes(weight)))


globs = st.text(alphabet="abcxyz_.*?[]0123", min_size=1, max_size=12)


@st.composite
def configs(draw: st.DrawFn) -> QuantConfig:
    """One to four rules."""
    rules = st.builds(Rule, layers=globs, scheme=st.none() | schemes(), optional=st.booleans())
    return QuantConfig(tuple(draw(st.lists(rules, min_size=1, max_size=4))))


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
"""Anything a JSON file may hold."""


_PLAIN = ("a*b", *(f"{name}(a)*b" for name in ACTIVATIONS), *(f"a*{name}(b)" for name in ACTIVATIONS))
GATES = (*_PLAIN, GPT_OSS, *(f"pairs {step}" for step in (*_PLAIN, GPT_OSS)))


@st.composite
def epilogues(draw: st.DrawFn) -> tuple[str, ...]:
    """Any epilogue that a `LinearSpec` of an even number of rows takes."""
    steps = draw(st.lists(st.sampled_from(EPILOGUE_STEPS), max_size=4).filter(lambda steps: steps.count("bias") <= 1))
    if draw(st.booleans()):
        gate = draw(st.sampled_from(GATES))
        steps = [*["bias"] * ("bias" in steps), gate, *(step for step in steps if step != "bias")]
    return (*steps, draw(st.sampled_from(sorted(STORES)))) if draw(st.booleans()) else tuple(steps)
