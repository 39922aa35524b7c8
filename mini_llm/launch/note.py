"""A rank's word to its launcher about the way it ended, whatever becomes of the exit status.

torchrun turns a rank's status 2 into a traceback and 1, and a scheduler's signal to every process
into an error of its own. So each try of a launch has a file, and ranks write one word into it.
"""

import os
from pathlib import Path

NOTE_VARIABLE = "MINI_LLM_STOP_NOTE"  # names the file

SAVED = "saved"  # stopped on purpose; a checkpoint is there
FINISHED = "finished"  # past the last barrier: no rank of any node needs another
REFUSED = "refused"  # the arguments or the data are wrong: the next try would end likewise


def write_note(word: str) -> None:
    """Leave the word where a launcher wants it; elsewhere do nothing."""
    path = os.environ.get(NOTE_VARIABLE)
    if path:
        Path(path).write_text(f"{word}\n")


def read_note(path: Path) -> str | None:
    """The word that was left there."""
    return path.read_text().strip() if path.exists() else None
