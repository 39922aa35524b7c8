"""Checkpoints written while training goes on, under real engines and in real runs.

Run as a script under ``accelerate launch``, this file is a rank that trains and saves.
"""

# ruff: noqa: E402
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.environment import prepare_environment

prepare_environment()

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mini_llm.data import load_tokenizer
from mini_llm.models import build_model
from mini_llm.parallel import engine
from mini_llm.parallel.snapshot import Snapshot
from mini_llm.training.checkpoint_files import check_files, list_checkpoints
from mini_llm.training.optimizer import build_optimizer
from mini_llm.training.saving import CheckpointWriter
from tests.conftest import TINY_MODELS, TinyData
from tests.launching import (
    REPOSITORY,
    TINY_RUN,
    launch,
    launch_command,
    launch_environment,
    metrics,
)

MODEL = "mini_deepseekv3_tiny"  # with a buffer, the router's bias
BROKEN = "the disk of rank {rank} is gone"


def be_a_rank(folder: Path, tokenizer_folder: Path, expert_parallel_size: int) -> None:
    """Save while training goes on, and again with the last rank unable to; write what came."""
    from mini_llm.parallel.expert_parallel import spread_experts

    accelerator = engine.build_accelerator(
        "none", micro_batch_size=1, expert_parallel_size=expert_parallel_size
    )
    rank, last = accelerator.process_index, accelerator.num_processes - 1
    torch.manual_seed(0)
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    model: Any = build_model(MODEL, vocab_size=len(tokenizer), **TINY_MODELS[MODEL])
    spread_experts(model, expert_parallel_size, rank)
    optimizer: Any = build_optimizer(
        model, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    announced: list[str] = []
    saving = CheckpointWriter(
        accelerator, folder, total_limit=2, announce=lambda path: announced.append(path.name)
    )

    def step() -> None:
        saving.agree(accelerator.reduce(torch.tensor(saving.progress()), "sum"))
        ids = torch.randint(len(tokenizer), (1, 16))
        with engine.accumulate(model, last=True):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(accelerator, model, loss / accelerator.num_processes)
        engine.optimizer_step(model, optimizer, 1.0)

    step()
    step()
    # The reference: Accelerate writes the same itself, while nothing else goes on.
    accelerator.save_state(str(folder / "reference"), safe_serialization=False)
    if expert_parallel_size == 1:
        weights = accelerator.get_state_dict(model)
        if rank == 0:
            torch.save({name: value.clone() for name, value in weights.items()}, folder / "weights")

    may_write = threading.Event()
    write = Snapshot.write

    def held(self: Snapshot) -> None:
        may_write.wait()
        write(self)

    Snapshot.write = held  # type: ignore[method-assign]
    saving.save(model, tokenizer, step=2, state={})
    for _ in range(3):
        step()
    assert not announced
    may_write.set()
    while not announced:
        step()

    def broken(self: Snapshot) -> None:
        if rank == last:
            raise OSError(BROKEN.format(rank=rank))
        write(self)

    Snapshot.write = broken  # type: ignore[method-assign]
    saving.save(model, tokenizer, step=9, state={})
    steps = 0
    try:
        while steps < 1000:
            steps += 1
            step()
        raise AssertionError("no failure")
    except OSError as error:
        seen = {"announced": announced, "steps": steps, "error": str(error)}
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    if accelerator.num_processes > 1:
        engine.leave(accelerator)
    may_write.clear()
    Snapshot.write = held  # type: ignore[method-assign]
    saving.save(model, tokenizer, step=10, state={})
    raise RuntimeError("the main thread ends while the other still writes")


@pytest.mark.parametrize(
    ("config", "expert_parallel_size"),
    [
        ("zero3", 1),
        *(
            pytest.param(config, size, marks=pytest.mark.slow)
            for config, size in [
                *((None, 1), ("zero1", 1), ("zero3", 2)),
            ]
        ),
    ],
)
def test_checkpoint_written_during_steps_is_the_synchronous_one_and_a_failure_ends_all_ranks_alike(
    config, expert_parallel_size, tiny_data, tmp_path
):
    launcher = [sys.executable] if config is None else launch_command(config=config)[:-1]
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path), str(tiny_data.tokenizer), str(expert_parallel_size)],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == (0 if config else 1), done.stdout
    if not config:
        assert "the main thread ends while" in done.stdout.splitlines()[-1]

    # The same files, byte for byte, though three steps were made before they were written.
    (checkpoint,) = list_checkpoints(tmp_path)
    assert checkpoint.name == "step-2"
    assert not (tmp_path / "checkpoints" / ".step-9.partial").exists()
    check_files(checkpoint)
    expected = files_below(tmp_path / "reference")
    assert len(expected) >= 3  # weights, optimizer, random states
    found = files_below(checkpoint / "engine")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    if expert_parallel_size == 1:
        saved = load_file(checkpoint / "model" / "model.safetensors")
        weights = torch.load(tmp_path / "weights")
        same = [name for name, value in saved.items() if name in weights]
        assert len(same) > 10 and all(saved[name].equal(weights[name]) for name in same)

    ranks = 1 if config is None else 2
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    assert all(other == seen[0] for other in seen)
    assert seen[0]["announced"] == ["step-2"]
    where = f"step 9 could not be written to {tmp_path}/checkpoints"
    assert f"{where} ({BROKEN.format(rank=ranks - 1)}); " in seen[0]["error"]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Runs whose checkpoints are held back


