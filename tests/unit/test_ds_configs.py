"""Every value that ds_configs/*.json leaves to "auto" comes from the run's arguments."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from mini_llm.parallel import engine

REPOSITORY = Path(__file__).resolve().parents[2]
DS_CONFIGS = sorted(REPOSITORY.glob("ds_configs/*.json"))
ACCELERATE_CONFIGS = sorted(REPOSITORY.glob("accelerate_configs/*.yaml"))
RANKS = 4
ARGUMENTS: dict[str, Any] = {
    "micro_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "max_grad_norm": 0.7,
    "bf16": False,
}
# key of DeepSpeed -> what the run's arguments and its ranks make of it
FOLLOWS = {
    "train_micro_batch_size_per_gpu": lambda a, ranks: a["micro_batch_size"],
    "gradient_accumulation_steps": lambda a, ranks: a["gradient_accumulation_steps"],
    "train_batch_size": lambda a, ranks: (
        a["micro_batch_size"] * a["gradient_accumulation_steps"] * ranks
    ),
    "gradient_clipping": lambda a, ranks: a["max_grad_norm"],
    "bf16.enabled": lambda a, ranks: a["bf16"],
}

every_json = pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)


def flat(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{path}{key}.")
        else:
            values[f"{path}{key}"] = value
    return values


@every_json
def test_exactly_what_the_run_knows_is_auto(path):
    config = flat(json.loads(path.read_text()))
    assert {key for key, value in config.items() if value == "auto"} == set(FOLLOWS)


@every_json
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"micro_batch_size": 8},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 1.5},
        {"max_grad_norm": 0.0},
        {"bf16": True},
        {"ranks": 6},
    ],
    ids=lambda change: "-".join(f"{key}_{value}" for key, value in change.items()) or "as_it_is",
)
def test_every_auto_follows_the_runs_argument_and_nothing_else_moves(path, change, monkeypatch):
    ranks = change.get("ranks", RANKS)
    arguments = {**ARGUMENTS, **{k: v for k, v in change.items() if k != "ranks"}}
    monkeypatch.setattr(engine, "world_size", lambda: ranks)
    config = json.loads(path.read_text())
    if path.stem == "zero0" and arguments["bf16"]:
        with pytest.raises(ValueError, match="--bf16 true with ZeRO-0"):
            engine.fill_deepspeed_config(config, **arguments)
        return
    filled = flat(engine.fill_deepspeed_config(config, **arguments))
    for key, value in flat(config).items():
        if key == "gradient_clipping" and path.stem == "zero0":
            assert filled[key] == 0.0  # the step clips by itself there, see optimizer_step()
        elif value == "auto":
            assert filled[key] == FOLLOWS[key](arguments, ranks), key
        else:
            assert filled[key] == value, key
    # Added, for it makes the host wait: DeepSpeed's own timer, unless the file has it.
    assert filled.keys() - flat(config).keys() == {"timers.throughput.enabled"}
    assert filled["timers.throughput.enabled"] is False
    config["timers"] = {"throughput": {"enabled": True}}
    assert engine.fill_deepspeed_config(config, **arguments)["timers"] == config["timers"]
    del config["timers"]
    assert json.loads(path.read_text()) == config  # the file's own copy is untouched


@every_json
def test_deepspeed_accepts_every_filled_config(path, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    # Without a process group DeepSpeed takes the job for one rank.
    monkeypatch.setattr(engine, "world_size", lambda: 1)
    parsed = DeepSpeedConfig(
        engine.fill_deepspeed_config(json.loads(path.read_text()), **ARGUMENTS)
    )
    assert parsed.zero_optimization_stage == int(path.stem[4])
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == path.stem.endswith("_offload")
    assert parsed.train_batch_size == 3 * 5


@every_json
def test_offload_updates_with_torchs_adamw_so_that_nothing_is_compiled(path):
    config = json.loads(path.read_text())
    assert config.get("zero_force_ds_cpu_optimizer", True) != path.stem.endswith("_offload")


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_every_config_and_the_json_that_it_names_exists(path):
    config = load_config_from_file(str(path))
    named = config.deepspeed_config.get("deepspeed_config_file")
    assert (named is not None) == (config.distributed_type == "DEEPSPEED")
    if named is not None:
        stage = "zero1" if path.stem == "multi_node" else path.stem
        assert REPOSITORY / named in DS_CONFIGS and Path(named).stem == stage


def test_the_config_for_several_nodes_does_not_leave_them_to_pdsh():
    config = load_config_from_file(str(REPOSITORY / "accelerate_configs/multi_node.yaml"))
    assert config.num_machines > 1
    assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("node", ["0", "1"])
def test_without_an_address_of_node_0_the_config_for_several_nodes_says_so_at_once(node):
    flags = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", node]
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("accelerate")), "launch"),
            *("--config_file", "accelerate_configs/multi_node.yaml", *flags),
            *("recipes/pretrain.py", "--help"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "--main_process_ip is missing" in done.stderr.splitlines()[-1]


def test_every_json_has_its_yaml_and_every_engine_its_file():
    yamls = {path.stem for path in ACCELERATE_CONFIGS}
    assert {path.stem for path in DS_CONFIGS} <= yamls
    assert {"single", "cpu", "ddp", "zero2_offload", "zero3_offload"} <= yamls


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ('{"zero_optimization": {"stage": 1,}}', "cannot be read: .* line 1 column 35"),
        ("[1]", "is no JSON object"),
    ],
)
def test_a_deepspeed_config_that_is_none_is_named(tmp_path, content, said):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"the DeepSpeed config {path} {said}"):
        engine.read_deepspeed_config(str(path))


def test_fp16_is_refused():
    config = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}
    with pytest.raises(ValueError, match="enables fp16.*--bf16 true"):
        engine.fill_deepspeed_config(config, **ARGUMENTS)
