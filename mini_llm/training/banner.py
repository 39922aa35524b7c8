"""What a recipe says before it starts, and instead of starting under ``--dry_run``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator

from mini_llm.data.stream import HeldOut
from mini_llm.models import kernels_in_use
from mini_llm.parallel.compile import is_compiled
from mini_llm.parallel.engine import describe
from mini_llm.parallel.expert_parallel import describe_groups
from mini_llm.parallel.hang_report import ranks_in_words
from mini_llm.parallel.rank_log import note, rank_log_path

from .arguments import RunArguments
from .run_folder import code_version, versions
from .sizes import ParameterCounts, communication_line, dry_run_report


def print_banner(
    args: RunArguments,
    accelerator: Accelerator,
    model: Any,
    parameters: ParameterCounts,
    held_out: Mapping[str, HeldOut],
    identity: Mapping[str, Any],
    hosts: list[str],
    start_step: int,
) -> None:
    """One block: ranks and hosts, model, engine, batch, data, kernels, versions.

    Rank 0 prints it; the others have it, as they know it, in their logs. ``hosts`` are the ranks'.
    """
    accumulation = args.gradient_accumulation_steps(accelerator.num_processes)
    config = accelerator.unwrap_model(model).config
    compiled = is_compiled(accelerator.unwrap_model(model))
    kernels = kernels_in_use(
        config,
        device_type=accelerator.device.type,
        half_precision=args.bf16,
        compiled=compiled,
    )
    if compiled:
        kernels["layers"] = "torch.compile"
    begin = "from step 0" if start_step == 0 else f"resumed at step {start_step}"
    lines = {
        "ranks": describe_hosts(hosts),
        "model": f"{args.model}, {parameters}",
        "engine": f"{describe(accelerator, model)}, {accelerator.device.type}, "
        f"{'bf16' if args.bf16 else 'fp32'}",
        "batch": f"{args.global_batch_tokens:,} tokens = {accelerator.num_processes} rank(s) × "
        f"{accumulation} micro-batch(es) × {args.per_device_train_batch_size} row(s) × "
        f"{args.seq_len} tokens",
        "data": ", ".join(f"{name} (weight {s.get('weight', 1)})" for name, s in args.data.items())
        + f"; fingerprint {identity['data_fingerprint'][:12]}",
        "held out": ", ".join(f"{name} {part.total} rows" for name, part in held_out.items())
        or "not read (--eval_steps 0)",
        "kernels": ", ".join(f"{part} {kernel}" for part, kernel in kernels.items()),
        "run": f"{args.output_dir}, {begin}, to step {args.max_steps}",
        "logs": f"{rank_log_path(Path(args.output_dir)).parent}/rank-<r>.log",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items())
        + f", this code {code_version()}",
    }
    if warning := warmup_warning(args):
        lines["warning"] = warning
    if args.expert_parallel_size > 1:
        lines["experts"] = describe_groups(args.expert_parallel_size, accelerator.num_processes)
    block = "\n".join(f"{name:>9}  {text}" for name, text in lines.items())
    if accelerator.is_main_process:
        print(block, flush=True)
    else:
        note(block)


def warmup_warning(args: RunArguments) -> str:
    """What there is to say of a warmup that takes the whole run; "" of a shorter one."""
    if args.warmup < args.max_steps:
        return ""
    highest = args.learning_rate * args.max_steps / args.warmup
    return (
        f"--warmup_steps {args.warmup} leaves nothing of --max_steps {args.max_steps}: the "
        f"learning rate only rises, to {highest:.2e} of --learning_rate {args.learning_rate:.2e}"
    )


def describe_hosts(hosts: list[str]) -> str:
    """The ranks in words, e.g. "4 on 2 host(s): a (ranks 0-1), b (ranks 2-3)"."""
    names = list(dict.fromkeys(hosts))
    places = (
        f"{name} ({ranks_in_words([rank for rank, host in enumerate(hosts) if host == name])})"
        for name in names
    )
    return f"{len(hosts)} on {len(names)} host(s): {', '.join(places)}"


def print_dry_run(
    args: RunArguments,
    accelerator: Accelerator,
    config: Any,
    parameters: ParameterCounts,
    tokenizer: Any,
    rows: list[Any],
) -> None:
    """The resolved config, the sizes and decoded rows, on rank 0.

    In rows of conversations, what is supervised stands in ⟦ ⟧.
    """
    if not accelerator.is_main_process:
        return
    print(yaml.safe_dump(dataclasses.asdict(args), sort_keys=False, allow_unicode=True))
    world_size = accelerator.num_processes
    micro_batches = args.gradient_accumulation_steps(world_size)
    print(
        dry_run_report(args, config, parameters, world_size=world_size, micro_batches=micro_batches)
    )
    print(communication_line(args, config, accelerator))
    if warning := warmup_warning(args):
        print(f"warning               {warning}")
    for number, row in enumerate(rows, start=1):
        documents = row["doc_lens"].tolist()
        print(f"\nrow {number} of {row['source']}: documents of {documents} tokens")
        print(_decoded(row, sum(documents), tokenizer), flush=True)


def _decoded(row: Any, length: int, tokenizer: Any) -> str:
    ids = row["input_ids"][:length]
    if "loss_mask" not in row:
        return str(tokenizer.decode(ids))
    mask = row["loss_mask"][:length]
    changes = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(ids, changes), np.split(mask, changes), strict=True)
    return "".join(
        f"⟦{tokenizer.decode(part)}⟧" if supervised[0] else str(tokenizer.decode(part))
        for part, supervised in parts
    )
