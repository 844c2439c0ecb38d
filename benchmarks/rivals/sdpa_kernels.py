"""torch's GPU kernels one by one. `sdpa` chooses among them by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Case
from ..data import Data
from .sdpa import Sdpa


class _SdpaKernel(Sdpa):
    """torch's scaled_dot_product_attention, restricted to one of its GPU kernels."""

    named_only = True
    kernel: SDPBackend

    def why_not(self, case: Case, data: Data) -> str | None:
        """Needs CUDA; the rest is torch's own answer when only this kernel is allowed."""
        if data.q.device.type != "cuda":
            return f"{self.name} runs on CUDA devices only"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch warns of each obstacle
                self.forward(case, data)()
        except RuntimeError as error:
            return f"torch refuses: {str(error).splitlines()[0]}"
        return None

    def dense(self, case: Case, data: Data) -> Callable[[], Tensor]:
        """One scaled_dot_product_attention under `sdpa_kernel`."""
        call = super().dense(case, data)

        def restricted() -> Tensor:
            with sdpa_kernel(self.kernel):
                return call()

        return restricted


class SdpaFlash(_SdpaKernel):
    """FlashAttention-2 as shipped with torch."""

    name, kernel = "sdpa-flash", SDPBackend.FLASH_ATTENTION


class SdpaCudnn(_SdpaKernel):
    """The attention of cuDNN."""

    name, kernel = "sdpa-cudnn", SDPBackend.CUDNN_ATTENTION


class SdpaEfficient(_SdpaKernel):
    """The memory-efficient attention of xformers as shipped with torch."""

    name, kernel = "sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION
