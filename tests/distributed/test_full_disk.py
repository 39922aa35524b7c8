"""A disk that is really full while a checkpoint is written: what is left, and that it goes on."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import TinyData
from tests.launching import REPOSITORY, TINY_RUN, launch_command, launch_environment, metrics

# A file system of its own, in a namespace that takes it away when this shell ends. The same command
# twice: on a disk too small for the second checkpoint, then on one with room.
IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]
TWICE = """
mount -t tmpfs -o size="$SMALL" tmpfs "$DISK"
if "$@" > "$LOGS/full" 2>&1; then exit 9; fi
ls -A "$DISK/run/checkpoints" > "$LOGS/left"
mount -o remount,size=64m "$DISK"
"$@" > "$LOGS/again" 2>&1
cp -r "$DISK/run" "$LOGS/run"
"""


def require_own_file_system(disk: Path) -> None:
    """Skip where this user or container may not mount one; then the stand-in test must do."""
    mount = [*IN_A_NAMESPACE, 'mount -t tmpfs -o size=1m tmpfs "$1"', "sh", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"there is no {error.filename} here")
    if done.returncode:
        pytest.skip(f"no file system of one's own here: {done.stderr.strip()}")


# A checkpoint is 1.8 MB. Each rank begins with the engine's files, 1.4 MB in all (by torch.save,
# whose error does not say why); then rank 0 writes the stock checkpoint (by safetensors). The
# larger disk lacks room for the last file: rank 0's, or rank 1's if that is the later one.
TORCH_SAVE, SAFETENSORS = "inline_container", "No space left on device"


@pytest.mark.parametrize(
    ("small", "writers"),
    [
        ("2400k", [TORCH_SAVE]),
        pytest.param("3400k", [TORCH_SAVE, SAFETENSORS], marks=pytest.mark.slow),
    ],
)
def test_disk_full_during_a_save_leaves_the_earlier_checkpoint_and_the_same_command_goes_on(
    tiny_data: TinyData, tmp_path: Path, small: str, writers: list[str]
) -> None:
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    logs.mkdir()
    require_own_file_system(disk)
    command = launch_command(
        *(*TINY_RUN, *tiny_data.flags, "--output_dir", str(disk / "run")),
        *("--max_steps", "4", "--save_steps", "2"),
    )
    done = subprocess.run(
        [*IN_A_NAMESPACE, TWICE, "sh", *command],
        cwd=REPOSITORY,
        env=launch_environment({"SMALL": small, "DISK": str(disk), "LOGS": str(logs)}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    full = (logs / "full").read_text()
    assert done.returncode == 0, done.stderr + full + (logs / "again").read_text()
    (sentence, *_) = [line for line in full.splitlines() if "OSError: the checkpoint of" in line]
    assert f"checkpoint of step 4 could not be written to {disk}/run/checkpoints" in sentence
    assert "0.00 GiB were free on its disk" in sentence
    assert any(writer in sentence for writer in writers), sentence
    # Nothing half is left, and the whole one passes the check of its bytes.
    assert (logs / "left").read_text().split() == ["step-2"]
    again = (logs / "again").read_text()
    assert "resumed at step 2, to step 4" in again and "warning: " not in again
    assert [m["step"] for m in metrics(logs / "run")] == [1, 2, 3, 4]
    assert (logs / "run/final/model.safetensors").is_file()
