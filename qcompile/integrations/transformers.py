"""qcompile as a quantizer of transformers: `from_pretrained(folder, quantization_config=TransformersConfig("int4"))`.

Importing this module registers it with transformers; `qcompile.TransformersConfig` imports it when it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcompile.checkpoint.loader import fill
from qcompile.checkpoint.saving.save import quantized_state_dict
from qcompile.checkpoint.source import open_checkpoint
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import ConfigError, QCompileError
from qcompile.experts import expert_modules, quantize_experts
from qcompile.linears import linear_modules, quantized_linear, shape_of
from qcompile.modules import QuantizedLinear
from qcompile.scheme import Scheme

METHOD = "qcompile"


@register_quantization_config(METHOD)
class TransformersConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained(..., quantization_config=...)` takes.

    Args:
        config: quantize the linear layers of a floating-point model as they are loaded: anything that
            `torch.compile`'s `options={"config": ...}` takes. None: read a quantized checkpoint, of any format that
            `qcompile.load` reads, with its own codes and scales.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | Scheme | QuantConfig | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.config = None if config is None else parse_config(config).to_dict()

    @property
    def parsed(self) -> QuantConfig | None:
        """The configuration, None to read a quantized checkpoint."""
        return None if self.config is None else QuantConfig.from_dict(self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersConfig:
        return TransformersConfig(copy.deepcopy(self.config, memo))


def _merge(given: Any, from_arguments: Any) -> Any:
    """Ours goes before the configuration in a checkpoint, which transformers would take."""
    if isinstance(from_arguments, TransformersConfig):
        return from_arguments
    return _merge_others(given, from_arguments)


_merge_others = AutoHfQuantizer.merge_quantization_configs
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """Two ways of loading: linears quantized one by one as transformers reads them, or `qcompile.load`'s way."""

    requires_calibration = False

    def __init__(self, quantization_config: TransformersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.online = quantization_config.parsed
        self.pre_quantized = self.online is None
        self.schemes: dict[str, Scheme] = {}
        self.error: QCompileError | None = None
        self.path = Path()
        self.device: torch.device | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.online is None and isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise ConfigError("quantized checkpoints are loaded on one device; pass device_map={'': device}")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ConfigError("TransformersConfig needs a checkpoint on disk, not a state_dict")
        self.path = Path(checkpoint_files[0]).parent
        quantized = open_checkpoint(self.path).method is not None
        if self.online is not None:
            if quantized:
                raise ConfigError(
                    f"{self.path}: is quantized already; pass TransformersConfig() to load it as it is, or take the "
                    "original model to quantize it anew"
                )
            self._choose_schemes(model)
            return
        if not quantized:
            raise ConfigError(f'{self.path}: is not quantized; say how to: TransformersConfig("int4")')
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        self.device = torch.device(places.pop()) if len(places) == 1 else None
        # transformers loads nothing: to it the model has no tensors, and it looks for none.
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        model.state_dict = dict
        model._keys_to_ignore_on_load_unexpected = {""}

    def _choose_schemes(self, model: nn.Module) -> None:
        assert self.online is not None
        modules = linear_modules(model)
        self.online.check_used([*modules, *expert_modules(model)])
        for name, module in modules.items():
            scheme = self.online.scheme_for(name)
            if scheme is None:
                continue
            activation = scheme.activation
            if activation is not None and not activation.dynamic and activation.scale is None:
                raise ConfigError(
                    f"{name}: static activation scales come from calibration; load the model unquantized and call "
                    "qcompile.quantize_(model, config, calibration=batches)"
                )
            self.schemes[name] = scheme.fit(name, shape_of(module))

    def replace(self, model: nn.Module, name: str) -> None:
        """Put a quantized linear in the place of one that has its weight."""
        module, scheme = model.get_submodule(name), self.schemes[name]
        fixed = None if scheme.activation is None else scheme.activation.scale
        device = module.weight.device
        input_scale = None if fixed is None else torch.tensor(fixed, device=device)  # type: ignore[arg-type]
        model.set_submodule(name, quantized_linear(name, module, scheme, input_scale))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and name in self.schemes

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.online is None:
            del model.state_dict, model._keys_to_ignore_on_load_unexpected
            places = set(getattr(model, "hf_device_map", {}).values())
            device = self.device or torch.device(places.pop() if len(places) == 1 else "cpu")
            fill(model, open_checkpoint(self.path), device, model.dtype)
        else:
            if self.error is not None:
                raise self.error
            # A head that is tied to the embedding has no tensor of its own, so it is quantized only now.
            for name in linear_modules(model).keys() & self.schemes.keys():
                self.replace(model, name)
            for name, experts in expert_modules(model).items():
                if (scheme := self.online.scheme_for(name)) is not None:
                    model.set_submodule(name, quantize_experts(name, experts, scheme))
        model.requires_grad_(False)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: compressed-tensors, which transformers and vLLM read."""
        tensors, described = quantized_state_dict(model)
        model.config.quantization_config = described
        if isinstance(model.get_output_embeddings(), QuantizedLinear):
            model.config.tie_word_embeddings = False
        return tensors, {}


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Puts a quantized linear in the place of one whose weight has been read."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        values = next(iter(input_dict.values()))
        weight = values[0] if isinstance(values, list) else values
        name = full_layer_name.rpartition(".")[0]
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        missing_keys.discard(full_layer_name)
        try:
            self.quantizer.replace(model, name)
        except QCompileError as error:  # transformers would swallow it
            self.quantizer.error = self.quantizer.error or error
        return {}
