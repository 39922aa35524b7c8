"""What a rank really holds, measured: bytes of weights, gradients and optimizer state.

``run.json`` records them, for equal losses prove nothing if nothing was split.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .expert_parallel import is_spread


class HeldBytes:
    """This rank's bytes, counted storage by storage: a view of a flat buffer is that buffer.

    ``parameters``, ``gradients`` (the most between a backward pass and the step) and
    ``optimizer_state``, fp32 master weights included. With experts spread over ranks, what of them
    belongs to those experts too: ``expert_parameters``, ``expert_gradients`` and
    ``expert_optimizer_state``, counted element by element.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.gradients: dict[str, int] = {}
        spread: list[Any] = [module for module in model.modules() if is_spread(module)]
        self.expert_weights = [w for module in spread for w in module.experts.parameters()]

    def note_gradients(self) -> None:
        """Call it after backward passes of one step, before the step is taken."""
        found = {"gradients": self._gradient_bytes()}
        if self.expert_weights:
            found["expert_gradients"] = sum(map(_size, self._expert_gradients()))
        for kind, size in found.items():
            self.gradients[kind] = max(size, self.gradients.get(kind, 0))

    def read(self) -> dict[str, int]:
        """All kinds, once the optimizer state exists: after the first step."""
        parameters = _Tally()
        for parameter in self.model.parameters():
            parameters.add(parameter)
            parameters.add(getattr(parameter, "ds_tensor", None))  # ZeRO-3: this rank's slice
        state = _Tally(seen=parameters.seen)
        for tensor in optimizer_tensors(self.optimizer):
            state.add(tensor)
        held = {"parameters": parameters.bytes, "optimizer_state": state.bytes, **self.gradients}
        if self.expert_weights:
            weights = [(w, getattr(w, "ds_tensor", None)) for w in self.expert_weights]
            held["expert_parameters"] = sum(_size(part) for pair in weights for part in pair)
            state_of_experts = optimizer_tensors(self.optimizer, only_experts=True)
            held["expert_optimizer_state"] = sum(map(_size, state_of_experts))
        return held

    def _gradient_bytes(self) -> int:
        gradients = _Tally()
        for parameter in self.model.parameters():
            gradients.add(parameter.grad)
            gradients.add(getattr(parameter, "grad_accum", None))
        zero = _zero(self.optimizer)
        for partition in getattr(zero, "averaged_gradients", {}).values():
            for gradient in _as_list(partition):
                gradients.add(gradient)
        # Offloaded, they accumulate in buffers of the host.
        for gradient in getattr(zero, "accumulated_grads_in_cpu", {}).values():
            gradients.add(gradient)
        gradients.add(getattr(zero, "grad_partitions_flat_buffer", None))
        for group in _torch_optimizer(self.optimizer).param_groups:
            for master in group["params"]:
                gradients.add(master.grad)
        return gradients.bytes

    def _expert_gradients(self) -> Iterator[torch.Tensor]:
        """Those that the spread experts' weights hold, and those that DeepSpeed holds for them."""
        zero = _zero(self.optimizer)
        seen = set()
        for weight in self.expert_weights:
            for gradient in (weight.grad, getattr(weight, "grad_accum", None)):
                if torch.is_tensor(gradient) and gradient.numel():
                    seen.add(gradient.untyped_storage().data_ptr())
                    yield gradient
        for i, partition in getattr(zero, "averaged_gradients", {}).items():
            if _is_of_experts(self.optimizer, i):
                for gradient in _as_list(partition):
                    if gradient.untyped_storage().data_ptr() not in seen:
                        yield gradient


def optimizer_tensors(optimizer: Any, only_experts: bool = False) -> Iterator[torch.Tensor]:
    """The weights that the optimizer updates (master weights, or the model's own) and its state.

    ``only_experts``: those of spread experts, which are a parameter group of their own.
    """
    inner = _torch_optimizer(optimizer)
    masters: list[torch.Tensor] = []
    zero = _zero(optimizer)
    for i, master in enumerate(getattr(zero, "fp32_partitioned_groups_flat", [])):  # ZeRO-3's
        if not only_experts or _is_of_experts(optimizer, i):
            masters.append(master)
    for group in inner.param_groups:
        if not only_experts or group.get("moe"):
            masters += group["params"]
    masters = list({id(master): master for master in masters}.values())
    yield from masters
    for master in masters:
        values = inner.state.get(master, {}).values()
        yield from (value for value in values if torch.is_tensor(value))


def _is_of_experts(optimizer: Any, i: int) -> bool:
    """Whether DeepSpeed's i-th flat group (at ZeRO-3 a group's part) is of spread experts."""
    group_of = getattr(_zero(optimizer), "sub_group_to_group_id", {})
    return bool(_torch_optimizer(optimizer).param_groups[group_of.get(i, i)].get("moe"))


def _zero(optimizer: Any) -> Any:
    """What wraps the torch optimizer itself: under DeepSpeed its ZeRO optimizer."""
    inner = _torch_optimizer(optimizer)
    while optimizer is not inner and optimizer.optimizer is not inner:
        optimizer = optimizer.optimizer
    return optimizer


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _as_list(partition: Any) -> list[torch.Tensor]:
    return [partition] if torch.is_tensor(partition) else list(partition or [])


def _size(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if torch.is_tensor(tensor) else 0


class _Tally:
    """Counts the bytes of tensors' storages, each once."""

    def __init__(self, seen: set[int] | None = None) -> None:
        self.bytes = 0
        self.seen = set(seen or ())

    def add(self, tensor: Any) -> None:
        if not torch.is_tensor(tensor) or tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
