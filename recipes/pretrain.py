"""Pretrain a model on packed rows, under any engine that Accelerate can launch.

    accelerate launch recipes/pretrain.py                       # the quickstart, as it stands
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 \\
        recipes/pretrain.py --config recipes/configs/mini_llama3/pretrain.yaml --max_steps 100

Reads top to bottom: check → engine → model → resume → loop → finish. What the steps call lives in
``mini_llm/``: ``training/`` (arguments, schedule, checkpoints, metrics), ``parallel/`` (the
engine), ``data/`` (the stream of rows), ``models/``.
"""

# ruff: noqa: E402
import sys
from pathlib import Path

# A recipe runs the code beside it, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_llm.training.arguments import PretrainArguments, check_arguments, parse_arguments, stop

if __name__ == "__main__":  # --help and mistyped flags answer before the slow imports below
    ARGS = parse_arguments(PretrainArguments, "recipes/configs/quickstart/pretrain.yaml")

from mini_llm.parallel import watchdog
from mini_llm.parallel.environment import prepare_environment, rank, world_size

prepare_environment()  # DeepSpeed and transformers read it when they are imported
watchdog.end_with_launcher()

import math
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from mini_llm.data import (
    collate,
    load_tokenizer,
    open_stream,
    open_validation,
    token_byte_lengths,
    tokenizer_fingerprint,
)
from mini_llm.data.quickstart import (
    QUICKSTART_FOLDER,
    build_quickstart_data,
    is_quickstart_data,
)
from mini_llm.hub.background_push import BackgroundPush
from mini_llm.hub.export import base_generation_config, save_final
from mini_llm.hub.model_card import write_card
from mini_llm.models import (
    build_model,
    check_model,
    check_vocabulary,
    is_checkpoint,
    load_model,
)
from mini_llm.models.common.attention import check_attention
from mini_llm.parallel import engine
from mini_llm.parallel.agreement import check_ranks_agree
from mini_llm.parallel.compile import compile_layers, wants_compile
from mini_llm.parallel.engine_state import EngineMismatch, describe_engine, load_engine_state
from mini_llm.parallel.expert_parallel import find_wire, spread_experts, wire_metrics
from mini_llm.parallel.held_bytes import HeldBytes
from mini_llm.parallel.rank_log import open_rank_log
from mini_llm.parallel.transfer import to_device
from mini_llm.plots import draw_plots, told
from mini_llm.plots.report import write_report
from mini_llm.training.bad_steps import BadSteps
from mini_llm.training.balancing import bias_spread, take_expert_load, update_expert_bias
from mini_llm.training.banner import print_banner, print_dry_run
from mini_llm.training.checkpoint import (
    check_shapes,
    find_checkpoint,
    load_newest,
    read_state,
    stream_state,
)
from mini_llm.training.evaluation import evaluate, load_held_out, mean_loss
from mini_llm.training.interruption import Interruption, note_the_stop, what_is_due
from mini_llm.training.losses import combine_losses, mtp_weight_at
from mini_llm.training.metrics import MetricsLog, TokenCounter, start_trackers
from mini_llm.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from mini_llm.training.profiling import StepProfiler
from mini_llm.training.rejected import describe_rejected, rejected_rows
from mini_llm.training.run_folder import (
    check_run_folder,
    check_tokenizer_of_model,
    common_facts,
    final_step,
    run_identity,
    set_final_aside,
    write_config,
    write_run_facts,
)
from mini_llm.training.run_lock import RunLock
from mini_llm.training.samples import PromptSamples, check_prompt_lengths, check_prompts
from mini_llm.training.saving import CheckpointWriter
from mini_llm.training.sizes import count_parameters, training_flops
from mini_llm.training.timing import StepTimer


