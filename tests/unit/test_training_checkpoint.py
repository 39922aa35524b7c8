"""Which checkpoint a resume finds, what damage it notices, and which ones rotation keeps."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_llm.models import build_model
from mini_llm.training import checkpoint as checkpoints
from mini_llm.training.checkpoint import (
    check_shapes,
    find_checkpoint,
    load_newest,
    read_state,
    remove_leftovers,
)
from mini_llm.training.checkpoint_files import (
    FILES_NAME,
    check_pickles,
    list_checkpoints,
    write_file_list,
)
from tests.conftest import TINY_MODELS

VERSION = checkpoints.FORMAT_VERSION


def make(run: Path, step: int, version: int = VERSION, **state: Any) -> Path:
    folder = run / "checkpoints" / f"step-{step}"
    (folder / "engine").mkdir(parents=True)
    torch.save({"weight": torch.arange(100)}, folder / "engine" / "weights.bin")
    content = {"format_version": version, "step": step, "eval_loss": None, **state}
    (folder / "state.json").write_text(json.dumps(content))
    write_file_list(folder)
    return folder


def test_auto_takes_the_newest_complete_one_and_counts_steps_as_numbers(tmp_path):
    make(tmp_path, 900)
    newest = make(tmp_path, 1000)
    (tmp_path / "checkpoints" / ".step-1100.partial").mkdir()  # killed while writing
    assert find_checkpoint(tmp_path, "auto") == newest
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-900", "step-1000"]


def test_auto_without_checkpoints_starts_from_the_beginning(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path, "never") is None


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["engine/weights.bin", "state.json", FILES_NAME])
@pytest.mark.parametrize(
    ("how", "damage"),
    [
        ("missing|incomplete", Path.unlink),
        ("bytes|damaged", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("sha256|damaged", flip_a_byte),
    ],
)
def test_auto_names_the_damage_and_takes_the_checkpoint_before(tmp_path, capsys, file, how, damage):
    earlier, damaged = make(tmp_path, 10), make(tmp_path, 20)
    damage(damaged / file)
    assert find_checkpoint(tmp_path, "auto") == earlier
    warned = capsys.readouterr().err
    assert "warning: " in warned and "step-20" in warned and "step-10 is used instead" in warned
    assert any(word in warned for word in how.split("|"))
    with pytest.raises(ValueError, match="--resume_from_checkpoint: "):
        find_checkpoint(tmp_path, str(damaged))


def test_auto_refuses_to_start_over_where_every_checkpoint_is_damaged(tmp_path):
    flip_a_byte(make(tmp_path, 10) / "engine/weights.bin")
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole .*weights.bin"):
        find_checkpoint(tmp_path, "auto")


def test_a_rewind_leaves_out_the_damaged_checkpoint_that_the_resume_left_out(tmp_path, monkeypatch):
    make(tmp_path, 10, engine={})
    flip_a_byte(make(tmp_path, 20, engine={}) / "engine/weights.bin")
    loaded: list[Path] = []
    monkeypatch.setattr(
        checkpoints, "load_engine_state", lambda *args, **kwargs: loaded.append(args[3])
    )
    nothing: Any = None
    assert load_newest(nothing, nothing, nothing, tmp_path)["step"] == 10
    assert loaded == [tmp_path / "checkpoints/step-10/engine"]


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_checkpoint_of_a_model_with_other_parameters_is_refused(tmp_path, name):
    checkpoint = make(tmp_path, 10)
    tiny = {**TINY_MODELS[name], "vocab_size": 64}
    model = build_model(name, **tiny)
    model.save_pretrained(checkpoint / "model")
    check_shapes(checkpoint, model)
    check_shapes(checkpoint, build_model(name, **tiny, max_position_embeddings=64))
    with pytest.raises(
        ValueError, match=r"another model \(model.embed_tokens.weight is \[64, .*32"
    ):
        check_shapes(checkpoint, build_model(name, **{**tiny, "vocab_size": 32}))
    deeper = {**tiny, "num_hidden_layers": model.config.num_hidden_layers + 4}
    with pytest.raises(ValueError, match=r"is absent there and .* here\); give the --model"):
        check_shapes(checkpoint, build_model(name, **deeper))


def test_never_refuses_to_overwrite_a_run(tmp_path):
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="--resume_from_checkpoint never would overwrite"):
        find_checkpoint(tmp_path, "never")


def test_auto_refuses_to_overwrite_a_final_model_whose_checkpoints_are_gone(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match="--resume_from_checkpoint auto would .*overwrite its fin"):
        find_checkpoint(tmp_path, "auto")
    assert find_checkpoint(tmp_path, "auto", is_finished=True) is None  # nothing is overwritten
    with pytest.raises(ValueError, match="--resume_from_checkpoint never would overwrite"):
        find_checkpoint(tmp_path, "never", is_finished=True)


def test_resuming_from_an_earlier_step_refuses_while_later_ones_exist(tmp_path, capsys):
    earlier = make(tmp_path, 10)
    make(tmp_path, 20)
    with pytest.raises(ValueError, match="later checkpoint step-20"):
        find_checkpoint(tmp_path, str(earlier))
    assert find_checkpoint(tmp_path / "elsewhere", str(earlier)) == earlier
    assert "is not a checkpoint of the run in" in capsys.readouterr().err


def test_another_format_version_is_named(tmp_path):
    with pytest.raises(ValueError, match="format version 99"):
        read_state(make(tmp_path, 10, version=99))


class RunsACommand:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_that_names_anything_unknown_is_refused_and_never_run(
    tmp_path, monkeypatch, protocol
):
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path, 10)
    torch.save(RunsACommand(), folder / "engine" / "extra.pt", pickle_protocol=protocol)
    write_file_list(folder)  # whoever made it can list it too
    for resume in ("auto", str(folder)):
        with pytest.raises(ValueError, match=r"extra.pt .*it is not loaded"):
            find_checkpoint(tmp_path, resume)
    assert not (tmp_path / "pwned").exists()


def test_file_that_is_no_torch_file_is_refused(tmp_path):
    (tmp_path / "random_states_0.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="random_states_0.pkl is no file that torch.save wrote"):
        check_pickles(tmp_path)


def test_a_run_killed_while_it_removes_a_checkpoint_leaves_none_that_looks_whole(
    tmp_path, monkeypatch
):
    old, newest = make(tmp_path, 5), make(tmp_path, 10)

    def killed(path: Path, **kwargs: Any) -> None:
        if path.exists():
            (path / "state.json").unlink()  # the first file is gone, then the process
            raise SystemExit

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        checkpoints.remove_checkpoint(old)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [newest]
    assert find_checkpoint(tmp_path, "auto") == newest
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-10"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / "checkpoints/.step-30.partial/engine").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
