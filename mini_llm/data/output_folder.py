"""The folder that a preparation writes: its own, with one process and one set of options."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..durable import TEMPORARY_SUFFIX
from .manifest import TRAIN, VALIDATION, FileEntry


def check_outside_input(output_dir: Path, inputs: Sequence[Path]) -> None:
    """Raise ValueError for a folder in one of --input: the next run would read what it holds."""
    for path in inputs:
        if path.is_dir() and output_dir.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output_dir: {output_dir} lies in {path}, so that what is written would become "
                "its own input; give a folder outside"
            )


def check_no_foreign_files(output_dir: Path, own: Collection[str]) -> None:
    """Raise ValueError when the folder holds things that no preparation wrote.

    `own` are the names that may stand in it besides those of the splits.
    """
    foreign = [p for p in output_dir.glob("*") if p.name not in {TRAIN, VALIDATION, *own}]
    for split in (TRAIN, VALIDATION):
        foreign += [p for p in (output_dir / split).glob("*") if p.suffix != ".parquet"]
    names = sorted(
        str(path.relative_to(output_dir)) for path in foreign if path.suffix != TEMPORARY_SUFFIX
    )
    if names:
        raise ValueError(
            f"--output_dir: {output_dir} holds other files ({', '.join(names[:3])}); give a new "
            "or empty folder"
        )


@contextmanager
def only_preparation_of(output_dir: Path, work: Path) -> Iterator[None]:
    """Hold the lock of a preparation, a file in its `work` folder, which is made.

    Raises ValueError when another process has it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output_dir: another process is preparing {output_dir}; wait for it or give "
                "another folder"
            ) from None
        yield


def check_same_preparation(
    output_dir: Path,
    wanted: Mapping[str, Any],
    found: Mapping[str, Any],
    files: Iterable[FileEntry],
    *,
    advice: str,
) -> None:
    """Raise ValueError when a finished folder is of other options or its `files` were changed.

    `wanted` and `found` map option names to values, "inputs" standing for --input; `advice` ends
    the sentence.
    """
    differing = [name for name in wanted if wanted[name] != found.get(name)]
    if differing:
        flags = ", ".join("--" + ("input" if name == "inputs" else name) for name in differing)
        raise ValueError(
            f"--output_dir: {output_dir} was prepared with another {flags}; give another folder "
            f"or {advice}"
        )
    for entry in files:
        path = output_dir / entry.file
        if not path.is_file() or path.stat().st_size != entry.bytes_on_disk:
            raise ValueError(
                f"--output_dir: {path} is missing or was changed; remove {output_dir} and "
                "prepare it again"
            )


def clear_unfinished(output_dir: Path, work: Path, names: Iterable[str]) -> None:
    """Remove what an interrupted preparation left: files and folders `names`, temporary files.

    The finished units in `work` stay.
    """
    for name in names:
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in (output_dir, work):
        for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


@contextmanager
def explained_full_disk(output_dir: Path, work: Path, *, needs: str, units: str) -> Iterator[None]:
    """Turn the error of a full disk into a sentence that says how to go on.

    `needs` says how much a preparation takes; the records of its units in `work` match `units`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"--output_dir: no space is left on the disk of {output_dir}; free some ({needs}) and "
            f"run the same command again: {len(list(work.glob(units)))} finished units are kept"
        ) from error
