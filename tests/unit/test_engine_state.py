"""Which engine continues what another wrote, and what happens when the conversion fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mini_llm.parallel import engine_state, watchdog
from mini_llm.parallel.engine_state import (
    EngineMismatch,
    Experts,
    check_engine,
    rename_experts,
)


def description(kind: str, stage: int | None = None, ranks: int = 2) -> dict[str, object]:
    return {
        "kind": kind,
        "zero_stage": stage,
        "world_size": ranks,
        "bf16": False,
        "expert_parallel_size": 1,
    }


WHOLE = Experts(shapes={}, spread=False)
ZERO0, ZERO1, ZERO3 = (description("deepspeed", stage) for stage in (0, 1, 3))
DDP, SINGLE = description("ddp"), description("single", ranks=1)


@pytest.mark.parametrize(
    ("written_by", "here"),
    [
        (ZERO1, ZERO3),
        (ZERO3, description("deepspeed", 1, ranks=8)),
        (ZERO0, description("deepspeed", 0, ranks=8)),
        (DDP, SINGLE),
        (SINGLE, DDP),
    ],
)
def test_engines_of_one_family_continue_each_other(written_by, here, tmp_path):
    check_engine(written_by, here, tmp_path)


@pytest.mark.parametrize(
    ("written_by", "here", "names"),
    [
        (DDP, ZERO1, ["DistributedDataParallel on 2", "DeepSpeed ZeRO-1 on 2", "resume with DDP"]),
        (ZERO1, SINGLE, ["DeepSpeed ZeRO-1 on 2", "plain PyTorch on 1", "any of ZeRO-1, 2 and 3"]),
        (ZERO0, ZERO1, ["DeepSpeed ZeRO-0 on 2", "DeepSpeed ZeRO-1 on 2", "resume with ZeRO-0"]),
        (ZERO1, ZERO0, ["DeepSpeed ZeRO-1 on 2", "DeepSpeed ZeRO-0 on 2", "any of ZeRO-1"]),
        (ZERO0, DDP, ["DeepSpeed ZeRO-0 on 2", "DistributedDataParallel on 2", "with ZeRO-0"]),
    ],
)
def test_other_engines_are_refused_in_a_sentence_that_says_what_works(written_by, here, names):
    with pytest.raises(EngineMismatch) as refused:
        check_engine(written_by, here, Path("out/checkpoints/step-5/engine"))
    for text in [*names, "--model out/checkpoints/step-5/model"]:
        assert text in str(refused.value)


def test_a_load_keeps_the_weight_decay_and_the_clipping_of_this_run():
    def build(weight_decay: float) -> torch.optim.AdamW:
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=weight_decay)
        optimizer.step()
        return optimizer

    saved, ours = build(0.5).state_dict(), build(0.1)
    zero = SimpleNamespace(clip_grad=1.0)
    with engine_state._own_settings(SimpleNamespace(optimizer=zero), ours):
        ours.load_state_dict(saved)
        zero.clip_grad = 3.0
    assert ours.param_groups[0]["weight_decay"] == 0.1 and zero.clip_grad == 1.0


def rank(number: int) -> SimpleNamespace:
    """As much of an Accelerator as waiting needs."""
    return SimpleNamespace(is_main_process=number == 0, wait_for_everyone=lambda: None)


def test_a_failed_conversion_ends_every_rank_and_frees_the_disk(tmp_path, monkeypatch):
    def fill_the_disk(folder: Path, universal: Path, experts: Experts) -> None:
        universal.mkdir()
        (universal / "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(engine_state, "_convert", fill_the_disk)
    universal = tmp_path / ".universal-step-5"
    with pytest.raises(OSError, match="No space left"):
        engine_state._convert_once(rank(0), tmp_path / "engine", universal, WHOLE)
    assert not (universal / "half").exists()
    with pytest.raises(RuntimeError, match="rank 0 could not convert"):
        engine_state._convert_once(rank(1), tmp_path / "engine", universal, WHOLE)


def test_a_conversion_may_take_longer_than_the_watchdog_waits(tmp_path, monkeypatch):
    resting = []

    def convert(folder: Path, universal: Path, experts: Experts) -> None:
        resting.append(watchdog._progress.at is None)
        universal.mkdir()

    monkeypatch.setattr(engine_state, "_convert", convert)
    watchdog.beat("loading the checkpoint")
    engine_state._convert_once(rank(0), tmp_path / "engine", tmp_path / "universal", WHOLE)
    assert resting == [True] and watchdog._progress.at is not None


def test_experts_go_from_their_stock_names_to_the_spread_ones_and_back(tmp_path):
    """Also from the flat tensors that ZeRO-3 writes."""
    E, F, D = 4, 3, 2
    name = "model.layers.1.mlp.experts"
    whole = {"gate_up_proj": torch.randn(E, 2 * F, D), "down_proj": torch.randn(E, D, F)}
    kinds = ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt")
    for weight, tensor in whole.items():
        folder = tmp_path / f"{name}.{weight}"
        folder.mkdir()
        torch.save(torch.tensor(7.0), folder / "step.pt")
        for kind in kinds:
            torch.save({"param": (tensor + kinds.index(kind)).flatten()}, folder / kind)

    def tensor_of(weight: str, kind: str) -> torch.Tensor:
        return torch.load(tmp_path / f"{name}.{weight}" / kind)["param"]

    shapes = {name: (E, F, D)}
    rename_experts(tmp_path, Experts(shapes, spread=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.experts.{weight}" for weight in ("w1", "w2", "w3")
    ]
    assert torch.equal(tensor_of("experts.w1", "fp32.pt"), whole["gate_up_proj"][:, :F])
    rename_experts(tmp_path, Experts(shapes, spread=True))  # nothing is left to do
    rename_experts(tmp_path, Experts(shapes, spread=False))
    for weight, tensor in whole.items():
        for added, kind in enumerate(kinds):
            assert torch.equal(tensor_of(weight, kind), tensor + added)
        assert torch.load(tmp_path / f"{name}.{weight}" / "step.pt") == 7.0
