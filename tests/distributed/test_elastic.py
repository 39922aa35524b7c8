"""A run goes on as if nothing had happened when its ranks or its ZeRO stage change on the way."""

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mini_llm.training.optimizer import learning_rate_at
from tests.conftest import TinyData
from tests.distributed.test_engines import MODELS, STEPS, assert_close, plain_loop
from tests.launching import TINY_RUN, facts, launch, metrics, series


@pytest.fixture(scope="module")
def reference_of(tiny_data: TinyData):
    """model -> the metrics of a plain loop in one process, which nothing interrupts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launched ranks
    yield cache(lambda model: plain_loop(tiny_data, model))
    torch.set_num_threads(threads)


def leg(
    run: Path,
    tiny_data: TinyData,
    model: str,
    config: str,
    processes: int,
    until: int,
    *flags: str,
    check: bool = True,
) -> str:
    """Start or continue ``run`` under a config, until a step; return what it printed."""
    stop = [] if until == STEPS else ["--stop_at_step", str(until)]
    no_deepspeed = ["--deepspeed", "none"] if config == "single" else []
    done = launch(
        *TINY_RUN,
        *tiny_data.flags,
        *("--output_dir", str(run), "--model", model),
        *("--model_overrides", json.dumps(MODELS[model])),
        *stop,
        *no_deepspeed,
        *flags,
        config=config,
        processes=processes,
        check=check,
    )
    if check:
        ran = facts(run)
        stage = int(config[4]) if config.startswith("zero") else None
        assert (ran["world_size"], ran["zero_stage"]) == (processes, stage)
        assert [m["step"] for m in metrics(run)] == list(range(1, until + 1))
        # What was converted is gone, and only checkpoints are left.
        left = {path.name.partition("-")[0] for path in (run / "checkpoints").iterdir()}
        assert left == {"step"}
    return done.stdout


def assert_continues(run: Path, reference: dict[str, list[float]]) -> None:
    """Losses, gradient norms and expert loads of every step are those of the reference."""
    assert len(reference["train/loss"]) == STEPS
    assert_close(run, reference, rtol=1e-5)
    # The batch and the schedule do not follow the number of ranks.
    for step in metrics(run):
        rate = learning_rate_at(
            step["step"], peak=3e-3, max_steps=STEPS, warmup_steps=1, min_lr_ratio=0.1
        )
        assert step["train/lr"] == pytest.approx(rate)
        assert 0.98 < step["train/tokens"] / (1024 * step["step"]) <= 1  # some rows are padded


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_2_then_1_then_4_ranks_continue_an_expert_model_as_the_uninterrupted_run(
    reference_of, tiny_data, tmp_path
):
    model = "mini_deepseekv3_tiny"  # with bias updates, balance loss and MTP
    leg(tmp_path, tiny_data, model, "zero1", 2, 6)
    checkpoint = tmp_path / "checkpoints" / "step-6"
    before = digests(checkpoint)
    # As left by a run that was killed while it converted.
    stale = tmp_path / "checkpoints" / ".universal-step-6"
    (stale / "pytorch_model" / "zero").mkdir(parents=True)
    (stale / "converted").touch()
    leg(tmp_path, tiny_data, model, "zero1", 1, 12)
    assert digests(checkpoint) == before
    leg(tmp_path, tiny_data, model, "zero1", 4, STEPS)
    assert_continues(tmp_path, reference_of(model))


@pytest.mark.slow
def test_zero_1_then_3_then_2_continue_as_the_uninterrupted_run(reference_of, tiny_data, tmp_path):
    run = tmp_path / "c++ [runs]"  # characters of regular expressions and patterns
    model = "mini_llama3_tiny"
    leg(run, tiny_data, model, "zero1", 2, 6)
    leg(run, tiny_data, model, "zero3", 2, 12)
    leg(run, tiny_data, model, "zero2", 2, STEPS)
    assert_continues(run, reference_of(model))


@pytest.mark.slow
def test_ddp_continues_as_a_single_process_and_refuses_to_as_zero(
    reference_of, tiny_data, tmp_path
):
    model = "mini_llama3_tiny"
    leg(tmp_path, tiny_data, model, "ddp", 2, 10)
    config = (tmp_path / "config.yaml").read_text()
    text = leg(tmp_path, tiny_data, model, "zero1", 1, STEPS, check=False)
    assert (tmp_path / "config.yaml").read_text() == config  # the run's, not the refused one's
    (sentence,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "was written by DistributedDataParallel on 2 rank(s)" in sentence
    assert "DeepSpeed ZeRO-1 on 1 rank(s) in fp32 cannot continue" in sentence
    assert f"--model {tmp_path}/checkpoints/step-10/model" in sentence
    leg(tmp_path, tiny_data, model, "single", 1, STEPS)
    assert_continues(tmp_path, reference_of(model))


# Each ordered pair of stages once, each time with other ranks.
EVERY_PAIR = [
    *[("zero1", 2), ("zero2", 1), ("zero3", 4), ("zero1", 2), ("zero3", 1), ("zero2", 4)],
    ("zero1", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "legs"),
    [("mini_deepseekv3_tiny", EVERY_PAIR), ("mini_qwen3_next_tiny", EVERY_PAIR[:4])],
)
def test_every_change_of_stage_with_a_change_of_ranks_continues(
    model, legs, reference_of, tiny_data, tmp_path
):
    for i, (config, processes) in enumerate(legs):
        until = STEPS if i == len(legs) - 1 else 2 + 3 * i
        leg(tmp_path, tiny_data, model, config, processes, until)
    assert_continues(tmp_path, reference_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3", "ddp"])
def test_2_then_1_then_4_ranks_continue_at_every_stage(config, reference_of, tiny_data, tmp_path):
    model = "mini_deepseekv3_tiny"
    leg(tmp_path, tiny_data, model, config, 2, 6)
    leg(tmp_path, tiny_data, model, "single" if config == "ddp" else config, 1, 12)
    leg(tmp_path, tiny_data, model, config, 4, STEPS)
    assert_continues(tmp_path, reference_of(model))


@pytest.mark.slow
def test_offload_is_one_stage_of_many(reference_of, tiny_data, tmp_path):
    model = "mini_llama3_tiny"
    leg(tmp_path, tiny_data, model, "zero2_offload", 2, 6)
    leg(tmp_path, tiny_data, model, "zero3_offload", 1, 12)
    leg(tmp_path, tiny_data, model, "zero1", 2, STEPS)
    assert_continues(tmp_path, reference_of(model))


@pytest.mark.slow
def test_bf16_continues_from_fp32_master_weights(tiny_data, tmp_path):
    model, whole, changed = "mini_llama3_tiny", tmp_path / "whole", tmp_path / "changed"
    bf16 = ("--bf16", "true")
    leg(whole, tiny_data, model, "zero1", 2, STEPS, *bf16)
    leg(changed, tiny_data, model, "zero1", 2, 6, *bf16)
    leg(changed, tiny_data, model, "zero1", 1, 12, *bf16)
    leg(changed, tiny_data, model, "zero2", 2, STEPS, *bf16)
    ours, theirs = series(changed, "train/loss"), series(whole, "train/loss")
    # Measured 4e-5; 8e-4 where the master weights were rounded to bf16 once, at step 12.
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)
