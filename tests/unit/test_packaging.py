"""pyproject.toml and constraints.txt agree with each other and with the project's layout."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINT_LINES = (REPOSITORY / "mini_llm/constraints.txt").read_text().splitlines()
PINS = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in CONSTRAINT_LINES if line[0] != "#")
}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_dependency_and_dev_tool_is_pinned_to_a_version_it_allows(
    pyproject: dict[str, Any],
) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    waiting = [*map(Requirement, project["dependencies"] + extras["dev"])]
    requirements = []
    while waiting:
        requirement = waiting.pop()
        if requirement.name == "mini_llm":  # extras of the project itself
            waiting += [Requirement(line) for name in requirement.extras for line in extras[name]]
        else:
            requirements.append(requirement)
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in PINS, f"{name} is missing in constraints.txt"
        assert requirement.specifier.contains(PINS[name]), requirement


def test_constraints_pin_torch_without_naming_a_build() -> None:
    assert PINS["torch"] == "2.13.0"


def test_constraints_are_one_plain_pin_a_line_in_order() -> None:
    pins = [line for line in CONSTRAINT_LINES if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in pins)
    assert len(PINS) == len(pins), "a package is pinned twice"
    assert pins == sorted(pins, key=lambda line: line.split("==")[0].lower())


def test_the_code_is_declared_to_run_on_the_oldest_supported_versions(
    pyproject: dict[str, Any],
) -> None:
    project = pyproject["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    assert project["requires-python"] == ">=3.11"
    assert str(declared["torch"]) == ">=2.11"
    assert str(declared["transformers"]) == "<6,>=5.17"
    assert str(declared["deepspeed"]) == "==0.19.8"


def test_the_package_holds_mini_llm_its_constraints_its_tokenizer_and_its_tasks(
    pyproject: dict[str, Any],
) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    assert setuptools["packages"]["find"] == {"include": ["mini_llm*"]}
    data = ["constraints.txt", "tokenizer/*", "evaluate/tasks/*"]
    assert setuptools["package-data"] == {"mini_llm": data}


def test_no_package_index_is_written_into_a_set_up_file() -> None:
    names = ("launch.sh", "pyproject.toml", "mini_llm/constraints.txt", ".ci/run", "Dockerfile")
    for name in names:
        assert "://" not in (REPOSITORY / name).read_text(), name


# ------------------------------------------------------------------ the Dockerfile

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "hadolint is missing; run ./launch.sh setup --dev"
    result = subprocess.run(
        [hadolint, "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_image_is_set_up_by_launch_sh_from_files_that_the_build_gets() -> None:
    copied = re.findall(r"^COPY --chown=\S+ (.*) \S+$", DOCKERFILE, re.MULTILINE)
    *early, everything = [line.split() for line in copied]
    names = [name for line in early for name in line]
    assert everything == ["."]
    # What the set-up reads and, for the editable install, what makes mini_llm a package.
    needed = {"launch.sh", "pyproject.toml", "mini_llm/constraints.txt", "mini_llm/__init__.py"}
    assert needed <= set(names)
    assert DOCKERFILE.index(names[0]) < DOCKERFILE.index("./launch.sh setup")
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for name in names:
        assert (REPOSITORY / name).is_file()
        assert not {name, *map(str, Path(name).parents)} & set(ignored)


def test_the_image_runs_launch_sh_and_not_as_root() -> None:
    assert 'ENTRYPOINT ["./launch.sh"]' in DOCKERFILE
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert users == ["${USER_ID}"]
    (user_id,) = re.findall(r"^ARG USER_ID=(.*)$", DOCKERFILE, re.MULTILINE)
    assert int(user_id) != 0
