"""Plans of tensor parallelism: which layers of a model are divided, and how."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

from torch import nn

from qcompile.errors import ConfigError, nearest_layers, shown, suggestion
from qcompile.experts import GroupedLinear

COLWISE, PACKED, GATHERED = "colwise", "packed_colwise", "colwise_gather_output"
ROWWISE, SPLIT = "rowwise", "rowwise_split_input"
EMBEDDING, EXPERTS, REPLICATE = "embedding_rowwise", "moe_tp_experts", "replicate"
STYLES = (COLWISE, ROWWISE, GATHERED, SPLIT, PACKED, EMBEDDING, EXPERTS, REPLICATE)
"""Styles of a plan, by the names of transformers; `docs/tensor_parallel.md` says what each is."""

OTHER_NAMES = {
    "colwise_rep": GATHERED,
    "rowwise_rep": SPLIT,
    # What concerns gradients alone, and what is left whole here.
    "replicated_with_grad_allreduce": REPLICATE,
    "mla_kv_a_proj": REPLICATE,
    "local_params": REPLICATE,
    "embedding_colwise": REPLICATE,
}


def planned(model: nn.Module, plan: Mapping[str, str] | None) -> dict[str, str]:
    """The style of each module, and of each vector that is a parameter of its own, that a plan names.

    Raises:
        ConfigError: see `qcompile.parallelize`.
    """
    if plan is not None and not isinstance(plan, Mapping):
        raise ConfigError(f'plan is a mapping such as {{"*.q_proj": "{COLWISE}"}}, not {shown(plan)}')
    given = dict(plan or {})
    for glob, style in given.items():
        if not isinstance(glob, str) or not isinstance(style, str) or OTHER_NAMES.get(style, style) not in STYLES:
            raise ConfigError(f"plan: {shown(glob)} has style {shown(style)}; {suggestion(style, STYLES)}")
    own = getattr(model, "tp_plan", None)
    own = dict(own) if isinstance(own, dict) else {}
    if own and isinstance(getattr(getattr(model, "base_model", None), "embed_tokens", None), nn.Embedding):
        # As later releases of transformers have it themselves.
        own.setdefault(f"{model.base_model_prefix}.embed_tokens", EMBEDDING)
    if not given and not own:
        raise ConfigError(
            f"{type(model).__name__} brings no plan of which layers are divided how; pass one, such as "
            f'plan={{"*.q_proj": "{COLWISE}", ..., "*.o_proj": "{ROWWISE}", ...}}'
        )
    entries = [(re.compile(fnmatch.translate(glob)), style) for glob, style in given.items()]
    # Between the dots of transformers' names an asterisk is a layer's number.
    entries += [(re.compile(re.escape(glob).replace(r"\*", r"\d+") + r"\Z"), style) for glob, style in own.items()]
    names = [n for n, m in model.named_modules() if n and not isinstance(m, GroupedLinear)]
    names += [n for n, p in model.named_parameters() if p.dim() == 1 and not n.endswith((".weight", ".bias"))]
    found, used = {}, set()
    for name in names:
        pattern, style = next((entry for entry in entries if entry[0].match(name)), (None, ""))
        used.add(pattern)
        found[name] = OTHER_NAMES.get(style, style)
    for (pattern, _), glob in zip(entries, given, strict=False):
        if pattern not in used:
            near = ", ".join(nearest_layers(glob, names) or names[:3])
            raise ConfigError(f"plan: {shown(glob)} matches no layer that an earlier entry leaves; there are {near}")
    divided = {name: style for name, style in found.items() if style not in ("", REPLICATE)}
    for name, style in divided.items():
        if style not in STYLES:
            raise ConfigError(
                f"{name}: transformers' plan says {style}, which qcompile does not do; say what becomes of it: "
                f'plan={{"{name}": "{REPLICATE}"}} leaves it whole'
            )
    if not divided:
        raise ConfigError(f"the plan leaves all of {type(model).__name__} whole; nothing is divided")
    return divided
