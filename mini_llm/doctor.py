"""What this machine has and whether DeepSpeed starts on it: `python -m mini_llm.doctor`.

With `--data PATH` it is the data there that is examined (`data_doctor`), not the machine.
Every line is `ok`, `note` (worth knowing, nothing needed is broken) or `FAIL`; with a `FAIL` the
exit status is 1. A machine without a GPU is an ordinary machine.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .command_line import Parser
from .finding import Finding
from .nvidia import DriverError, ask_driver
from .parallel.environment import clear_stale_build_locks

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
PROBE_CONFIG = "accelerate_configs/zero1.yaml"
PROBE_PASSED = "probe passed: "
LAUNCHER_SPEAKS = "torch/distributed/elastic/multiprocessing/api.py"
PROBE_TIMEOUT = 120.0  # seconds; a healthy probe takes about 15
KERNELS = {  # distribution name → module it provides
    "flash-attn": "flash_attn",
    "flash-linear-attention": "fla",
    "causal-conv1d": "causal_conv1d",
    "liger-kernel": "liger_kernel",
}
GIB = 2**30


def tested_versions() -> dict[str, str]:
    """Canonical package name → the version in `constraints.txt`."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def check_versions() -> Iterator[Finding]:
    """Each dependency: installed, new enough, and whether it is the tested version."""
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")
    tested = tested_versions()
    try:
        requirements = importlib.metadata.requires("mini_llm") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("FAIL", "mini_llm", "not installed; run ./launch.sh setup")
        return
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        expected = tested[canonicalize_name(name)]
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", name, "not installed; run ./launch.sh setup")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            detail = f"{installed}, but {requirement.specifier} is needed; run ./launch.sh setup"
            yield Finding("FAIL", name, detail)
        elif Version(installed).public != expected:
            yield Finding("note", name, f"{installed} (tested: {expected})")
        else:
            yield Finding("ok", name, installed)


def check_devices() -> Iterator[Finding]:
    """The GPUs that torch can use, and those that it cannot use though the driver sees them."""
    import torch

    cuda = torch.version.cuda
    build = f"torch {torch.__version__} ({f'CUDA {cuda}' if cuda else 'CPU'} build)"
    gpus: list[str] = []
    try:
        gpus = ask_driver("name", "memory.total", "driver_version")
    except DriverError as error:
        yield Finding("note", "GPU driver", str(error))
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(usable):
        gpu = torch.cuda.get_device_properties(index)
        driver = gpus[0].rpartition(", ")[2] if gpus else "unknown"
        detail = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, driver {driver}, {build}"
        yield Finding("ok", f"GPU {index}", detail)
    if usable:
        return
    if not gpus or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("ok", "GPU", f"no CUDA GPU: training runs on the CPU with gloo; {build}")
    elif cuda is None:
        hint = "./launch.sh setup --torch_index URL takes a CUDA build from that package index"
        yield Finding("note", "GPU", f"{gpus[0]} is not used by {build}; {hint}")
    else:
        hint = f"update the driver to one for CUDA {cuda}"
        yield Finding("FAIL", "GPU", f"{gpus[0]} cannot be used by {build}; {hint}")


def check_machine() -> Iterator[Finding]:
    """Cores, free memory and disk, and a C++ compiler."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    yield Finding("ok", "CPU cores", f"{cores}")
    yield Finding(
        "ok" if memory.available >= 4 * GIB else "note",
        "memory",
        f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f} GiB",
    )
    disk = shutil.disk_usage(REPOSITORY)
    yield Finding(
        "ok" if disk.free >= 5 * GIB else "note",
        "disk",
        f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB at {REPOSITORY}",
    )
    compiler = next(
        (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), ""
    )
    if compiler:
        yield Finding("ok", "C++ compiler", compiler)
    else:
        yield Finding(
            "note",
            "C++ compiler",
            "none: torch.compile, on by default on a GPU, and GPU kernels need one",
        )


def check_kernels() -> Iterator[Finding]:
    """Which of the optional GPU kernels are installed."""
    found = []
    for name, module in KERNELS.items():
        if importlib.util.find_spec(module) is not None:
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # a folder on the path, not installed
                version = "of unknown version"
            found.append(f"{name} {version}")
    yield Finding("ok", "optional kernels", ", ".join(found) or "none (pip extra: kernels)")


def check_build_locks() -> Iterator[Finding]:
    """Removes DeepSpeed build locks that a killed run left: every start would wait for them."""
    removed = clear_stale_build_locks()
    for lock in removed:
        yield Finding("note", "DeepSpeed build lock", f"was stale, removed: {lock}")
    if not removed:
        yield Finding("ok", "DeepSpeed build lock", "none is stale")


def check_deepspeed() -> Iterator[Finding]:
    """Launches two optimizer steps of DeepSpeed on 2 processes; a lone GPU gets a launch too."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1:
        yield run_probe(1, "the GPU", visible_gpus=None)
    if gpus < 2:  # two processes cannot share a GPU under NCCL
        yield run_probe(2, "the CPU", visible_gpus="")
    else:
        yield run_probe(2, "2 GPUs", visible_gpus=None)


