"""One optimizer step under DeepSpeed ZeRO 0–3, DDP or a single process, through Accelerate.

The recipe asks for an :class:`accelerate.Accelerator` here, then writes its loop with three
functions that mean the same under every engine: :func:`accumulate`, :func:`backward`,
:func:`optimizer_step`.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config

from mini_llm.launch.note import FINISHED, write_note

from .clipping import clips_in_its_kernel, global_norm, take_over, tell
from .environment import (
    LaunchRequest,
    end_process,
    join_as_single_process,
    launch_request,
    world_size,
)
from .expert_parallel import check_expert_parallel
from .held_bytes import optimizer_tensors
from .watchdog import beat, collective_seconds, finish, report_exceptions


def build_accelerator(
    deepspeed: str | None = None,
    *,
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    bf16: bool = False,
    expert_parallel_size: int = 1,
    timeout_seconds: float = 600.0,
    log_with: list[str] | None = None,
    project_dir: str | Path | None = None,
) -> Accelerator:
    """Start the engine that the Accelerate config names, or DeepSpeed with the file ``deepspeed``.

    ``deepspeed`` None or "none": no DeepSpeed unless the Accelerate config asks for it. Raises
    RuntimeError when the engine that started is not the one that was asked for.
    """
    request = launch_request()
    _check_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), bf16)
    cpu = request.use_cpu or not torch.cuda.is_available()
    plugin = None
    wants_ddp = request.distributed_type in ("MULTI_GPU", "MULTI_CPU")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    elif wants_ddp or deepspeed == "none":
        deepspeed = None
    if deepspeed is not None:
        join_as_single_process()
        if cpu:
            spare_cpu_the_extension_build()
        arguments: dict[str, Any] = {
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_grad_norm": max_grad_norm,
            "bf16": bf16,
            "expert_parallel_size": expert_parallel_size,
        }
        if deepspeed == "none":  # an Accelerate config with its DeepSpeed fields inline
            plugin = DeepSpeedPlugin()
            plugin.deepspeed_config = fill_deepspeed_config(plugin.deepspeed_config, **arguments)
        else:
            config = read_deepspeed_config(deepspeed)
            plugin = DeepSpeedPlugin(hf_ds_config=fill_deepspeed_config(config, **arguments))
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin is not None else {}
    check_expert_parallel(
        expert_parallel_size,
        zero_stage=zero.get("stage", 0),
        offloads=any(
            zero.get(part, {}).get("device", "none") != "none"
            for part in ("offload_optimizer", "offload_param")
        ),
    )
    project = None
    if project_dir is not None:
        logs = str(Path(project_dir) / "logs")
        project = ProjectConfiguration(project_dir=str(project_dir), logging_dir=logs)
    # Where a collective waits for a late rank, the watchdog ends all ranks and says whose fault it
    # is; this ends what the watchdog cannot.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=collective_seconds(timeout_seconds)))
    if cpu:
        group.backend = "gloo"
    accelerator = Accelerator(
        # With a DeepSpeed plugin, cpu=True would make Accelerate start DDP instead.
        cpu=cpu and plugin is None,
        deepspeed_plugin=plugin,
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[group] if world_size() > 1 or plugin is not None else [],
        log_with=log_with or None,
        project_config=project,
    )
    report_exceptions()
    # Else transformers splits what it loads over the ranks as it loads it, and lets one rank's
    # generate wait for the others. Models of this size are built whole, then split by prepare.
    unset_hf_deepspeed_config()
    _check_started_as_asked(accelerator, request, plugin)
    return accelerator


def limit_collectives(seconds: float) -> None:
    """Give all process groups the first one's time limit; call it once ``prepare`` has made them.

    torch gives a group that DeepSpeed makes half an hour with gloo, and with NCCL the ten minutes
    after which the watchdog wants to speak: NCCL would kill the rank in the middle of its report.
    """
    limit = timedelta(seconds=collective_seconds(seconds))
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(limit, group)


def spare_cpu_the_extension_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory communication op.

    Launched by torchrun, DeepSpeed never uses that op, yet builds it at start: 20 s, a failure
    where there is no compiler, and a hang where an earlier build was killed.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The DeepSpeed JSON at ``path``. Raises ValueError, naming it, where there is none."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the DeepSpeed config {path} cannot be read: {why}") from None
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed config {path} is no JSON object")
    return config


def fill_deepspeed_config(
    config: dict[str, Any],
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    bf16: bool,
    expert_parallel_size: int = 1,
) -> dict[str, Any]:
    """``config`` with every "auto" replaced by the run's own value.

    Raises ValueError for an "auto" in a key that no argument of the run determines, for a number
    that contradicts the run's, and for fp16.
    """
    if config.get("fp16", {}).get("enabled") is True:  # its scaled gradients are not clipped here
        raise ValueError(
            "the DeepSpeed config enables fp16, in which the recipes do not train; leave its "
            "section out, and give --bf16 true for half the bytes"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and bf16:
        # deepspeed 0.19.8 lets AdamW take a step on zero gradients when it starts (see
        # tests/distributed/test_engine_bugs.py): every later step corrects the moments' bias for
        # one step too many, and from the second loss on the run leaves the other engines'.
        raise ValueError(
            "--bf16 true with ZeRO-0 does not train as the other engines do; use "
            "accelerate_configs/zero1.yaml, or ddp.yaml to split nothing"
        )
    # ZeRO-0 is DeepSpeed's plain path: it clips by the mean of the ranks' norms and reports none,
    # so optimizer_step() clips there and DeepSpeed must not clip again.
    ours_to_clip = stage == 0
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size(),
        "gradient_clipping": 0.0 if ours_to_clip else max_grad_norm,
        "bf16.enabled": bf16,
    }
    filled: dict[str, Any] = json.loads(json.dumps(config))
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        node = filled
        for section in sections:
            node = node.setdefault(section, {})
        if node.get(key, "auto") != "auto" and not ours_to_clip and node[key] != value:
            raise ValueError(
                f"the DeepSpeed config sets {dotted} to {node[key]!r} but the run's arguments give "
                f'{value!r}; write "auto" there'
            )
        node[key] = value
    if expert_parallel_size > 1 and stage == 1:
        # Without it deepspeed 0.19.8 divides the gradients of spread experts by too few ranks.
        filled["zero_optimization"]["contiguous_gradients"] = True
    # Its own timer would have the host wait for the device twice a step.
    filled.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    _refuse_auto(filled)
    return filled


def _refuse_auto(node: dict[str, Any], path: str = "") -> None:
    for key, value in node.items():
        dotted = f"{path}{key}"
        if isinstance(value, dict):
            _refuse_auto(value, f"{dotted}.")
        elif value == "auto":
            raise ValueError(f'the DeepSpeed config leaves {dotted} to "auto"; write a value')


def _check_precision(asked: str, bf16: bool) -> None:
    """``asked`` is the Accelerate config's mixed_precision, which the run's argument overrules."""
    if asked == "no" or (asked == "bf16" and bf16):
        return
    way_out = "but --bf16 is false; add --bf16 true, or" if asked == "bf16" else "not done here;"
    raise RuntimeError(
        f"the Accelerate config or command line asks for mixed_precision {asked}, {way_out} give "
        "--mixed_precision no to accelerate launch"
    )


def _check_started_as_asked(
    accelerator: Accelerator, request: LaunchRequest, plugin: DeepSpeedPlugin | None
) -> None:
    """No silent single process, no unsynchronised ranks."""
    started = accelerator.num_processes
    expected = request.num_processes or world_size()
    if started != expected or started != world_size():
        raise RuntimeError(
            f"{expected} processes were asked for but the job has {started}: accelerate has no "
            "launcher for this machine; add --config_file accelerate_configs/zero1.yaml"
        )
    if plugin is not None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed was asked for but Accelerate started {accelerator.distributed_type}"
        )
    if started > 1 and not (dist.is_initialized() and dist.get_world_size() == started):
        raise RuntimeError(f"{started} processes started without a process group: unsynchronised")


def is_deepspeed(model: nn.Module) -> bool:
    """Whether ``model`` is a DeepSpeed engine."""
    return hasattr(model, "set_gradient_accumulation_boundary")


def zero_stage(accelerator: Accelerator, model: nn.Module) -> int | None:
    """The ZeRO stage at which the engine really runs; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(model.zero_optimization_stage())  # type: ignore[operator]


