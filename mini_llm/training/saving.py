"""Writing checkpoints while training goes on.

A save copies what it needs (snapshot.py), which is all that training waits for. A thread of each
rank writes the rank's files under another name. Once all ranks have written theirs, rank 0's lists
them with checksums, flushes them to disk and gives the folder its own name: complete or absent,
whenever the run ends.

The threads take part in no collective. How far they are travels in the all-reduce that every
optimizer step makes anyway, so that all ranks learn at the same step that a checkpoint is complete,
or that it failed.
"""

import atexit
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mini_llm.hub.export import write_stock_checkpoint
from mini_llm.parallel.engine_state import save_engine_state
from mini_llm.parallel.expert_parallel import stock_state_dict
from mini_llm.parallel.snapshot import Snapshot
from mini_llm.parallel.transfer import OnTheWay
from mini_llm.parallel.watchdog import beat

from .checkpoint import (
    FORMAT_VERSION,
    PARTIAL,
    remove_checkpoint,
    remove_leftovers,
    superseded,
)
from .checkpoint_files import flush_directory, list_checkpoints, write_file_list

LOOK_SECONDS = 0.5
LAST_SECONDS = 5.0


class CheckpointWriter:
    """Writes ``checkpoints/step-N`` of a run, one at a time; used alike on all ranks.

        saving = CheckpointWriter(accelerator, output_dir, total_limit=…, announce=…)
        for step in …:
            sums = all_reduce([num_targets, …, *saving.progress()])
            saving.agree(sums[…])
            …
            if …:
                saving.save(model, tokenizer, step=step, state=…, wait=is_last)

    Kept are the newest ``total_limit`` checkpoints, the one with the lowest ``eval_loss``, and
    every multiple of ``milestone_steps`` (0: none). ``announce`` is called on all ranks with the
    folder of each checkpoint once it is complete.

    :meth:`save`, :meth:`agree` and :meth:`wait` raise OSError when one cannot be written, on all
    ranks at the same step; the checkpoints before are untouched then.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        *,
        total_limit: int,
        milestone_steps: int = 0,
        announce: Callable[[Path], None],
    ) -> None:
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._total_limit = total_limit
        self._milestone_steps = milestone_steps
        self._announce = announce
        self._under_way: _Save | None = None
        self._sums: deque[OnTheWay] = deque()
        atexit.register(self._let_go)

    def save(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        step: int,
        state: dict[str, Any],
        eval_loss: float | None = None,
        wait: bool = False,
    ) -> None:
        """Begin to write the checkpoint of ``step``, and with ``wait`` stay until it is complete.

        A collective. One that is under way is waited for first. ``state`` goes into state.json,
        and so does ``eval_loss``, the mean held-out loss at this step.
        """
        self.wait()
        beat("saving a checkpoint")
        accelerator, is_main = self._accelerator, self._accelerator.is_main_process
        save = _Save(self._output_dir, step, is_main=is_main)
        aside = save.aside
        try:
            if is_main:
                remove_leftovers(self._output_dir)
                aside.mkdir(parents=True)
                content = {"format_version": FORMAT_VERSION, "step": step, "eval_loss": eval_loss}
                (aside / "state.json").write_text(json.dumps(content | state, indent=2) + "\n")
        except Exception as error:
            save.error = error
        self._raise_if_failed(save)
        try:
            snapshot = Snapshot(accelerator.device)
            save_engine_state(accelerator, aside / "engine", snapshot)
            beat()
            weights = stock_state_dict(accelerator, model, snapshot.copy)
            snapshot.close()
            unwrapped = accelerator.unwrap_model(model)
        except Exception as error:  # the other ranks may be in a collective: this one ends alone
            free = save.free_bytes()
            save.remove()
            raise save.not_written(str(error), free) from error

        def write() -> None:
            snapshot.write()
            if is_main:
                with snapshot.reading():
                    write_stock_checkpoint(unwrapped, tokenizer, weights, aside / "model")

        save.begin(write)
        self._under_way = save
        if wait:
            self.wait()

    def progress(self) -> tuple[float, float]:
        """(parts left to write, failures) of this rank, to be summed over ranks this step."""
        save = self._under_way
        return (0.0, 0.0) if save is None else (float(save.parts), float(save.error is not None))

    def agree(self, sums: torch.Tensor) -> None:
        """Take this step's summed :meth:`progress`: go on with the save, or announce its end.

        On a GPU the sums of the step before are read, which have arrived as a rule: to read this
        step's would make the host wait for the device. What is left only falls, so older sums are
        as good.
        """
        if self._under_way is None:
            return
        self._sums.append(OnTheWay(sums))
        if sums.is_cuda and len(self._sums) < 2:
            return
        self._go_on(self._under_way, *self._sums.popleft().read())

    def wait(self) -> None:
        """Until what is under way is complete; a collective.

        Every rank takes part in many short waits: one long one would look like a rank that hangs.
        A disk that hangs does: nothing gets done then, and the watchdog's time runs out.
        """
        before = None
        while (save := self._under_way) is not None:
            save.join(LOOK_SECONDS)
            here = torch.tensor(self.progress(), device=self._accelerator.device)
            sums = self._accelerator.reduce(here, "sum").tolist()
            if sums != before:
                beat("waiting for a checkpoint to be written")
            before = sums
            self._go_on(save, *sums)

    def _let_go(self) -> None:
        """An exception ends this rank: what is being written will not be a checkpoint.

        A thread that Python finds in the middle of torch's code when it goes down would abort the
        process, so it gets a moment; one that hangs keeps no rank from ending.
        """
        if self._under_way is not None:
            self._under_way.join(LAST_SECONDS)

    def _go_on(self, save: "_Save", parts: float, failures: float) -> None:
        """What the sums over ranks call for."""
        if failures:
            self._raise_if_failed(save)
        if parts == 0:
            self._under_way = None
            self._sums.clear()
            self._announce(save.complete)
        elif parts == 1 and save.may_complete:
            # All ranks have written their files: what is left is rank 0's.
            save.begin(lambda: self._complete(save))

    def _complete(self, save: "_Save") -> None:
        """Rank 0's last part: from files under another name to a checkpoint."""
        write_file_list(save.aside)
        if save.complete.exists():
            remove_checkpoint(save.complete)
        save.aside.rename(save.complete)
        flush_directory(save.complete.parent)
        checkpoints = list_checkpoints(self._output_dir)
        for old in superseded(checkpoints, save.step, self._total_limit, self._milestone_steps):
            remove_checkpoint(old)

    def _raise_if_failed(self, save: "_Save") -> None:
        """Raise the first rank's error on all ranks, once none of them writes; a collective."""
        beat("waiting for the ranks that write")
        while True:
            save.join(LOOK_SECONDS)
            writing = torch.tensor(float(save.is_writing), device=self._accelerator.device)
            if not self._accelerator.reduce(writing, "sum"):
                break
        why = None if save.error is None else str(save.error)
        of_ranks = gather_object([(why, save.free_bytes())])
        reasons = [reason for reason, _ in of_ranks if reason is not None]
        if not reasons:
            return
        self._under_way = None
        if self._accelerator.is_main_process:
            save.remove()
        _, free = of_ranks[0]
        raise save.not_written(reasons[0], free) from save.error


