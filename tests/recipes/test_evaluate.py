"""`launch.sh evaluate` on what the recipes leave behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from mini_llm.evaluate.results import Results, read_results
from tests.conftest import TinyConversations, TinyData
from tests.launching import REPOSITORY, SFT_RUN, TINY_RUN, launch, launch_environment, metrics

pytestmark = pytest.mark.slow
EVALUATED = ["--eval_steps", "5", "--max_eval_rows", "32"]


def evaluate(run: Path) -> Results:
    """Run launch.sh as a user does, with nothing to be had from anywhere."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MINI_LLM_VENV": sys.prefix}
    done = subprocess.run(
        ["./launch.sh", "evaluate", str(run), "--limit", "3"],
        cwd=REPOSITORY,
        env=launch_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    found = read_results(run)
    assert found is not None and "Tasks" in done.stdout
    return found


def assert_as_logged(run: Path, found: Results) -> None:
    """The figures are those of the run's last evaluation."""
    logged = metrics(run)[-1]
    for figure in ("loss", "bits_per_byte"):
        value = found["held_out"]["tiny"][figure]
        assert value == pytest.approx(logged[f"eval/tiny/{figure}"], rel=1e-5)


def test_a_pretrained_run_is_evaluated_to_what_it_logged(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch(*TINY_RUN, *tiny_data.flags, *EVALUATED, "--output_dir", str(run))
    found = evaluate(run)
    assert_as_logged(run, found)
    assert (found["step"], found["apply_chat_template"]) == (20, False)
    assert "Perplexity by document length" in (run / "report.html").read_text()
    assert "## Benchmarks" in (run / "final" / "README.md").read_text()


def test_a_fine_tuned_run_is_evaluated_on_its_answers_and_asked_through_its_template(
    tiny_conversations: TinyConversations, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*SFT_RUN, *tiny_conversations.flags("mini_llama3_tiny"), *EVALUATED]
    launch(*flags, "--output_dir", str(run), recipe="sft", processes=1)
    found = evaluate(run)
    assert_as_logged(run, found)
    assert found["apply_chat_template"] is True
