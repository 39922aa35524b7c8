"""Which checkpoint a resume finds."""

import json
from pathlib import Path

import pytest

from mini_llm.training.checkpoint import find_checkpoint, list_checkpoints, read_state


def make(run: Path, step: int, version: int = 1) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format_version": version, "step": step}))
    return folder


def test_auto_takes_the_newest_complete_one_and_counts_steps_as_numbers(tmp_path):
    make(tmp_path, 900)
    newest = make(tmp_path, 1000)
    (tmp_path / "checkpoints" / ".step-1100.partial").mkdir()  # killed while writing
    (tmp_path / "checkpoints" / "step-1200").mkdir()  # no state.json: not one
    assert find_checkpoint(tmp_path, "auto") == newest
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-900", "step-1000"]


def test_auto_without_checkpoints_starts_from_the_beginning(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path, "never") is None


def test_never_refuses_to_overwrite_a_run(tmp_path):
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="--resume_from_checkpoint never would overwrite"):
        find_checkpoint(tmp_path, "never")


def test_resuming_from_an_earlier_step_refuses_while_later_ones_exist(tmp_path):
    earlier = make(tmp_path, 10)
    make(tmp_path, 20)
    with pytest.raises(ValueError, match="later checkpoint step-20"):
        find_checkpoint(tmp_path, str(earlier))
    assert find_checkpoint(tmp_path / "elsewhere", str(earlier)) == earlier


def test_another_format_version_is_named(tmp_path):
    with pytest.raises(ValueError, match="format version 99"):
        read_state(make(tmp_path, 10, version=99))
