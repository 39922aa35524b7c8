"""What logging costs a step: no wait for the device between logged ones; and its clock is right."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_MODELS, TinyData
from tests.launching import TINY_RUN, launch_several, metrics

LLAMA, DEEPSEEK, QWEN = TINY_MODELS
LOGGED = (1, 6, 12, 18)
RUNS = {
    "zero1": ("zero1", DEEPSEEK),
    "ddp": ("ddp", QWEN),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: Any, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 steps on two ranks, every 6th of them logged."""
    config, model = RUNS[request.param]
    folder = tmp_path_factory.mktemp(f"watched-{config}")
    flags = [*TINY_RUN, *tiny_data.flags, "--model", model, "--max_steps", "18"]
    flags += ["--model_overrides", json.dumps(TINY_MODELS[model]), "--logging_steps", "6"]
    flags += ["--output_dir", str(folder / "run"), "--bad_step_policy", "skip"]
    launch_several([flags], folder / "plan.json", config=config, script="watched_steps.py")
    return folder / "run"


def watched(run: Path) -> list[dict[str, Any]]:
    """What each of the ranks noted."""
    return [json.loads((run / f"watched-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_the_host_waits_for_no_value_in_steps_that_are_not_logged(run: Path) -> None:
    reads = watched(run)[0]["reads"]
    waiting = {int(step): lines for step, lines in reads.items() if int(step) > 0}
    assert set(waiting) <= set(LOGGED), waiting
    assert set(waiting) == set(LOGGED)  # where it does, it is seen


@pytest.mark.slow
def test_tokens_per_second_are_those_of_an_independent_clock_and_count(run: Path) -> None:
    logged = {line["step"]: line["perf/tokens_per_second"] for line in metrics(run)}
    seconds, tokens = dict.fromkeys(LOGGED, 0.0), dict.fromkeys(LOGGED, 0)
    for of_rank in watched(run):  # each has its own interval, which the other's waits do not end
        intervals = of_rank["intervals"]
        assert tuple(logged) == LOGGED == tuple(step for step, _, _ in intervals)
        for (_, began, before), (step, ended, after) in pairwise(intervals):
            seconds[step] += (ended - began) / 2  # the mean of two ranks
            tokens[step] += after - before
    for step in LOGGED[2:]:  # run.json is written after the first step, in nobody's interval
        assert logged[step] == pytest.approx(tokens[step] / seconds[step], rel=0.02)
