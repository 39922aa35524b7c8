"""A run's checkpoints as files: which are whole, their checksums, what their pickles may contain.

``files.json`` lists every file with its bytes and sha256. It is written last, so a folder without
it is not complete, and a file that was deleted, cut or changed afterwards is found before it is
used.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILES_NAME = "files.json"
_NAME = re.compile(r"step-(\d+)")
PICKLE_SUFFIXES = (".pt", ".bin", ".pkl", ".pth", ".ckpt")
# What this project, Accelerate and DeepSpeed put into their pickles besides tensors, as seen in
# checkpoints of every engine; a pickle can run whatever it names, so nothing else is loaded.
KNOWN_GLOBALS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.set",
}


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not those that were written; says which and how."""


def write_file_list(folder: Path) -> None:
    """Flush every file below ``folder`` to disk, then list them in ``files.json``, flushed too."""
    (folder / FILES_NAME).unlink(missing_ok=True)
    _flush(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        checksums = list(pool.map(_sha256, files))
    content = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(files, checksums, strict=True)
    }
    (folder / FILES_NAME).write_text(json.dumps(content, indent=2) + "\n")
    _flush(folder)


def is_complete(folder: Path) -> bool:
    """Whether the folder was written to its end; says nothing of what happened since."""
    return (folder / FILES_NAME).is_file()


def step_of(checkpoint: Path) -> int:
    """N of a folder that is named ``step-N``; -1 of any other."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run that were written to their end, oldest first."""
    found = [
        path
        for path in (output_dir / "checkpoints").glob("step-*")
        if step_of(path) >= 0 and is_complete(path)
    ]
    return sorted(found, key=step_of)


def check_files(folder: Path) -> None:
    """Raise DamagedCheckpointError unless the files are those of ``files.json``, byte for byte."""
    try:
        listed = json.loads((folder / FILES_NAME).read_text())
        expected = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in listed.items()}
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"{folder} is incomplete: it has no {FILES_NAME}, which is written last"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder / FILES_NAME} is damaged ({error})") from error

    def fault(name: str) -> str | None:
        path, (size, checksum) = folder / name, expected[name]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size:,} bytes, {size:,} were written"
        return None if _sha256(path) == checksum else f"{path} has another sha256 than was written"

    with ThreadPoolExecutor() as pool:
        faults = [found for found in pool.map(fault, expected) if found is not None]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DamagedCheckpointError(f"{faults[0]}{more}")


def check_pickles(folder: Path) -> None:
    """Raise ValueError if a torch file below ``folder`` names what this project does not write.

    Nothing is unpickled for that: the pickles are read as instructions (torch's own scan).
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for path in sorted(folder.rglob("*")):
        if path.suffix not in PICKLE_SUFFIXES:
            continue
        try:
            unknown = set(get_unsafe_globals_in_checkpoint(path)) - KNOWN_GLOBALS
        except Exception as error:  # whatever a made-up pickle does to the scan
            raise ValueError(
                f"--resume_from_checkpoint: {path} is no file that torch.save wrote ({error}); it "
                "is not loaded"
            ) from error
        if unknown:
            raise ValueError(
                f"--resume_from_checkpoint: {path} holds {', '.join(sorted(unknown)[:3])}, which "
                "neither this project nor DeepSpeed writes and which could run anything; it is not "
                "loaded"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """fsync every file and folder below ``folder``."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
        flush_directory(Path(directory))


def flush_directory(folder: Path) -> None:
    """fsync a folder: its entries, such as a rename, are on disk then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
