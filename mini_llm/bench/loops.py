"""The training loops that `step` compares: this project's, and what people use instead.

Each runs in a process of its own (its engines keep global state), on the same weights and rows, and
takes its steps when it is told to. ``step.py`` starts them and lets them take turns.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..parallel.environment import end_process, join_as_single_process, prepare_environment

prepare_environment()  # transformers and DeepSpeed read it when they are imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from .operators import Operators  # noqa: E402

WEIGHTS, TOKENS = "model", "tokens.npy"  # in a job's folder


@dataclass(frozen=True)
class Job:
    """One loop: which, on what, and for how many steps in all."""

    folder: str
    loop: str  # "ours", or a key of names.PEERS
    engine: str  # "none" or the name of a file in ds_configs/; for accelerate its ZeRO stage counts
    compiled: bool  # ours only
    bf16: bool
    rows: int  # of a micro-batch
    micro_batches: int
    steps: int
    device: str  # "cpu" or "cuda"

    def to_json(self) -> str:
        """For the command line of the process that runs it."""
        return json.dumps(asdict(self))


class Turns:
    """Holds a loop back between its steps until the benchmark asks for more, and times them.

    A loop calls :meth:`start` before its first step and :meth:`step_done` after each. On a CUDA
    device the steps of one turn are queued without waiting, as in training, and timed by events.
    """

    def __init__(self, device: str, read: Callable[[], str], write: Callable[[Any], None]) -> None:
        self.cuda = device == "cuda"
        self._read, self._write = read, write
        self._counter: Operators | None = None

    def start(self) -> None:
        """The loop is ready for its first step."""
        self._write({"ready": True})
        self._next_turn()

    def step_done(self) -> bool:
        """One optimizer step was taken; whether there is another to take."""
        self._marks.append(self._mark())
        self._left -= 1
        if self._left:
            return True
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
        if self.cuda:
            torch.cuda.synchronize()
        cpu = time.process_time() - self._cpu_begin
        told: dict[str, Any] = {"clock": self._clock(), "cpu": cpu / self._steps}
        if self._counter is not None:
            told["operators"] = self._counter.operators.total()
            told["host_syncs"] = self._counter.synchronisations.total()
            self._counter = None
        self._write(told)
        return self._next_turn()

    def _next_turn(self) -> bool:
        asked = json.loads(self._read())
        self._left = self._steps = asked["steps"]
        if not self._steps:
            return False
        if asked["count"]:
            self._counter = Operators()
            self._counter.__enter__()
        self._cpu_begin = time.process_time()
        self._marks = [self._mark()]
        return True

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _clock(self) -> list[float]:
        """Seconds of each step of the turn."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.cuda:
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


def main() -> None:
    """Run the job of the command line; lines of JSON come in on stdin and go out on stdout."""
    # What libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job(**json.loads(sys.argv[1]))
    if job.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    turns = Turns(job.device, sys.stdin.readline, lambda told: print(json.dumps(told), file=out))
    loop = {
        "ours": ours,
        "bare": bare,
        "bare_stock": bare,
        "trainer": trainer,
        "trainer_compile": trainer,
        "trainer_fast": trainer,
        "accelerate": accelerate,
        "accelerate_stock": accelerate,
    }[job.loop]
    mean_loss = loop(job, turns)
    if job.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # ru_maxrss is in KiB (on macOS in bytes)
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"mean_loss": mean_loss, "peak_memory_bytes": peak}), file=out)
    out.flush()
    end_process()


