"""Pushing to the hub while training goes on.

Rank 0 starts ``python -m mini_llm.hub push`` in a process of its own for a checkpoint, one at a
time; a newer one replaces one that waits. A thread looks after that process, so that neither a hub
that hangs nor one that refuses stops or slows the loop. What fails is said once, with the command
that repeats it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from mini_llm.training.arguments import REPOSITORY, RunArguments

from .push import check_target, explain

STAGING = ".push"
LOG = "logs/push.log"
PUSH_SECONDS = 3600.0  # of one push, after which it is given up
CHECK_SECONDS = 5.0
INTERRUPTED_SECONDS = 20.0  # a run that was told to stop waits no longer for its last push
LOOK_SECONDS = 2.0
LOWEST_PRIORITY = 19


class BackgroundPush:
    """Pushes the checkpoints of a run; does nothing without ``--push_to_hub``.

    Raises ValueError, naming the flag, for what cannot succeed: no token, no valid name, offline.
    Rank 0 also asks the hub whether it takes the token; what goes wrong there is only said.

        pusher = BackgroundPush(args, rank)
        pusher.send(folder)          # on all ranks, after a save; comes back at once
        pusher.finish(accelerator)   # on all ranks, at the end
    """

    def __init__(self, args: RunArguments, rank: int) -> None:
        self.args = args
        self.run = Path(args.output_dir).resolve()
        self.is_active = args.push_to_hub and rank == 0 and not args.dry_run
        self._said: set[str] = set()
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_busy = self._is_over = False
        self._thread: threading.Thread | None = None
        if args.push_to_hub and rank == 0:  # other nodes need no token
            check_target(args.hub_model_id, flag="--hub_model_id")
        if self.is_active:
            asking = threading.Thread(target=self._ask_hub, name="ask the hub", daemon=True)
            asking.start()
            asking.join(2 * CHECK_SECONDS)  # looking up a name knows no limit of its own

    def _ask_hub(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        try:
            url = f"{constants.ENDPOINT}/api/whoami-v2"
            hf_raise_for_status(
                get_session().get(url, headers=build_hf_headers(), timeout=CHECK_SECONDS)
            )
        except Exception as error:
            self._say_failure(explain(error, str(self.args.hub_model_id))[0])

    def send(self, folder: Path) -> None:
        """Push ``checkpoints/step-N`` or ``final/``, when the push before it has ended."""
        last_step = f"step-{self.args.max_steps}"
        if not self.is_active or folder.name == last_step:  # final/ comes right after it
            return
        try:
            staged = folder if folder.name == "final" else self._stage(folder)
        except OSError as error:
            self._say_failure(f"{folder.name} could not be linked to {STAGING}/ ({error})")
            return
        with self._changed:
            self._drop(self._waiting)
            self._waiting = staged
            self._is_busy = True
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="push to hub", daemon=True)
            self._thread.start()

    def _stage(self, checkpoint: Path) -> Path:
        """Links to the model's files: they outlive the checkpoint, which later saves may remove."""
        if self._thread is None:  # what a killed run left
            shutil.rmtree(self.run / STAGING, ignore_errors=True)
        staged = self.run / STAGING / checkpoint.name
        shutil.rmtree(staged, ignore_errors=True)
        (staged / "model").mkdir(parents=True)
        for path in [checkpoint / "state.json", *(checkpoint / "model").iterdir()]:
            target = staged / path.relative_to(checkpoint)
            try:
                os.link(path, target)
            except OSError:  # a disk that has no hard links
                shutil.copyfile(path, target)
        return staged

    def _drop(self, staged: Path | None) -> None:
        if staged is not None and staged.name != "final":
            shutil.rmtree(staged, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_busy = self._waiting is not None
                self._changed.notify_all()
                while self._waiting is None:
                    self._changed.wait()
                folder, self._waiting = self._waiting, None
            try:
                self._push(folder)
            except OSError as error:  # no process, no disk
                self._say_failure(f"{folder.name} could not be pushed ({error})")
            self._drop(folder)

    def _push(self, folder: Path) -> None:
        log = self.run / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {folder.name}\n")
            file.flush()
            begin = file.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mini_llm.hub", "push", str(folder), *self._flags()],
                cwd=REPOSITORY,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run, which saves and then pushes
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)
            try:
                status = self._process.wait(PUSH_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
                file.write(f"error: no end of it after {PUSH_SECONDS:.0f} s\n")
                status = 1
        if self._is_over:
            return
        lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        last_line = lines[-1] if lines else f"it ended with status {status}"
        if status == 0:
            _say(f"pushed {folder.name} to {last_line.rsplit(' ', 1)[-1]}")
        else:
            self._say_failure(last_line.removeprefix("error: "))

    def _flags(self) -> list[str]:
        public = [] if self.args.hub_private else ["--public"]
        return ["--repo_id", str(self.args.hub_model_id), *public]

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _say_failure(self, reason: str) -> None:
        """Say what went wrong, unless it went wrong in the same way before."""
        if reason in self._said:
            return
        self._said.add(reason)
        command = shlex.join(
            ["python", "-m", "mini_llm.hub", "push", str(self.run), *self._flags()]
        )
        _say(
            f"--push_to_hub: {reason}; the run itself is not touched, and later saves are pushed "
            f"all the same ({LOG} tells of each); to repeat it: {command}"
        )

    def finish(self, accelerator: Any) -> None:
        """Wait for the last push, for ``--hub_wait_seconds`` at most; a collective of all ranks.

        Every rank takes part in many short waits: one long one would look like a rank that hangs.
        """
        if not self.args.push_to_hub:
            return
        is_whole = (self.run / "final").exists()
        limit = float(self.args.hub_wait_seconds)
        deadline = time.monotonic() + (limit if is_whole else min(limit, INTERRUPTED_SECONDS))
        while True:
            waits = self._is_busy and time.monotonic() < deadline
            flag = torch.tensor(float(waits), device=accelerator.device)
            if not accelerator.reduce(flag, "sum"):
                break
            if waits:
                with self._changed:
                    self._changed.wait_for(lambda: not self._is_busy, timeout=LOOK_SECONDS)
        self._is_over = True
        if self._is_busy:
            self._say_failure(f"the push to {self.args.hub_model_id} did not end in time")
            self._kill()
        if self.is_active:
            shutil.rmtree(self.run / STAGING, ignore_errors=True)


def _say(text: str) -> None:
    """A line on the terminal, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()
