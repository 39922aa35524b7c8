"""Ranks that were started with different flags or code, through the launcher."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TinyConversations, TinyData
from tests.launching import REPOSITORY, SFT_RUN, TINY_RUN, launch_command, launch_environment


def run(recipe: str, of_rank_1: str, *flags: str) -> subprocess.CompletedProcess[str]:
    *launcher, _ = launch_command()
    command = [*launcher, "tests/distributed/one_rank_differs.py", recipe, of_rank_1, *flags]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def check_what_is_said(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """One sentence on the terminal, the same in the log of every rank; nothing was trained."""
    assert done.returncode != 0, done.stdout
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: the ranks differ in ")
    for rank in (0, 1):
        assert said in (folder / "logs" / f"rank-{rank}.log").read_text()
    assert not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists()
    return said


def test_ranks_that_differ_in_flags_code_and_data_stop_at_once_and_say_in_what(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    data = json.dumps({"of another name": {"path": str(tiny_data.packed), "weight": 1}})
    other = json.dumps(["--seed", "7", "--data", data])
    done = run(
        *("pretrain", other, *TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run"))
    )
    said = check_what_is_said(done, tmp_path / "run")
    assert "--seed (42 on rank 0 (host " in said and ", 7 on rank 1 (host " in said
    assert "code version (" in said and ", an older one on rank 1" in said
    assert "data fingerprint (" in said


@pytest.mark.slow
def test_ranks_of_sft_that_differ_stop_at_once_and_say_in_what(
    tiny_conversations: TinyConversations, tmp_path: Path
) -> None:
    flags = [*SFT_RUN, *tiny_conversations.flags("mini_llama3_tiny")]
    done = run("sft", '["--seed","7"]', *flags, "--output_dir", str(tmp_path / "run"))
    said = check_what_is_said(done, tmp_path / "run")
    assert "--seed (42 on rank 0 (host " in said and "code version (" in said