def ours(job: Job, turns: Turns) -> float:
    """The step of recipes/pretrain.py by the functions that it calls, in its order.

    A test holds it to the recipe's: what that calls once in a while (logging, evaluation, saves) is
    no part of it.
    """
    from ..data import collate
    from ..models import load_model
    from ..parallel import engine, watchdog
    from ..parallel.compile import compile_layers
    from ..parallel.transfer import to_device
    from ..training.arguments import REPOSITORY, PretrainArguments
    from ..training.bad_steps import BadSteps
    from ..training.balancing import take_expert_load, update_expert_bias
    from ..training.interruption import Interruption, what_is_due
    from ..training.losses import combine_losses, mtp_weight_at
    from ..training.metrics import TokenCounter
    from ..training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
    from ..training.saving import CheckpointWriter
    from ..training.sizes import TrainingFlops
    from ..training.timing import StepTimer

    args = PretrainArguments(output_dir="", model="", tokenizer="", bf16=job.bf16)
    config = "none" if job.engine == "none" else str(REPOSITORY / f"ds_configs/{job.engine}.json")
    accelerator = engine.build_accelerator(
        config,
        micro_batch_size=job.rows,
        gradient_accumulation_steps=job.micro_batches,
        max_grad_norm=args.max_grad_norm,
        bf16=job.bf16,
    )
    model: Any = load_model(Path(job.folder, WEIGHTS), dtype=torch.float32)
    if job.compiled:
        compile_layers(model, accelerator.device)
    optimizer: Any = build_optimizer(model.to(accelerator.device), **_adamw())
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = TokenCounter(accelerator, sources=["made_up"])
    bad_steps = BadSteps(args, accelerator)
    timer = StepTimer(accelerator, flops=TrainingFlops(0.0, 0.0), peak=None)
    interruption = Interruption(max_hours=None, save_minutes=0)
    saving = CheckpointWriter(
        accelerator, Path(job.folder), total_limit=1, announce=lambda saved: None
    )
    model.train()
    losses: list[torch.Tensor] = []
    stream = packed_rows(job)
    tokens_per_step = _tokens(job)[: job.rows * job.micro_batches].size
    step = 0
    turns.start()
    while True:
        step += 1
        timer.begin_step(is_logged=what_is_due(args, step, is_last=False).log)
        micro_batches = []
        watchdog.beat("reading data", step)
        with timer.part("data"):
            for _ in range(job.micro_batches):
                rows: list[Any] = [next(stream) for _ in range(job.rows)]
                tokens.add(rows)
                micro_batches.append(collate(rows, accelerator.device))
        num_targets = float(sum(batch["num_target_tokens"] for batch in micro_batches))
        shares = torch.tensor([num_targets, *interruption.wishes(), *saving.progress()])
        watchdog.beat("counting the step's tokens")
        sums = accelerator.reduce(to_device(shares, accelerator.device), "sum")
        saving.agree(sums[3:])
        learning_rate = learning_rate_at(
            step,
            peak=args.learning_rate,
            max_steps=job.steps,
            warmup_steps=0,
            min_lr_ratio=1.0,
            schedule="constant",
        )
        set_learning_rate(optimizer, learning_rate)
        step_losses: dict[str, torch.Tensor] = {}
        mtp_weight = mtp_weight_at(
            step,
            first=args.mtp_loss_weight,
            last=args.mtp_loss_final_weight,
            max_steps=job.steps,
        )
        for i, batch in enumerate(micro_batches):
            with engine.accumulate(model, last=i == job.micro_batches - 1):
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
                        micro_batches=job.micro_batches * accelerator.num_processes,
                    )
                with timer.part("backward"):
                    engine.backward(accelerator, model, loss)
            for name, part in parts.items():
                step_losses[name] = step_losses.get(name, 0) + part.float()
        with timer.part("optimizer"):
            grad_norm = engine.optimizer_step(model, optimizer, args.max_grad_norm)
        load = take_expert_load(model)
        if load is not None:
            update_expert_bias(
                model, load, speed=args.expert_bias_update_speed, grad_norm=grad_norm
            )
        interruption.agree(sums[1:3])
        what_is_due(args, step, is_last=False, save_now=interruption.save_now)
        fault = bad_steps.fault(step, step_losses["train/loss"], grad_norm, now=False)
        if fault is not None:
            raise RuntimeError(str(fault))
        timer.end_step(tokens_per_step, num_targets)
        losses.append(step_losses["train/loss"])
        if not turns.step_done():
            return torch.stack(losses).mean().item()


def bare(job: Job, turns: Turns) -> float:
    """Forward, backward, clip, fused AdamW: the least that a training loop is."""
    from ..training.optimizer import build_optimizer

    model = load_weights(job, stock=job.loop == "bare_stock").to(job.device).train()
    optimizer = build_optimizer(model, **_adamw())
    batches = token_batches(job)
    losses: list[torch.Tensor] = []
    turns.start()
    while True:
        step_loss = torch.zeros((), device=job.device)
        for _ in range(job.micro_batches):
            ids = next(batches)
            with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.bf16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / job.micro_batches
            loss.backward()
            step_loss += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
        if not turns.step_done():
            return torch.stack(losses).mean().item()