def run_probe(processes: int, where: str, visible_gpus: str | None) -> Finding:
    """Launches `--probe` as a recipe is launched; `visible_gpus` None: the GPUs as they are."""
    subject = "DeepSpeed start"
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", PROBE_CONFIG, "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    command += ["--module", "mini_llm.doctor", "--probe"]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1"
    }  # a killed probe still shows its last lines
    if visible_gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpus
    started = time.monotonic()
    code, output = run_with_timeout(command, environment, PROBE_TIMEOUT)
    # The launcher's own account of a failure would push the ranks' words out of the tail.
    lines = output.partition(LAUNCHER_SPEAKS)[0].splitlines()
    said = next((line for line in lines if line.startswith(PROBE_PASSED)), None)
    if code == 0 and said is not None:
        seconds = time.monotonic() - started
        detail = (
            f"{processes} process(es) on {where} in {seconds:.0f} s: {said[len(PROBE_PASSED) :]}"
        )
        return Finding("ok", subject, detail)
    if code is None:
        problem = f"hung: stopped after {PROBE_TIMEOUT:.0f} s"
    else:
        problem = f"exit status {code}"
    tail = "\n".join(f"      | {line}" for line in lines[-25:])
    detail = f"{processes} process(es) on {where}: {problem}; the end of its output:\n{tail}"
    return Finding("FAIL", subject, detail)


def run_with_timeout(
    command: list[str], environment: dict[str, str], timeout: float
) -> tuple[int | None, str]:
    """Exit status (None: `timeout` seconds ran out) and output; leaves no process behind."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        code = wait_or_kill(process, timeout)
        output.seek(0)
        return code, output.read()


def wait_or_kill(process: subprocess.Popen[Any], timeout: float) -> int | None:
    """Exit status of a launcher; None: `timeout` seconds ran out. Leaves none of its ranks."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # The launcher gives its ranks sessions of their own, so each is ended by its number.
        if process.poll() is None:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
            psutil.wait_procs(family, timeout=10)  # a killed process takes a moment to go


def probe() -> None:
    """One rank of the probe: two steps of a linear model, then what must hold on every rank.

    Raises RuntimeError where the engine that runs is not ZeRO-1 over all the launched ranks.
    """
    from .parallel.environment import prepare_environment, world_size

    prepare_environment()
    import torch
    from torch import nn

    from .parallel.engine import (
        accumulate,
        backward,
        build_accelerator,
        leave,
        optimizer_step,
        zero_stage,
    )

    accelerator = build_accelerator()
    ranks = accelerator.num_processes
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False)
    size = linear.weight.numel()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(linear, optimizer)
    torch.manual_seed(1 + accelerator.process_index)  # each rank has its own data
    inputs = torch.randn(16, 64, device=accelerator.device)

    losses = []
    for _ in range(2):
        with accumulate(model, last=True):
            loss = model(inputs).square().mean() / ranks
            backward(accelerator, model, loss)
        optimizer_step(model, optimizer, max_grad_norm=1.0)
        losses.append(accelerator.reduce(loss.detach(), "sum").item())

    moments = inner_optimizer(optimizer).state.values()
    held = sum(value["exp_avg"].numel() for value in moments)
    weights = accelerator.gather(next(model.parameters()).detach().sum().reshape(1))
    claims = {
        f"all {world_size()} ranks belong to one job of {ranks}": ranks == world_size(),
        "the engine is DeepSpeed ZeRO-1": zero_stage(accelerator, model) == 1,
        f"the loss falls ({losses[0]:.4f} to {losses[1]:.4f})": losses[1] < losses[0],
        f"each rank holds 1/{ranks} of the optimizer state": held * ranks == size,
        "all ranks have the same weights": bool((weights == weights[0]).all()),
    }
    for claim, holds in claims.items():
        if not holds:
            raise RuntimeError(f"rank {accelerator.process_index}: this does not hold: {claim}")
    if accelerator.is_main_process:
        print(f"{PROBE_PASSED}{'; '.join(claims)}", flush=True)
    leave(accelerator)


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside Accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_everything() -> Iterator[Finding]:
    """All findings about the machine."""
    checks = [check_versions, check_machine, check_kernels, check_build_locks]
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a shared library cannot be loaded
        why = " ".join(str(error).split())
        detail = f"cannot be imported ({why}); ./launch.sh setup installs it anew"
        yield Finding("FAIL", "torch", detail)
    else:
        checks += [check_devices, check_deepspeed]
    for check in checks:
        yield from check()


def report(findings: Iterable[Finding]) -> int:
    """Prints the findings as they come; 1 where one is FAIL."""
    failed = False
    for finding in findings:
        print(finding, flush=True)
        failed = failed or finding.status == "FAIL"
    return int(failed)


def main(command_line: list[str] | None = None) -> int:
    """Prints the report; 1 where something that training needs is broken."""
    parser = Parser(prog="./launch.sh doctor", description=__doc__)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="examine this data instead of the machine: parquet, jsonl, .bin tokens or a prepared "
        "folder; a file, a folder, or an https:// or hf:// URL",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer for --data (default: mini_llm/tokenizer)"
    )
    parser.add_argument(
        "--seq_len", type=int, help="tokens per row for --data (default: a prepared folder's, 2048)"
    )
    arguments = parser.parse_args(command_line)
    if arguments.probe:
        probe()
        return 0
    if arguments.data is not None:
        from .data_doctor import examine  # loads what the check of a machine does not need

        return report(examine(arguments.data, arguments.tokenizer, arguments.seq_len))
    if arguments.tokenizer is not None or arguments.seq_len is not None:
        parser.error("--tokenizer and --seq_len belong to --data PATH")
    failed = report(check_everything())
    print("something is broken, see FAIL above" if failed else "this machine is ready")
    return failed


if __name__ == "__main__":
    sys.exit(main())
