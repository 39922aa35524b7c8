"""The doctor's findings: one line each."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Literal["ok", "note", "FAIL"]
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.subject:<22}  {self.detail}"