def accelerate(job: Job, turns: Turns) -> float:
    """Accelerate's and DeepSpeed's own way and defaults, at the ZeRO stage of the engine or 1."""
    from accelerate import Accelerator, DeepSpeedPlugin

    from ..parallel.engine import spare_cpu_the_extension_build

    stage = peer_stage(job.engine)
    join_as_single_process()
    if job.device == "cpu":
        spare_cpu_the_extension_build()
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        gradient_accumulation_steps=job.micro_batches,
        gradient_clipping=1.0,
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = job.rows
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16" if job.bf16 else "no")
    model: Any = load_weights(job, stock=job.loop == "accelerate_stock")
    optimizer: Any = torch.optim.AdamW(model.to(job.device).parameters(), **_torch_adamw())
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batches = token_batches(job)
    losses: list[torch.Tensor] = []
    turns.start()
    while True:
        step_loss = torch.zeros((), device=job.device)
        for _ in range(job.micro_batches):
            with accelerator.accumulate(model):
                ids = next(batches)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach().float() / job.micro_batches
        losses.append(step_loss)
        if not turns.step_done():
            return torch.stack(losses).mean().item()


def peer_stage(engine: str) -> int:
    """The ZeRO stage of stock Accelerate and DeepSpeed beside an engine of ours; no offload."""
    return 1 if engine == "none" else int(engine.removeprefix("zero")[0])


def trainer(job: Job, turns: Turns) -> float:
    """transformers' Trainer on the stock class, with its defaults but for what makes it equal."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if job.loop == "trainer_fast":
        keep_ligers_loss_from_compile()

    class Held(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.start()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            control.should_training_stop = not turns.step_done()

    adamw = _adamw()
    arguments = TrainingArguments(
        output_dir=str(Path(job.folder, "trainer")),
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=job.micro_batches,
        max_steps=job.steps,
        learning_rate=adamw["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=adamw["weight_decay"],
        adam_beta1=adamw["betas"][0],
        adam_beta2=adamw["betas"][1],
        adam_epsilon=adamw["epsilon"],
        bf16=job.bf16,
        use_cpu=job.device == "cpu",
        torch_compile=job.loop in ("trainer_compile", "trainer_fast"),
        use_liger_kernel=job.loop == "trainer_fast",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    run = Trainer(
        model=load_weights(job, stock=True),
        args=arguments,
        train_dataset=InOrder(job),
        callbacks=[Held()],
    )
    return float(run.train().training_loss)


def keep_ligers_loss_from_compile() -> None:
    """Let torch.compile call Liger's fused loss as it is, and compile the rest of the model.

    torch 2.11 cannot trace it (``addmm`` with ``out_dtype``), so that Trainer would not start.
    """
    from liger_kernel.transformers import functional

    loss = functional.liger_fused_linear_cross_entropy
    functional.liger_fused_linear_cross_entropy = torch.compiler.disable(loss)


class InOrder(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The job's rows, one after the other whatever index a sampler asks for."""

    def __init__(self, job: Job) -> None:
        self.tokens = _tokens(job).astype(np.int64)
        self.given = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[self.given % len(self.tokens)])
        self.given += 1
        return {"input_ids": ids, "labels": ids}


def load_weights(job: Job, *, stock: bool) -> Any:
    """The job's model in fp32, as this project's class or as transformers' own."""
    from transformers import AutoModelForCausalLM

    from ..models import load_model

    load = AutoModelForCausalLM.from_pretrained if stock else load_model
    return load(str(Path(job.folder, WEIGHTS)), dtype=torch.float32)


def packed_rows(job: Job) -> Iterator[dict[str, Any]]:
    """The job's rows as the data stream gives them, each one document."""
    for ids in _tokens(job):
        lengths = np.array([len(ids)], np.int32)
        yield {"input_ids": ids, "doc_lens": lengths, "source": "made_up"}


def token_batches(job: Job) -> Iterator[torch.Tensor]:
    """The job's micro-batches (rows, T) on its device."""
    from ..parallel.transfer import to_device

    for ids in _tokens(job).reshape(job.steps * job.micro_batches, job.rows, -1):
        yield to_device(torch.from_numpy(ids.astype(np.int64)), torch.device(job.device))


def _tokens(job: Job) -> np.ndarray:
    tokens: np.ndarray = np.load(Path(job.folder, TOKENS))
    return tokens


def _adamw() -> dict[str, Any]:
    """The recipe's defaults, by the names of ``build_optimizer``."""
    from ..training.arguments import PretrainArguments

    args = PretrainArguments(output_dir="", model="", tokenizer="")
    return {
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "epsilon": args.adam_epsilon,
    }


def _torch_adamw() -> dict[str, Any]:
    adamw = _adamw()
    lr, eps = adamw.pop("learning_rate"), adamw.pop("epsilon")
    return {"lr": lr, "eps": eps, **adamw, "fused": True}


if __name__ == "__main__":
    main()
