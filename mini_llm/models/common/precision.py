"""Which dtype a forward pass computes in.

Autocast casts what goes into the operators it knows. Kernels that it does not know (grouped matrix
products, variable-length attention, this project's own autograd functions) ask here.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Asked once: torch.compile cannot trace the question in every version.
_DEVICES_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on x's device, or None where it is off."""
    device = x.device.type
    if device not in _DEVICES_WITH_AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products of x: autocast's where autocast is on, else x's own."""
    return autocast_dtype(x) or x.dtype


def full_precision(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off on x's device: routers compute in fp32, whatever the run does."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def products_like(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Where autocast is off, switch it to x's dtype if that is a 16-bit one.

    For a computation that keeps fp32 values beside 16-bit inputs and wants its matrix products in
    the inputs' dtype all the same, as in a model whose weights themselves are bf16 (DeepSpeed).
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or autocast_dtype(x) is not None:
        return nullcontext()
    return torch.autocast(x.device.type, dtype=x.dtype)
