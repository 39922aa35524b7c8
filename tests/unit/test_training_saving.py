"""Saving while training goes on, with stand-ins for the engine and the other ranks."""

import errno
import math
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mini_llm.parallel.snapshot import Snapshot
from mini_llm.training import checkpoint, saving
from mini_llm.training.checkpoint import find_checkpoint
from mini_llm.training.checkpoint_files import check_files, list_checkpoints
from mini_llm.training.saving import CheckpointWriter
from tests.unit.test_training_checkpoint import flip_a_byte


class Shared:
    """A value that torch.save pickles by its class, with a tensor inside."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


# Snapshots


def everything() -> dict[str, Any]:
    """Whatever engines put into their files: shared memory, views, parameters, random states."""
    flat = torch.arange(24.0)
    weight = torch.nn.Parameter(flat[:12].view(3, 4))
    return {
        "weight": weight,
        "tied": weight,
        "view": flat[12:].view(4, 3).t(),
        "step": torch.tensor(3),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "shared": Shared(flat[2:5]),
        "nested": [{"betas": (0.9, 0.95), "params": [0, 1]}, None],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    }


def test_snapshot_writes_the_bytes_that_torch_save_would_have_written_then(tmp_path):
    state = everything()
    (tmp_path / "now").mkdir()
    (tmp_path / "later").mkdir()
    torch.save(state, tmp_path / "now" / "state.pt")
    snapshot = Snapshot(torch.device("cpu"))
    with snapshot.taking_saves():
        torch.save(state, tmp_path / "later" / "state.pt")
        assert not list((tmp_path / "later").iterdir())
    snapshot.close()
    # Training goes on.
    with torch.no_grad():
        state["weight"].zero_()
        state["view"].fill_(-1)
        state["half"].zero_()
    state["nested"][0]["params"].append(2)
    state["shared"].tensor = None
    torch.rand(3), random.random(), np.random.rand()
    thread = threading.Thread(target=snapshot.write)
    thread.start()
    thread.join()
    later = (tmp_path / "later" / "state.pt").read_bytes()
    assert later == (tmp_path / "now" / "state.pt").read_bytes()
    found = torch.load(tmp_path / "later" / "state.pt", weights_only=False)
    assert found["weight"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    found["weight"].data[0, 2] = 50  # memory that was shared still is
    assert found["shared"].tensor[0] == 50 and found["tied"] is found["weight"]


def test_torch_save_is_itself_again_after_a_snapshot_that_failed(tmp_path):
    snapshot = Snapshot(torch.device("cpu"))
    save = torch.save
    with pytest.raises(OSError, match="no room"), snapshot.taking_saves():
        raise OSError("no room")
    assert torch.save is save


# One rank


class Engine:
    """Stands for Accelerate: one weight, whose file says how it was then."""

    def __init__(self) -> None:
        self.weight = torch.zeros(100)
        self.is_main_process = True
        self.device = torch.device("cpu")
        # A thread writes only while this is set.
        self.may_write = threading.Event()
        self.may_write.set()

    def save_state(self, folder: str, safe_serialization: bool) -> None:
        Path(folder).mkdir()
        torch.save({"weight": self.weight}, Path(folder) / "weights.bin")

    def unwrap_model(self, model: Any) -> Any:
        return model

    def reduce(self, sums: torch.Tensor, how: str) -> torch.Tensor:
        return sums


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()

    def write(model: Any, tokenizer: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
        assert engine.may_write.wait(60)
        folder.mkdir()
        torch.save(weights, folder / "model.bin")

    def copied(accelerator: Any, model: Any, copy: Any) -> dict[str, torch.Tensor]:
        return {"weight": copy(engine.weight)}

    monkeypatch.setattr(saving, "write_stock_checkpoint", write)
    monkeypatch.setattr(saving, "stock_state_dict", copied)
    monkeypatch.setattr(saving, "gather_object", lambda objects: objects)
    return engine


class Run:
    """A writer, what it has announced, and a step as a recipe makes it."""

    def __init__(self, engine: Engine, folder: Path, total_limit: int = 2, **options: Any) -> None:
        self.engine = engine
        self.folder = folder
        self.announced: list[str] = []
        self.writer = CheckpointWriter(
            engine,  # type: ignore[arg-type]
            folder,
            total_limit=total_limit,
            announce=lambda path: self.announced.append(path.name),
            **options,
        )

    def step(self) -> None:
        sums = torch.tensor(self.writer.progress())
        self.engine.weight += 1
        self.writer.agree(sums)

    def save(self, step: int, *, wait: bool = True, **options: Any) -> list[str]:
        self.writer.save(None, None, step=step, state={}, wait=wait, **options)  # type: ignore
        return self.kept()

    def kept(self) -> list[str]:
        return [path.name.removeprefix("step-") for path in list_checkpoints(self.folder)]


def weight_of(checkpoint: Path) -> set[float]:
    check_files(checkpoint)
    files = (checkpoint / "engine/weights.bin", checkpoint / "model/model.bin")
    return {float(value) for file in files for value in torch.load(file)["weight"]}


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(engine, tmp_path):
    run = Run(engine, tmp_path)
    run.step()
    engine.may_write.clear()
    run.save(1, wait=False)
    for _ in range(5):
        run.step()
    assert run.announced == [] and run.kept() == [] and find_checkpoint(tmp_path, "auto") is None
    engine.may_write.set()
    steps = 0
    while not run.announced:
        threading.Event().wait(0.005)
        run.step()
        steps += 1
        assert steps < 10_000
    assert run.announced == ["step-1"] and run.kept() == ["1"]
    assert weight_of(tmp_path / "checkpoints/step-1") == {1.0}
    assert run.writer.progress() == (0.0, 0.0)


def test_save_while_one_is_under_way_waits_for_it_first(engine, tmp_path):
    run = Run(engine, tmp_path)
    engine.may_write.clear()
    run.save(10, wait=False)
    threading.Timer(0.2, engine.may_write.set).start()
    run.save(20, wait=False)
    assert run.announced == ["step-10"]
    run.writer.wait()
    assert run.announced == ["step-10", "step-20"] and run.kept() == ["10", "20"]
    run.writer.wait()  # nothing is under way
    assert run.announced == ["step-10", "step-20"]


def test_waiting_for_a_disk_that_does_nothing_says_no_beat_so_that_the_watchdog_ends_it(
    engine, tmp_path, monkeypatch
):
    run = Run(engine, tmp_path)
    engine.may_write.clear()
    run.save(10, wait=False)
    beats, looks = [], []
    monkeypatch.setattr(saving, "beat", beats.append)
    monkeypatch.setattr(saving, "LOOK_SECONDS", 0.01)

    def reduce(sums: torch.Tensor, how: str) -> torch.Tensor:
        looks.append(len(beats))
        if len(looks) == 20:
            engine.may_write.set()
        return sums

    monkeypatch.setattr(engine, "reduce", reduce)
    run.writer.wait()
    assert len(looks) > 20 and looks[1:20] == [1] * 19 and len(beats) <= 3


def test_rotation_keeps_the_newest_the_best_and_the_milestones(engine, tmp_path):
    run = Run(engine, tmp_path, milestone_steps=30)
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.2, 60: 2.1}
    for step, loss in losses.items():
        kept = run.save(step, eval_loss=loss)
    assert kept == ["20", "30", "50", "60"]  # 20: best; 30 and 60: milestones; 50, 60: newest
    assert run.save(70, eval_loss=1.0) == ["30", "60", "70"]


def test_a_held_out_loss_that_is_no_number_is_never_the_best(engine, tmp_path):
    run = Run(engine, tmp_path, total_limit=1)
    for step, loss in {10: math.nan, 20: 2.0, 30: math.inf, 40: 3.0}.items():
        kept = run.save(step, eval_loss=loss)
    assert kept == ["20", "40"]


def test_save_replaces_a_damaged_later_checkpoint_instead_of_counting_it(engine, tmp_path):
    run = Run(engine, tmp_path, total_limit=1)
    run.save(10)
    Run(engine, tmp_path).save(20)
    flip_a_byte(tmp_path / "checkpoints/step-20/engine/weights.bin")
    assert find_checkpoint(tmp_path, "auto").name == "step-10"
    assert run.save(15) == ["15"]
    assert find_checkpoint(tmp_path, "auto").name == "step-15"


@pytest.mark.parametrize(
    "at",
    ["write_file_list", "flush_directory", "write_stock_checkpoint", "save_engine_state"],
)
def test_failed_save_leaves_no_half_checkpoint_and_the_earlier_ones_whole(
    engine, tmp_path, monkeypatch, at
):
    run = Run(engine, tmp_path)
    run.save(10)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, at, full)
        with pytest.raises(OSError, match=r"step 20 could not be written .*No space left.*GiB"):
            run.save(20)
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
    found = find_checkpoint(tmp_path, "auto")
    # Where only the flush of the folder failed, the new one has its name already and is whole.
    assert found.name == ("step-20" if at == "flush_directory" else "step-10")
    assert run.announced == ["step-10"]
    assert run.save(30)[-1] == "30"


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    engine, tmp_path, monkeypatch, capsys
):
    run = Run(engine, tmp_path, total_limit=1)
    run.save(10)
    rmtree = checkpoint.shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if "step-10" in path.name and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path / "model"))
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        assert run.save(20) == ["20"] and run.save(30) == ["30"]
    assert run.announced == ["step-10", "step-20", "step-30"]
    warning = capsys.readouterr().err
    assert "warning: " in warning and "step-10" in warning and "the next save tries" in warning
    assert run.save(40) == ["40"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-40"]


def test_failure_of_a_save_under_way_ends_a_later_step(engine, tmp_path, monkeypatch):
    run = Run(engine, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_file_list", full)
    run.save(10, wait=False)
    with pytest.raises(OSError, match=r"step 10 could not be written .*No space left") as failed:
        for _ in range(10_000):
            threading.Event().wait(0.001)
            run.step()
    assert str(failed.value.__cause__) == "[Errno 28] No space left on device"


# Several ranks


def test_rank_0_completes_a_checkpoint_only_once_all_ranks_have_written_theirs(engine, tmp_path):
    run = Run(engine, tmp_path)
    others = 1.0  # the other rank's parts
    run.save(10, wait=False)

    def step() -> tuple[float, float]:
        threading.Event().wait(0.01)
        own = run.writer.progress()
        run.writer.agree(torch.tensor(own) + torch.tensor([others, 0.0]))
        return own

    for _ in range(10_000):
        if (own := step()) == (1.0, 0.0):
            break
    for _ in range(30):
        own = step()
    assert own == (1.0, 0.0) and run.kept() == []  # its files are written, its list is not
    others = 0.0
    for _ in range(10_000):
        if step() == (0.0, 0.0):
            break
    assert run.announced == ["step-10"] and run.kept() == ["10"]


class OnAGpu:
    """Sums that are read one step late, as those on a GPU are."""

    is_cuda = True

    def __init__(self, sums: tuple[float, float]) -> None:
        self.sums = sums

    def read(self) -> list[float]:
        return list(self.sums)


def test_sums_of_the_step_before_are_as_good_but_not_those_of_the_save_before(
    engine, tmp_path, monkeypatch
):
    monkeypatch.setattr(saving, "OnTheWay", lambda sums: sums)
    run = Run(engine, tmp_path)
    for number in (1, 2):
        engine.may_write.clear()
        run.save(number, wait=False)
        for _ in range(5):
            run.writer.agree(OnAGpu(run.writer.progress()))
        assert len(run.announced) == number - 1
        engine.may_write.set()
        for _ in range(10_000):
            run.writer.agree(OnAGpu(run.writer.progress()))
            if len(run.announced) == number:
                break
            threading.Event().wait(0.001)
    assert run.announced == ["step-1", "step-2"] and run.kept() == ["1", "2"]
