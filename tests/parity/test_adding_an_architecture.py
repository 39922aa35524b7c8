"""models/README.md's checklist, followed: one folder and one line add an architecture."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyData
from tests.launching import REPOSITORY, metrics

TOY = Path(__file__).with_name("toy_architecture")


@pytest.fixture(scope="module")
def copy_with_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the toy's folder and its line in the table."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("mini_llm", "recipes", "tests", "ds_configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, copy / name, ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    shutil.copytree(TOY, copy / "mini_llm" / "models" / "toy")
    table = copy / "mini_llm" / "models" / "__init__.py"
    line = 'ARCHITECTURES = {\n    "qwen3": "mini_llm.models.toy",'
    table.write_text(table.read_text().replace("ARCHITECTURES = {", line, 1))
    return copy


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done


def test_the_toy_fits_in_150_lines():
    assert sum(len(path.read_text().splitlines()) for path in TOY.glob("*.py")) <= 150


@pytest.mark.slow
def test_the_toy_inherits_every_parity_packing_and_cache_test(copy_with_toy):
    names = ("test_stock_parity", "test_stock_features", "test_generation_and_loading")
    files = [f"tests/parity/{name}.py" for name in names]
    done = run(copy_with_toy, "-m", "pytest", *files, "-k", "toy_tiny", "-q")
    match = re.search(r"(\d+) passed", done.stdout)
    assert match and int(match.group(1)) >= 45 and "skipped" not in done.stdout, done.stdout


def test_the_toy_trains_through_the_recipe(copy_with_toy, tiny_data: TinyData, tmp_path):
    run(
        *(copy_with_toy, "recipes/pretrain.py", *tiny_data.flags, "--model", "toy_tiny"),
        *("--output_dir", str(tmp_path), "--deepspeed", "none", "--max_steps", "30"),
        *("--global_batch_tokens", "1024", "--per_device_train_batch_size", "16"),
        *("--learning_rate", "1e-2", "--logging_steps", "1", "--eval_steps", "0"),
        *("--sample_prompts", "[]", "--report_to", "none"),
    )
    losses = [step["train/loss"] for step in metrics(tmp_path)]
    assert losses[0] - losses[-1] > 1.0