def held_command(tiny_data: TinyData, run: Path, call: int, *flags: str) -> list[str]:
    *launcher, _ = launch_command()
    command = [*launcher, "tests/distributed/held_write.py", str(call), "nan", *TINY_RUN]
    return [*command, *tiny_data.flags, "--output_dir", str(run), *flags]


@pytest.mark.slow
def test_bad_step_that_stops_the_run_waits_for_the_checkpoint_under_way(tiny_data, tmp_path):
    run = tmp_path / "run"
    # Two micro-batches a step: call 14 is of step 8.
    flags = ("--max_steps", "12", "--save_steps", "3", "--bad_step_policy", "stop")
    done = subprocess.run(
        held_command(tiny_data, run, 14, *flags),
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "step 8 went wrong" in done.stdout, done.stdout
    # Both ranks write to one stream, so a line may have another's words behind it.
    fault = done.stdout.index("step 8 went wrong")
    saved = done.stdout.index(f"saved {run / 'checkpoints/step-6'}")
    assert fault < saved  # it was under way until then
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-6"}
    check_files(run / "checkpoints/step-6")


@pytest.mark.slow
def test_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(tiny_data, tmp_path):
    run, every = tmp_path / "run", 150  # steps: so long may the kill below be on its way
    flags = ("--max_steps", "20000", "--save_steps", str(every))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            held_command(tiny_data, run, -1, *flags),
            cwd=REPOSITORY,
            env=launch_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 240
            while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2 * every + 2:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
        finally:
            everything = [*psutil.Process(process.pid).children(recursive=True), process]
            for each in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
    before = {m["step"]: m for m in metrics(run)}
    assert 2 * every + 2 <= max(before) < 3 * every
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [f".step-{2 * every}.partial", f"step-{every}"]

    again = ("--max_steps", "20000", "--stop_at_step", str(2 * every))
    done = launch(*TINY_RUN, *tiny_data.flags, "--output_dir", str(run), *again)
    assert f"resumed at step {every}" in done.stdout and "warning: " not in done.stdout
    assert [path.name for path in list_checkpoints(run)] == [f"step-{every}", f"step-{2 * every}"]
    assert not list((run / "checkpoints").glob(".step-*"))
    after = {m["step"]: m for m in metrics(run)}
    assert max(after) == 2 * every
    for key in ("train/loss", "train/grad_norm", "train/tokens"):
        assert all(after[step][key] == before[step][key] for step in after), key


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
