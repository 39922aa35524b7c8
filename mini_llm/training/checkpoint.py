"""Checkpoints that are complete or absent: which there are, and resuming from the newest whole one.

``checkpoints/step-N/`` holds ``engine/`` (what Accelerate and DeepSpeed need to continue: weights,
optimizer, random states), ``model/`` (the same weights as a stock transformers directory),
``state.json`` (step, stream state, format version) and ``files.json`` (checksums of them all).
saving.py writes them.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from mini_llm.data.stream import RowStream
from mini_llm.models import empty_model
from mini_llm.parallel.engine_state import load_engine_state

from .checkpoint_files import (
    DamagedCheckpointError,
    check_files,
    check_pickles,
    list_checkpoints,
    step_of,
)

FORMAT_VERSION = 2
PARTIAL = ".partial"


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; if the run is killed meanwhile, what is left does not look like one."""
    leftover = checkpoint.with_name(f".{checkpoint.name}-removed{PARTIAL}")
    shutil.rmtree(leftover, ignore_errors=True)
    checkpoint.rename(leftover)
    _remove_leftover(leftover)


def _remove_leftover(folder: Path) -> None:
    """Remove what is no checkpoint; a folder that stays is said and is no reason to stop a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:  # somebody still reads it on a network disk, or has protected it
        _say(f"warning: {folder} could not be removed ({error}); the next save tries again")


def superseded(
    checkpoints: list[Path], step: int, total_limit: int, milestone_steps: int
) -> list[Path]:
    """Which of a run's ``checkpoints`` need not be kept after a save at ``step``.

    Kept are the newest ``total_limit``, the one with the lowest held-out loss, and every multiple
    of ``milestone_steps`` (0: none).
    """
    # What lies after this step was damaged, or the run would have gone on from there.
    later = [path for path in checkpoints if step_of(path) > step]
    rest = [path for path in checkpoints if step_of(path) <= step]
    keep = set(rest[-total_limit:])
    losses = {path: _eval_loss_of(path) for path in rest}
    measured = [path for path in rest if losses[path] is not None]
    if measured:
        keep.add(min(measured, key=lambda path: losses[path] or 0.0))
    if milestone_steps:
        keep |= {path for path in rest if step_of(path) % milestone_steps == 0}
    return [path for path in rest if path not in keep] + later


def _eval_loss_of(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / "state.json").read_text()).get("eval_loss")
    except ValueError:  # damaged since; find_checkpoint names it
        return None
    # Nothing is less than NaN: min() would keep one that comes first.
    return float(loss) if loss is not None and math.isfinite(loss) else None


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed while saving left; rank 0, holding the folder's lock."""
    for leftover in (output_dir / "checkpoints").glob(f".step-*{PARTIAL}"):
        _remove_leftover(leftover)


def find_checkpoint(output_dir: Path, resume: str, *, is_finished: bool = False) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means, None to start from step 0.

    A run that ``is_finished``, its final/ being of the last step that is asked for, needs none.

    Its files are checked byte for byte. ``auto`` leaves out an incomplete or damaged one with a
    warning and takes the one before. Raises ValueError where following ``resume`` would lose work,
    or there is nothing whole to follow.
    """
    existing = list_checkpoints(output_dir)
    if resume == "never":
        if existing or (output_dir / "final").exists():
            raise ValueError(
                f"--resume_from_checkpoint never would overwrite the run in {output_dir}; choose "
                "another --output_dir or delete that folder"
            )
        return None
    if resume == "auto":
        newest = _newest_whole(output_dir)
        if newest is None and (output_dir / "final").exists() and not is_finished:
            raise ValueError(
                f"--resume_from_checkpoint auto would train the run in {output_dir} anew and "
                "overwrite its final/, for it has no checkpoints to go on from; choose another "
                "--output_dir or delete that folder"
            )
        return newest
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {path} is not a checkpoint of this project (no "
            "state.json); give auto, never or a checkpoints/step-N folder"
        )
    try:
        check_files(path)
    except DamagedCheckpointError as error:
        raise ValueError(
            f"--resume_from_checkpoint: {error}; give another checkpoint, or auto"
        ) from error
    check_pickles(path / "engine")
    newer = [other for other in existing if step_of(other) > read_state(path)["step"]]
    if newer:
        raise ValueError(
            f"--resume_from_checkpoint: {output_dir} holds the later checkpoint {newer[-1].name}; "
            "choose another --output_dir or delete the later ones"
        )
    if path.resolve().parent != (output_dir / "checkpoints").resolve():
        _say(f"note: {path} is not a checkpoint of the run in {output_dir}; continuing from it")
    return path


def check_shapes(checkpoint: Path, model: PreTrainedModel) -> None:
    """Refuse a checkpoint whose model has other parameters than ``model``. Raises ValueError."""
    saved = empty_model(AutoConfig.from_pretrained(checkpoint / "model"))
    theirs = {name: list(parameter.shape) for name, parameter in saved.named_parameters()}
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint} is of another model ({name} is "
                f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here); give "
                "the --model and --model_overrides of its run"
            )


def _newest_whole(output_dir: Path) -> Path | None:
    folders = [p for p in (output_dir / "checkpoints").glob("step-*") if step_of(p) >= 0]
    faults = []
    for path in sorted(folders, key=step_of, reverse=True):
        try:
            check_files(path)
        except DamagedCheckpointError as error:
            faults.append(str(error))
            continue
        check_pickles(path / "engine")
        for fault in faults:
            _say(f"warning: {fault}; {path.name} is used instead")
        return path
    if faults:
        raise ValueError(
            f"--resume_from_checkpoint: no checkpoint of {output_dir} is whole ({faults[0]}); "
            "restore one, or delete its checkpoints/ to start over"
        )
    return None


def load_newest(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, output_dir: Path
) -> dict[str, Any]:
    """Go back to the newest whole checkpoint of the running run; return its state.json.

    A collective. One that ``auto`` has left out as damaged is left out again. Raises RuntimeError
    when there is none yet.
    """
    newest = _newest_whole(output_dir)
    if newest is None:
        raise RuntimeError(
            f"{output_dir} has no checkpoint to go back to yet; lower --save_steps or "
            "--learning_rate"
        )
    state = read_state(newest)
    load_engine_state(
        accelerator,
        model,
        optimizer,
        newest / "engine",
        written_by=state["engine"],
        scratch=output_dir / "checkpoints",
    )
    return state


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


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
