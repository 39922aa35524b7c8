"""A gradient that is not finite, on one rank: what each policy makes of it, under each engine."""

import json
import math
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import TinyData
from tests.launching import (
    REPOSITORY,
    TINY_RUN,
    launch_command,
    launch_environment,
    metrics,
    series,
)

BAD_STEP = 7
CALLS_A_STEP = 2  # 16 rows, 2 ranks of 4
MODEL = ["--model", "mini_deepseekv3_tiny", "--model_overrides", '{"num_hidden_layers": 2}']


def run(
    tiny_data: TinyData,
    output_dir: Path,
    config: str,
    factor: str,
    *flags: str,
    bad_step: int = BAD_STEP,
) -> str:
    *launcher, _ = launch_command(config=config)
    command = [*launcher, "tests/distributed/bad_gradient.py"]
    command += [str((bad_step - 1) * CALLS_A_STEP), factor, *TINY_RUN, *tiny_data.flags, *MODEL]
    command += ["--output_dir", str(output_dir), "--max_steps", "12", *flags]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return f"{done.stdout}\nstatus {done.returncode}"


@pytest.mark.parametrize(
    ("config", "bf16"),
    [
        ("zero1", "false"),
        pytest.param("zero1", "true", marks=pytest.mark.slow),  # only the kernel looks at the norm
        pytest.param("ddp", "false", marks=pytest.mark.slow),
        pytest.param("zero0", "false", marks=pytest.mark.slow),
        pytest.param("zero2", "false", marks=pytest.mark.slow),
        pytest.param("zero2", "true", marks=pytest.mark.slow),
        pytest.param("zero3", "false", marks=pytest.mark.slow),
    ],
)
def test_skipped_step_changes_no_weight_and_is_counted(tiny_data, tmp_path, config, bf16):
    output = run(
        tiny_data,
        *(tmp_path / "run", config, "nan", "--bad_step_policy", "skip"),
        *("--save_steps", "1", "--save_total_limit", "20", "--bf16", bf16),
    )
    assert output.endswith("status 0"), output
    assert f"step {BAD_STEP} went wrong: its gradient norm is" in output
    assert series(tmp_path / "run", "train/bad_steps") == [0] * 6 + [1] * 6
    bad = metrics(tmp_path / "run")[BAD_STEP - 1]
    assert bad["step"] == BAD_STEP and bad["train/loss"] is None and bad["train/grad_norm"] is None
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    weights = [
        load_file(tmp_path / f"run/checkpoints/step-{step}/model/model.safetensors")
        for step in range(BAD_STEP - 2, BAD_STEP + 2)
    ]
    changed = [
        [name for name in later if not later[name].equal(earlier[name])]
        for earlier, later in pairwise(weights)
    ]
    assert changed[0] and not changed[1] and changed[2]  # router biases included
    assert all(tensor.isfinite().all() for tensor in weights[-1].values())
    assert math.isfinite(series(tmp_path / "run", "train/loss")[-1])


@pytest.mark.slow
def test_stop_ends_at_the_step_and_leaves_the_checkpoints(tiny_data, tmp_path):
    output = run(tiny_data, tmp_path / "run", "zero1", "inf", "--save_steps", "3")
    assert not output.endswith("status 0")
    assert f"step {BAD_STEP} went wrong" in output
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-3", "step-6"}


@pytest.mark.parametrize(
    ("factor", "bad_step", "flags"),
    # A loss a thousand times as large is no error of arithmetic: it is seen as a jump.
    [
        ("nan", 7, []),
        pytest.param("1000", 14, ["--max_loss_jump", "3"], marks=pytest.mark.slow),
    ],
)
def test_rewind_goes_back_to_the_checkpoint_and_on_with_other_rows(
    tiny_data, tmp_path, factor, bad_step, flags
):
    output = run(
        tiny_data,
        *(tmp_path / "run", "zero1", factor, "--bad_step_policy", "rewind"),
        *("--save_steps", "5", "--save_total_limit", "20", "--max_steps", "18", *flags),
        bad_step=bad_step,
    )
    assert output.endswith("status 0"), output
    undone = bad_step % 5
    steps = metrics(tmp_path / "run")
    assert [m["step"] for m in steps] == list(range(1, 19))
    kept = bad_step - undone
    assert [m["train/bad_steps"] for m in steps] == [0] * kept + [1] * (18 - kept)
    state = json.loads((tmp_path / "run/checkpoints/step-18/state.json").read_text())
    # The rows of 18 steps, and of those that were undone.
    assert state["stream"]["rows"] == (18 + undone) * 16
    assert state["bad_steps"] == {"count": 1, "rewinds": 1}
    tokens = [0.0, *(m["train/tokens"] for m in steps)]
    assert all(0 < after - before <= 1024 for before, after in pairwise(tokens))  # 16 rows of 64
