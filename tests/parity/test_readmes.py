"""The READMEs beside the models walk from equations to lines: to lines that exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import mini_llm
from mini_llm import build_model, list_models
from mini_llm.models import ARCHITECTURES, preset_config
from mini_llm.training.sizes import count_parameters

PACKAGE = Path(mini_llm.__file__).parent
MODELS = PACKAGE / "models"
FOLDERS = [MODELS / module.rpartition(".")[2] for module in ARCHITECTURES.values()]


@cache
def _definitions(path: Path) -> set[str]:
    """Functions, classes, ``Class.member`` and assigned names of a Python file."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for member in _definitions_of_members(node)}
    return names


def _definitions_of_members(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.Attribute | ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.attr if isinstance(inner, ast.Attribute) else inner.id


def _code_cells(readme: str) -> Iterator[str]:
    """The last cell of each row of the tables, where the code is named."""
    for line in readme.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            yield line.strip("|").rpartition("|")[2]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_line_of_code_that_a_readme_names_exists(folder):
    here = [folder / "modeling.py", *sorted((MODELS / "common").glob("*.py"))]
    named = 0
    for cell in _code_cells((folder / "README.md").read_text()):
        files = here
        for name, colon in re.findall(r"`([^`]+)`(:?)", cell):
            if name.endswith(".py"):
                path = next((p for p in (MODELS / name, PACKAGE / name) if p.is_file()), None)
                assert path is not None, name
                files = [path] if colon else here  # `file.py`: what follows is in that file
                continue
            defined = set().union(*(_definitions(path) for path in files))
            name = name.removeprefix("outputs.")
            assert name in defined, f"{name} is not in {[path.name for path in files]}"
            named += 1
    assert named >= 12


@pytest.mark.parametrize("name", [name for name in list_models() if not name.endswith("_tiny")])
def test_the_sizes_that_a_readme_states_are_the_presets(name):
    with torch.device("meta"):
        counts = count_parameters(build_model(name))
    folder = MODELS / ARCHITECTURES[preset_config(name).model_type].rpartition(".")[2]
    readme = " ".join((folder / "README.md").read_text().split())
    for size in {counts.total, counts.active}:
        assert f"{size / 1e6:.1f} M" in readme
