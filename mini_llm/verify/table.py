"""The rows of the report, in the terminal and in files."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "WARN", "FAIL", "skipped"]
VERDICTS: tuple[Verdict, ...] = ("ok", "WARN", "FAIL", "skipped")
COLUMNS = ("check", "verdict", "figure", "result")


@dataclass(frozen=True)
class Row:
    """One check: what was found, in words and as a figure with its unit, and what that means."""

    check: str
    verdict: Verdict
    figure: str
    result: str  # for any verdict but ok also why

    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        return [self.check, self.verdict, self.figure, self.result]


def terminal_table(rows: Sequence[Row]) -> str:
    """Aligned columns; the last one, which is long, comes last."""
    lines = [list(COLUMNS), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    lines.insert(1, ["-" * width for width in (*widths[:-1], len(COLUMNS[-1]))])
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(padded)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same for verify.md."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def summary(rows: Sequence[Row]) -> str:
    """How many of each verdict, e.g. "14 ok, 1 WARN, 0 FAIL, 2 skipped"."""
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def exit_status(rows: Sequence[Row]) -> int:
    """1 if a check failed. Skipped ones did not, but are not called ok either."""
    return int(any(row.verdict == "FAIL" for row in rows))


def write_report(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """verify.json and verify.md; ``about`` says where and when this was measured."""
    content = {**about, "rows": [dataclasses.asdict(row) for row in rows]}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / "verify.json").write_text(text, encoding="utf-8")
    said = "\n".join(f"- {name}: {value}" for name, value in about.items())
    (folder / "verify.md").write_text(
        f"# verify: {summary(rows)}\n\n{said}\n\n{markdown_table(rows)}\n", encoding="utf-8"
    )


def read_rows(path: Path) -> list[Row]:
    """What the preflight left for the driver."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """For :func:`read_rows`."""
    content = [dataclasses.asdict(row) for row in rows]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
