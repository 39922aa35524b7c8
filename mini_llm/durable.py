"""Files that are complete or absent, whatever stops the program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """Return where `path` is written before it is renamed: another file for every process."""
    return path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


@contextmanager
def complete_or_absent(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears as `path` when the block ends, on disk and whole.

    When the block raises, nothing is left of it. A killed process leaves a file with
    TEMPORARY_SUFFIX.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that a reader, and whoever comes after a full disk, sees old or new: whole."""
    with complete_or_absent(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
