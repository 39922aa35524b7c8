"""The process environment that DeepSpeed and the launchers need, and what the launcher was asked.

Call :func:`prepare_environment` before importing transformers or deepspeed: both read it on import.
"""

import os
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


def prepare_environment() -> None:
    """Set what DeepSpeed reads on import, and clear build locks that nobody holds any more."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "mini_llm" / "torch_extensions"))
    # DeepSpeed narrates its start-up in dozens of INFO lines; our banner says what matters.
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls torch functions by their old names; nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    # The oldest transformers that we support has no other name for it; pyproject.toml ends below 6.
    old_name = "`gradient_checkpointing_enable` is deprecated"
    warnings.filterwarnings("ignore", category=FutureWarning, message=old_name)
    for lock in clear_stale_build_locks():
        print(f"removed a stale DeepSpeed build lock: {lock}", flush=True)


def clear_stale_build_locks() -> list[Path]:
    """Delete lock files in TORCH_EXTENSIONS_DIR that no live process holds open; return them.

    torch's extension builder waits for ever on the lock that a killed build left behind. It keeps
    the lock file open while building, so a lock that no process has open is nobody's.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ""))
    if not os.environ.get("TORCH_EXTENSIONS_DIR") or not root.is_dir():
        return []
    locks = {lock for lock in root.rglob("lock") if lock.is_file()}
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    held = {path for path in _open_files() if path.name == "lock"}
    stale = sorted(lock for lock in locks if lock.resolve() not in held)
    for lock in stale:
        lock.unlink(missing_ok=True)  # another rank may have been faster
    return stale


def _open_files() -> set[Path]:
    """Targets of every file descriptor that this user may see."""
    targets = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                targets.add(Path(os.readlink(descriptor)))
        except OSError:  # the process ended, or it is another user's and cannot hold our lock
            continue
    return targets


def world_size() -> int:
    """Number of processes of this job, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def join_as_single_process() -> None:
    """Describe a one-process job to DeepSpeed when no distributed launcher did."""
    defaults = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def is_in_process_group() -> bool:
    """Whether this process has joined others, or itself, for collectives."""
    torch = sys.modules.get("torch")  # not imported: --help need not wait for it
    return torch is not None and torch.distributed.is_initialized()


def end_process(status: int = 0) -> NoReturn:
    """End this process with this status, without Python's own teardown; no buffer is lost.

    A gloo thread may still hold the last collective's tensors when all work is done. If it lets go
    of one while the interpreter goes down, the process aborts ("terminate called without an active
    exception", torch 2.13, ``ProcessGroupGloo::runLoop``), and its launcher calls it failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass(frozen=True)
class LaunchRequest:
    """What ``accelerate launch`` was asked for; None where it was not said."""

    num_processes: int | None = None
    distributed_type: str | None = None
    use_cpu: bool = False


def launch_request() -> LaunchRequest:
    """Read the command line and config file of the ``accelerate launch`` above this process.

    Accelerate does not tell its children whether DDP was asked for or guessed, nor how many
    processes were wanted; a CPU job that asked for two can silently become one. The launcher is
    this process's parent, so its command line is there to be read.
    """
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    for parent in psutil.Process().parents()[:3]:
        try:
            command = parent.cmdline()
        except psutil.Error:  # ended, or not ours to look at
            return LaunchRequest()
        arguments = _accelerate_arguments(command)
        if arguments is not None:
            break
    else:
        return LaunchRequest()
    args = launch_command_parser().parse_args(arguments)
    num_processes, distributed_type, use_cpu = args.num_processes, None, args.cpu
    if args.config_file is not None or Path(default_config_file).is_file():
        config = load_config_from_file(args.config_file)
        distributed_type = str(config.distributed_type).removeprefix("DistributedType.")
        use_cpu = use_cpu or bool(config.use_cpu)
        num_processes = num_processes or config.num_processes
    if args.multi_gpu:
        distributed_type = "MULTI_GPU"
    elif args.use_deepspeed:
        distributed_type = "DEEPSPEED"
    return LaunchRequest(num_processes, distributed_type, use_cpu)


def _accelerate_arguments(command: list[str]) -> list[str] | None:
    """The arguments after ``accelerate launch`` in a command line, or None if it is another one."""
    for i, word in enumerate(command[:4]):
        name = Path(word).name
        if name == "accelerate" and command[i + 1 : i + 2] == ["launch"]:
            return command[i + 2 :]
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return command[i + 1 :]
        if word.endswith("accelerate/commands/launch.py"):
            return command[i + 1 :]
    return None
