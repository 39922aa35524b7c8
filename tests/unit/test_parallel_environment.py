"""Launcher requests, stale build locks, DeepSpeed configs that are refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from mini_llm.models import build_model
from mini_llm.parallel import engine, environment
from mini_llm.parallel.engine import fill_deepspeed_config
from mini_llm.parallel.environment import (
    LaunchRequest,
    _accelerate_arguments,
    clear_stale_build_locks,
    launch_request,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DS_CONFIGS = sorted(REPOSITORY.glob("ds_configs/*.json"))


def test_a_lock_that_nobody_holds_is_removed_and_a_held_one_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held = tmp_path / "op_a" / "lock", tmp_path / "op_b" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir()
        lock.touch()
    with held.open():
        assert clear_stale_build_locks() == [stale]
        assert held.exists() and not stale.exists()
    assert clear_stale_build_locks() == [held]


def test_no_extensions_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert clear_stale_build_locks() == []


@pytest.mark.parametrize(
    "start",
    [
        ["python", "/venv/bin/accelerate", "launch"],
        ["python", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["/venv/bin/accelerate", "launch"],
    ],
)
def test_every_way_to_call_accelerate_launch_is_recognised(start):
    assert _accelerate_arguments([*start, "--num_processes", "2", "x.py"]) == [
        *("--num_processes", "2", "x.py")
    ]


def test_other_parents_are_not_accelerate():
    assert _accelerate_arguments(["torchrun", "--nproc_per_node", "2", "x.py"]) is None
    assert _accelerate_arguments(["accelerate", "config"]) is None
    assert _accelerate_arguments([]) is None


class _Process:
    """A stand-in for psutil.Process with one parent."""

    command: list[str] = []

    def parents(self):
        return [self]

    def cmdline(self):
        return self.command


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "3"],
            LaunchRequest(3, "MULTI_GPU", False),
        ),
        (["--config_file", "accelerate_configs/cpu.yaml"], LaunchRequest(2, "MULTI_GPU", True)),
        (["--config_file", "accelerate_configs/zero1.yaml"], LaunchRequest(1, "DEEPSPEED", False)),
        (["--config_file", "accelerate_configs/single.yaml"], LaunchRequest(1, "NO", False)),
        (["--num_processes", "2"], LaunchRequest(2, None, False)),
        (["--multi_gpu", "--num_processes", "2"], LaunchRequest(2, "MULTI_GPU", False)),
    ],
)
def test_the_launchers_request_is_read_from_its_command_line(
    flags, expected, monkeypatch, tmp_path
):
    import psutil
    from accelerate.commands.config import config_args

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    process = _Process()
    process.command = ["python", "accelerate", "launch", *flags, "recipes/pretrain.py", "--x", "1"]
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert launch_request() == expected


def test_zero1_leaves_fp32_gradient_accumulation_out():
    """With it and bf16, deepspeed takes BF16_Optimizer, with whole fp32 gradients on every rank."""
    accumulate = {
        path.stem: json.loads(path.read_text()).get("data_types", {}).get("grad_accum_dtype")
        for path in DS_CONFIGS
    }
    whole = {"zero0": None, "zero1": None, "zero2": "fp32", "zero3": "fp32"}
    assert accumulate == whole | {"zero2_offload": "fp32", "zero3_offload": "fp32"}


def test_a_deepspeed_config_that_contradicts_the_run_is_refused():
    arguments = {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "bf16": False}
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu to 9"):
        fill_deepspeed_config(
            {"train_micro_batch_size_per_gpu": 9, "zero_optimization": {"stage": 1}},
            micro_batch_size=2,
            **arguments,
        )
    with pytest.raises(ValueError, match=r"leaves zero_optimization\.reduce_bucket_size"):
        fill_deepspeed_config(
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            micro_batch_size=2,
            **arguments,
        )


@pytest.mark.parametrize(
    ("asked", "bf16", "said"),
    [
        ("bf16", False, "mixed_precision bf16, but --bf16 is false; add --bf16 true"),
        ("fp16", True, "mixed_precision fp16, not done here; give"),
        ("fp8", False, "mixed_precision fp8, not done here; give"),
        ("bf16", True, None),
        ("no", True, None),  # as accelerate_configs/ddp.yaml has it
        ("no", False, None),
    ],
)
def test_a_precision_of_the_accelerate_config_that_the_run_has_not_is_refused(
    monkeypatch, asked, bf16, said
):
    class Started(Exception):
        """The engine."""

    def start(**arguments: Any) -> None:
        assert arguments["mixed_precision"] == ("bf16" if bf16 else "no")
        raise Started

    monkeypatch.setattr(engine, "Accelerator", start)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    expected = pytest.raises(Started) if said is None else pytest.raises(RuntimeError, match=said)
    with expected:
        engine.build_accelerator("none", bf16=bf16)


def test_a_one_process_job_is_described_without_touching_what_a_launcher_set(monkeypatch):
    variables = {"MASTER_ADDR": "10.0.0.1"}
    monkeypatch.setattr(environment.os, "environ", variables)
    environment.join_as_single_process()
    assert variables["WORLD_SIZE"] == "1" and variables["RANK"] == variables["LOCAL_RANK"] == "0"
    assert variables["MASTER_ADDR"] == "10.0.0.1" and int(variables["MASTER_PORT"]) > 0


def test_gradient_checkpointing_by_its_old_name_warns_nobody(monkeypatch):
    monkeypatch.setattr(environment, "clear_stale_build_locks", list)
    model = build_model("mini_llama3_tiny", num_hidden_layers=1, vocab_size=64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment.prepare_environment()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing and not caught
