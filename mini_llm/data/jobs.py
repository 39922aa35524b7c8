"""Jobs that each write one unit (`unit_files.py`), done in processes and only once.

A job that was done before, by a run that was interrupted, is not done again: its unit has the same
key.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .progress import Progress
from .text_files import BadFileError
from .unit_files import read_record, remove_unit


class Job(Protocol):
    """A part of a stage; `amount` of work is in the units of the stage's other jobs."""

    @property
    def name(self) -> str:
        """Of the unit that it writes."""

    @property
    def key(self) -> str:
        """The sha256 of all that its result depends on; the unit's record has it as "key"."""

    @property
    def amount(self) -> int:
        """Of work."""


AnyJob = TypeVar("AnyJob", bound=Job)
# Does one job and returns its number of tokens, or the bad input file that it met.
Worker = Callable[[Any], int | BadFileError]


def available_cpus() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    stage: str,
    jobs: Sequence[AnyJob],
    folder: Path,
    make_worker: Callable[[], Worker],
    num_proc: int,
) -> list[BadFileError]:
    """Do the jobs that are not done yet, in any order, and return the bad files that turned up.

    `make_worker` is called once in every process, so it must be picklable. Raises
    ChildProcessError when a process is killed.
    """
    progress = Progress(stage, sum(job.amount for job in jobs))
    to_do = []
    for job in jobs:
        record = read_record(folder, job.name)
        if record is not None and record["key"] == job.key:
            progress.skip(job.amount)
        else:
            remove_unit(folder, job.name)
            to_do.append(job)
    if len(to_do) < len(jobs):
        print(f"{stage}: {len(jobs) - len(to_do)} of {len(jobs)} units were done before")
    bad = []
    for job, result in _results(to_do, make_worker, num_proc):
        if isinstance(result, BadFileError):
            bad.append(result)
        else:
            progress.add(job.amount, result)
    return bad


def _results(
    jobs: Sequence[AnyJob], make_worker: Callable[[], Worker], num_proc: int
) -> Iterator[tuple[AnyJob, int | BadFileError]]:
    """Yield every job with its result, as they finish."""
    # One thread per process: num_proc says how many cores are used.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if num_proc == 1 or len(jobs) < 2:
        worker = make_worker()
        for job in jobs:
            yield job, worker(job)
        return
    pool = ProcessPoolExecutor(
        min(num_proc, len(jobs)), get_context("spawn"), _start_process, (make_worker,)
    )
    try:
        futures = _submit_all(pool, jobs)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        # The pool ends its processes, but not one that was being started meanwhile: it would wait
        # for work, and this process for it, without end.
        for process in active_children():
            process.kill()
            process.join()
        raise ChildProcessError(
            "--num_proc: a worker process was killed, perhaps for want of memory; run the "
            "same command again, with fewer processes: finished units are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit_all(
    pool: ProcessPoolExecutor, jobs: Sequence[AnyJob]
) -> dict[Future[int | BadFileError], AnyJob]:
    """Give the pool all jobs, which starts its processes. Raises BrokenProcessPool."""
    try:
        return {pool.submit(_do, job): job for job in jobs}
    except Exception:
        # When a process is killed while others are started, the pool's thread closes the pipe that
        # `submit` is handing to the next one, which then fails in one of several ways. The pool
        # is marked as broken before: a further `submit` says so.
        pool.submit(os.getpid)
        raise


_worker_of_process: Worker


def _start_process(make_worker: Callable[[], Worker]) -> None:
    global _worker_of_process
    _worker_of_process = make_worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # When the preparation is killed its processes must not go on: it may be started again.
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(job: Job) -> int | BadFileError:
    return _worker_of_process(job)
