"""The faults of DeepSpeed that this project mends are still there.

A test that fails here is good news: the installed DeepSpeed does better, and the mend that the
message names can go.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import REPOSITORY, launch_command, launch_environment

REPRODUCTIONS = Path(__file__).with_name("deepspeed_reproductions.py")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reproductions gave: in a process of their own, for they start a process group."""
    done = subprocess.run(
        [sys.executable, str(REPRODUCTIONS), str(tmp_path_factory.mktemp("deepspeed"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def facts_of_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of expert_reproductions.py, on two ranks."""
    folder = tmp_path_factory.mktemp("experts")
    *launcher, _ = launch_command(config="zero1", processes=2)
    done = subprocess.run(
        [*launcher, str(REPRODUCTIONS.with_name("expert_reproductions.py")), str(folder)],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return found


def test_the_converter_wants_state_that_dense_zero_1_and_2_do_not_save(facts):
    assert "universal_checkpoint_info state is missing" in facts["converting dense ZeRO-1"], (
        "mended: drop inject_missing_state from engine_state._convert"
    )


def test_the_converter_takes_its_path_for_a_regular_expression(facts):
    assert "Cannot parse dp_rank" in facts["converting to a path with +"], (
        "mended: drop engine_state._plain_name once loading is mended too"
    )


def test_loading_takes_its_path_for_a_glob_pattern(facts):
    assert "AssertionError" in facts["loading from a path with ["], (
        "mended: drop engine_state._plain_name once the converter is mended too"
    )


def test_a_universal_load_leaves_buffers_as_initialised(facts):
    assert facts["buffer after loading"] == [0.0, 0.0], (  # 7 was saved
        "mended: drop buffers.pt from engine_state._complete and _load_universal"
    )


def test_a_zero_3_universal_load_shares_one_step_over_all_groups(facts):
    assert facts["step tensors of ZeRO-3"] == 1, (
        "mended: drop the cloning of `step` from engine_state._load_universal (not its device)"
    )


def test_a_zero_3_universal_load_gives_all_groups_the_settings_of_group_0(facts):
    assert facts["weight decay of ZeRO-3"] == [0.1, 0.1], (  # 0.1 and 0.0 were saved
        "mended: say so in engine_state._own_settings, which stays for changed arguments"
    )


@pytest.mark.parametrize(
    ("obstacle", "error"),
    [
        ("ZeRO-1 to 3, file name", "AssertionError"),
        ("ZeRO-1 to 3, optimizer", "KeyError: 'optimizer_state_dict'"),
        ("ZeRO-3 to 1, file name", "AssertionError"),
        ("ZeRO-3 to 1, optimizer", "Empty ds_version"),
        ("ZeRO-3 to 1, parameters", "IndexError: too many indices"),
        ("ZeRO-3 to 1, step", "KeyError: 'step'"),
    ],
)
def test_a_converted_checkpoint_loads_only_into_the_stage_that_wrote_it(facts, obstacle, error):
    assert error in facts[obstacle], f"mended ({obstacle}): drop it from engine_state._complete"


def test_a_universal_load_leaves_out_groups_that_the_checkpoint_has_not(facts):
    loaded = facts["loaded with a group more"]
    assert loaded["found"] == [1.0, 1.0] != loaded["expected"], (
        "mended: write as many groups as the checkpoint has in engine_state._complete"
    )


def test_zero_1_divides_gradients_of_spread_experts_by_too_few_ranks_unless_contiguous(
    facts_of_experts,
):
    norm = facts_of_experts["norm"]
    assert facts_of_experts["norm, contiguous"] == pytest.approx(norm, rel=1e-6)
    assert facts_of_experts["norm, not contiguous"] > 1.1 * norm, (
        "mended: drop contiguous_gradients from engine.fill_deepspeed_config"
    )


def test_zero_3_does_not_save_frozen_experts_that_are_spread(facts_of_experts):
    assert facts_of_experts["saving, ZeRO-1"] == "done"
    assert "does not support frozen expert parameters" in facts_of_experts["saving, ZeRO-3"], (
        "mended: frozen experts may be spread too in expert_parallel.spread_experts"
    )
