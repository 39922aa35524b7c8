"""Checkpoints that are complete or absent, and resuming from the newest one.

``checkpoints/step-N/`` holds ``engine/`` (what Accelerate and DeepSpeed need to continue: weights,
optimizer, random states), ``model/`` (the same weights as a stock transformers directory) and
``state.json`` (step, stream state, format version).
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mini_llm.data.stream import RowStream
from mini_llm.hub.export import save_stock_checkpoint

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: Any,
    output_dir: Path,
    *,
    step: int,
    state: dict[str, Any],
    total_limit: int,
) -> Path:
    """Write ``checkpoints/step-<step>`` from all ranks, then keep the newest ``total_limit``.

    ``state`` goes into state.json. Everything is written under another name and flushed to disk;
    only then the folder gets its own.
    """
    folder = output_dir / "checkpoints"
    complete, aside = folder / f"step-{step}", folder / f".step-{step}.partial"
    if accelerator.is_main_process:
        for leftover in folder.glob(".step-*.partial"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Pickled torch files: safetensors would drop one of two tied weights.
    accelerator.save_state(str(aside / "engine"), safe_serialization=False)
    save_stock_checkpoint(accelerator, model, tokenizer, aside / "model")
    if accelerator.is_main_process:
        content = {"format_version": FORMAT_VERSION, "step": step, **state}
        (aside / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _flush(aside)
        if complete.exists():
            shutil.rmtree(complete)
        aside.rename(complete)
        _flush_directory(folder)
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return complete


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in (output_dir / "checkpoints").glob("step-*")
        if _NAME.fullmatch(path.name) and (path / "state.json").is_file()
    ]
    return sorted(found, key=_step_of)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means, None to start from step 0.

    Raises ValueError where following it would lose work or there is nothing to follow.
    """
    existing = list_checkpoints(output_dir)
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "never":
        if existing or (output_dir / "final").exists():
            raise ValueError(
                f"--resume_from_checkpoint never would overwrite the run in {output_dir}; choose "
                "another --output_dir or delete that folder"
            )
        return None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {path} is not a checkpoint of this project (no "
            "state.json); give auto, never or a checkpoints/step-N folder"
        )
    newer = [other for other in existing if _step_of(other) > read_state(path)["step"]]
    if newer:
        raise ValueError(
            f"--resume_from_checkpoint: {output_dir} holds the later checkpoint {newer[-1].name}; "
            "choose another --output_dir or delete the later ones"
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint. Raises ValueError for another format version."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint} has format version "
            f"{state['format_version']}, this version reads {FORMAT_VERSION}"
        )
    return state


def stream_state(stream: RowStream) -> Any:
    """What ``stream.load_state_dict`` continues from on every rank; a collective.

    One state that any number of ranks loads, or with raw text the list of all ranks' own.
    """
    state = stream.state_dict()
    return gather_object([state]) if stream.state_is_per_rank else state


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore the prepared model, optimizer and random states in place, on every rank."""
    accelerator.load_state(str(checkpoint / "engine"))


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _flush(folder: Path) -> None:
    """fsync every file and folder below ``folder``."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(directory))


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
