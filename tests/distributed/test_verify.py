"""`./launch.sh verify` on two gloo ranks, on two nodes, and with faults that it must name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_llm.verify.table import Row
from tests.launching import REPOSITORY, launch_environment, launch_port
from tests.two_nodes import ADDRESSES, two_nodes

SECONDS = 3600  # this machine may be busy with other tests
BROKEN = [sys.executable, "tests/distributed/broken_verify.py"]
ENGINES = [f"{engine}, fp32" for engine in ("zero1", "zero2", "zero3", "ddp", "zero0")]
EXPERTS = [f"zero{stage}, experts over 2 ranks, fp32" for stage in (1, 2, 3)]


def environment() -> dict[str, str]:
    return launch_environment({"MINI_LLM_VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""})


def verify(*flags: str, command: list[str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*(command or ["./launch.sh"]), "verify", *flags],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def rows_of(folder: Path) -> dict[str, Row]:
    """By check, from verify.json."""
    content = json.loads((folder / "verify.json").read_text())
    return {row["check"]: Row(**row) for row in content["rows"]}


def test_the_preflight_of_two_ranks_measures_disk_compute_and_network(tmp_path: Path) -> None:
    flags = ["--procs_per_node", "2", "--skip", "equivalence", "--output_dir", str(tmp_path)]
    done = verify(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert (rows["ranks"].figure, rows["ranks"].verdict) == ("2 on 1 node(s)", "ok")
    assert "gloo on CPU" in rows["ranks"].result
    assert "torch 2." in rows["same versions"].result and ", code " in rows["same versions"].result
    units = {
        **{"disk: free": "GB", "disk: write": "MB/s", "compute fp32": "TFLOP/s"},
        **{"all-reduce, all ranks": "GB/s", "all-to-all, all ranks": "GB/s"},
        "all-reduce of 8 bytes, all ranks": "µs",
        **{"all-reduce of pairs, same node": "GB/s", "all-to-all of pairs, same node": "GB/s"},
    }
    for check, unit in units.items():
        number, found = rows[check].figure.split()
        assert float(number) > 0 and found == unit
        # Other tests may slow a rank down, and their disk may be nearly full.
        assert rows[check].verdict == "ok" or check in ("compute fp32", "disk: free")
    assert rows["all-reduce of pairs, between nodes"].verdict == "skipped"
    assert rows["equivalence"].verdict == "skipped"
    # The table is what it ends in, and nothing is left of what was written to measure the disk.
    assert "check" in done.stdout and "0 FAIL, 3 skipped; 2 rank(s) on 1 node(s)" in done.stdout
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("verify-2")]
    assert sorted(left) == ["verify.json", "verify.md"]


@pytest.mark.slow
def test_every_engine_trains_on_two_ranks_as_one_process_does(tmp_path: Path) -> None:
    flags = ["--procs_per_node", "2", "--max_minutes", "55", "--output_dir", str(tmp_path)]
    done = verify(*flags, "--skip", "preflight")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    for check in [*ENGINES, *EXPERTS, "zero2, interrupted and resumed, fp32"]:
        assert rows[check].verdict == "ok", rows[check]
        loss, norm = (float(part.split()[1]) for part in rows[check].figure.split(","))
        assert loss < 1e-5 and norm < 1e-5
    assert {check for check, row in rows.items() if row.verdict == "skipped"} == {
        "bf16",
        "preflight",
    }


@pytest.mark.slow
def test_a_slow_rank_and_one_with_another_version_are_named(tmp_path: Path) -> None:
    flags = ["--procs_per_node", "2", "--skip", "equivalence", "--output_dir", str(tmp_path)]
    done = verify(*flags, command=[*BROKEN, "preflight"])
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    host = os.uname().nodename
    assert rows["compute fp32"].verdict == "WARN"
    assert f"slow: rank 1 ({host})" in rows["compute fp32"].result
    assert rows["same torch"].verdict == "FAIL"
    assert f"0.1 on rank 1 ({host})" in rows["same torch"].result


@pytest.mark.slow
def test_one_process_and_a_path_that_cannot_be_written_fail_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output_dir = tmp_path / "file" / "checkpoints"
    done = verify("--output_dir", str(output_dir))
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (disk,) = [line for line in lines if line.startswith("disk")]
    assert " FAIL " in disk and f"{output_dir} cannot be written by rank 0" in disk
    assert "Not a directory" in disk
    assert any("one rank: nothing to compare" in line for line in lines)
    assert any("nothing to send, and no pair" in line for line in lines)
    (zero1,) = [line for line in lines if line.startswith("zero1, fp32")]
    assert "skipped" in zero1


@pytest.mark.slow
def test_an_engine_that_loses_a_part_of_the_gradient_fails(tmp_path: Path) -> None:
    flags = ["--procs_per_node", "2", "--skip", "preflight", "--output_dir", str(tmp_path)]
    done = verify(*flags, command=[*BROKEN, "engine"])
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert rows["reference, dense"].verdict == "ok"
    row = rows["zero2, fp32"]
    assert row.verdict == "FAIL" and "norm beyond the limit" in row.result
    assert 0.2 < float(row.figure.rpartition("norm ")[2]) < 0.3


@pytest.mark.slow
def test_two_nodes_are_verified_together_and_only_the_first_has_the_table(tmp_path: Path) -> None:
    words = ["./launch.sh", "verify", "--nodes", "2", "--main_ip", ADDRESSES[0]]
    words += ["--main_port", str(launch_port()), "--skip", "equivalence", "--procs_per_node", "2"]
    words += ["--output_dir", str(tmp_path / "out")]
    logs = [tmp_path / f"node{node}.log" for node in (0, 1)]
    with two_nodes() as nodes:
        started = [
            nodes.start(node, [*words, "--node_rank", str(node)], logs[node], environment())
            for node in (0, 1)
        ]
        status = [process.wait(SECONDS) for process in started]
    said = [log.read_text() for log in logs]
    assert status == [0, 0], "\n".join(said)
    rows = rows_of(tmp_path / "out")
    assert rows["ranks"].figure == "4 on 2 node(s)"
    assert rows["disk: shared"].result == "all nodes see the same folder"
    between = rows["all-reduce of pairs, between nodes"]
    inside = rows["all-reduce of pairs, same node"]
    assert "of 1 pair(s)" in between.result and "of 2 pair(s)" in inside.result
    assert "same versions" in said[0] and "the table is on node 0" in said[1]
