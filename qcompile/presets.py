"""Schemes by the names that the field has for them."""

from __future__ import annotations

from qcompile.errors import ConfigError, shown, suggestion
from qcompile.formats import get_format
from qcompile.scheme import WHOLE, ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme, blocks_of_32


def _integer(bits: int, group: int | None, *, symmetric: bool = True, sparsity: str | None = None) -> WeightScheme:
    return WeightScheme(
        format=get_format(f"{'int' if symmetric else 'uint'}{bits}"),
        granularity=Granularity.channel() if group is None else Granularity.group(group),
        symmetric=symmetric,
        scale_dtype="float32" if group is None else "bfloat16",
        flexible_group=group is not None,
        sparsity=sparsity,
    )


def _mx(name: str) -> WeightScheme:
    return WeightScheme(
        format=get_format(name), granularity=Granularity.group(32), scale_dtype="float8_e8m0fnu", flexible_group=True
    )


def _bnb(name: str) -> WeightScheme:
    return WeightScheme(format=get_format(name), granularity=Granularity.group(64), flexible_group=True)


def _gguf_k(name: str, group: int, bits: int, *, offset: bool = False) -> WeightScheme:
    return WeightScheme(
        format=get_format(name),
        granularity=Granularity.group(group),
        symmetric=not offset,
        offset=offset,
        scale_dtype="uint8" if offset else "int8",
        super_scale=SuperScale(columns=256, dtype="float16", bits=bits),
        flexible_group=True,
    )


def _fp8(granularity: Granularity) -> WeightScheme:
    return WeightScheme(format=get_format("fp8_e4m3"), granularity=granularity)


def _activation(name: str, granularity: Granularity, *, dynamic: bool = True) -> ActivationScheme:
    return ActivationScheme(format=get_format(name), granularity=granularity, dynamic=dynamic)


_CHANNEL, _TENSOR = Granularity.channel(), Granularity.tensor()

PRESETS: dict[str, Scheme] = {
    "int2": Scheme(weight=_integer(2, 64)),
    "int3": Scheme(weight=_integer(3, 128)),
    "int4": Scheme(weight=_integer(4, 128)),
    "int4_asym": Scheme(weight=_integer(4, 128, symmetric=False)),
    "int5": Scheme(weight=_integer(5, 128)),
    "int6": Scheme(weight=_integer(6, 128)),
    "int7": Scheme(weight=_integer(7, 128)),
    "int8": Scheme(weight=_integer(8, None), activation=_activation("int8", _CHANNEL)),
    "int8_weight_only": Scheme(weight=_integer(8, None)),
    "fp8": Scheme(weight=_fp8(_CHANNEL), activation=_activation("fp8_e4m3", _CHANNEL)),
    "fp8_static": Scheme(weight=_fp8(_TENSOR), activation=_activation("fp8_e4m3", _TENSOR, dynamic=False)),
    "fp8_block": Scheme(
        weight=_fp8(Granularity.block(128, 128)), activation=_activation("fp8_e4m3", Granularity.group(128))
    ),
    "fp8_weight_only": Scheme(weight=_fp8(_CHANNEL)),
    "int4_fp8": Scheme(weight=_integer(4, 128), activation=_activation("fp8_e4m3", _CHANNEL)),
    "nf4": Scheme(weight=_bnb("nf4")),
    "fp4": Scheme(weight=_bnb("fp4")),
    "mxfp4": Scheme(weight=_mx("fp4_e2m1")),
    "mxfp8": Scheme(
        weight=_mx("fp8_e4m3"),
        activation=ActivationScheme(
            format=get_format("fp8_e4m3"), granularity=Granularity.group(32), scale_dtype="float8_e8m0fnu"
        ),
    ),
    "nvfp4": Scheme(
        weight=WeightScheme(
            format=get_format("fp4_e2m1"),
            granularity=Granularity.group(16),
            scale_dtype="float8_e4m3fn",
            super_scale=SuperScale(columns=WHOLE, dtype="float32"),
            flexible_group=True,
        )
    ),
    "q4_0": Scheme(weight=blocks_of_32("int4")),
    "q4_1": Scheme(weight=blocks_of_32("uint4", offset=True)),
    "q5_0": Scheme(weight=blocks_of_32("int5")),
    "q5_1": Scheme(weight=blocks_of_32("uint5", offset=True)),
    "q8_0": Scheme(weight=blocks_of_32("int8")),
    "iq4_nl": Scheme(weight=blocks_of_32("iq4_nl")),
    "q2_k": Scheme(weight=_gguf_k("uint2", 16, 4, offset=True)),
    "q3_k": Scheme(weight=_gguf_k("int3", 16, 6)),
    "q4_k": Scheme(weight=_gguf_k("uint4", 32, 6, offset=True)),
    "q5_k": Scheme(weight=_gguf_k("uint5", 32, 6, offset=True)),
    "q6_k": Scheme(weight=_gguf_k("int6", 16, 8)),
    "iq4_xs": Scheme(weight=_gguf_k("iq4_nl", 32, 6)),
    "int4_int8": Scheme(weight=_integer(4, 128), activation=_activation("int8", _CHANNEL)),
    "int4_int4": Scheme(weight=_integer(4, None), activation=_activation("int4", _CHANNEL)),
    "int4_24": Scheme(weight=_integer(4, 128, sparsity="2:4")),
    "int8_24": Scheme(weight=_integer(8, None, sparsity="2:4")),
}

ALIASES: dict[str, str] = {
    "W4A16": "int4",
    "W4A16_ASYM": "int4_asym",
    "W8A16": "int8_weight_only",
    "W8A8": "int8",
    "INT8": "int8",
    "FP8": "fp8_static",
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8_block",
    "W4A8": "int4_int8",
    "W4A4": "int4_int4",
    "W4AFP8": "int4_fp8",
}


def preset(name: str) -> Scheme:
    """The scheme of a preset's name or alias.

    Raises:
        ConfigError: unknown; the message lists the nearest names.
    """
    found = PRESETS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"unknown scheme {shown(name)}; {suggestion(name, [*PRESETS, *ALIASES])}")
    return found
