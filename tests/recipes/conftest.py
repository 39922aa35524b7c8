"""Running the recipe in this process, for the sentences that mistakes get."""

import gc
import runpy

import pytest

from mini_llm.training import arguments
from mini_llm.training.arguments import PretrainArguments, parse_arguments
from tests.launching import REPOSITORY, TINY_RUN

QUICKSTART = "recipes/configs/quickstart/pretrain.yaml"


@pytest.fixture
def stopped(tiny_data, tmp_path, monkeypatch, capsys):
    """Flags -> the sentence that the recipe stops with; building a model would fail the test."""
    recipe = runpy.run_path(str(REPOSITORY / "recipes" / "pretrain.py"), run_name="recipe")

    def forbidden(*args, **kwargs):
        raise AssertionError("a model or an engine was built before the mistake was found")

    recipe["main"].__globals__["build_model"] = forbidden
    monkeypatch.setattr(recipe["engine"], "build_accelerator", forbidden)
    monkeypatch.setattr(arguments, "SECONDS_FOR_RANK_0", 0)

    def run(*flags: str) -> str:
        base = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run")]
        args = parse_arguments(PretrainArguments, QUICKSTART, [*base, *flags])
        with pytest.raises(SystemExit) as exit_info:
            recipe["main"](args)
        assert exit_info.value.code == 2
        del exit_info
        gc.collect()  # the recipe's frame, and with it the lock that a process would lose by ending
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    return run
