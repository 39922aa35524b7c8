"""Launcher requests, stale build locks, DeepSpeed configs."""

import json
from pathlib import Path

import pytest

from mini_llm.parallel import environment
from mini_llm.parallel.engine import fill_deepspeed_config
from mini_llm.parallel.environment import (
    LaunchRequest,
    _accelerate_arguments,
    clear_stale_build_locks,
    launch_request,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DS_CONFIGS = sorted(REPOSITORY.glob("ds_configs/*.json"))
ACCELERATE_CONFIGS = sorted(REPOSITORY.glob("accelerate_configs/*.yaml"))


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


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_auto_of_a_deepspeed_config_comes_from_the_runs_arguments(path, bf16, monkeypatch):
    monkeypatch.setattr("mini_llm.parallel.engine.world_size", lambda: 4)
    config = json.loads(path.read_text())
    stage = int(path.stem[4])
    if stage == 0 and bf16:
        with pytest.raises(ValueError, match="--bf16 true with ZeRO-0"):
            fill_deepspeed_config(
                config,
                micro_batch_size=3,
                gradient_accumulation_steps=5,
                max_grad_norm=1,
                bf16=True,
            )
        return
    filled = fill_deepspeed_config(
        config, micro_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7, bf16=bf16
    )
    assert filled["train_micro_batch_size_per_gpu"] == 3
    assert filled["gradient_accumulation_steps"] == 5
    assert filled["train_batch_size"] == 3 * 5 * 4
    assert filled["bf16"]["enabled"] is bf16
    # Under ZeRO-0 the step clips by itself, see optimizer_step().
    assert filled["gradient_clipping"] == (0.0 if stage == 0 else 0.7)
    assert filled["zero_optimization"]["stage"] == stage
    assert "auto" not in json.dumps(filled)
    assert json.loads(path.read_text()) == config  # the file's own copy is untouched


def test_zero1_leaves_fp32_gradient_accumulation_out():
    """With it and bf16, deepspeed 0.19.8's first step has a wrong gradient (its BF16_Optimizer)."""
    accumulate = {
        path.stem: json.loads(path.read_text()).get("data_types", {}).get("grad_accum_dtype")
        for path in DS_CONFIGS
    }
    assert accumulate == {"zero0": None, "zero1": None, "zero2": "fp32", "zero3": "fp32"}


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


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_every_accelerate_config_is_valid_and_names_files_that_exist(path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    file = config.deepspeed_config.get("deepspeed_config_file")
    assert (file is not None) == (str(config.distributed_type).endswith("DEEPSPEED"))
    if file is not None:
        assert (REPOSITORY / file).is_file() and Path(file).stem == path.stem


def test_a_one_process_job_is_described_without_touching_what_a_launcher_set(monkeypatch):
    variables = {"MASTER_ADDR": "10.0.0.1"}
    monkeypatch.setattr(environment.os, "environ", variables)
    environment.join_as_single_process()
    assert variables["WORLD_SIZE"] == "1" and variables["RANK"] == variables["LOCAL_RANK"] == "0"
    assert variables["MASTER_ADDR"] == "10.0.0.1" and int(variables["MASTER_PORT"]) > 0
