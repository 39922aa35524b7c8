"""metrics.jsonl, the trackers and the lines on the terminal: one place that knows all three."""

import dataclasses
import json
import math
import secrets
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mini_llm.durable import write_whole

from .arguments import RunArguments
from .wandb_tracker import PROJECT, WandbTracker


class MetricsLog:
    """Writes one JSON object per logged step, hands it to the trackers, and shows it.

    Only rank 0 writes and shows. A resumed run cuts what lies after its checkpoint.
    """

    def __init__(
        self, output_dir: Path, accelerator: Accelerator, *, start_step: int, max_steps: int
    ) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.accelerator = accelerator
        self.max_steps = max_steps
        self.progress: Any = None
        if not accelerator.is_main_process:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self._cut_after(start_step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.progress = tqdm(
                total=max_steps, initial=start_step, unit="step", dynamic_ncols=True
            )

    def _cut_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        # A line that a killed run left half written has no newline; it lies after the checkpoint.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_whole(self.path, "".join(kept))

    def rewind(self, step: int) -> None:
        """The run goes on from ``step``: drop what was logged after it, by TensorBoard too.

        W&B keeps it; its curves go on from there with ``step`` as their axis.
        """
        if not self.accelerator.is_main_process:
            return
        self._cut_after(step)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                # Begins another file, as a resumed run does, whose first event says so.
                tracker.writer.close()
                tracker.writer.purge_step = step + 1
        if self.progress is not None:
            self.progress.n = step
            self.progress.refresh()

    def advance(self) -> None:
        """One optimizer step is done (moves the progress bar)."""
        if self.progress is not None:
            self.progress.update()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Record ``metrics`` (already reduced over ranks) of optimizer step ``step`` (from 1).

        A metric is a number, or a list of them such as an expert's each, which only metrics.jsonl
        gets. What is not finite is null there, which is JSON, and left out of the trackers.
        """
        finite = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, list) or (value is not None and math.isfinite(value))
        }
        numbers = {name: value for name, value in finite.items() if not isinstance(value, list)}
        self.accelerator.log(numbers, step=step)
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            line = {"step": step, **{name: finite.get(name) for name in metrics}}
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.say(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  {summary(metrics)}")

    def say(self, text: str) -> None:
        """A line on rank 0's terminal, above the progress bar if there is one."""
        if not self.accelerator.is_main_process:
            return
        if self.progress is not None:
            self.progress.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Finish the progress bar."""
        if self.progress is not None:
            self.progress.close()


def summary(metrics: dict[str, Any]) -> str:
    """The few numbers worth a line of terminal."""
    parts = []
    if "train/loss" in metrics:
        parts += [
            f"loss {metrics['train/loss']:.4f}",
            f"grad norm {metrics['train/grad_norm']:.3f}",
            f"lr {metrics['train/lr']:.2e}",
            f"{metrics['perf/tokens_per_second']:,.0f} tok/s",
        ]
    for key, value in metrics.items():
        if key.startswith("eval/") and key.endswith("/loss"):
            source = key.removeprefix("eval/").removesuffix("/loss")
            bits = metrics[f"eval/{source}/bits_per_byte"]
            parts.append(f"held-out {source} {value:.4f} ({bits:.3f} bits/byte)")
    return "  ".join(parts)


class TokenCounter:
    """Trained tokens per source, padding not counted, over all ranks and since step 0."""

    def __init__(self, accelerator: Accelerator, sources: list[str]) -> None:
        self.accelerator = accelerator
        self.global_counts = dict.fromkeys(sources, 0)
        self.local_counts = dict.fromkeys(sources, 0)

    def add(self, rows: list[Any]) -> None:
        """Count this rank's rows."""
        for row in rows:
            self.local_counts[row["source"]] += int(row["doc_lens"].sum())

    def _reduce(self) -> None:
        counts = torch.tensor(list(self.local_counts.values()), device=self.accelerator.device)
        counts = self.accelerator.reduce(counts, "sum")
        for source, count in zip(self.global_counts, counts.tolist(), strict=True):
            self.global_counts[source] += count
            self.local_counts[source] = 0

    def read(self) -> dict[str, float | None]:
        """``train/tokens`` and ``data/<source>/tokens`` so far; a collective."""
        self._reduce()
        per_source = {f"data/{name}/tokens": count for name, count in self.global_counts.items()}
        return {"train/tokens": self.total(), **per_source}

    def total(self) -> int:
        """All tokens up to the last :meth:`read` or :meth:`state_dict`."""
        return sum(self.global_counts.values())

    def state_dict(self) -> dict[str, int]:
        """Counts to save in a checkpoint; a collective."""
        self._reduce()
        return dict(self.global_counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint's counts; a rewound run drops what it has counted since."""
        self.global_counts = {name: int(state.get(name, 0)) for name in self.global_counts}
        self.local_counts = dict.fromkeys(self.local_counts, 0)


def start_trackers(accelerator: Accelerator, args: RunArguments, *, start_step: int) -> None:
    """Start TensorBoard and W&B as ``--report_to`` says; both write below ``output_dir/logs``.

    A resumed run goes on with the curve and the W&B run that it began; what lies after
    ``start_step`` of an interrupted one is dropped, all of it where nothing had been saved yet.
    """
    if not args.trackers:
        return
    logs = Path(args.output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    settings = {
        key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
        for key, value in dataclasses.asdict(args).items()
    }
    accelerator.log_with = [
        WandbTracker(PROJECT, _wandb_options(args, logs, accelerator.is_main_process))
        if name == "wandb"
        else name
        for name in map(str, accelerator.log_with)
    ]
    accelerator.init_trackers(
        PROJECT,
        config=settings,
        init_kwargs={"tensorboard": {"purge_step": start_step + 1}},
    )
    accelerator.wait_for_everyone()  # for rank 0, which waits for a server: no rank's first step


def _wandb_options(args: RunArguments, logs: Path, is_main_process: bool) -> dict[str, Any]:
    return {
        "name": args.run_name or Path(args.output_dir).name,
        "dir": str(logs),
        "id": _wandb_run_id(logs) if is_main_process else None,
        "resume": "allow",
    }


def _wandb_run_id(logs: Path) -> str:
    """The W&B id of the run in this folder, drawn once."""
    path = logs / "wandb_run_id"
    if not path.is_file():
        path.write_text(f"{secrets.token_hex(6)}\n")
    return path.read_text().strip()