class _Save:
    """One checkpoint on its way, as far as this rank writes it.

    ``parts`` are left to this rank: its own files, and on rank 0 the list of all of them. A part
    that fails stays.
    """

    def __init__(self, output_dir: Path, step: int, *, is_main: bool) -> None:
        folder = output_dir / "checkpoints"
        self.step = step
        self.complete = folder / f"step-{step}"
        self.aside = folder / f".step-{step}{PARTIAL}"
        self.parts = 2 if is_main else 1
        self._is_main = is_main
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Do the next part in a thread of its own."""
        self._thread = threading.Thread(
            target=self._run, args=(write,), name="write a checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self.error = error  # raised by the main thread, on all ranks
        else:
            self.parts -= 1

    def join(self, seconds: float) -> None:
        """Until the part that is being written is done, for ``seconds`` at most."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def is_writing(self) -> bool:
        """Whether a part is being written now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def may_complete(self) -> bool:
        """Whether this is rank 0, with its own files written and the last part not begun."""
        has_written = self._is_main and self.parts == 1
        return has_written and self.error is None and not self.is_writing

    def remove(self) -> None:
        """Remove what a save that failed has left, which may have filled the disk."""
        shutil.rmtree(self.aside, ignore_errors=True)

    def free_bytes(self) -> int:
        """What is free on the disk."""
        folder = self.aside.parent
        return shutil.disk_usage(folder if folder.exists() else Path.cwd()).free

    def not_written(self, why: str, free_bytes: int) -> OSError:
        """The sentence for a save that failed."""
        return OSError(
            f"the checkpoint of step {self.step} could not be written to {self.aside.parent} "
            f"({' '.join(why.split())}); {free_bytes / 2**30:.2f} GiB were free on its disk; "
            "earlier checkpoints are whole: mend it and run the same command again"
        )
