"""A run folder as it lies on the disk: what was logged, what ran, and on which data."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

METRICS, RUN_FACTS, CONFIG, SAMPLES = "metrics.jsonl", "run.json", "config.yaml", "samples.txt"
Metrics = dict[str, Any]


class PlotError(ValueError):
    """A folder that is no run, or a damaged file in it: one sentence with the way out."""


@dataclass(frozen=True)
class Run:
    """A run folder's content; ``facts`` (run.json) and ``config`` are empty where it has none."""

    folder: Path
    name: str
    steps: list[Metrics]
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlotError(f"{self.folder / METRICS} has no logged step yet; plot the run later")


def read_metrics(run: Path) -> list[Metrics]:
    """The logged steps of a run folder, in order; raises PlotError for a line that is none.

    The last line of a run that is writing it, without its end yet, does not count; a step that a
    run logged anew after going back counts as logged last.
    """
    path = run / METRICS
    if not run.is_dir():
        raise PlotError(f"{run} is no folder; give a run folder, the --output_dir of a run")
    if not path.is_file():
        raise PlotError(f"{run} is no run folder: it has no {METRICS}; give the --output_dir")
    steps: list[Metrics] = []
    text = path.read_bytes().decode(errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            metrics = json.loads(line)
            step = metrics["step"]
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise PlotError(
                f"{path}, line {number}: not a JSON object with a whole number as step; "
                "take the line out, or give another run"
            ) from None
        while steps and steps[-1]["step"] >= step:
            steps.pop()
        steps.append(metrics)
    return steps


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder. Raises PlotError, in one sentence, where it is none or is damaged."""
    steps = read_metrics(folder)
    facts, config = {}, {}
    if (folder / RUN_FACTS).is_file():
        facts = read_mapping(folder / RUN_FACTS)
    if (folder / CONFIG).is_file():
        config = read_mapping(folder / CONFIG)
    return Run(folder, name or folder.resolve().name, steps, facts, config)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; raises PlotError naming one that does not."""
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise PlotError(f"{path} cannot be read: it holds no mapping; restore it or remove it")
    return content


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, each under the end of its path that tells it from the others.

    Raises PlotError where one is no run folder, or is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    for place, path in enumerate(whole):
        if path in whole[:place]:
            raise PlotError(f"{folders[place]} is given twice; name each run once")
    length = 1
    while True:
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names):
            break
        length += 1
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def common_parent(folders: Sequence[Path]) -> Path:
    """The innermost folder that holds all of them."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def values(steps: Sequence[Metrics], key: str) -> tuple[list[int], list[float]]:
    """Steps at which ``key`` was logged, and its values; null is NaN. ([], []) if all are null."""
    found = [(m["step"], m[key]) for m in steps if key in m]
    if all(value is None for _, value in found):
        return [], []
    return [step for step, _ in found], [
        float("nan") if value is None else float(value) for _, value in found
    ]


def keys_like(steps: Sequence[Metrics], pattern: str) -> dict[str, str]:
    """The metrics that a pattern such as ``eval/*/loss`` means, with what stands for the ``*``.

    Numbers in it are sorted as numbers. A pattern without ``*`` means itself.
    """
    begin, star, end = pattern.partition("*")
    found = {}
    for key in {key for m in steps for key in m}:
        if not star and key == pattern:
            found[key] = ""
        elif star and key.startswith(begin) and key.endswith(end):
            middle = key[len(begin) : len(key) - len(end)]
            if middle:
                found[key] = middle
    order = sorted(found, key=lambda key: (int(found[key]) if found[key].isdigit() else -1, key))
    return {key: found[key] for key in order}