def asked_zero_stage(accelerator: Accelerator) -> int:
    """The ZeRO stage of the engine that was asked for, before ``prepare``; 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    config = {} if plugin is None else plugin.deepspeed_config
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload(model: nn.Module) -> dict[str, str | None]:
    """Where the engine keeps what it has moved off the device; None: it has not.

    ``optimizer``: master weights, moments and the update itself; ``parameters``: this rank's slices
    between two uses. Asked of DeepSpeed's running objects, not of the config. Raises RuntimeError
    if a tensor does not lie where they say.
    """
    where: dict[str, str | None] = {"optimizer": None, "parameters": None}
    if not is_deepspeed(model):
        return where
    zero: Any = model.optimizer
    # ZeRO-2 calls it cpu_offload, ZeRO-3 offload_optimizer.
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        where["optimizer"] = "cpu"
    if getattr(zero, "offload_param", False):
        where["parameters"] = "cpu"
    parameters: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    tensors = {
        "optimizer": list(optimizer_tensors(zero)),
        # Small ones (stage3_param_persistence_threshold) stay whole on the device.
        "parameters": [p.ds_tensor for p in parameters if not p.ds_persist],
    }
    for what, device in where.items():
        misplaced = {tensor.device.type for tensor in tensors[what]} - {device}
        if device is not None and misplaced:
            raise RuntimeError(f"{what} should be offloaded to {device} but lie on {misplaced}")
    return where


def describe(accelerator: Accelerator, model: nn.Module) -> str:
    """The engine in words, e.g. "DeepSpeed ZeRO-1 on 2 rank(s)"."""
    stage = zero_stage(accelerator, model)
    if stage is not None:
        name = f"DeepSpeed ZeRO-{stage}"
    elif accelerator.num_processes > 1:
        name = "DistributedDataParallel"
    else:
        name = "plain PyTorch"
    return f"{name} on {accelerator.num_processes} rank(s)"


@contextlib.contextmanager
def accumulate(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around one micro-batch's forward and backward; ``last`` of the step reduces the gradients."""
    beat("forward and backward")
    if is_deepspeed(model):
        model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
    elif not last and isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
        return
    yield


