"""`python -m mini_llm.launch.quiet …/accelerate launch …`: a refusal ends in the rank's sentence.

torchrun follows a rank's status 2 with some 30 lines of log, traceback and table, above which the
sentence that says what is wrong is lost. Any other failure keeps them.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

from .note import NOTE_VARIABLE, REFUSED, read_note

# The logger that tells of a rank's exit status.
TORCHRUN_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def quietly(command: list[str]) -> list[str]:
    """The words of an ``accelerate`` command, without what follows a refusal."""
    return [sys.executable, "-m", "mini_llm.launch.quiet", *command]


def main() -> None:
    """Be ``accelerate`` with the arguments after its name."""
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv = sys.argv[1:]
    logging.getLogger(TORCHRUN_LOGGER).addFilter(lambda record: not _was_refused())
    try:
        accelerate()
    except (ChildFailedError, subprocess.CalledProcessError):  # with torchrun, and without
        if _was_refused():
            sys.exit(2)
        raise


def _was_refused() -> bool:
    return read_note(Path(os.environ[NOTE_VARIABLE])) == REFUSED


if __name__ == "__main__":
    main()
