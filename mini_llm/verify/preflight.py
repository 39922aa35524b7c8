"""On every rank: versions, the disk, compute and the network, measured; rank 0 writes the rows.

    accelerate launch … --module mini_llm.verify.preflight --output_dir DIR --result FILE

What is measured is what this machine gives now, under NCCL with CUDA events on GPUs and under gloo
with the wall clock on CPUs. Nothing is compared with what it should be, only ranks with ranks.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from mini_llm.parallel.environment import (
    end_process,
    join_as_single_process,
    prepare_environment,
)

prepare_environment()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from mini_llm.nvidia import DriverError, ask_driver  # noqa: E402
from mini_llm.parallel import watchdog  # noqa: E402
from mini_llm.training.run_folder import versions  # noqa: E402

from .judge import (  # noqa: E402
    NONE,
    Disk,
    PairSpeed,
    Ranks,
    compute_row,
    disk_rows,
    pair_rows,
    version_rows,
)
from .pairs import Round, is_ring, plan_rounds  # noqa: E402
from .table import Row, write_rows  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
# What decides what a rank computes; documentation and tests may differ.
CODE = ("mini_llm/**/*.py", "recipes/*.py", "ds_configs/*.json", "accelerate_configs/*.yaml")
PROBE_BYTES = 64 * 2**20  # written to the checkpoint path
CONNECT_SECONDS = 120  # until a peer that does not answer ends the preflight
REPEATS = 20  # of which the median counts
WARM_UP_SECONDS = 0.5
SMALL_BYTES = 8  # the latency of a collective, nothing else


@dataclass(frozen=True)
class Sizes:
    """Large enough that the start of an operation does not count, and all is over in seconds."""

    matrix: int  # rows and columns
    world_bytes: int
    pair_bytes: int


GPU_SIZES = Sizes(matrix=8192, world_bytes=256 * 2**20, pair_bytes=64 * 2**20)
CPU_SIZES = Sizes(matrix=512, world_bytes=4 * 2**20, pair_bytes=4 * 2**20)


class Job:
    """This rank among the others; ``control`` is a gloo group for objects, whatever the backend."""

    def __init__(self) -> None:
        join_as_single_process()
        is_gpu = torch.cuda.is_available()
        self.backend = "nccl" if is_gpu else "gloo"
        self.device = torch.device("cpu")
        if is_gpu:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.sizes = GPU_SIZES if is_gpu else CPU_SIZES
        timeout = timedelta(seconds=CONNECT_SECONDS)
        dist.init_process_group(self.backend, timeout=timeout)
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        self.is_first_of_node = os.environ["LOCAL_RANK"] == "0"

    def gather(self, own: Any) -> list[Any]:
        """Everybody's, by rank."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, own, group=self.control)
        return found

    def barrier(self) -> None:
        """Wait for all."""
        dist.barrier(group=self.control)

    def agree(self, decision: bool) -> bool:
        """Rank 0's decision."""
        word = torch.tensor([decision])
        dist.broadcast(word, src=0, group=self.control)
        return bool(word.item())

    def seconds(self, operation: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Median time of an operation, after a warm-up."""
        operation()
        times = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                operation()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
            else:
                began = time.perf_counter()
                operation()
                times.append(time.perf_counter() - began)
        return statistics.median(times)


# ---------------------------------------------------------------- facts


def code_hash() -> str:
    """Of the files that decide what a rank computes; 12 hexadecimal digits."""
    total = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(REPOSITORY.glob(pattern)):
            total.update(str(path.relative_to(REPOSITORY)).encode() + b"\0")
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def rank_facts() -> dict[str, str]:
    """Name -> version, of what should be the same on all ranks."""
    found = {**versions(), "code": code_hash(), "CUDA": torch.version.cuda or NONE}
    found["NCCL"] = found["driver"] = found["GPU"] = NONE
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        try:
            drivers = ask_driver("driver_version")
        except DriverError as error:
            drivers = [f"unknown ({error})"]
        found["driver"] = drivers[0] if drivers else "unknown (no nvidia-smi)"
        found["GPU"] = torch.cuda.get_device_name()
    return found


# ---------------------------------------------------------------- disk


def measure_disk(job: Job, output_dir: Path) -> dict[int, Disk]:
    """Of every node by its first rank: can it write, how fast, and does it see rank 0's file?"""
    probe = output_dir / f".verify-probe-{uuid.uuid4().hex}"
    disk = Disk()
    if job.is_first_of_node:
        try:
            disk = write_probe(probe)
        except OSError as error:
            disk = Disk(error=error.strerror or str(error))
    probe_of_rank_0 = job.gather(str(probe))[0]  # also a barrier: it is written
    disk = Disk(disk.error, disk.free, disk.write_speed, Path(probe_of_rank_0).exists())
    found = job.gather(disk if job.is_first_of_node else None)
    if job.is_first_of_node and disk.error is None:
        probe.unlink(missing_ok=True)
    return {rank: own for rank, own in enumerate(found) if own is not None}


def write_probe(path: Path) -> Disk:
    """Write a file to its end on the disk. Raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(2**20)  # not zeros: some file systems store those as nothing
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    speed = PROBE_BYTES / (time.perf_counter() - began)
    return Disk(free=shutil.disk_usage(path.parent).free, write_speed=speed)


# ---------------------------------------------------------------- compute


def matmul_seconds(job: Job, kind: torch.dtype) -> float:
    """Median time of a square matrix product, on all ranks at once, as in training."""
    size = job.sizes.matrix
    left = torch.randn(size, size, device=job.device, dtype=kind)
    right = torch.randn(size, size, device=job.device, dtype=kind)
    job.barrier()
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        job.seconds(lambda: left @ right, repeats=1)
    return job.seconds(lambda: left @ right)


def measure_compute(job: Job, ranks: Ranks) -> list[Row]:
    """fp32, and on GPUs bf16."""
    kinds = {"fp32": torch.float32}
    if job.device.type == "cuda":
        kinds["bf16"] = torch.bfloat16
    rows = []
    for name, kind in kinds.items():
        seconds = job.gather(matmul_seconds(job, kind))
        rows.append(compute_row(name, 2.0 * job.sizes.matrix**3, seconds, ranks))
    return rows


# ---------------------------------------------------------------- network


def reduce_speed(job: Job, size: int, group: Any, members: int) -> float:
    """All-reduce of ``size`` bytes: bytes/s that each rank sends, 2 (n-1)/n of the buffer."""
    buffer = torch.zeros(size // 4, device=job.device)  # whose sums stay zeros
    seconds = job.seconds(lambda: dist.all_reduce(buffer, group=group))
    return 2 * (members - 1) / members * size / seconds


def exchange_speed(job: Job, size: int, group: Any, members: int) -> float:
    """All-to-all of ``size`` bytes: bytes/s that each rank sends, (n-1)/n of the buffer."""
    count = size // 4 // members * members
    sent, received = (torch.ones(count, device=job.device) for _ in range(2))
    seconds = job.seconds(lambda: dist.all_to_all_single(received, sent, group=group))
    return (members - 1) / members * count * 4 / seconds


def measure_world(job: Job) -> list[Row]:
    """Collectives of all ranks."""
    if job.world_size == 1:
        text = "there is one rank: nothing to send, and no pair"
        return [Row("network", "skipped", "", text)]
    job.barrier()
    small = torch.ones(SMALL_BYTES // 4, device=job.device)
    latency = max(job.gather(job.seconds(lambda: dist.all_reduce(small))))
    rows = [
        Row("all-reduce of 8 bytes, all ranks", "ok", f"{latency * 1e6:.0f} µs", "latency, median")
    ]
    for name, measure in (("all-reduce", reduce_speed), ("all-to-all", exchange_speed)):
        job.barrier()
        speed = min(job.gather(measure(job, job.sizes.world_bytes, None, job.world_size)))
        text = f"sent by each rank; {job.sizes.world_bytes // 2**20} MiB a rank"
        rows.append(Row(f"{name}, all ranks", "ok", f"{speed / 1e9:.3g} GB/s", text))
    return rows


def measure_round(job: Job, current: Round) -> list[PairSpeed]:
    """This rank's part: both operations with its partner, if it has one. RuntimeError names it."""
    for pair in current.pairs:
        if job.rank not in pair:
            continue
        found = []
        try:
            group = dist.new_group(
                pair,
                timeout=timedelta(seconds=CONNECT_SECONDS),
                use_local_synchronization=True,  # the others need not take part
            )
            for name, measure in (("all-reduce", reduce_speed), ("all-to-all", exchange_speed)):
                speed = measure(job, job.sizes.pair_bytes, group, 2)
                found.append(PairSpeed(current.kind, name, pair, speed))
            dist.destroy_process_group(group)
        except RuntimeError as error:
            raise RuntimeError(
                f"ranks {pair[0]} and {pair[1]} ({current.kind}) cannot exchange data: {error}"
            ) from error
        return found if job.rank == pair[0] else []
    return []


def measure_pairs(job: Job, ranks: Ranks, seconds: float) -> list[Row]:
    """All rounds that begin within ``seconds``; says what was left out."""
    if job.world_size == 1:
        return []
    nodes = job.gather(job.node)
    rounds = plan_rounds(nodes)
    deadline = time.monotonic() + seconds
    own: list[PairSpeed] = []
    done = 0
    for current in rounds:
        if not job.agree(time.monotonic() < deadline):
            break
        if job.rank == 0:
            print(f"measuring {current.kind}: {current.pairs}", flush=True)
        own += measure_round(job, current)
        done += 1
    rows = pair_rows([speed for of_rank in job.gather(own) for speed in of_rank], ranks)
    if is_ring(nodes):
        text = "of more than 8 ranks on a node, or 8 nodes, only neighbours are measured"
        rows.append(Row("pairs beyond neighbours", "skipped", "", text))
    if done < len(rounds):
        left = sum(len(current.pairs) for current in rounds[done:])
        text = f"no time was left after {seconds:.0f} s; give --max_minutes more"
        rows.append(Row("the other pairs", "skipped", f"{left} pair(s)", text))
    return rows


# ---------------------------------------------------------------- all of it


def main(words: Sequence[str] | None = None) -> None:
    """One rank of the preflight."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for the pairs")
    arguments = parser.parse_args(words)
    watchdog.end_with_launcher()
    job = Job()
    ranks = Ranks(job.gather(os.uname().nodename))
    nodes = len(set(job.gather(job.node)))
    device = torch.cuda.get_device_name() if job.device.type == "cuda" else "CPU"
    text = f"{job.backend} on {device}: figures below are of these"
    rows = [Row("ranks", "ok", f"{job.world_size} on {nodes} node(s)", text)]
    rows += version_rows(job.gather(rank_facts()), ranks)
    rows += disk_rows(measure_disk(job, arguments.output_dir), str(arguments.output_dir), ranks)
    rows += measure_compute(job, ranks)
    rows += measure_world(job)
    rows += measure_pairs(job, ranks, arguments.seconds)
    if job.rank == 0:
        write_rows(arguments.result, rows)
    job.barrier()
    end_process()


if __name__ == "__main__":
    main()
