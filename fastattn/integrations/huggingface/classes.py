"""Which models of Hugging Face Transformers call attention implementations, judged by the code of their layers.

Those that do not would accept the name "fastattn", change nothing, and say nothing. `guard` refuses them wherever the
name is given: to a config, to `set_attn_implementation`, and to a model that is built, also by `from_pretrained` and
`_from_config`. A config is refused if no model of its class can call the implementation. A model is refused if none of
its layers does. A model of which some layers do is accepted, with a warning that names the others.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
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
_IN_PART = (
    '{} runs on attn_implementation="fastattn" in part: its layers {} compute attention of their own, and stay as they '
    "are"
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
    model: Any = transformers.PreTrainedModel
    config: Any = transformers.PretrainedConfig
    if hasattr(model.set_attn_implementation, "_fastattn"):
        return
    switch, finish, told = model.set_attn_implementation, model.post_init, config._attn_implementation

    @functools.wraps(switch)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if _is_named(attn_implementation):
            check_config(self.config, attn_implementation)
            check_model(self)
        switch(self, attn_implementation, *args, **kwargs)

    @functools.wraps(finish)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        finish(self, *args, **kwargs)
        if _named_configs(self.config, _told(self.config)) and not _is_being_built(sys._getframe(1).f_back):
            check_model(self)

    def tell(self: Any, value: Any) -> None:
        if not _checked.get() and _is_named(value):
            check_config(self, value)
        token = _checked.set(True)
        try:
            told.fset(self, value)
        finally:
            _checked.reset(token)

    set_attn_implementation._fastattn = True  # type: ignore[attr-defined]
    model.set_attn_implementation, model.post_init = set_attn_implementation, post_init
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


def check_model(model: Any) -> None:
    """Raises ValueError if no layer calls the implementation; warns of layers that compute attention of their own."""
    name, own = type(model).__name__, sorted({type(layer).__name__ for layer in layers_of_its_own(model)})
    if not any(calls(type(part)) for part in model.modules()):
        raise ValueError((_ATTENDS_ITSELF if own else _NO_ATTENTION).format(name))
    if own:
        warnings.warn(_IN_PART.format(name, ", ".join(own)), stacklevel=3)


def layers_of_its_own(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The innermost modules named attention that neither call the implementation nor belong to one that does."""
    layers = [x for x in model.modules() if "Attention" in type(x).__name__]
    calling = [x for x in model.modules() if calls(type(x)) and not isinstance(x, transformers.PreTrainedModel)]
    served = {part for x in calling for part in x.modules()}
    own = [layer for layer in layers if layer not in served and served.isdisjoint(layer.modules())]
    return [layer for layer in own if not any(part is not layer and part in own for part in layer.modules())]


def _told(config: Any) -> Any:
    """The value for attn_implementation that says what a config and its parts have been told."""
    parts = ((name, getattr(config, name, None)) for name in config.sub_configs)
    return {"": config._attn_implementation, **{name: _told(part) for name, part in parts if part is not None}}


def _is_being_built(frame: FrameType | None) -> bool:
    """Whether a model's __init__ further out on the stack, of the whole or of a subclass, will call post_init."""
    while frame is not None:
        code = frame.f_code
        finishes = code.co_name == "__init__" and "post_init" in code.co_names
        if finishes and isinstance(frame.f_locals.get("self"), transformers.PreTrainedModel):
            return True
        frame = frame.f_back
    return False


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


def _find_table(layer: type) -> bool:
    """Whether a class looks up attention implementations in its methods, inherited ones included."""
    bases = [base for base in layer.__mro__ if base.__module__ not in _NO_LAYERS]
    for name in {name for base in bases for name in vars(base)}:
        for method in (vars(base)[name] for base in bases if name in vars(base)):
            named = _names(method)
            if TABLE in named:
                return True
            if "super" not in named:
                break  # those of the bases are overridden
    return False


calls: Callable[[type], bool] = functools.cache(_find_table)
_NO_LAYERS = {transformers.PreTrainedModel.__module__, torch.nn.Module.__module__, "builtins"}


def _names(method: Any) -> set[str]:
    """The names that a function uses, in its decorators, inner functions and the functions of its module as well."""
    found: set[str] = set()
    seen: set[int] = set()
    pending = [method]
    while pending:
        x = pending.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, CodeType):
            found.update(x.co_names)
            pending += x.co_consts
        elif isinstance(x, FunctionType):
            cells = [cell.cell_contents for cell in x.__closure__ or () if cell != CellType()]
            pending += [x.__code__, getattr(x, "__wrapped__", None), *cells]
            helpers = (x.__globals__.get(name) for name in x.__code__.co_names)
            pending += [f for f in helpers if isinstance(f, FunctionType) and f.__module__ == x.__module__]
        elif isinstance(x, property):
            pending.append(x.fget)
        elif isinstance(x, (classmethod, staticmethod)):
            pending.append(x.__func__)
    return found


@functools.cache
def _may_call(config: Hashable) -> bool:
    """Whether models of a config class may call attention implementations: themselves, or by parts from elsewhere."""
    module = _modeling(config)
    own = _own_classes(module)
    tables = [x for name, x in ({} if module is None else vars(module)).items() if name.endswith("_ATTENTION_CLASSES")]
    if any(NAME not in table for table in tables):  # by which its models choose a class for a layer
        return False
    if any(map(calls, own)):
        return True
    if any("Attention" in x.__name__ for x in own) and not config.sub_configs:  # type: ignore[attr-defined]
        return False
    return any(x.__name__.startswith("Auto") or calls(x) for x in _classes(module) if ".models." in x.__module__)
