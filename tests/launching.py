"""Starting the recipes the way a user does, and reading what a run left behind."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import TINY_MODELS

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 600  # for a launch; a busy machine takes minutes

# A model small enough that a launch is mostly imports; everything else is the recipe's own.
TINY_MODEL = TINY_MODELS["mini_llama3_tiny"]
TINY_RUN = [
    *("--model", "mini_llama3_tiny", "--model_overrides", json.dumps(TINY_MODEL)),
    *("--max_steps", "20", "--global_batch_tokens", "1024"),  # 16 rows of 64 tokens
    *("--per_device_train_batch_size", "4", "--learning_rate", "3e-3"),
    *("--min_lr_ratio", "0.1", "--weight_decay", "0.1", "--warmup_steps", "1"),
    # At 1e-8, AdamW makes steps of lr out of gradients that are rounding, and soon that decides a
    # near-tie of a router: one token goes to another expert, and losses differ by 1e-4.
    *("--adam_epsilon", "1e-4"),
    *("--expert_bias_update_speed", "0.01", "--balance_loss_weight", "0.01"),
    *("--logging_steps", "1", "--eval_steps", "0", "--save_steps", "0"),
    *("--sample_prompts", "[]", "--report_to", "none"),
]

# The same for recipes/sft.py, on rows of TinyConversations.
SFT_RUN = [
    *("--num_train_epochs", "0", "--max_steps", "6", "--per_device_train_batch_size", "4"),
    *("--global_batch_tokens", "2560", "--learning_rate", "1e-3", "--warmup_steps", "1"),
    *("--adam_epsilon", "1e-4", "--weight_decay", "0.1"),
    *("--logging_steps", "1", "--eval_steps", "0", "--save_steps", "0", "--report_to", "none"),
    *("--sample_prompts", "[]"),
]


_numbers = itertools.count(os.getpid())


def launch_port() -> int:
    """A port at which ranks can meet minutes from now.

    It is below those that Linux gives to whoever asks for any (from 32768 on), where another
    connection might take it meanwhile, and no other worker of this suite has it. Those after it are
    left free, because a restart takes the next.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = 5_000 // workers
    while True:
        port = 12_000 + 4 * (worker * share + next(_numbers) % share)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port


def launch(
    *flags: str,
    recipe: str = "pretrain",
    config: str | None = "zero1",
    processes: int = 2,
    check: bool = True,
    cwd: Path = REPOSITORY,
    env: dict[str, str] | None = None,
    seconds: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run ``accelerate launch … recipes/RECIPE.py flags``; stdout and stderr come together.

    ``config`` None: no Accelerate config at all. ``check``: a failure fails the test, with output.
    """
    done = subprocess.run(
        launch_command(*flags, recipe=recipe, config=config, processes=processes),
        cwd=cwd,
        env=launch_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def launch_command(
    *flags: str, recipe: str = "pretrain", config: str | None = "zero1", processes: int = 2
) -> list[str]:
    """The words of ``accelerate launch … recipes/RECIPE.py flags``."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is not None:
        command += ["--config_file", f"accelerate_configs/{config}.yaml"]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*command, str(REPOSITORY / f"recipes/{recipe}.py"), *flags]


def launch_environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a launch: one thread a rank, and the code beside the recipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    environment.pop("PYTHONPATH", None)
    return environment


def launch_several(
    runs: list[list[str]],
    plan: Path,
    *,
    recipe: str = "pretrain",
    config: str = "zero1",
    processes: int = 2,
    env: dict[str, str] | None = None,
    env_of_runs: list[dict[str, str]] | None = None,
    script: str = "several_runs.py",
    seconds: float = 1800,
) -> str:
    """Run the recipe once for every list of flags, one after the other, in one launch.

    ``plan`` is a file to write them to for tests/distributed/several_runs.py, which says why the
    runs are independent, or for another ``script`` there. ``env_of_runs`` has variables for each
    run alone. Returns the output; fails with it if one of them fails.
    """
    content = [
        {"recipe": recipe, "flags": flags, "port": launch_port(), "env": variables}
        for flags, variables in zip(runs, env_of_runs or [{}] * len(runs), strict=True)
    ]
    plan.write_text(json.dumps(content))
    *launcher, _ = launch_command(config=config, processes=processes)
    done = subprocess.run(
        [*launcher, str(REPOSITORY / "tests/distributed" / script), str(plan)],
        cwd=REPOSITORY,
        env=launch_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def series(run: Path, key: str) -> list[float]:
    """One metric over the logged steps that have it."""
    return [step[key] for step in metrics(run) if key in step]


def facts(run: Path) -> dict[str, Any]:
    """run.json."""
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content