def main(args: PretrainArguments) -> None:
    output_dir = Path(args.output_dir)

    # ---- Check: whatever can be wrong is found before anything is built --------------------------
    try:
        check_arguments(args, world_size())
        pusher = BackgroundPush(args, rank())
        check_prompts(args.sample_prompts, chat=False)
        check_model(args.model, args.model_overrides)
        if args.quickstart_data and is_quickstart_data(args.data):
            build_quickstart_data(QUICKSTART_FOLDER)
        tokenizer = load_tokenizer(args.tokenizer)
        check_vocabulary(args.model, len(tokenizer))
        check_prompt_lengths(args.sample_prompts, tokenizer, args.seq_len)
        stream = open_stream(
            args.data,
            seq_len=args.seq_len,
            seed=args.seed,
            rows_per_step=args.rows_per_step(),
            rank=rank(),
            world_size=world_size(),
            tokenizer=args.tokenizer,
        )
        fingerprint = tokenizer_fingerprint(args.tokenizer)
        check_tokenizer_of_model(args.model, args.tokenizer, fingerprint)
        identity = run_identity(args, fingerprint, stream.fingerprint)
        check_run_folder(output_dir, identity)
        lock = RunLock(output_dir)
        if not args.dry_run:
            lock.take(rank())  # one run at a time in a folder
            open_rank_log(output_dir)
        watchdog.end_if_stuck(args.ddp_timeout)
        last_step = min(args.max_steps, args.stop_at_step or args.max_steps)
        made_at = final_step(output_dir) or 0
        checkpoint = find_checkpoint(
            output_dir, args.resume_from_checkpoint, is_finished=made_at >= last_step
        )
        if checkpoint:
            state = read_state(checkpoint)
            stream.load_state_dict(state["stream"])
        stream.start()
        held_out = load_held_out(args, open_validation, rank=rank(), world_size=world_size())
    except (ValueError, OSError) as error:
        stop(str(error))

    start_step = state["step"] if checkpoint else made_at
    finished = (output_dir / "final").exists() or last_step < args.max_steps
    if start_step >= last_step and finished and not args.dry_run:
        if rank() == 0:
            print(f"{output_dir} is already at step {start_step}; nothing to do", flush=True)
        stream.close()
        return

    # ---- Engine: DeepSpeed ZeRO 0–3, DDP or one process, as the Accelerate config says -----------
    watchdog.beat("starting the engine")
    accumulation = args.gradient_accumulation_steps(world_size())
    try:
        accelerator = engine.build_accelerator(
            args.deepspeed,
            micro_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=args.max_grad_norm,
            bf16=args.bf16,
            expert_parallel_size=args.expert_parallel_size,
            timeout_seconds=args.ddp_timeout,
            log_with=args.trackers,
            project_dir=output_dir,
        )
        hosts = check_ranks_agree(common_facts(args, accelerator, identity, checkpoint))
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    if not args.dry_run:
        lock.join()

    # ---- Model: the same weights on every rank, whatever the engine ------------------------------
    watchdog.beat("building the model")
    disable_progress_bar()  # for loading and saving a hundred megabytes
    set_seed(args.seed)
    config_overrides = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **args.model_overrides,
    }
    if is_checkpoint(args.model):
        model = load_model(args.model, dtype=torch.float32)
    else:
        model = build_model(args.model, **config_overrides)
    try:
        check_attention(args.attn_implementation, accelerator.device, bf16=args.bf16)
        model.set_attn_implementation(args.attn_implementation)
    except (ValueError, ImportError) as error:
        stop(f"--attn_implementation {args.attn_implementation}: {error}")
    model.generation_config = base_generation_config(tokenizer)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if wants_compile(
        args.torch_compile,
        accelerator.device,
        zero_stage=engine.asked_zero_stage(accelerator),
        expert_parallel_size=args.expert_parallel_size,
    ):
        try:
            compile_layers(model, accelerator.device)
        except RuntimeError as error:
            stop(f"--torch_compile: {error}")
    config, parameters = model.config, count_parameters(model)
    try:
        if checkpoint:
            check_shapes(checkpoint, model)
        spread_experts(model, args.expert_parallel_size, rank())
    except ValueError as error:
        stop(str(error))
    if args.dry_run:
        print_dry_run(
            args, accelerator, config, parameters, tokenizer, [next(stream), next(stream)]
        )
        stream.close()
        engine.leave(accelerator)

    optimizer = build_optimizer(
        model.to(accelerator.device),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
    )
    watchdog.beat("preparing model and optimizer")
    model, optimizer = accelerator.prepare(model, optimizer)
    engine.limit_collectives(args.ddp_timeout)
    wire = find_wire(model)  # None unless experts are spread over ranks

    # ---- Resume: weights and optimizer; the stream is at its place already -----------------------
    tokens = TokenCounter(accelerator, sources=list(args.data))
    bad_steps = BadSteps(args, accelerator)
    watchdog.beat("loading the checkpoint")
    if checkpoint:
        try:
            load_engine_state(
                accelerator,
                model,
                optimizer,
                checkpoint / "engine",
                written_by=state["engine"],
                scratch=output_dir / "checkpoints",
            )
        except EngineMismatch as error:
            stop(str(error))
        tokens.load_state_dict(state["tokens"])
        bad_steps.load_state_dict(state["bad_steps"])
    if accelerator.is_main_process:  # what is refused has changed nothing
        set_final_aside(output_dir, args.max_steps)
        write_config(output_dir, args)

    token_bytes = token_byte_lengths(tokenizer)
    start_trackers(accelerator, args, start_step=start_step)
    samples = PromptSamples(
        accelerator,
        tokenizer,
        output_dir,
        args.sample_prompts,
        chat=False,
        max_new_tokens=args.sample_max_new_tokens,
        seed=args.seed,
        start_step=start_step,
    )
    log = MetricsLog(output_dir, accelerator, start_step=start_step, max_steps=args.max_steps)
    timer = StepTimer(
        accelerator,
        flops=training_flops(config, parameters, args.seq_len),
        peak=args.peak_flops,
    )
    print_banner(args, accelerator, model, parameters, held_out, identity, hosts, start_step)
    evaluation: dict[str, float] = {}
    interruption = Interruption(max_hours=args.max_hours, save_minutes=args.save_minutes)

    def announce(saved: Path) -> None:
        log.say(f"saved {saved}")
        pusher.send(saved)

    saving = CheckpointWriter(
        accelerator,
        output_dir,
        total_limit=args.save_total_limit,
        milestone_steps=args.milestone_steps,
        announce=announce,
    )

    # ---- Loop: one iteration is one optimizer step -----------------------------------------------
    model.train()
    held = HeldBytes(model, optimizer)
    profiler = StepProfiler(
        args.profile_steps,
        output_dir,
        accelerator.device,
        start_step=start_step,
        last_step=last_step,
    )
    evaluated_at = 0
    step = start_step
    while step < last_step:
        step += 1
        if profiler.begin_step(step):
            timer.restart()
        if wire is not None:
            wire.read()  # what evaluation sent is no part of a step
        timer.begin_step(is_logged=what_is_due(args, step, is_last=step == last_step).log)
        micro_batches = []
        watchdog.beat("reading data", step)
        with timer.part("data"):
            for _ in range(accumulation):
                rows = [next(stream) for _ in range(args.per_device_train_batch_size)]
                tokens.add(rows)
                micro_batches.append(collate(rows, accelerator.device))

        # The loss of a step is Σ token losses ÷ supervised tokens, both over all ranks and
        # micro-batches, so it does not depend on how the step is divided.
        num_targets = float(sum(batch["num_target_tokens"] for batch in micro_batches))
        shares = torch.tensor([num_targets, *interruption.wishes(), *saving.progress()])
        watchdog.beat("counting the step's tokens")
        sums = accelerator.reduce(to_device(shares, accelerator.device), "sum")
        saving.agree(sums[3:])  # announces a checkpoint that all ranks have written meanwhile

        set_learning_rate(
            optimizer,
            learning_rate := learning_rate_at(
                step,
                peak=args.learning_rate,
                max_steps=args.max_steps,
                warmup_steps=args.warmup,
                min_lr_ratio=args.min_lr_ratio,
                schedule=args.lr_scheduler_type,
                decay_steps=args.decay,
            ),
        )
        step_losses: dict[str, torch.Tensor] = {}
        mtp_weight = mtp_weight_at(
            step,
            first=args.mtp_loss_weight,
            last=args.mtp_loss_final_weight,
            max_steps=args.max_steps,
        )
        for i, batch in enumerate(micro_batches):
            with engine.accumulate(model, last=i == accumulation - 1):
                with timer.part("forward"):
                    outputs = model(
                        input_ids=batch["input_ids"],
                        position_ids=batch["position_ids"],
                        documents=batch["documents"],
                        labels=batch["labels"],
                        num_items_in_batch=sums[0],
                        num_target_tokens=batch["num_target_tokens"],
                        use_cache=False,
                    )
                    loss, parts = combine_losses(
                        outputs,
                        mtp_weight=mtp_weight,
                        balance_weight=args.balance_loss_weight,
                        micro_batches=accumulation * accelerator.num_processes,
                    )
                with timer.part("backward"):
                    engine.backward(accelerator, model, loss)
            for name, part in parts.items():
                step_losses[name] = step_losses.get(name, 0) + part.float()
            if step == start_step + 1:
                held.note_gradients()
        with timer.part("optimizer"):
            grad_norm = engine.optimizer_step(model, optimizer, args.max_grad_norm)
        load = take_expert_load(model)  # None for a model without experts
        if load is not None:
            update_expert_bias(
                model, load, speed=args.expert_bias_update_speed, grad_norm=grad_norm
            )

        # If one rank wishes to save or to stop, all do, after this step.
        interruption.agree(sums[1:3])
        is_last = step == last_step or interruption.stop_now
        due = what_is_due(args, step, is_last=is_last, save_now=interruption.save_now)
        fault = bad_steps.fault(step, step_losses["train/loss"], grad_norm, now=due.anything)
        if fault is not None:
            log.say(f"{fault} (--bad_step_policy {args.bad_step_policy})")
            if args.bad_step_policy != "skip":
                profiler.close()
                saving.wait()  # the newest checkpoint, if it is still being written
            if args.bad_step_policy == "stop":
                raise RuntimeError(f"{fault}; see --bad_step_policy")
            if args.bad_step_policy == "rewind":
                bad_steps.rewind()
                state = load_newest(accelerator, model, optimizer, output_dir)
                step = state["step"]
                tokens.load_state_dict(state["tokens"])
                log.rewind(step)
                timer.restart()
                continue
        timer.end_step(args.global_batch_tokens, num_targets)
        log.advance()

        if step == start_step + 1:  # now the optimizer state exists: record what each rank holds
            write_run_facts(
                output_dir, args, accelerator, model, optimizer, parameters, identity, held.read()
            )

        # Once in a while: log, evaluate, save.
        metrics: dict[str, Any] = {}
        if due.log:
            losses = accelerator.reduce(torch.stack(list(step_losses.values())), "sum").tolist()
            metrics |= dict(zip(step_losses, losses, strict=True))
            metrics["train/perplexity"] = math.exp(min(losses[0], 700.0))
            metrics["train/grad_norm"] = float(grad_norm)
            metrics["train/lr"] = learning_rate
            metrics["train/bad_steps"] = bad_steps.count
            metrics |= tokens.read()
            for name, reasons in rejected_rows(stream).items():
                metrics[f"data/{name}/rejected"] = reasons.total()
            metrics |= timer.read()
            metrics |= wire_metrics(accelerator, wire)
            if load is not None:
                metrics |= load.metrics(args.expert_parallel_size) | bias_spread(model)
        if due.evaluate:
            evaluation = evaluate(
                accelerator,
                model,
                held_out,
                batch_size=args.per_device_eval_batch_size,
                token_bytes=token_bytes,
            )
            metrics |= evaluation
            evaluated_at = step
        if due.sample:
            metrics |= samples.take(model, step)
        if due.evaluate or due.sample:
            timer.restart()
        if metrics:
            log.write(step, metrics)
        if due.save:
            saving.save(
                model,
                tokenizer,
                step=step,
                state={
                    "engine": describe_engine(accelerator, model),
                    "stream": stream_state(stream),
                    "tokens": tokens.state_dict(),
                    "bad_steps": bad_steps.state_dict(),
                },
                eval_loss=mean_loss(evaluation) if evaluated_at == step else None,
                wait=is_last,  # else it is written while the next steps are made
            )
            interruption.saved()
            timer.restart()
        if interruption.stop_now:
            log.say(f"stopping at step {step}: {interruption.reason}; the same command goes on")
            note_the_stop()
            break
        if is_last and step < args.max_steps:
            log.say(f"stopping at step {step}; the same command without --stop_at_step goes on")

    # ---- Finish: a stock checkpoint, plots, a few samples, a report ------------------------------
    for line in describe_rejected(rejected_rows(stream)):
        log.say(line)
    stream.close()
    profiler.close()
    log.close()
    timer.close()
    interruption.close()
    watchdog.rest("finishing")
    if step == args.max_steps:
        save_final(accelerator, model, tokenizer, output_dir / "final")
        if accelerator.is_main_process:
            plots = draw_plots(output_dir)
            print(f"drew {told(plots)}")
            print(samples.text(), end="")
            print(f"wrote {write_report(output_dir)}")
            # With the curve and the samples, which were not there when it was saved.
            write_card(output_dir / "final", output_dir, picture=plots[0] if plots else None)
            pusher.send(output_dir / "final")
            print(f"the trained model is in {output_dir / 'final'}", flush=True)
    pusher.finish(accelerator)
    engine.leave(accelerator)


if __name__ == "__main__":
    main(ARGS)
