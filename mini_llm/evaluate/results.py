"""``results.json`` of an evaluation, and the tables that are made of it. Imports nothing slow."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER, RESULTS, PICTURE = "evaluation", "results.json", "perplexity_by_length.png"
MANY_TASKS = 8  # a group with more shows its mean alone

Results = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows
HELD_OUT_HEAD = ("held-out part of", "nats/token", "perplexity", "bits/byte", "tokens")
TASKS_HEAD = ("task", "metric", "value", "± stderr", "questions", "examples shown")


def results_folder(run: Path, step: int | None) -> Path:
    """Where the evaluation of a run's ``final/`` lies, or of its checkpoint of that step."""
    return run / FOLDER if step is None else run / FOLDER / f"step-{step}"


def read_results(run: Path, step: int | None = None) -> Results | None:
    """The evaluation of a run's ``final/``, or of that step's checkpoint; None where there is none.

    Raises ValueError, naming the file, for one that cannot be read.
    """
    path = results_folder(run, step) / RESULTS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"held_out", "tasks"} <= content.keys():
        raise ValueError(f"{path} cannot be read: it is no evaluation; evaluate again or remove it")
    return content


def number(value: Any, digits: int) -> str:
    """A figure with so many digits behind the point; – where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def held_out_table(results: Results) -> Table:
    """The sources: loss, perplexity, bits per byte, predicted tokens."""
    rows: list[tuple[str, ...]] = [
        (
            name,
            number(source["loss"], 4),
            number(source["perplexity"], 2),
            number(source["bits_per_byte"], 4),
            f"{source['tokens']:,}",
        )
        for name, source in results["held_out"].items()
    ]
    return HELD_OUT_HEAD, rows


def bucket_name(bucket: Mapping[str, Any]) -> str:
    """16–31, or 1."""
    first, last = bucket["from"], bucket["to"]
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def bucket_table(buckets: Sequence[Mapping[str, Any]], what: str) -> Table:
    """The buckets of ``by_length`` or ``by_position``; ``what`` heads their first column."""
    counts_documents = all("documents" in bucket for bucket in buckets)
    head = [what, *(["documents"] if counts_documents else [])]
    head += ["tokens", "nats/token", "perplexity", "bits/byte"]
    rows = []
    for bucket in buckets:
        row = [bucket_name(bucket)]
        row += [f"{bucket['documents']:,}"] if counts_documents else []
        row += [f"{bucket['tokens']:,}", number(bucket["loss"], 4)]
        row += [number(bucket["perplexity"], 2), number(bucket["bits_per_byte"], 4)]
        rows.append(tuple(row))
    return tuple(head), rows


def tasks_table(results: Results) -> Table:
    """Every metric of every task and group; of a large group the members are left out."""
    groups = [task for task in results["tasks"].values() if task.get("members")]
    hidden = {name for g in groups if len(g["members"]) > MANY_TASKS for name in g["members"]}
    rows: list[tuple[str, ...]] = [
        (
            name,
            metric,
            number(value["value"], 4),
            number(value["stderr"], 4),
            f"{task['questions']:,}",
            "–" if task["num_fewshot"] is None else str(task["num_fewshot"]),
        )
        for name, task in results["tasks"].items()
        if name not in hidden
        for metric, value in task["metrics"].items()
    ]
    return TASKS_HEAD, rows


def as_text(table: Table) -> str:
    """A table in columns, names on the left and numbers on the right."""
    head, rows = table
    lines = [head, *rows]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(head))]

    def cell(text: str, column: int, left: bool) -> str:
        padding = " " * (widths[column] - _width(text))
        return text + padding if left else padding + text

    names = {0, *(c for c in range(len(head)) if head[c] == "metric")}
    return "\n".join(
        "  ".join(cell(text, c, c in names) for c, text in enumerate(line)).rstrip()
        for line in lines
    )


def _width(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def as_markdown(table: Table) -> str:
    """A table as a model card has it."""
    head, rows = table
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(t.split()).replace("|", "\\|") for t in line) + " |"
        for line in lines
    )
