"""What only a CUDA GPU can show: timing and guarding a step makes the host wait for nothing."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from mini_llm import build_model
from mini_llm.data.collate import collate
from mini_llm.parallel import collective_times, engine
from mini_llm.parallel.clocks import DeviceClock
from mini_llm.parallel.collective_times import CollectiveTimes
from mini_llm.parallel.environment import free_port
from mini_llm.parallel.transfer import to_device
from mini_llm.training.arguments import REPOSITORY
from mini_llm.training.bad_steps import BadSteps
from mini_llm.training.balancing import take_expert_load, update_expert_bias
from mini_llm.training.optimizer import build_optimizer
from mini_llm.training.sizes import TrainingFlops
from mini_llm.training.timing import StepTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def waiting_is_an_error():
    """Within it, whatever makes the host wait for the stream raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_parts_of_a_step_are_the_times_of_the_stream(waiting_is_an_error):
    timer = StepTimer(Accelerator(), flops=TrainingFlops(1.0, 0.0), peak=None)
    torch.cuda._sleep(1000)
    timer.restart()
    waiting_is_an_error()
    for _ in range(3):
        timer.begin_step(is_logged=False)
        with timer.part("forward"):
            torch.cuda._sleep(20_000_000)
        with timer.part("backward"):
            torch.cuda._sleep(40_000_000)
        timer.end_step(100, 100)
    torch.cuda.set_sync_debug_mode("default")
    found = timer.read()
    forward, backward = found["perf/forward_seconds"], found["perf/backward_seconds"]
    assert backward == pytest.approx(2 * forward, rel=0.1)
    assert forward + backward == pytest.approx(found["perf/step_seconds"], rel=0.1)


def take_steps(accelerator, model, optimizer, waiting_is_an_error):
    """Four steps; those after the second raise where they wait, but for the model's own passes.

    tests/parity looks at these.
    """
    bad_steps = BadSteps(SimpleNamespace(bad_step_policy="skip", max_loss_jump=0.0), accelerator)
    timer = StepTimer(accelerator, flops=TrainingFlops(1.0, 0.0), peak=None)
    rows = [{"input_ids": torch.arange(1, 257).numpy(), "doc_lens": torch.tensor([256]).numpy()}]
    for step in range(1, 5):
        timer.begin_step(is_logged=False)
        with timer.part("data"):
            batch = collate(rows, accelerator.device)
            sums = to_device(torch.tensor([255.0, 0.0, 0.0]), accelerator.device)
        with engine.accumulate(model, last=True):
            with timer.part("forward"):
                loss = model(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    labels=batch["labels"],
                    num_items_in_batch=sums[0],
                    use_cache=False,
                ).loss
            with timer.part("backward"):
                engine.backward(accelerator, model, loss)
        if step > 2:  # states and buffers are there
            waiting_is_an_error()
        with timer.part("optimizer"):
            norm = engine.optimizer_step(model, optimizer, 1.0)
        update_expert_bias(model, take_expert_load(model), speed=1e-3, grad_norm=norm)
        assert bad_steps.fault(step, loss.detach(), norm, now=False) is None
        timer.end_step(256, 256)
        collate(rows, accelerator.device)
        to_device(torch.tensor([255.0, 0.0, 0.0]), accelerator.device)
        torch.cuda.set_sync_debug_mode("default")


def model_and_optimizer(accelerator):
    """A model with experts on the accelerator's device, as its engine holds it."""
    model = build_model("mini_deepseekv3_tiny", vocab_size=512).to(accelerator.device).train()
    optimizer = build_optimizer(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    return accelerator.prepare(model, optimizer)


def test_a_step_between_logged_ones_waits_for_nothing(waiting_is_an_error):
    accelerator = Accelerator()
    take_steps(accelerator, *model_and_optimizer(accelerator), waiting_is_an_error)


def test_a_bf16_step_under_zero_1_waits_for_nothing():
    """In a process of its own, for DeepSpeed keeps global state."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "took the steps under ZeRO-1" in done.stdout


def steps_under_zero_1():
    """What the test above starts."""
    accelerator = engine.build_accelerator(
        str(REPOSITORY / "ds_configs/zero1.json"), micro_batch_size=1, bf16=True
    )
    model, optimizer = model_and_optimizer(accelerator)
    assert engine.zero_stage(accelerator, model) == 1
    take_steps(accelerator, model, optimizer, lambda: torch.cuda.set_sync_debug_mode("error"))
    print("took the steps under ZeRO-1")


def test_a_collective_is_timed_in_the_stream(monkeypatch, waiting_is_an_error):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("nccl", rank=0, world_size=1)
    monkeypatch.setattr(collective_times.dist, "get_world_size", lambda *_: 2)  # as if not alone
    times = CollectiveTimes(torch.device("cuda", 0), DeviceClock())
    try:
        numbers = torch.ones(1 << 24, device="cuda")
        dist.all_reduce(numbers)
        torch.cuda.synchronize()
        times.open()
        waiting_is_an_error()
        for _ in range(5):
            dist.all_reduce(numbers)
            dist.all_reduce(numbers, async_op=True).wait()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert 0 < times.time.read() < 5
        times.close()
        dist.all_reduce(numbers)
        assert times.time.read() == 0
    finally:
        times.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    steps_under_zero_1()
