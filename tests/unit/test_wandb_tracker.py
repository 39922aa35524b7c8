"""W&B's real client against a loopback server that works, refuses, hangs, or is not there."""

import time

import pytest
import wandb

from mini_llm.training import wandb_tracker
from mini_llm.training.wandb_tracker import WandbTracker
from tests.launching import launch_port
from tests.wandb_server import HANG, REFUSE, WandbServer


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Environment of W&B -> a started tracker; W&B's process ends with the test.

    ``start_seconds`` and ``finish_seconds`` are long where the server answers, which on a busy
    machine may take W&B's process some time.
    """
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs this
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()

    def start(
        start_seconds: float = 100.0, finish_seconds: float = 100.0, **environment: str
    ) -> WandbTracker:
        monkeypatch.setattr(wandb_tracker, "START_SECONDS", start_seconds)
        monkeypatch.setattr(wandb_tracker, "FINISH_SECONDS", finish_seconds)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        tracker = WandbTracker("mini-llm", {"dir": str(tmp_path), "id": "abc", "resume": "allow"})
        tracker.start()
        return tracker

    yield start
    wandb.teardown()


def log_some(tracker: WandbTracker, first: int = 1) -> None:
    tracker.store_init_configuration({"seed": 1})
    began = time.perf_counter()
    for step in range(first, first + 100):
        tracker.log({"train/loss": 1 / step}, step=step)
    assert time.perf_counter() - began < 10  # a hanging server would take minutes


def test_a_server_that_works_gets_every_step_and_a_resumed_run_goes_on_there(client):
    with WandbServer() as server:
        for first in (1, 51):  # as after a crash: what was not saved is logged again
            tracker = client(**server.environment())
            log_some(tracker, first)
            tracker.finish()
    assert list(server.history) == ["abc"]
    losses = {line["step"]: line["train/loss"] for line in server.history["abc"].values()}
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 151)}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (REFUSE, "401"),
        ("no key", "no API key"),
        pytest.param("nobody", "connection refused", marks=pytest.mark.slow),
    ],
)
def test_without_a_server_the_run_is_recorded_on_disk_and_that_is_said_once(
    client, capsys, tmp_path, fault, reason
):
    with WandbServer("" if fault == "no key" else fault) as server:
        environment = server.environment()
        if fault == "no key":
            del environment["WANDB_API_KEY"]
        elif fault == "nobody":
            environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{launch_port()}"
        began = time.perf_counter()
        tracker = client(2.0 if fault == "nobody" else 100.0, **environment)
        log_some(tracker)
        tracker.finish()
        assert time.perf_counter() - began < 60
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-abc")
    said = [line for line in capsys.readouterr().out.splitlines() if "--report_to" in line]
    assert len(said) == 1
    assert reason in said[0] and said[0].endswith(f"wandb sync {folder}")
    assert (folder / "run-abc.wandb").stat().st_size > 1000


def test_a_server_that_hangs_later_delays_neither_logging_nor_the_end(client, capsys, tmp_path):
    with WandbServer(HANG, fault_of="file_stream") as server:
        tracker = client(finish_seconds=2.0, **server.environment())
        log_some(tracker)
        began = time.perf_counter()
        tracker.finish()
        assert time.perf_counter() - began < 30
    (folder,) = (tmp_path / "wandb").glob("run-*-abc")
    said = [line for line in capsys.readouterr().out.splitlines() if "--report_to" in line]
    assert len(said) == 1 and said[0].endswith(f"wandb sync --include-online {folder}")


def test_when_wandbs_own_process_dies_the_run_goes_on_without_it(client, capsys):
    with WandbServer() as server:
        tracker = client(**server.environment())
        tracker.log({"train/loss": 1.0}, step=1)
        wandb.teardown()  # as if it had crashed
        for step in (2, 3):
            tracker.log({"train/loss": 1.0}, step=step)
        tracker.finish()
    assert capsys.readouterr().out.count("the run goes on without it") == 1
