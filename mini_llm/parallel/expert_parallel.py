"""What a run with spread experts needs around them: checks, groups, gathering them for saving.

``--expert_parallel_size`` N > 1 spreads every layer's experts over groups of N ranks, see
``spread_experts.py``, which alone needs DeepSpeed.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .snapshot import to_host

if TYPE_CHECKING:
    from .spread_experts import Wire

Copy = Callable[[torch.Tensor], torch.Tensor]


def is_spread(module: nn.Module) -> bool:
    """Whether a module is a layer's experts, spread over ranks."""
    return getattr(module, "is_spread", False)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts that are not spread, by name: with ``gate_up_proj`` (E, 2F, D)."""
    return {
        name: module
        for name, module in model.named_modules()
        if len(_whole_shape(getattr(module, "gate_up_proj", None))) == 3
    }


def _whole_shape(parameter: Any) -> tuple[int, ...]:
    """Also of a parameter that ZeRO-3 has split; () of what is none."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "shape", ())))


def expert_shapes(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """(E, F, D) of all stacked experts, by the name of their module, spread or not."""
    shapes = {}
    for name, module in model.named_modules():
        if is_spread(module):
            _, F_, D = _whole_shape(module.experts.w1)
            shapes[name] = (module.num_experts, F_, D)
    for name, module in find_experts(model).items():
        E, twice_F, D = _whole_shape(module.gate_up_proj)
        shapes[name] = (E, twice_F // 2, D)
    return shapes


def spread_experts(model: nn.Module, size: int, rank: int) -> None:
    """Replace all stacked experts of ``model`` by this rank's part of them, before ``prepare``.

    With ``size`` 1 nothing is done, and frozen experts stay whole. ``rank`` is this process's
    among all; a group is ``size`` neighbours. Raises ValueError, naming the flag, where the
    experts cannot be divided.
    """
    if size == 1:
        return
    flag = f"--expert_parallel_size {size}"
    found = find_experts(model)
    if not found:
        raise ValueError(f"{flag}: the model has no experts to spread; leave it out")
    from .spread_experts import SpreadExperts, Wire

    wire = Wire()
    for name, module in found.items():
        parameter: Any = module.gate_up_proj
        if not parameter.requires_grad:
            # Frozen, they cost neither gradient nor optimizer state; and at ZeRO-3 deepspeed 0.19.8
            # refuses to save frozen experts that are spread.
            continue
        E, *_ = _whole_shape(parameter)
        if E % size:
            raise ValueError(f"{flag} does not divide the {E} experts of {name}")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SpreadExperts(module, size, rank % size, wire))


def check_expert_parallel(size: int, *, zero_stage: int | None, offloads: bool) -> None:
    """Refuse a combination that does not train as without. Raises ValueError naming the flag."""
    if size == 1:
        return
    flag = f"--expert_parallel_size {size}"
    if not zero_stage:
        raise ValueError(
            f"{flag} needs DeepSpeed's ZeRO-1, 2 or 3, which reduce an expert's gradient over the "
            "ranks that hold it; use accelerate_configs/zero1.yaml"
        )
    if offloads:
        raise ValueError(
            f"{flag} with CPU offload is not supported; use zero1, zero2 or zero3.yaml"
        )


def expert_groups(size: int, world_size: int) -> list[list[int]]:
    """The groups of ranks that share one set of experts, e.g. ``[[0, 1], [2, 3]]``."""
    return [list(range(first, first + size)) for first in range(0, world_size, size)]


def describe_groups(size: int, world_size: int) -> str:
    """Expert and data groups in words, for the banner."""
    groups = expert_groups(size, world_size)
    holders = [[group[i] for group in groups] for i in range(size)]
    return (
        f"spread over {size} ranks: groups {', '.join(map(str, groups))}; the same experts on "
        f"ranks {', '.join(map(str, holders))}"
    )


def find_wire(model: nn.Module) -> "Wire | None":
    """What counts the traffic of a (wrapped) model's experts, None where they are not spread."""
    wires: list[Any] = [m.wire for m in model.modules() if is_spread(m)]
    return wires[0] if wires else None


def wire_metrics(accelerator: Any, wire: "Wire | None") -> dict[str, float]:
    """What the expert all-to-alls of this step cost, over all ranks; a collective; {} without any.

    ``ep/rows_sent`` and ``ep/bytes_sent`` are sums over ranks, forward and backward;
    ``ep/all_to_all_seconds`` is the mean over ranks.
    """
    if wire is None:
        return {}
    found = torch.tensor(wire.read(), dtype=torch.float64, device=accelerator.device)
    rows, num_bytes, seconds = accelerator.reduce(found, "sum").tolist()
    return {
        "ep/rows_sent": rows,
        "ep/bytes_sent": num_bytes,
        "ep/all_to_all_seconds": seconds / accelerator.num_processes,
    }


def expert_parallel_size(model: nn.Module) -> int:
    """Ranks over which the experts of a (wrapped) model are spread, 1 where they are not."""
    sizes: list[Any] = [m.ep_size for m in model.modules() if is_spread(m)]
    return sizes[0] if sizes else 1


def gather_experts(model: nn.Module, copy: Copy) -> dict[str, torch.Tensor]:
    """All experts' weights under their stock names, as rank 0 copies them; {} on other ranks.

    ``{"….experts.gate_up_proj": (E, 2F, D), "….experts.down_proj": (E, D, F), …}``. A collective of
    all ranks, under any ZeRO stage.
    """
    import deepspeed
    import deepspeed.comm as dist

    is_main = dist.get_rank() == 0
    whole: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not is_spread(module):
            continue
        local = module.experts
        with deepspeed.zero.GatheredParameters([local.w1, local.w2, local.w3]):
            parts = []
            for weight in (local.w1, local.w2, local.w3):
                received = [torch.empty_like(weight) for _ in range(module.ep_size)]
                dist.all_gather(received, weight.detach().contiguous(), group=module.ep_group)
                if is_main:
                    parts.append(torch.cat(received))
        if is_main:
            gate, down, up = parts
            whole[f"{name}.gate_up_proj"] = copy(torch.cat([gate, up], dim=1))
            whole[f"{name}.down_proj"] = copy(down)
    return whole


def stock_state_dict(
    accelerator: Any, model: nn.Module, copy: Copy = to_host
) -> dict[str, torch.Tensor]:
    """Copies of all weights and buffers under their stock names on rank 0; {} on other ranks.

    A collective of all ranks, under any engine, with spread experts or without. ``copy`` is called
    on rank 0 for each of them.
    """
    unwrapped = accelerator.unwrap_model(model)
    spread = {
        f"{name}.experts.{weight}"
        for name, module in unwrapped.named_modules()
        if is_spread(module)
        for weight in ("w1", "w2", "w3")
    }
    # Accelerate's own way brings everything to the host at once. And with spread experts DeepSpeed
    # 0.19.8 gives rank 0's alone at ZeRO-1 and 2, silently, and raises at ZeRO-3.
    state = {}
    parameters = dict(unwrapped.named_parameters(remove_duplicate=False))
    for name, value in unwrapped.state_dict().items():
        if name in spread:
            continue
        whole = parameters.get(name, value)  # of a weight that ZeRO-3 has split, value is empty
        with _gathered(whole):
            if accelerator.is_main_process:
                state[name] = copy(whole)
    return state | (gather_experts(unwrapped, copy) if spread else {})


def _gathered(parameter: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, a parameter that ZeRO-3 has split is whole on every rank."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        [parameter]
    )
    return gathered
