"""One frozen, validated description of an attention call.

Every public function builds an `Inputs` (the tensors) and an `Options` (everything else). `describe` checks both and
makes a `Problem` of them. It refuses wrong shapes, dtypes, devices and options before any memory is touched.
`check_values` checks the values inside small index tensors.
Backends take a `Problem` and its `Inputs` and check nothing again.
"""

from .arguments import CACHE_NAMES, DIFFERENTIABLE, INDICES, PER_SEQUENCE
from .describe import check_tensors, describe, metas_of
from .options import check_keywords, split_window, with_offset
from .shapes import check_heads, check_rank, check_rotary, check_shape
from .types import (
    DTYPES,
    AttentionOptions,
    CacheOptions,
    Inputs,
    Options,
    Problem,
)
from .values import LARGEST_OFFSET, check_results, check_values

__all__ = [
    "CACHE_NAMES",
    "DIFFERENTIABLE",
    "DTYPES",
    "INDICES",
    "LARGEST_OFFSET",
    "PER_SEQUENCE",
    "AttentionOptions",
    "CacheOptions",
    "Inputs",
    "Options",
    "Problem",
    "check_heads",
    "check_keywords",
    "check_rank",
    "check_results",
    "check_rotary",
    "check_shape",
    "check_tensors",
    "check_values",
    "describe",
    "metas_of",
    "split_window",
    "with_offset",
]
