"""mini_llm/verify: who is slow, which pairs are measured, verdicts, the table, the list of runs."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mini_llm.command_line import UsageError
from mini_llm.launch.__main__ import main
from mini_llm.launch.nodes import PORTS_PER_JOB, Nodes
from mini_llm.launch.options import parse_options
from mini_llm.verify import driver as driver_module
from mini_llm.verify.driver import Driver, Main, Step, check_same_processes, telling_line
from mini_llm.verify.equivalence import (
    BF16,
    EXPERTS,
    STEPS,
    Run,
    absent_rows,
    build_data,
    compare,
    plan_runs,
)
from mini_llm.verify.judge import (
    Disk,
    PairSpeed,
    Ranks,
    compute_row,
    disk_rows,
    numbers,
    pair_rows,
    slow_ranks,
    version_rows,
)
from mini_llm.verify.meeting import Meeting, Outcome
from mini_llm.verify.pairs import BETWEEN_NODES, SAME_NODE, is_ring, pairs_of, plan_rounds
from mini_llm.verify.table import (
    Row,
    exit_status,
    markdown_table,
    read_rows,
    summary,
    terminal_table,
    write_report,
    write_rows,
)
from tests.launching import launch_port

RANKS = Ranks(["alpha", "alpha", "beta", "beta"])
ROWS = [
    Row("disk: free", "ok", "71.3 GB", "at output"),
    Row("compute fp32", "WARN", "1 TFLOP/s", "slow: rank 1 (beta)"),
    Row("zero3, fp32", "skipped", "", "no time"),
]


# ------------------------------------------------------------------ judging


def test_a_rank_is_slow_above_a_quarter_more_than_the_median() -> None:
    assert slow_ranks([1.0, 1.0, 1.25, 1.26]) == [3]
    assert slow_ranks([1.0]) == slow_ranks([1.0, 1.2]) == []
    assert slow_ranks([2.0, 1.0]) == [0]  # of two, compared with the faster


def test_slow_ranks_are_named_with_their_host_and_only_warned_of() -> None:
    row = compute_row("fp32", 2e12, [1.0, 1.0, 1.0, 1.5], RANKS)
    assert (row.verdict, row.figure) == ("WARN", "2 TFLOP/s")
    assert "slow: rank 3 (beta), up to 1.50x" in row.result
    assert compute_row("fp32", 2e12, [1.0, 1.0, 1.1, 1.0], RANKS).verdict == "ok"


def test_ranks_are_named_by_spans() -> None:
    assert numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert RANKS.name([3, 0, 1]) == "ranks 0-1 (alpha), 3 (beta)"
    assert RANKS.name([2]) == "rank 2 (beta)"


def test_versions_that_differ_are_named_with_their_ranks() -> None:
    facts = [{"torch": "2.13.0", "driver": "580", "code": "a"} for _ in range(4)]
    (row,) = version_rows(facts, RANKS)
    assert (row.verdict, row.result) == ("ok", "torch 2.13.0, driver 580, code a")
    facts[2] = {"torch": "2.12.0", "driver": "570", "code": "a"}
    torch, driver, rest = version_rows(facts, RANKS)
    assert (torch.check, torch.verdict) == ("same torch", "FAIL")
    assert torch.result == "2.13.0 on ranks 0-1 (alpha), 3 (beta); 2.12.0 on rank 2 (beta)"
    assert (driver.check, driver.verdict) == ("same driver", "WARN")
    assert (rest.verdict, rest.result) == ("ok", "the rest: code a")


def test_a_path_that_a_node_cannot_write_fails_with_its_name_and_host() -> None:
    disks = {0: Disk(free=10**12, write_speed=1e9), 2: Disk(error="Read-only file system")}
    (row,) = disk_rows(disks, "/ckpt", RANKS)
    assert row.verdict == "FAIL"
    assert "/ckpt cannot be written by rank 2 (beta): Read-only file system" in row.result


def test_free_space_speed_and_a_folder_of_its_own_on_every_node_are_said() -> None:
    disks = {
        0: Disk(free=10**12, write_speed=2e9),
        2: Disk(free=9 * 10**9, write_speed=3e8, shared=False),
    }
    free, write, shared = disk_rows(disks, "/ckpt", RANKS)
    assert (free.verdict, free.figure) == ("WARN", "9.0 GB") and "rank 2 (beta)" in free.result
    assert (write.verdict, write.figure) == ("ok", "300 MB/s") and "rank 2 (beta)" in write.result
    assert shared.verdict == "FAIL" and shared.result.startswith("node-local: rank 2 (beta)")
    alone = disk_rows({0: disks[0]}, "/ckpt", RANKS)
    assert [row.verdict for row in alone] == ["ok", "ok"]  # one node: nothing to share


def speeds(kind: str, values: list[float]) -> list[PairSpeed]:
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2)]
    return [
        PairSpeed(kind, "all-reduce", pair, speed * 1e9)
        for pair, speed in zip(pairs, values, strict=False)
    ]


def test_a_pair_is_slow_below_half_of_the_median_of_its_own_kind() -> None:
    fast, slow = speeds(SAME_NODE, [100, 100, 100, 49]), speeds(BETWEEN_NODES, [10, 10])
    inside, _, between, absent = pair_rows([*fast, *slow], RANKS)
    assert inside.verdict == "WARN" and inside.check == "all-reduce of pairs, same node"
    assert "ranks 1 (alpha), 2 (beta) 49 GB/s" in inside.result
    assert "ranks 0" not in inside.result
    assert (between.verdict, between.figure) == ("ok", "10 GB/s")
    assert (absent.verdict, absent.result) == ("skipped", "no such pair was measured")


# ------------------------------------------------------------------ pairs


def test_up_to_eight_members_meet_in_all_pairs_and_more_in_a_ring() -> None:
    assert pairs_of([4, 5, 6]) == [(4, 5), (4, 6), (5, 6)]
    assert len(pairs_of(range(8))) == 28
    ring = pairs_of(range(9))
    assert len(ring) == 9 and ring[0] == (0, 1) and ring[-1] == (8, 0)
    assert pairs_of([3]) == []


def test_nodes_are_measured_one_pair_at_a_time_and_their_insides_all_at_once() -> None:
    rounds = plan_rounds([0, 0, 0, 1, 1, 1])
    assert [(r.kind, r.pairs) for r in rounds] == [
        (BETWEEN_NODES, ((0, 3),)),
        (SAME_NODE, ((0, 1), (3, 4))),
        (SAME_NODE, ((0, 2), (3, 5))),
        (SAME_NODE, ((1, 2), (4, 5))),
    ]
    assert plan_rounds([0]) == []
    assert not is_ring([0] * 8) and is_ring([0] * 9) and is_ring(list(range(9)))


def test_512_ranks_on_64_nodes_take_92_rounds() -> None:
    rounds = plan_rounds([rank // 8 for rank in range(512)])
    assert len(rounds) == 64 + 28
    for current in rounds:
        members = [rank for pair in current.pairs for rank in pair]
        assert len(members) == len(set(members))  # no rank is measured twice at once


# ------------------------------------------------------------------ runs


def checks(world_size: int, *, gpu: bool = False) -> list[str]:
    return [run.check for run in plan_runs(world_size, gpu=gpu)]


def test_every_engine_and_experts_are_in_the_list_of_two_ranks() -> None:
    assert checks(2) == [
        "reference, dense",
        *("zero1, fp32", "zero2, fp32", "zero3, fp32"),
        "zero2, interrupted and resumed, fp32",
        "reference, experts",
        *(f"zero{stage}, experts over 2 ranks, fp32" for stage in (1, 2, 3)),
        *("ddp, fp32", "zero0, fp32"),
    ]
    assert checks(2, gpu=True)[-4:] == ["zero1, bf16", "zero2, bf16", "zero3, bf16", "ddp, bf16"]


def test_what_the_number_of_ranks_does_not_allow_is_left_out_and_said() -> None:
    assert not {c for c in checks(1, gpu=True) if "ddp" in c or "experts" in c}
    assert "ddp, fp32" in checks(3) and not any("experts" in check for check in checks(3))
    assert [row.check for row in absent_rows(1, gpu=True)] == ["ddp", "experts over 2 ranks"]
    assert [row.check for row in absent_rows(2, gpu=False)] == ["bf16"]
    assert {row.verdict for row in absent_rows(1, gpu=False)} == {"skipped"}
    assert absent_rows(2, gpu=True) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 24, 512])
def test_the_reference_takes_the_same_rows_a_step_whatever_the_number_of_ranks(
    world_size: int, tmp_path: Path
) -> None:
    def batch(run: Run) -> tuple[int, int]:
        words = run.flags(tmp_path, world_size, 0)
        flags = dict(zip(words[::2], words[1::2], strict=True))
        rows = int(flags["--global_batch_tokens"]) // int(flags["--seq_len"])
        at_once = int(flags["--per_device_train_batch_size"]) * run.ranks(world_size)
        assert rows % at_once == 0
        return rows, rows // at_once

    run = Run("zero2")
    assert batch(run) == (4 * world_size, 2)
    assert batch(run.reference())[0] == 4 * world_size


@pytest.mark.slow
def test_data_is_the_same_byte_for_byte_and_another_node_may_be_faster(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "data", tmp_path / "b" / "data"
    for folder in (first, second):
        folder.parent.mkdir()
        build_data(folder)
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert any(name.suffix == ".parquet" for name in names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    build_data(first)  # is there already
    assert [path.name for path in first.parent.iterdir()] == ["data"]


# ------------------------------------------------------------------ comparing


def leave_run(
    folder: Path, norm: float = 1.0, steps: int = STEPS, loss: float = 5.0, **facts: Any
) -> None:
    folder.mkdir()
    ran = {"world_size": 2, "zero_stage": 2, "expert_parallel_size": 1, **facts}
    (folder / "run.json").write_text(json.dumps(ran))
    lines = [
        json.dumps({"step": step, "train/loss": loss, "train/grad_norm": norm})
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def row_of(work: Path, run: Run, **left: Any) -> Row:
    leave_run(work / run.reference().name, world_size=1, zero_stage=None)
    leave_run(work / run.name, **left)
    return compare(run, work, world_size=2)


def test_a_run_as_the_reference_is_ok_within_the_tolerance(tmp_path: Path) -> None:
    row = row_of(tmp_path, Run("zero2"), norm=1.00005)
    assert (row.verdict, row.figure) == ("ok", "loss 0.0e+00, norm 5.0e-05")


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        ({"norm": 1.01}, "trains otherwise than one process: norm beyond the limit"),
        ({"loss": 5.01}, "loss beyond the limit"),
        ({"loss": math.nan}, "loss beyond the limit"),
        ({"norm": math.inf}, "norm beyond the limit"),
        ({"steps": 3}, "logged steps [1, 2, 3], not 1 to 6"),
        ({"world_size": 1}, "another engine ran: world_size 1"),
        ({"zero_stage": None}, "another engine ran: zero_stage None"),
        ({"expert_parallel_size": 2}, "another engine ran: expert_parallel_size 2"),
    ],
)
def test_a_run_that_is_not_as_the_reference_fails_with_the_reason(
    left: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    row = row_of(tmp_path, Run("zero2"), **left)
    assert row.verdict == "FAIL" and reason in row.result


def test_bf16_and_experts_have_tolerances_of_their_own(tmp_path: Path) -> None:
    assert Run("zero1", bf16=True).tolerance == BF16
    assert Run("zero1", EXPERTS).tolerance.norm > Run("zero1").tolerance.norm
    assert row_of(tmp_path, Run("zero2", bf16=True), norm=1.01).verdict == "ok"


def test_a_run_that_left_nothing_fails(tmp_path: Path) -> None:
    assert compare(Run("zero1"), tmp_path, world_size=2).verdict == "FAIL"


# ------------------------------------------------------------------ the time


class Clock:
    """Time passes when a step is done, and only then."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Store:
    """Of a single node: nobody asks."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def tell(self, key: str, content: Any) -> None:
        self.told[key] = content


def report_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    do: Callable[[Driver, Step, float], tuple[float, Outcome]],
    why_no_folder: str | None = None,
) -> tuple[int, dict[str, Row], Store]:
    """Exit status and rows of a verify whose steps are ``do``: seconds that it takes, outcome."""
    clock, store = Clock(), Store()
    monkeypatch.setattr(driver_module.time, "monotonic", clock.monotonic)
    words = ["--output_dir", str(tmp_path), *flags]
    driver = Driver(parse_options("verify", words), Nodes(), processes=2)
    driver.agree_on_plan({**driver.plan(), "stamp": "1", "gpu": False})
    assert driver.make_work_folder() is None

    def pretend(number: int, step: Step, seconds: float) -> Outcome:
        took, outcome = do(driver, step, seconds)
        clock.now += took
        return outcome

    monkeypatch.setattr(driver, "do", pretend)
    main_node = Main(driver, store, why_no_folder)  # type: ignore[arg-type]
    status = main_node.run()
    return status, {row.check: row for row in main_node.rows}, store


def leave_result(driver: Driver, step: Step) -> None:
    """What a step that goes well leaves."""
    if step.check == "preflight":
        write_rows(driver.work / "preflight", ROWS[:2])
    run = driver.runs.get(step.check)
    if run is not None and not (driver.work / run.name).exists():
        stage = int(run.config[4]) if run.config.startswith("zero") else None
        leave_run(
            driver.work / run.name,
            world_size=run.ranks(2),
            zero_stage=stage,
            expert_parallel_size=run.expert_parallel_size,
        )


def test_all_goes_well_within_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def do(driver: Driver, step: Step, seconds: float) -> tuple[float, Outcome]:
        leave_result(driver, step)
        return 20, Outcome(0)

    status, rows, _ = report_of(tmp_path, monkeypatch, [], do)
    assert status == 0
    assert [row.verdict for check, row in rows.items() if check in checks(2)] == ["ok"] * 11
    assert "verify: 12 ok, 1 WARN, 0 FAIL, 1 skipped" in capsys.readouterr().out
    assert (tmp_path / "verify.md").exists()
    assert not (tmp_path / "verify-1" / "zero1").exists()  # what is ok need not be kept


def test_what_does_not_fit_into_the_time_is_skipped_and_not_called_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(driver: Driver, step: Step, seconds: float) -> tuple[float, Outcome]:
        leave_result(driver, step)
        return 40, Outcome(0)

    status, rows, store = report_of(tmp_path, monkeypatch, ["--max_minutes", "3"], do)
    assert status == 0
    assert rows["zero1, fp32"].verdict == "ok"
    left_out = rows["zero2, fp32"]
    assert (left_out.verdict, left_out.figure) == ("skipped", "")
    assert left_out.result == "needs about 48 s, of --max_minutes 20 s were left"
    assert store.told["step/4"] == 0  # the other nodes skip it too
    assert rows["zero1, experts over 2 ranks, fp32"].verdict == "skipped"
    _, rows, _ = report_of(tmp_path, monkeypatch, ["--max_minutes", "0.1"], do)
    assert {row.verdict for row in rows.values()} == {"skipped"}


def test_a_launch_that_hangs_fails_and_one_that_the_time_cuts_off_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(driver: Driver, step: Step, seconds: float) -> tuple[float, Outcome]:
        if step.check in ("zero1, fp32", "ddp, fp32"):
            return seconds, Outcome(None, "waiting")
        leave_result(driver, step)
        return 20, Outcome(0)

    flags = ["--max_minutes", str((11 * 20 + 180 + 50) / 60)]
    status, rows, _ = report_of(tmp_path, monkeypatch, flags, do)
    assert status == 1
    assert rows["zero1, fp32"].verdict == "FAIL"
    assert "did not end within 180 s; the last of it: node 0: waiting" in rows["zero1, fp32"].result
    assert rows["ddp, fp32"].verdict == "skipped"
    assert rows["ddp, fp32"].result == "the time of --max_minutes ran out: node 0: waiting"


def test_a_folder_that_cannot_be_written_fails_without_a_preflight_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(driver: Driver, step: Step, seconds: float) -> tuple[float, Outcome]:
        raise AssertionError("nothing can be run")

    flags = ["--skip", "preflight"]
    status, rows, _ = report_of(tmp_path, monkeypatch, flags, do, "Read-only file system")
    assert status == 1
    assert rows["disk"].verdict == "FAIL"
    assert rows["disk"].result == f"{tmp_path} cannot be written: Read-only file system"
    assert rows["zero1, fp32"].verdict == "skipped"


def test_without_a_preflight_or_a_reference_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "reference, dense"

    def do(driver: Driver, step: Step, seconds: float) -> tuple[float, Outcome]:
        leave_result(driver, step)
        return 20, Outcome(1, "no GPU") if step.check == broken else Outcome(0)

    status, rows, _ = report_of(tmp_path, monkeypatch, [], do)
    assert status == 1
    assert (rows[broken].verdict, rows[broken].result) == ("FAIL", "node 0: no GPU")
    assert rows["zero3, fp32"].verdict == "skipped"
    assert rows["zero1, experts over 2 ranks, fp32"].verdict == "ok"
    broken = "preflight"
    _, rows, _ = report_of(tmp_path, monkeypatch, [], do)
    assert rows["preflight"].verdict == "FAIL"
    assert rows["reference, dense"].result == "preflight did not end well"


# ------------------------------------------------------------------ the table


def test_the_table_is_aligned_and_ends_with_what_was_found() -> None:
    lines = terminal_table(ROWS).splitlines()
    assert lines[0].split() == ["check", "verdict", "figure", "result"]
    assert lines[3].startswith("compute fp32  WARN")
    assert {line.index(row.result) for line, row in zip(lines[2:], ROWS, strict=True)} == {34}
    assert markdown_table(ROWS).splitlines()[2] == "| disk: free | ok | 71.3 GB | at output |"


def test_only_a_failed_check_makes_the_exit_status_1_and_skipped_ones_are_counted() -> None:
    assert summary(ROWS) == "1 ok, 1 WARN, 0 FAIL, 1 skipped"
    assert exit_status(ROWS) == 0
    assert exit_status([*ROWS, Row("ddp", "FAIL", "", "")]) == 1


def test_rows_go_through_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", ROWS)
    assert read_rows(tmp_path / "rows") == ROWS
    write_report(tmp_path, ROWS, {"seconds": 3})
    content = json.loads((tmp_path / "verify.json").read_text())
    assert content["seconds"] == 3 and Row(**content["rows"][1]) == ROWS[1]
    assert "# verify: 1 ok, 1 WARN" in (tmp_path / "verify.md").read_text()


# ------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_minutes", "0"], "--max_minutes is 0.0; it must be above 0"),
        (["--skip", "disk"], "--skip"),
        (["--max_steps", "3"], "--max_steps"),
        (["--config_file", "accelerate_configs/zero2.yaml"], "leave --config_file out"),
        (["--max_restarts", "2"], "--max_restarts is for training"),
        (["--nodes", "2"], "--nodes 2 does not say which node this is"),
        (["--main_port", "65517"], "--main_port 65517: each launch takes the next port"),
    ],
)
def test_flags_that_verify_does_not_take_are_refused_with_status_2(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("launch.sh: verify: ") and sentence in said.err
    assert len(said.err.splitlines()) == 1 and not said.out


def test_print_shows_every_launch_with_a_port_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["verify", "--nodes", "2", "--node_rank", "1", "--main_ip", "127.0.0.1"]
    assert main([*words, "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Node 1 has no part in the two references; the run that is resumed has two launches.
    assert len(lines) == 1 + len(checks(2)) - 2 + 1
    assert "--module mini_llm.verify.preflight" in lines[0]
    ports = [line.partition("--main_process_port ")[2].split()[0] for line in lines]
    assert len(set(ports)) == len(ports) and "29500" not in ports  # that one is the drivers'
    assert all("NVIDIA_TF32_OVERRIDE=0" in line for line in lines)
    assert "--stop_at_step" in " ".join(lines)


def test_the_launches_of_a_slurm_job_stay_within_its_ports(tmp_path: Path) -> None:
    driver = Driver(parse_options("verify", []), Nodes(), processes=2)
    driver.agree_on_plan({**driver.plan(), "gpu": True})
    assert 1 + len(driver.steps()) <= PORTS_PER_JOB


def test_a_hostfile_starts_verify_on_every_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("alpha slots=8\nbeta slots=8\n")
    (tmp_path / "pdsh").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["verify", "--hostfile", str(tmp_path / "hosts"), "--max_minutes", "5", "--print"]
    assert main(words) == 0
    for rank, line in enumerate(capsys.readouterr().out.splitlines()):
        assert "exec ./launch.sh verify " in line and line.count("--max_minutes 5") == 1
        assert f"--nodes 2 --node_rank {rank} --main_ip alpha" in line


def test_nodes_with_different_numbers_of_processes_are_refused() -> None:
    meeting = Meeting(Nodes(2, main_port=launch_port()), patience=1)
    meeting.tell("node/0", {"host": "alpha", "processes": 8})
    with pytest.raises(
        UsageError, match=r"node 1 did not come to 127\.0\.0\.1, port .* within 1 s"
    ):
        check_same_processes(meeting)
    meeting.tell("node/1", {"host": "beta", "processes": 8})
    check_same_processes(meeting)
    meeting.tell("node/1", {"host": "beta", "processes": 4})
    with pytest.raises(UsageError, match=r"node 1 \(beta\) starts 4 process\(es\), node 0 8"):
        check_same_processes(meeting)


def test_nodes_hear_what_the_others_tell_and_wait_for_node_0_only_so_long() -> None:
    port = launch_port()
    with pytest.raises(UsageError, match=f"node 0 did not come to 127.0.0.1, port {port}"):
        Meeting(Nodes(2, 1, main_port=port), patience=0)
    first = Meeting(Nodes(2, 0, main_port=port), patience=60)
    second = Meeting(Nodes(2, 1, main_port=port), patience=60)
    assert second.hear("plan", 0) is None
    first.tell("plan", {"skip": None})
    assert second.hear("plan", 60) == {"skip": None}
    second.say_farewell()
    first.say_farewell()


def test_help_shows_the_flags_of_launcher_and_verify(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == 0
    said = capfd.readouterr().out
    assert "--hostfile F" in said and "--max_minutes" in said


def test_the_reason_of_a_failed_launch_is_its_first_error() -> None:
    log = "accelerate launch --error\nstart\n[rank1]: ValueError: no data\nTypeError: later\nbye\n"
    assert telling_line(log) == "[rank1]: ValueError: no data"
    assert (
        telling_line("command\nstart\nstopped here\n[W1126 socket.cpp] no name\n\n")
        == "stopped here"
    )
    assert telling_line("command\n") == "no output"
