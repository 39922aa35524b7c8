"""The pictures that prepare_sft.py draws of its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mini_llm.plots.packed_rows import attention_mask, draw_attention_mask
from mini_llm.plots.style import COLORS, drawing

__all__ = [
    "attention_mask",
    "draw_attention_mask",
    "draw_lengths",
    "draw_utilisation",
    "length_counts",
]

# Lengths are counted in classes that grow by a quarter of a power of two: 8, 9.5, 11.3, 13.5, 16, …
LENGTH_EDGES = 2.0 ** np.arange(3, 20.25, 0.25)


def length_counts(lengths: Sequence[int]) -> np.ndarray:
    """Return int64 [classes]: how many lengths fall into each class, the outer ones open."""
    inside = np.clip(np.array(lengths, np.float64), LENGTH_EDGES[0], LENGTH_EDGES[-2])
    return np.histogram(inside, LENGTH_EDGES)[0].astype(np.int64)


def draw_lengths(path: Path, before: np.ndarray, after: np.ndarray, seq_len: int) -> None:
    """Draw the shares of conversations by length, before and after filters and sampling."""
    with drawing(path) as axes:
        for counts, label, color in (
            (before, f"valid in the input ({before.sum():,})", COLORS[1]),
            (after, f"written ({after.sum():,})", COLORS[0]),
        ):
            shares = 100 * counts / max(counts.sum(), 1)
            axes.stairs(shares, LENGTH_EDGES, label=label, color=color, fill=True, alpha=0.35)
            axes.stairs(shares, LENGTH_EDGES, color=color)
        used = np.flatnonzero(before + after)
        axes.set_xscale("log", base=2)
        axes.set_xlim(LENGTH_EDGES[used[0]], max(LENGTH_EDGES[used[-1] + 1], seq_len * 1.1))
        axes.axvline(
            seq_len, color="black", linestyle="--", linewidth=1, label=f"a row: {seq_len:,}"
        )
        axes.set_xlabel("tokens of a conversation")
        axes.set_ylabel("share of conversations (%)")
        axes.legend()


def draw_utilisation(path: Path, row_tokens: np.ndarray, conversations: int, seq_len: int) -> None:
    """Draw how full the packed rows are, and what one conversation a row would give."""
    with drawing(path) as axes:
        axes.hist(
            100 * row_tokens / seq_len, bins=np.linspace(0, 100, 51).tolist(), color=COLORS[0]
        )
        mean = 100 * row_tokens.sum() / (seq_len * len(row_tokens))
        alone = 100 * row_tokens.sum() / (seq_len * conversations)
        axes.axvline(mean, color="black", linewidth=1, label=f"packed, mean {mean:.1f}%")
        axes.axvline(
            alone,
            color=COLORS[1],
            linestyle="--",
            linewidth=1,
            label=f"one a row, mean {alone:.1f}%",
        )
        axes.set_xlabel("positions of a row that hold a token (%)")
        axes.set_ylabel("rows")
        axes.set_yscale("log")
        axes.legend()
