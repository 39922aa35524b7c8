"""Clipping a gradient, or dropping a bad one, inside the optimizer's own kernel.

Torch's fused AdamW takes two tensors that its gradient scaler uses: it divides the gradient by
``grad_scale`` while it reads it, and changes nothing, moments included, where ``found_inf`` is 1.
Told so, no pass over the gradients is made to clip them, and the host never waits for the norm:
on a GPU it hands out the next step's work while this one is computed.
"""

import math
from typing import Any

import torch
import torch.distributed as dist


def tell(optimizer: torch.optim.Optimizer, norm: torch.Tensor, limit: float) -> None:
    """Have the next ``step()`` clip from the global ``norm`` to ``limit``, or do nothing.

    ``norm``: a scalar on the parameters' device; where it is not finite, the step does nothing.
    ``limit`` may be inf. Only for an optimizer that :func:`clips_in_its_kernel`.
    """
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    scale = None
    if math.isfinite(limit):  # as nn.utils.clip_grad_norm_ does, 1e-6 included
        scale = ((norm.float() + 1e-6) / limit).clamp(min=1.0)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]


def clips_in_its_kernel(optimizer: Any) -> bool:
    """Whether the (unwrapped) ``optimizer`` heeds what :func:`tell` says: AdamW if it is fused."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """2-norm of all ``gradients`` as one vector, added up in fp32: one kernel and one more."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def take_over(zero: Any, limit: float) -> None:
    """Have DeepSpeed's ZeRO-1 or 2 optimizer ``zero`` clip as :func:`tell` says.

    By itself deepspeed 0.19.8 looks into every gradient for what is not finite, converts each to
    fp64 for the norm, multiplies all by the factor, and waits for the device after the first two
    and for each parameter group. Offloaded, where gradients are on the host anyway, it keeps its
    own way, and so does ZeRO-3, whose step is another one.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.cpu_offload:
        return
    if not clips_in_its_kernel(zero.optimizer) or "scaled_global_norm" in vars(zero):
        return
    of_all_groups = zero.scaled_global_norm

    def norm_of_group(gradients: list[torch.Tensor], params: Any, norm_type: int = 2) -> Any:
        """Of what all ranks hold of a group's gradient; not finite becomes DeepSpeed's -1."""
        square = global_norm(gradients).square()
        dist.all_reduce(square, group=zero.dp_process_group)
        return square.sqrt().masked_fill(~square.isfinite(), -1.0)

    def scaled_global_norm(norm_type: int = 2) -> Any:
        norm = of_all_groups(norm_type)  # inf where a group's is -1
        tell(zero.optimizer, norm, limit)
        return norm

    zero.get_grad_norm_direct = norm_of_group
    zero.scaled_global_norm = scaled_global_norm
    zero.check_grad_overflow = False
    zero.clip_grad = 0.0
