"""--profile_steps: which steps are recorded, and what becomes of a profile without a place."""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_llm.training.profiling import StepProfiler


def profiler(folder: Path, steps: str = "2:3", *, start: int = 0, end: int = 9) -> StepProfiler:
    cpu = torch.device("cpu")
    return StepProfiler(steps, folder, cpu, start_step=start, last_step=end)


def take(profiler: StepProfiler, *steps: int) -> list[int]:
    """Make these steps, each with one product; those before which time went by otherwise."""
    slow = []
    for step in steps:
        if profiler.begin_step(step):
            slow.append(step)
        torch.ones(2, 2) @ torch.ones(2, 2)
    return slow


def products(folder: Path) -> int:
    (trace,) = (folder / "profile" / "rank-0").iterdir()
    assert trace.name == "trace.json.gz"
    with gzip.open(trace, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    return names.count("aten::mm")


def test_a_profile_holds_its_steps_and_its_time_is_told_from_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take(profiler(tmp_path), 1, 2, 3, 4, 5) == [2, 4]
    assert products(tmp_path) == 2
    assert capsys.readouterr().out.startswith("profiled steps 2 to 3: trace")


def test_a_resumed_run_profiles_what_is_left_and_says_when_nothing_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = profiler(tmp_path, "2:4", start=2, end=3)
    take(rest, 3)
    rest.close()
    assert products(tmp_path) == 1
    assert capsys.readouterr().out.startswith("profiled steps 3 to 3: ")
    for start, end in ((4, 9), (0, 1)):
        take(profiler(tmp_path / "none", "2:4", start=start, end=end), *range(start + 1, end + 1))
        assert capsys.readouterr().out == (
            f"--profile_steps 2:4: nothing is profiled, for the run goes from step {start + 1} to "
            f"{end}\n"
        )
    assert not (tmp_path / "none").exists()


def test_steps_that_a_rewound_run_makes_again_are_not_profiled_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewound = profiler(tmp_path, "2:4")
    take(rewound, 1, 2, 3)
    rewound.close()
    assert take(rewound, 2, 3, 4, 5) == []
    assert products(tmp_path) == 2
    assert capsys.readouterr().out.count("profiled steps 2 to 3") == 1


def test_a_profile_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profile").touch()
    take(profiler(tmp_path), 1, 2, 3, 4)
    assert "the profile could not be written to" in capsys.readouterr().out

    def disk_is_full(_: Any, path: str) -> None:  # torch says nothing of it
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", disk_is_full)
    take(profiler(tmp_path / "other"), 1, 2, 3, 4)
    assert "is the disk full?" in capsys.readouterr().out
    assert list((tmp_path / "other/profile/rank-0").iterdir()) == []


def test_a_full_temporary_folder_costs_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    take(profiler(tmp_path), 1, 2, 3, 4)
    assert products(tmp_path) == 2


def test_a_run_that_fails_while_it_is_profiled_leaves_the_trace_and_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *failure: reported.append(failure))
    before = sys.excepthook
    take(profiler(tmp_path), 1, 2, 3)
    error = RuntimeError("out of memory")
    sys.excepthook(RuntimeError, error, None)
    assert reported == [(RuntimeError, error, None)] and sys.excepthook is before
    assert products(tmp_path) == 2
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "RuntimeError: out of memory; writing the profile first"


def test_a_rank_that_only_misses_another_one_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *failure: reported.append(failure))
    monkeypatch.setattr("mini_llm.training.profiling.where_peer_was_missed", lambda error: ())
    recording = profiler(tmp_path)
    take(recording, 1, 2)
    sys.excepthook(RuntimeError, RuntimeError("Connection closed by peer"), None)
    assert len(reported) == 1 and not (tmp_path / "profile").exists()
    recording.close()  # torch's profiler must not outlive the test
