"""Input files of a preparation: what they hold, and whether they stay the same while it runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .text_files import BadFileError

SAMPLED_BYTES = 64 * 1024


@dataclass(frozen=True)
class InputFile:
    """An input file as it is when the preparation starts.

    `stamp` (size, time of change, inode) shows a file that is replaced during the run;
    `description` identifies the content, in the manifest too.
    """

    path: Path
    stamp: tuple[int, int, int]
    description: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> InputFile:
        """Look at a file: its stamp first, so that a change while it is read shows."""
        return cls(path, _stamp(path), _describe(path))


def check_unchanged(file: InputFile) -> None:
    """Raise ValueError when an input file is no longer the one that the preparation began with."""
    try:
        stamp = _stamp(file.path)
    except FileNotFoundError:
        stamp = None
    if stamp != file.stamp:
        raise ValueError(
            f"--input: {file.path} was changed or replaced during the preparation; leave the input "
            "alone and run the same command again"
        )


def skip_or_raise(error: BadFileError, skipped: dict[str, str], skip_bad_files: bool) -> None:
    """Note a bad file as skipped, or raise the error when that was not asked for."""
    if not skip_bad_files:
        raise ValueError(f"{error}, or give --skip_bad_files") from error
    if error.file not in skipped:
        # By its name, so that the manifest does not depend on where the input lies.
        skipped[error.file] = error.fault.replace(error.file, Path(error.file).name)
        print(f"skipped: {error.fault}", flush=True)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _describe(file: Path) -> dict[str, Any]:
    """Return what identifies a file: name, bytes, sha256 of its first and last 64 KiB.

    The end of a parquet file is its footer, with the sizes and statistics of all its columns, so a
    changed file shows without reading gigabytes.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        digest = hashlib.sha256(content.read(SAMPLED_BYTES))
        content.seek(max(0, size - SAMPLED_BYTES))
        digest.update(content.read())
    return {"name": file.name, "bytes": size, "sampled_sha256": digest.hexdigest()}
