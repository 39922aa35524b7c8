"""Running a recipe in this process, for the sentences that mistakes get."""

import gc
import runpy
from collections.abc import Callable
from typing import Any

import pytest

from mini_llm.training import arguments
from mini_llm.training.arguments import (
    PretrainArguments,
    RunArguments,
    SftArguments,
    parse_arguments,
)
from tests.launching import REPOSITORY, SFT_RUN, TINY_RUN


@pytest.fixture
def stopped(tiny_data, tmp_path, monkeypatch, capsys):
    """Flags -> the sentence that recipes/pretrain.py stops with."""
    base = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run")]
    return stopping("pretrain", PretrainArguments, base, monkeypatch, capsys)


@pytest.fixture
def stopped_sft(tiny_conversations, tmp_path, monkeypatch, capsys):
    """Flags -> the sentence that recipes/sft.py stops with."""
    flags = tiny_conversations.flags("mini_llama3_tiny")
    base = [*SFT_RUN, *flags, "--output_dir", str(tmp_path / "run")]
    return stopping("sft", SftArguments, base, monkeypatch, capsys)


def stopping(
    name: str, cls: type[RunArguments], base: list[str], monkeypatch: Any, capsys: Any
) -> Callable[..., str]:
    """Flags -> the sentence of recipes/NAME.py; building a model would fail the test."""
    recipe = runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"), run_name="recipe")

    def forbidden(*args, **kwargs):
        raise AssertionError("a model or an engine was built before the mistake was found")

    for builder in ("build_model", "load_model"):
        recipe["main"].__globals__[builder] = forbidden
    monkeypatch.setattr(recipe["engine"], "build_accelerator", forbidden)
    monkeypatch.setattr(arguments, "SECONDS_FOR_RANK_0", 0)
    config = f"recipes/configs/quickstart/{name}.yaml"

    def run(*flags: str) -> str:
        capsys.readouterr()  # what others said before
        args = parse_arguments(cls, config, [*base, *flags])
        with pytest.raises(SystemExit) as exit_info:
            recipe["main"](args)
        assert exit_info.value.code == 2
        del exit_info
        gc.collect()  # the recipe's frame, and with it the lock that a process would lose by ending
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    return run
