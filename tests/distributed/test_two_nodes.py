"""Two nodes that only a cable joins train as two ranks of one, started by hand and by a file."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TINY_MODELS, TinyData
from tests.launching import (
    TINY_RUN,
    facts,
    launch_environment,
    launch_several,
    metrics,
    series,
)
from tests.two_nodes import ADDRESSES, CABLE_ENDS, TwoNodes, two_nodes

STEPS = 3
PATIENCE = 300.0
DEEPSEEK = "mini_deepseekv3_tiny"
SPREAD = [
    *("--model", DEEPSEEK, "--model_overrides", json.dumps(TINY_MODELS[DEEPSEEK])),
    *("--expert_parallel_size", "2"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as nodes:
        yield nodes


def run_flags(data: TinyData, output_dir: Path, *more: str) -> list[str]:
    run = [*TINY_RUN, *data.flags, "--max_steps", str(STEPS), *more]
    return [*run, "--output_dir", str(output_dir)]


@pytest.fixture(scope="module")
def one_node(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same two runs on two ranks of this machine: dense/ and experts/."""
    folder = tmp_path_factory.mktemp("one_node")
    runs = [
        run_flags(tiny_data, folder / "dense"),
        run_flags(tiny_data, folder / "experts", *SPREAD),
    ]
    launch_several(runs, folder / "plan.json", config="zero2")
    return folder


def start_on_both(nodes: TwoNodes, folder: Path, flags: list[list[str]]) -> list[Any]:
    """`launch.sh pretrain` on each node with its flags; what it says goes to node<i>.log."""
    env = launch_environment({"MINI_LLM_VENV": sys.prefix})
    launcher = ["./launch.sh", "pretrain", "--config_file", "accelerate_configs/zero2.yaml"]
    return [
        nodes.start(node, [*launcher, *words], folder / f"node{node}.log", env)
        for node, words in enumerate(flags)
    ]


def said_on_both(folder: Path) -> list[str]:
    return [(folder / f"node{node}.log").read_text() for node in (0, 1)]


def wait_for(what: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "\n".join(said_on_both(folder))
        time.sleep(0.1)


def launch_on_both(nodes: TwoNodes, folder: Path, flags: list[list[str]]) -> list[str]:
    """The same to its end, which must be a good one; returns what each one said."""
    processes = start_on_both(nodes, folder, flags)
    wait_for(lambda: all(process.poll() is not None for process in processes), folder)
    said = said_on_both(folder)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said


def assert_trained_as_one_node(run: Path, reference: Path) -> None:
    assert [step["step"] for step in metrics(run)] == list(range(1, STEPS + 1))
    for key in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(series(run, key), series(reference, key), atol=1e-6, rtol=0)
    found, alone = facts(run), facts(reference)
    assert (found["world_size"], found["zero_stage"], found["backend"]) == (2, 2, "gloo")
    assert sorted(found["hosts"]) == ["node0", "node1"]
    assert alone["world_size"] == 2 and len(set(alone["hosts"])) == 1
    assert found["bytes_per_rank"] == alone["bytes_per_rank"]
    assert (run / "final/model.safetensors").is_file()


@pytest.mark.slow
def test_two_nodes_started_by_hand_train_as_two_ranks_of_one_node(
    nodes: TwoNodes, one_node: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    flags = run_flags(tiny_data, tmp_path / "run")
    place = ["--nodes", "2", "--main_ip", ADDRESSES[0], "--node_rank"]
    said = launch_on_both(nodes, tmp_path, [[*place, str(node), *flags] for node in (0, 1)])
    for node in (0, 1):
        assert f"node  {node} of 2 (node{node}), by hand; rank {node} of 2" in said[node]
        assert f"main  node 0 at {ADDRESSES[0]}, port 29500" in said[node]
        # The host name leads nowhere, so this is what makes them meet.
        assert f"GLOO_SOCKET_IFNAME={CABLE_ENDS[node]}" in said[node]
    assert_trained_as_one_node(tmp_path / "run", one_node / "dense")
    assert facts(tmp_path / "run")["hosts"] == ["node0", "node1"]


@pytest.mark.slow
def test_two_nodes_that_meet_through_a_file_spread_experts_as_one_node_does(
    nodes: TwoNodes, one_node: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    flags = run_flags(tiny_data, tmp_path / "run", *SPREAD)
    place = ["--nodes", "2", "--rendezvous_file", str(tmp_path / "meet")]
    launch_on_both(nodes, tmp_path, [[*place, *flags]] * 2)
    assert_trained_as_one_node(tmp_path / "run", one_node / "experts")
    found = facts(tmp_path / "run")
    assert (found["expert_parallel_size"], found["expert_groups"]) == (2, [[0, 1]])
    assert sum(series(tmp_path / "run", "ep/bytes_sent")) > 0  # over the cable


@pytest.mark.slow
def test_a_cut_cable_ends_both_nodes_by_name_and_they_go_on_from_the_last_checkpoint(
    nodes: TwoNodes, tiny_data: TinyData, tmp_path: Path
) -> None:
    run, limit = tmp_path / "run", 10
    flags = run_flags(tiny_data, run, "--max_steps", "1000", "--save_steps", "10")
    flags += ["--ddp_timeout", str(limit)]
    place = ["--nodes", "2", "--main_ip", ADDRESSES[0], "--node_rank"]
    processes = start_on_both(nodes, tmp_path, [[*place, str(node), *flags] for node in (0, 1)])
    wait_for(lambda: "step   25/1000" in said_on_both(tmp_path)[0], tmp_path)
    try:
        nodes.set_cable("down")
        cut = time.monotonic()
        wait_for(lambda: all(process.poll() is not None for process in processes), tmp_path)
        # Twice the limit, for a report takes up to another one; and a busy machine.
        assert time.monotonic() - cut < 2 * limit + 60
    finally:
        nodes.set_cable("up")
    said = said_on_both(tmp_path)
    assert all(process.returncode == 1 for process in processes), "\n".join(said)
    assert "rank 1 (host node1" in said[0]
    assert f"lost contact with {ADDRESSES[0]}" in said[1]
    folders = sorted((run / "checkpoints").iterdir())
    assert folders and all((folder / "files.json").is_file() for folder in folders)
    saved = max(int(folder.name.removeprefix("step-")) for folder in folders)

    flags += ["--stop_at_step", str(saved + 20)]
    said = launch_on_both(nodes, tmp_path, [[*place, str(node), *flags] for node in (0, 1)])
    assert f"resumed at step {saved}" in said[0]
    alone = [*flags, "--output_dir", str(tmp_path / "alone")]
    launch_several([alone], tmp_path / "plan.json", config="zero2")
    assert [step["step"] for step in metrics(run)] == list(range(1, saved + 21))
    for key in ("train/loss", "train/grad_norm"):
        expected = series(tmp_path / "alone", key)
        np.testing.assert_allclose(series(run, key), expected, rtol=1e-5, err_msg=key)