def backward(accelerator: Accelerator, model: nn.Module, loss: torch.Tensor) -> None:
    """Accumulate the gradient of Σ over ranks and micro-batches of ``loss``.

    ``loss`` is this micro-batch's share: its summed token losses ÷ the supervised tokens of the
    whole optimizer step. Every engine *averages* gradients over ranks, hence the factor.
    """
    loss = loss * accelerator.num_processes
    if is_deepspeed(model):
        model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
    else:
        loss.backward()


def optimizer_step(model: nn.Module, optimizer: Any, max_grad_norm: float) -> torch.Tensor | float:
    """Clip to the global norm ``max_grad_norm`` (0: do not), update, clear; return the norm before.

    The norm is over all parameters and ranks, of the step's whole gradient. Where it is not finite,
    nothing is updated. The fused optimizer's kernel does both (clipping.py), so the host does not
    wait for the norm; it does under ZeRO-3 and with offload, where DeepSpeed does both itself, and
    for an optimizer that is not fused.
    """
    beat("optimizer step")
    limit = max_grad_norm if max_grad_norm > 0 else math.inf
    stage = model.zero_optimization_stage() if is_deepspeed(model) else 0  # type: ignore[operator]
    if stage > 0:
        take_over(model.optimizer, limit)
        model.step()  # type: ignore[operator]
        return model.get_global_grad_norm()  # type: ignore[operator]
    kernel = optimizer
    while hasattr(kernel, "optimizer"):  # Accelerate's and DeepSpeed's wrappers
        kernel = kernel.optimizer
    parameters = [p for p in model.parameters() if p.grad is not None]
    if clips_in_its_kernel(kernel):
        norm = global_norm([p.grad for p in parameters])  # type: ignore[misc]
        tell(kernel, norm, limit)
        may_step = True
    else:
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        may_step = bool(norm.isfinite())
    if may_step:
        (model if is_deepspeed(model) else optimizer).step()  # type: ignore[operator]
    model.zero_grad()
    return norm


def leave(accelerator: Accelerator) -> NoReturn:
    """End this rank with status 0, once all ranks are here; the last call of a recipe.

    Without Python's own teardown, for :func:`~.environment.end_process`'s reason.
    """
    accelerator.wait_for_everyone()
    write_note(FINISHED)  # what may still go wrong here is no reason to start again
    finish()
    for tracker in accelerator.trackers:
        tracker.finish()
    end_process()
