"""Sizes that can be known before a run: parameters, FLOPs, memory per rank."""

import re
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from mini_llm.models import empty_model, mixing_flops_per_token
from mini_llm.parallel.expert_parallel import find_experts
from mini_llm.parallel.traffic import ModelShape, StepShape, sent, step_traffic

from .arguments import RunArguments, SftArguments
from .losses import mtp_options

GIB = 1 << 30


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable parameters, a tied weight once.

    ``active`` takes part in one token's inference: of the routed experts those that a router picks,
    and no multi-token-prediction module. ``mtp`` is the size of those modules, ``experts`` that of
    all routed experts, ``idle_experts`` of those that one token does not use.
    """

    total: int
    active: int
    mtp: int
    experts: int
    idle_experts: int

    def __str__(self) -> str:
        if self.active == self.total:
            return f"{self.total:,} parameters"
        mtp = f", {self.mtp:,} of multi-token prediction" if self.mtp else ""
        return f"{self.total:,} parameters ({self.active:,} active{mtp})"


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count a model that is not wrapped or partitioned yet."""
    config: Any = model.config
    total = active = mtp = experts = idle = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        total += size
        unused = 0
        if re.search(r"\.experts\.(gate_up|down)_proj$", name):  # (E, …): a token uses K of E
            unused = size - size * config.num_experts_per_tok // parameter.shape[0]
            experts += size
            idle += unused
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            mtp += size
        else:
            active += size - unused
    return ParameterCounts(total, active, mtp, experts, idle)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of forward and backward passes; only a supervised token needs logits."""

    layers: float  # of a token
    head: float  # of a supervised token

    @property
    def per_token(self) -> float:
        """Of a token where every one is supervised."""
        return self.layers + self.head


def training_flops(
    config: PreTrainedConfig,
    parameters: ParameterCounts,
    seq_len: int,
    *,
    predict_further: bool = True,
) -> TrainingFlops:
    """FLOPs of one token's forward and backward pass.

    6 per weight that multiplies (Kaplan et al. 2020, §2.1) – the input embedding only looks up, the
    head multiplies once for the main loss and once for each MTP depth – plus what mixes tokens:
    attention scores and values, or the delta rule. Attention counts all T² scores, not the causal
    half, as PaLM (appendix B) and others do for MFU; recomputation does not count.
    ``predict_further`` False leaves the MTP layers out, where the model has any.
    """
    multiplied = parameters.total - parameters.idle_experts
    depths = getattr(config, "num_nextn_predict_layers", 0)
    if depths and not predict_further:
        config = copy(config)
        config.num_nextn_predict_layers = depths = 0
        multiplied = parameters.active
    embedding = config.vocab_size * config.hidden_size
    matrices = 1 if config.tie_word_embeddings else 2  # that are no layer's
    layers = 6.0 * (multiplied - matrices * embedding) + mixing_flops_per_token(config, seq_len)
    return TrainingFlops(layers, head=6.0 * embedding * (1 + depths))


def memory_per_rank(
    parameters: ParameterCounts, *, world_size: int, bf16: bool, expert_parallel_size: int = 1
) -> dict[str, float]:
    """GiB of weights, gradients and AdamW state per rank at each ZeRO stage (no activations).

    ZeRO (Rajbhandari et al. 2020, fig. 1) as ``ds_configs/`` sets it up: stage 1 splits the
    optimizer state (two moments and fp32 master weights, which DeepSpeed keeps in fp32 runs too), 2
    the gradients too, 3 the weights too. Gradients accumulate in fp32, but at stage 1 in the
    weights' type. ``zero0`` is what DDP and a single process hold: fp32 weights, under autocast in
    bf16 (DeepSpeed's own stage 0 refuses bf16). With experts spread, which ``zero0`` does not do, a
    rank has 1/``expert_parallel_size`` of them, and what ZeRO splits it splits over the other ranks
    that have the same ones: to the same 1/``world_size``.
    """
    total = parameters.total
    here = total - parameters.experts + parameters.experts // expert_parallel_size
    weight = 2 if bf16 else 4
    moments, master = total * 8, total * 4
    stages = {
        "zero0": total * (4 + 4 + 8),
        "zero1": here * (weight + weight) + (moments + master) / world_size,
        "zero2": here * weight + (total * 4 + moments + master) / world_size,
        "zero3": (total * (weight + 4) + moments + master) / world_size,
    }
    if expert_parallel_size > 1:
        del stages["zero0"]
    return {stage: size / GIB for stage, size in stages.items()}


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes that the formula of communication asks for, of a model not wrapped nor spread."""
    config: Any = model.config
    stacked = {
        f"{name}.{weight}": module
        for name, module in find_experts(model).items()
        for weight in ("gate_up_proj", "down_proj")
    }
    matrices: list[int] = []
    vectors: list[int] = []
    experts: list[tuple[int, int, int]] = []
    frozen: list[int] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen.append(parameter.numel())
        elif name in stacked:
            if name.endswith("down_proj"):
                E, D, F = parameter.shape
                experts.append((E, F, D))
        else:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter.numel())
    return ModelShape(
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        experts=tuple(experts),
        experts_per_token=config.num_experts_per_tok if experts else 0,
        frozen=tuple(frozen),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
    )


