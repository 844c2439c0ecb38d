"""Which models of Hugging Face Transformers call attention implementations, judged by their Python modules.

Those that do not would accept the name "fastattn", change nothing, and say nothing. `guard` refuses them wherever the
name is given: to a config, also by way of `from_pretrained` and `_from_config`, and to `set_attn_implementation`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Hashable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
import transformers

NAME = "fastattn"
TABLE = "ALL_ATTENTION_FUNCTIONS"
_ATTENDS_ITSELF = (
    '{} computes attention of its own and does not call the attention implementation: attn_implementation="fastattn" '
    'would change nothing; use "eager". In a model of several parts name those that can, such as '
    'attn_implementation={{"text_config": "fastattn"}}'
)
_NO_ATTENTION = (
    '{} has no layer that calls the attention implementation: attn_implementation="fastattn" would change nothing; '
    "leave it out"
)
WITHOUT_SDPA: set[Hashable] = set()
"""Config classes with models that do not take the masks of sdpa, as far as configs of them were checked."""
_checked: ContextVar[bool] = ContextVar("fastattn_checked", default=False)
"""Whether the library hands a name down to the parts of a config that was checked as a whole."""


def guard() -> None:
    """Makes the library refuse the name for classes to which it means nothing; more than once does no harm."""
    model, config = transformers.PreTrainedModel, transformers.PretrainedConfig
    if hasattr(model.set_attn_implementation, "_fastattn"):
        return
    switch, told = model.set_attn_implementation, config._attn_implementation

    @functools.wraps(switch)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if _is_named(attn_implementation):
            check_config(self.config, attn_implementation)
            if not any(_calls(type(part)) for part in self.modules()):
                raise ValueError(_NO_ATTENTION.format(type(self).__name__))
        switch(self, attn_implementation, *args, **kwargs)

    def tell(self: Any, value: Any) -> None:
        if not _checked.get() and _is_named(value):
            check_config(self, value)
        token = _checked.set(True)
        try:
            told.fset(self, value)
        finally:
            _checked.reset(token)

    set_attn_implementation._fastattn = True  # type: ignore[attr-defined]
    model.set_attn_implementation = set_attn_implementation
    config._attn_implementation = told.setter(tell)


def check_config(config: Any, value: Any = NAME) -> None:
    """Raises ValueError if the name, given to a config or to parts of it, would change nothing.

    A model of several parts, of which one calls attention implementations, is accepted: the others stay as they are.
    """
    named: list[Any] = [type(part) for part in _named_configs(config, value)]
    WITHOUT_SDPA.update(part for part in named if not _supports_sdpa(part))
    known = [part for part in named if _modeling(part) is not None]  # others may be mere groups of options
    if known and not any(map(_may_call, known)):
        attends = any("Attention" in x.__name__ for x in _own_classes(_modeling(type(config))))
        text = _ATTENDS_ITSELF if attends else _NO_ATTENTION
        raise ValueError(text.format(f"The model of {type(config).__name__}"))


@functools.cache
def _supports_sdpa(config: Hashable) -> bool:
    """Whether every model of this config class takes the masks of sdpa, booleans."""
    models = [x for x in _classes(_modeling(config)) if getattr(x, "config_class", None) is config]
    return all(getattr(model, "_supports_sdpa", True) for model in models)


def _is_named(value: Any) -> bool:
    """Whether a value for attn_implementation, a name or a dict of them by part, has ours in it."""
    return any(map(_is_named, value.values())) if isinstance(value, dict) else value == NAME


def _named_configs(config: Any, value: Any) -> list[Any]:
    """The config and those of its parts, as far as they are told our name."""
    found = [config] if value == NAME or (isinstance(value, dict) and value.get("") == NAME) else []
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found += _named_configs(part, value.get(name) if isinstance(value, dict) else value)
    return found


def _modeling(config: Any) -> ModuleType | None:
    """The Python module with the models of a config class; None where none with their usual name is found."""
    module = _imported(config.__module__.replace(".configuration_", ".modeling_"))
    return module if any(getattr(x, "config_class", None) is config for x in _classes(module)) else None


@functools.cache
def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _own_classes(module: ModuleType | None) -> list[type]:
    """The classes of torch modules that a Python module defines."""
    name = getattr(module, "__name__", None)
    return [x for x in _classes(module) if issubclass(x, torch.nn.Module) and x.__module__ == name]


def _classes(module: ModuleType | None) -> list[type]:
    return [x for x in ({} if module is None else vars(module)).values() if isinstance(x, type)]


def _looks_up(module: ModuleType | None) -> bool:
    """Whether a Python module looks up attention implementations, and does not miss ours in a table of its own."""
    if not hasattr(module, TABLE):
        return False
    return all(NAME in x for name, x in vars(module).items() if name.endswith("_ATTENTION_CLASSES"))


def _calls(layer: type) -> bool:
    """Whether a class is from a Python module that looks up implementations, or inherits from one that is."""
    modules = {base.__module__ for base in layer.__mro__} - {transformers.PreTrainedModel.__module__}  # has the table
    return any(_looks_up(sys.modules.get(name)) for name in modules)


@functools.cache
def _may_call(config: Hashable) -> bool:
    """Whether models of a config class may call attention implementations: themselves, or by parts from elsewhere."""
    module = _modeling(config)
    if _looks_up(module):
        return True
    attention = [x for x in _own_classes(module) if "Attention" in x.__name__]
    if attention and not config.sub_configs:  # type: ignore[attr-defined]
        return any(map(_calls, attention))
    return any(x.__name__.startswith("Auto") or _calls(x) for x in _classes(module) if ".models." in x.__module__)
