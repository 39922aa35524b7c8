"""How far a long stage is, as plain lines that read well in a log file too."""

from __future__ import annotations

import time

PROGRESS_SECONDS = 10.0


class Progress:
    """Prints a line now and then: how far a stage is, its speed, and when it will be done."""

    def __init__(self, stage: str, total: int) -> None:
        self._stage = stage
        self._total = total
        self._done = self._skipped = self._tokens = 0
        self._started = self._last = time.monotonic()

    def skip(self, amount: int) -> None:
        """Count work that an earlier run did, which says nothing about the speed of this one."""
        self._skipped += amount

    def add(self, amount: int, tokens: int) -> None:
        """Count work of this run; print if the last line is some seconds old."""
        self._done += amount
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS or not self._done:
            return
        self._last = now
        seconds = now - self._started
        left = self._total - self._skipped - self._done
        share = (self._done + self._skipped) / self._total
        speed = f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s, "
        print(
            f"{self._stage}: {share:.1%}, {speed if self._tokens else ''}"
            f"ETA {duration(left * seconds / self._done)}",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Return hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