def communication_line(args: RunArguments, config: PreTrainedConfig, accelerator: Any) -> str:
    """What a rank will send in a step of the run, for ``--dry_run``.

    Where there is no formula for it, the line says why.
    """
    title = "sent per rank, step   "
    world_size, plugin = accelerator.num_processes, accelerator.state.deepspeed_plugin
    zero = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    engine = "ddp" if plugin is None else f"zero{zero.get('stage', 0)}"
    if world_size == 1:
        return f"{title}nothing: one rank"
    model = empty_model(config)
    if isinstance(args, SftArguments):
        mtp_options(model, weight=args.mtp_loss_weight)  # with 0 it freezes some
    step = StepShape(
        engine=engine,
        world_size=world_size,
        micro_batches=args.gradient_accumulation_steps(world_size),
        micro_batch_tokens=args.per_device_train_batch_size * args.seq_len,
        bf16=args.bf16,
        expert_parallel_size=args.expert_parallel_size,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    try:
        traffic = step_traffic(model_shape(model), step)
    except ValueError as error:
        return f"{title}not computed: {error}"
    by_purpose: dict[str, float] = {}
    for part in traffic:
        by_purpose[part.purpose] = by_purpose.get(part.purpose, 0) + float(part.sent)
    parts = ", ".join(f"{name} {size / 1e6:,.3f}" for name, size in by_purpose.items())
    return f"{title}{sent(traffic) / 1e6:,.3f} MB under {engine} ({parts}), by formula (ring)"


def dry_run_report(
    args: Any,
    config: PreTrainedConfig,
    parameters: ParameterCounts,
    *,
    world_size: int,
    micro_batches: int,
) -> str:
    """The sizes of a run as text, for ``--dry_run``."""
    memory = memory_per_rank(
        parameters,
        world_size=world_size,
        bf16=args.bf16,
        expert_parallel_size=args.expert_parallel_size,
    )
    # Pretraining computes multi-token prediction whatever its weight, which may change in the run.
    frozen = isinstance(args, SftArguments) and not args.mtp_loss_weight
    flops = training_flops(config, parameters, args.seq_len, predict_further=not frozen)
    lines = [
        f"model                 {parameters}",
        f"training FLOPs/token  {flops.layers:.3e}, and {flops.head:.3e} if it is supervised",
        f"tokens per step       {args.global_batch_tokens:,} = {world_size} rank(s) × "
        f"{micro_batches} micro-batch(es) × {args.per_device_train_batch_size} row(s) × "
        f"{args.seq_len} tokens",
        f"tokens of the run     {args.global_batch_tokens * args.max_steps:,}",
        "memory per rank       "
        + ", ".join(f"{stage} {gib:.3f} GiB" for stage, gib in memory.items())
        + " (weights, gradients, optimizer state; activations come on top"
        + ("; ddp is as zero0)" if args.expert_parallel_size == 1 else ")"),
    ]
    return "\n".join(lines)
