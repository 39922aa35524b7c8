"""A whole training step: this project's recipe, and what people use instead, in turns.

    python -m mini_llm.bench step --model mini_llama3 --engine none zero1 --precision bf16 \\
        --peers bare trainer accelerate

Every loop (``loops.py``) is a process of its own with the same weights, rows, precision and AdamW;
one after the other takes a turn of steps while the rest wait. On a CPU figures compare CPU time of
a loop's process, which other work on the machine hardly touches; on a GPU time by its own events.
The losses of all must agree, or nothing is reported; multi-token prediction, which other loops do
not have, is left out beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from ..device import choose_device
from ..models import build_model
from ..training.arguments import REPOSITORY
from ..training.sizes import count_parameters, training_flops
from ..training.timing import peak_flops
from .loops import TOKENS, WEIGHTS, Job, peer_stage
from .measure import (
    device_name,
    machine,
    markdown_table,
    median_and_range,
    threads,
    without_mtp,
)
from .names import PEERS, BenchmarkError

WARMUP_STEPS = 3  # torch.compile, caches, DeepSpeed's first step
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}
# Largest difference of the loops' mean losses, as a share of the loss.
TOLERANCE = {"fp32": 3e-4, "bf16": 5e-3}
NEEDS = {"trainer_fast": "liger_kernel"}


def run(
    model: str,
    overrides: dict[str, Any],
    engines: list[str],
    precision: str,
    peers: list[str],
    *,
    compiled: list[bool] | None = None,
    rows: int,
    seq_len: int,
    micro_batches: int,
    steps: int,
    device: str,
) -> dict[str, Any]:
    """Measure at least `steps` steps of each loop; print the table and return the figures.

    A peer that fails in its first steps is named with its error and left out. Raises ValueError for
    a peer that cannot run here or train such a model, and RuntimeError where another loop fails or
    trains otherwise than the first.
    """
    device = choose_device(device).type
    _check_peers(peers, device)
    if peers:
        overrides = without_mtp(model, overrides)
    turns = -(-steps // STEPS_PER_TURN[device])
    total = WARMUP_STEPS + turns * STEPS_PER_TURN[device] + 1
    set_seed(0)
    built = build_model(model, **{"max_position_embeddings": seq_len, **overrides})
    parameters = count_parameters(built)
    flops = training_flops(built.config, parameters, seq_len).per_token
    with tempfile.TemporaryDirectory() as folder:
        disable_progress_bar()
        built.save_pretrained(Path(folder, WEIGHTS))
        tokens = made_up_rows(built.config.vocab_size, total * micro_batches * rows, seq_len)
        np.save(Path(folder, TOKENS), tokens)
        jobs = {}
        for engine in engines:
            for compile_it in compiled or [device == "cuda"]:
                name = f"recipe, engine {engine}{', torch.compile' if compile_it else ''}"
                jobs[name] = ("ours", engine, compile_it)
        for peer in peers:
            jobs[peer_name(peer, engines[-1])] = (peer, engines[-1], False)
        loops: dict[str, Loop] = {}
        try:
            for name, (kind, engine, compile_it) in jobs.items():
                job = Job(
                    folder=folder,
                    loop=kind,
                    engine=engine,
                    compiled=compile_it,
                    bf16=precision == "bf16",
                    rows=rows,
                    micro_batches=micro_batches,
                    steps=total,
                    device=device,
                )
                loops[name] = Loop(name, job)
            failed = {}
            # The first steps of all at once: on a GPU most of them is torch.compile's work.
            for loop in loops.values():
                loop.ask(WARMUP_STEPS)
            for name, loop in list(loops.items()):
                try:
                    loop.expect("ready")
                    loop.expect("clock")
                except RuntimeError as error:
                    if jobs[name][0] == "ours":
                        raise
                    # What others' loops cannot do here is a result too, and no reason to have none.
                    failed[name] = str(error)
                    print(f"{error}\n{name} is left out", file=sys.stderr, flush=True)
                    loops.pop(name).close()
            for _ in range(turns):
                for loop in loops.values():
                    loop.take_turn(STEPS_PER_TURN[device], keep=True)
            for loop in loops.values():
                loop.finish()
        finally:
            for loop in loops.values():
                loop.close()
    step_tokens = rows * micro_batches * seq_len
    peak = peak_flops(torch.device(device))
    figures = {
        name: loop.figures(step_tokens, flops, peak if precision == "bf16" else None)
        for name, loop in loops.items()
    }
    _check_losses(figures, TOLERANCE[precision])
    what = "clock" if device == "cuda" else "cpu"
    ours = [name for name, (kind, *_) in jobs.items() if kind == "ours"]
    ratios = {
        mine: {
            other: statistics.median(
                a / b
                for a, b in zip(loops[mine].seconds[what], loops[other].seconds[what], strict=True)
            )
            for other in loops
            if other not in ours
        }
        for mine in ours
    }
    found = {
        **machine("torch", "transformers", "accelerate", "deepspeed", threads=threads(device)),
        "device": device_name(torch.device(device)),
        "model": model,
        "overrides": overrides,
        "parameters": parameters.total,
        "precision": precision,
        "rows": rows,
        "micro_batches": micro_batches,
        "seq_len": seq_len,
        "steps": turns * STEPS_PER_TURN[device],
        "compared": what,
        "loops": figures,
        "failed": failed,
        "ratios": ratios,
    }
    print(markdown(found))
    return found


def made_up_rows(vocab_size: int, rows: int, seq_len: int) -> np.ndarray:
    """Random ids (rows, seq_len), the same every time, of the type that packed rows have.

    As unequally frequent as words, id i in 1/(i + 1) of the cases, so that there is something to
    learn, and a loop that learns nothing, or of other rows, has another loss.
    """
    share = np.random.default_rng(0).random((rows, seq_len))
    ids = np.floor(np.exp(share * np.log(vocab_size + 1))) - 1
    return ids.clip(0, vocab_size - 1).astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def peer_name(peer: str, engine: str) -> str:
    """What a table calls the loop ``peer`` beside an engine, whose ZeRO stage it may take."""
    return PEERS[peer].replace("DeepSpeed", f"DeepSpeed ZeRO-{peer_stage(engine)}")


def _check_peers(peers: list[str], device: str) -> None:
    for peer in peers:
        package = NEEDS.get(peer)
        if package and (device == "cpu" or find_spec(package) is None):
            raise ValueError(
                f"--peers: {peer} needs a GPU and {package.replace('_', '-')}; install it there, "
                "or leave the peer out"
            )


def _check_losses(figures: dict[str, Any], tolerance: float) -> None:
    losses = {name: of["mean_loss"] for name, of in figures.items()}
    first = next(iter(losses.values()))
    if any(not abs(loss - first) <= tolerance * first for loss in losses.values()):
        raise BenchmarkError(
            f"the loops do not train alike; mean losses of the same steps: {losses}"
        )


class Loop:
    """One training loop in its process, and what it told of its steps."""

    def __init__(self, name: str, job: Job) -> None:
        environment = dict(os.environ)
        if job.device == "cpu":
            environment["OMP_NUM_THREADS"] = threads("cpu")
            environment["CUDA_VISIBLE_DEVICES"] = ""
        else:  # of several GPUs one, as for all: Trainer would split its batch over them
            visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
            environment["CUDA_VISIBLE_DEVICES"] = visible or "0"
        path = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        self.name = name
        self.errors = Path(job.folder, f"{name}.log")
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mini_llm.bench.loops", job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        # Counting takes a compiled function apart; on a GPU the loss of our class is one.
        compiled = job.compiled or job.loop in ("trainer_compile", "trainer_fast")
        self.countable = job.device == "cpu" and not compiled
        self.seconds: dict[str, list[float]] = {"clock": [], "cpu": []}
        self.counted: dict[str, Any] = {"operators": None, "host_syncs": None}
        self.end: dict[str, Any] = {}

    def expect(self, key: str) -> dict[str, Any]:
        """The process's next line, which must hold `key`; RuntimeError with its last words."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise BenchmarkError(f"{self.name} failed:\n{self.errors.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(line)
        if key not in told:
            raise BenchmarkError(f"{self.name} said {told} where {key!r} was due")
        return told

    def ask(self, steps: int, count: bool = False) -> None:
        """Have it take `steps` steps when it is ready, 0: end; the times are its next line.

        A process that has ended hears nothing: :meth:`expect` tells what became of it.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"steps": steps, "count": count}) + "\n")
            self.process.stdin.flush()

    def take_turn(self, steps: int, keep: bool = False) -> None:
        """Let it take `steps` steps, and keep their times."""
        self.ask(steps)
        told = self.expect("clock")
        if keep:
            self.seconds["clock"] += told["clock"]
            self.seconds["cpu"] += [told["cpu"]] * steps

    def finish(self) -> None:
        """The last step, whose operators are counted where nothing is compiled."""
        self.ask(1, count=self.countable)
        told = self.expect("clock")
        self.counted = {key: told.get(key) for key in self.counted}
        self.ask(0)
        self.end = self.expect("mean_loss")

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # what it was asked and never read
                stream.close()

    def figures(self, tokens: int, flops_per_token: float, peak: float | None) -> dict[str, Any]:
        """Medians over the counted steps of one loop."""
        clock = statistics.median(self.seconds["clock"])
        return {
            "clock_seconds": clock,
            "clock_range": median_and_range(self.seconds["clock"]),
            "cpu_seconds": statistics.median(self.seconds["cpu"]),
            "cpu_range": median_and_range(self.seconds["cpu"]),
            "tokens_per_second": tokens / clock,
            "mfu": None if peak is None else tokens / clock * flops_per_token / peak,
            **self.counted,
            **self.end,
        }


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table, with the line that says on what."""
    on_cpu = found["compared"] == "cpu"
    header = ["loop", "CPU s a step", "clock s a step", "tokens/s", "MFU", "peak MiB"]
    header += ["operators", "host syncs"]
    header += [f"{name} ÷ it" for name in found["ratios"]]
    table = []
    for name, of in found["loops"].items():
        table.append(
            [
                name,
                of["cpu_range"],
                of["clock_range"],
                f"{of['tokens_per_second']:,.0f}",
                "–" if of["mfu"] is None else f"{of['mfu']:.1%}",
                f"{of['peak_memory_bytes'] / 2**20:,.0f}",
                "–" if of["operators"] is None else f"{of['operators']:,}",
                "–" if of["host_syncs"] is None else f"{of['host_syncs']:,}",
                *(
                    f"{ratio[name]:.3f}" if name in ratio else "–"
                    for ratio in found["ratios"].values()
                ),
            ]
        )
    memory = "of the process" if on_cpu else "that torch took"
    compared = "CPU time of a process" if on_cpu else "the GPU's time"
    failed = "".join(f"\n\n{name} failed." for name in found["failed"])
    return (
        f"A training step of {found['model']} {found['overrides'] or ''} ({found['parameters']:,} "
        f"parameters) in {found['precision']}: {found['micro_batches']} × {found['rows']} rows of "
        f"{found['seq_len']} tokens; medians (minimum to maximum) of {found['steps']} steps taken "
        f"in turns; ratios of {compared}, step by step; peak memory {memory}.\n\n"
        + markdown_table(header, table)
        + failed
    )
