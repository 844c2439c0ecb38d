"""`import flash_attn` for machines without flash-attn."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

VERSION = "2.8.3+fastattn"

_HERE = __package__
_MODULES: dict[str, str | None] = {  # of flash-attn -> where its names are; None has none
    "flash_attn": _HERE,
    "flash_attn.bert_padding": f"{_HERE}.bert_padding",
    "flash_attn.flash_attn_interface": f"{_HERE}.flash_attn_interface",
    "flash_attn.layers": None,
    "flash_attn.layers.rotary": f"{_HERE}.rotary",
}
_PACKAGES = ("flash_attn", "flash_attn.layers")


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of flash-attn in this package; comes last, so that the real ones win."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _MODULES:
            return None
        return ModuleSpec(name, self, origin="fastattn", is_package=name in _PACKAGES)

    def exec_module(self, module: ModuleType) -> None:
        source = _MODULES[module.__name__]
        if source is None:
            return
        ours = importlib.import_module(source)
        module.__doc__ = ours.__doc__
        for name in ours.__all__:
            if name != "install":
                setattr(module, name, getattr(ours, name))
        if module.__name__ == "flash_attn":
            vars(module)["__version__"] = VERSION
            importlib.import_module("flash_attn.flash_attn_interface")  # an attribute of the real one, too


_finder = _Finder()


def install() -> bool:
    """Makes `import flash_attn` find fastattn's functions, in this process, if flash-attn itself is not installed.

    Returns True if it does, False if there is a real flash-attn, which stays in charge. The modules are flash_attn,
    flash_attn.flash_attn_interface, flash_attn.bert_padding and flash_attn.layers.rotary; importlib.util.find_spec
    knows them, and flash_attn.__version__ is "2.8.3+fastattn". There is no distribution of that name:
    importlib.metadata.version("flash_attn") raises PackageNotFoundError as before. Hugging Face Transformers then takes
    __version__, and says that flash-attn is available where it also sees a GPU, and only there.
    Processes that are started anew, as by DataLoader workers with spawn, call it again.
    """
    if _finder in sys.meta_path:
        return True
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return False
    sys.meta_path.append(_finder)
    return True
