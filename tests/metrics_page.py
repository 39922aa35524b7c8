"""The tables of docs/metrics.md, and which of their names a run has emitted."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tests.launching import REPOSITORY


@dataclass(frozen=True)
class Documented:
    """A row of a table."""

    name: str
    meaning: str
    unit: str
    over: str
    when: str

    @property
    def is_list(self) -> bool:
        """Whether only metrics.jsonl gets it."""
        return ", a list" in self.meaning

    @property
    def is_table(self) -> bool:
        """Whether only the trackers get it."""
        return ", a table" in self.meaning

    def matches(self, name: str) -> bool:
        """Whether ``name`` is one of those that this row stands for."""
        pattern = re.escape(self.name).replace("<i>", r"\d+").replace("<source>", "[^/]+")
        return re.fullmatch(pattern, name) is not None


def documented_metrics() -> list[Documented]:
    """All rows, in the order of the page."""
    rows = []
    for line in (REPOSITORY / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            name, *others = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append(Documented(name.strip("`"), *others))
    return rows


def names_without_a_row(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that the page does not know."""
    page = documented_metrics()
    return [name for name in names if not any(row.matches(name) for row in page)]
