"""`@qcompile.quantized(config)` on a module class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from qcompile.config import QuantConfig, parse_config
from qcompile.scheme import Scheme

ModuleType = TypeVar("ModuleType", bound=type[nn.Module])


def quantized(
    config: str | Path | Mapping[str, Any] | Scheme | QuantConfig, **options: Any
) -> Callable[[ModuleType], ModuleType]:
    """Compile every instance of a module class with the qcompile backend.

        @qcompile.quantized("int4")
        class Block(nn.Module): ...

    Weights are quantized at the first call, so they may be loaded after construction. The configuration is checked here
    already; its layer names are relative to the class.

    Args:
        config: anything that `torch.compile`'s `options={"config": ...}` takes.
        options: further options of the backend, e.g. `mode="reduce-overhead"`.

    Raises:
        ConfigError: a bad configuration.
        TypeError: on something that is no module class; without a configuration.
    """
    if isinstance(config, type):
        raise TypeError(f'quantized takes a configuration first: @qcompile.quantized("int4") above {config.__name__}')
    parsed = parse_config(config)

    def decorate(module_class: ModuleType) -> ModuleType:
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
            raise TypeError(f"quantized decorates nn.Module classes, not {module_class!r}")
        original = module_class.__init__

        def initialize(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if type(self) is module_class:
                self.compile(backend="qcompile", options={"config": parsed, **options})

        initialize.__wrapped__ = original  # type: ignore[attr-defined]
        module_class.__init__ = initialize  # type: ignore[method-assign]
        return module_class

    return decorate
