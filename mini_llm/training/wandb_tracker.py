"""W&B as an Accelerate tracker that neither stops nor slows a run, whatever its server does.

What is logged goes to W&B's own process, which sends it on. Only starting and finishing wait for
the server, for a limited time. A server that cannot be had, or refuses, is said once, and the run
is recorded on disk instead, as with ``WANDB_MODE=offline``.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker, on_main_process
from tqdm import tqdm

PROJECT = "mini-llm"
SAMPLES = "samples/answers"  # the table
# The x-axis. W&B's own count of steps cannot go back: it drops or shifts what a resumed or rewound
# run logs again.
STEP = "step"
START_SECONDS = 20.0  # W&B asks for its user first, for up to 10 more
FINISH_SECONDS = 30.0  # for what has not been sent when the run ends


class WandbTracker(WandBTracker):
    """``options`` go to ``wandb.init``; its ``dir`` is below the run folder. Rank 0's alone."""

    main_process_only = True

    def __init__(self, project: str, options: dict[str, Any]) -> None:
        super().__init__(project, **options)
        self.run: Any = None

    @on_main_process
    def start(self) -> None:
        """Begin the run, or go on with it, on the server or on disk."""
        self._start()
        self._try(lambda: self.run.define_metric("*", step_metric=STEP))

    def _start(self) -> None:
        import wandb

        # W&B's reports on itself go to the same server, and wait for it when the process ends.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if wandb.setup().settings.mode in ("offline", "disabled"):
            super().start()
            return
        limits = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            limits["init_timeout"] = START_SECONDS
        self.init_kwargs["settings"] = limits
        try:
            if wandb.login(prompt=False, verify=False):
                super().start()
                return
            reason = "no API key: give WANDB_API_KEY, or run `wandb login`"
        except wandb.Error as error:
            reason = " ".join(str(error).split())
        wandb.teardown()  # of the attempt, which holds the run's id
        self.init_kwargs |= {"mode": "offline", "settings": {}}
        super().start()
        self._say(f"the server cannot be had ({reason}); this run is recorded on disk")

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The run's arguments."""
        self._try(lambda: self.run.config.update(values, allow_val_change=True))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Hand ``values`` of optimizer step ``step`` to W&B's process; comes back at once."""
        self._try(lambda: self.run.log({**values, STEP: step}, **options))

    @on_main_process
    def finish(self) -> None:
        """Send what is left, for :data:`FINISH_SECONDS` at most."""
        self._try(lambda: self.run.finish())

    def _try(self, call: Callable[[], Any]) -> None:
        """Do ``call``; if W&B fails, say so and leave it alone from then on."""
        if self.run is None:
            return
        try:
            call()
        except Exception as error:  # its process died, its disk is full, …: no reason to stop
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"W&B failed ({reason}); the run goes on without it")
            self.run = None

    def _say(self, text: str) -> None:
        folder = Path(self.run.settings.sync_dir)
        online = "" if self.run.offline else "--include-online "
        tqdm.write(f"--report_to wandb: {text}; to upload it later: wandb sync {online}{folder}")
        sys.stdout.flush()
