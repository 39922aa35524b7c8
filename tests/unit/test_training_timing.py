"""Times of steps and of their parts, on clocks that the test sets."""

import math

import pytest
import torch
from accelerate import Accelerator

from mini_llm.parallel.collective_times import CoveredTime
from mini_llm.training.sizes import TrainingFlops
from mini_llm.training.timing import StepTimer, peak_flops


class LateClock:
    """A clock as a GPU's: what was asked for comes when the test lets the device get there.

    ``now`` is the moment that the device will pass next, ``done`` how far it is.
    """

    def __init__(self) -> None:
        self.next = self.done = 0.0
        self.released: list[float] = []

    def now(self) -> float:
        return self.next

    def has_come(self, moment: float) -> bool:
        return moment <= self.done

    def seconds(self, begin: float, end: float) -> float:
        assert max(begin, end) <= self.done, "read before it has come: a GPU would raise"
        return end - begin

    def release(self, moment: float) -> None:
        self.released.append(moment)


@pytest.fixture
def timer(monkeypatch):
    """A timer whose host's clock is ``timer.host`` and whose device's is ``timer.device``."""
    timer = StepTimer(Accelerator(cpu=True), flops=TrainingFlops(6.0, 10.0), peak=None)
    timer.host, timer.device = LateClock(), LateClock()
    timer.host.done = 1e9
    monkeypatch.setattr(timer, "_host", timer.host)
    monkeypatch.setattr(timer, "_clock", timer.device)
    timer.restart()
    return timer


def a_step(timer, parts: dict[str, float], tokens: int = 100) -> None:
    timer.begin_step(is_logged=True)
    for name, seconds in parts.items():
        with timer.part(name):
            timer.host.next += seconds
            timer.device.next += seconds
    timer.end_step(tokens, targets=tokens / 4)


def test_throughput_and_parts_are_means_over_the_steps_of_their_interval_alone(timer):
    timer.device.done = 1e9
    a_step(timer, {"data": 1, "forward": 2, "backward": 4, "optimizer": 1})
    a_step(timer, {"data": 2, "forward": 4, "backward": 4, "optimizer": 2})
    timer.host.next += 10  # of no part
    found = timer.read()
    assert found["perf/step_seconds"] == 15
    assert found["perf/tokens_per_second"] == pytest.approx(200 / 30)
    assert [found[f"perf/{part}_seconds"] for part in ("data", "forward", "backward")] == [
        *(1.5, 3, 4)
    ]
    assert found["perf/optimizer_seconds"] == 1.5
    assert found["perf/communication_seconds"] == 0  # one process
    assert found["perf/peak_memory_bytes"] > 50e6  # Python with torch
    a_step(timer, {"data": 1, "forward": 1, "backward": 1, "optimizer": 1}, tokens=20)
    assert timer.read()["perf/tokens_per_second"] == 5


def test_what_is_no_training_does_not_count(timer):
    a_step(timer, {"forward": 8})
    timer.host.next += 100
    timer.device.done = 1e9  # restarting waits for the device
    timer.restart()
    a_step(timer, {"forward": 2})
    found = timer.read()
    assert found["perf/step_seconds"] == found["perf/forward_seconds"] == 2


def test_parts_of_a_device_that_works_behind_are_counted_when_it_is_done_with_them(timer):
    for _ in range(3):  # the clock fails the test if one is read too early
        a_step(timer, {"forward": 1, "backward": 2})
    timer.device.done = 4.5  # in the second step's backward pass
    a_step(timer, {"forward": 1, "backward": 2})
    assert sorted(timer.device.released) == [0, 1, 1, 3, 3, 4]
    timer.device.done = 12
    assert timer.read()["perf/backward_seconds"] == 2


def test_utilisation_is_none_where_the_peak_is_unknown_and_of_all_devices_where_it_is_given(timer):
    timer.device.done = 1e9
    a_step(timer, {"forward": 2})
    assert timer.read()["perf/mfu"] is None
    timer._peak = 1000.0
    a_step(timer, {"forward": 2})
    assert timer.read()["perf/mfu"] == pytest.approx((100 * 6.0 + 25 * 10.0) / 2 / 1000)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_kind_and_not_of_one_whose_name_begins_alike(
    monkeypatch, name, peak
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_communication_of_a_step_that_was_not_to_be_logged_is_not_a_number(timer):
    timer.device.done = 1e9
    timer.begin_step(is_logged=False)
    timer.end_step(1, 1)
    assert math.isnan(timer.read()["perf/communication_seconds"])


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(0, 2), (3, 4)], 3),  # one after the other
        ([(0, 2), (1, 4)], 4),  # overlapping
        ([(0, 9), (1, 2), (3, 10)], 10),  # one inside another that ends later
        ([(0, 1), (0, 1), (0, 1)], 1),
    ],
)
def test_time_that_several_collectives_share_is_counted_once(spans, seconds):
    clock = LateClock()
    covered = CoveredTime(clock)
    opened = []
    for begin, end in spans:
        clock.next = begin
        opened.append((end, covered.begin()))
    for end, span in sorted(opened, key=lambda item: item[0]):
        clock.next = end
        covered.end(span)
    assert covered.read() == 0  # nothing has come
    clock.done = 100
    assert covered.read() == seconds
    assert covered.read() == 0
