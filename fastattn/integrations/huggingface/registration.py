"""Makes the attention function and its masks known to transformers, which is imported by then alone."""

from __future__ import annotations

import importlib

from .attention import attention_forward

NAME = "fastattn"
OLDEST = (4, 57)
INTERFACES = ("AttentionInterface", "AttentionMaskInterface")


def register() -> None:
    """Makes `attn_implementation="fastattn"` known to transformers, with its masks; more than once does no harm.

    From then on the library refuses that name, with ValueError, for model classes that compute attention themselves:
    it would change nothing. Raises ImportError if transformers is missing, or older than 4.57.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as missing:
        raise ImportError(f"fastattn.integrations.huggingface needs transformers>=4.57: {missing}") from missing
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST or not all(hasattr(transformers, name) for name in INTERFACES):
        raise ImportError(
            "fastattn.integrations.huggingface needs transformers>=4.57, with its AttentionInterface and "
            f"AttentionMaskInterface, got transformers {transformers.__version__}"
        )
    from .classes import guard
    from .masks import make_mask

    guard()
    # A name that only the first knows gets no masks at all, silently.
    for interface, function in zip(INTERFACES, (attention_forward, make_mask), strict=True):
        getattr(transformers, interface).register(NAME, function)
