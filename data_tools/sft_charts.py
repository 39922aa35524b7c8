"""The pictures that prepare_sft.py draws of its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Lengths are counted in classes that grow by a quarter of a power of two: 8, 9.5, 11.3, 13.5, 16, …
LENGTH_EDGES = 2.0 ** np.arange(3, 20.25, 0.25)
PICTURE_POSITIONS = 1024


def length_counts(lengths: Sequence[int]) -> np.ndarray:
    """Return int64 [classes]: how many lengths fall into each class, the outer ones open."""
    inside = np.clip(np.array(lengths, np.float64), LENGTH_EDGES[0], LENGTH_EDGES[-2])
    return np.histogram(inside, LENGTH_EDGES)[0].astype(np.int64)


def attention_mask(doc_lens: np.ndarray, seq_len: int) -> np.ndarray:
    """Return bool [seq_len, seq_len]: whether position i attends to position j of a packed row.

    A token attends to itself and what stands before it in its conversation; padding to nothing.
    """
    document = np.full(seq_len, -1)
    document[: int(doc_lens.sum())] = np.repeat(np.arange(len(doc_lens)), doc_lens)
    same = (document[:, None] == document[None, :]) & (document >= 0)[:, None]
    return np.tril(same)


def draw_lengths(path: Path, before: np.ndarray, after: np.ndarray, seq_len: int) -> None:
    """Draw the shares of conversations by length, before and after filters and sampling."""
    figure, axes = _figure()
    for counts, label, color in (
        (before, f"valid in the input ({before.sum():,})", "tab:orange"),
        (after, f"written ({after.sum():,})", "tab:blue"),
    ):
        shares = 100 * counts / max(counts.sum(), 1)
        axes.stairs(shares, LENGTH_EDGES, label=label, color=color, fill=True, alpha=0.35)
        axes.stairs(shares, LENGTH_EDGES, color=color)
    used = np.flatnonzero(before + after)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LENGTH_EDGES[used[0]], max(LENGTH_EDGES[used[-1] + 1], seq_len * 1.1))
    axes.axvline(seq_len, color="black", linestyle="--", linewidth=1, label=f"a row: {seq_len:,}")
    axes.set_xlabel("tokens of a conversation")
    axes.set_ylabel("share of conversations (%)")
    axes.legend()
    _save(figure, path)


def draw_utilisation(path: Path, row_tokens: np.ndarray, conversations: int, seq_len: int) -> None:
    """Draw how full the packed rows are, and what one conversation a row would give."""
    figure, axes = _figure()
    axes.hist(100 * row_tokens / seq_len, bins=np.linspace(0, 100, 51).tolist(), color="tab:blue")
    mean = 100 * row_tokens.sum() / (seq_len * len(row_tokens))
    alone = 100 * row_tokens.sum() / (seq_len * conversations)
    axes.axvline(mean, color="black", linewidth=1, label=f"packed, mean {mean:.1f}%")
    axes.axvline(
        alone, color="tab:red", linestyle="--", linewidth=1, label=f"one a row, mean {alone:.1f}%"
    )
    axes.set_xlabel("positions of a row that hold a token (%)")
    axes.set_ylabel("rows")
    axes.set_yscale("log")
    axes.legend()
    _save(figure, path)


def draw_attention_mask(path: Path, doc_lens: np.ndarray, loss_mask: np.ndarray) -> None:
    """Draw what each position of a row attends to, and below it which ones are supervised."""
    from matplotlib.colors import ListedColormap

    seq_len = len(loss_mask)
    step = -(-seq_len // PICTURE_POSITIONS)
    allowed = attention_mask(doc_lens, seq_len)[::step, ::step]
    figure, axes = _figure(
        2, figsize=(6.5, 7.2), gridspec_kw={"height_ratios": [24, 1]}, sharex=True
    )
    extent = (0, seq_len, seq_len, 0)
    colors = ListedColormap(["#f2f2f2", "tab:blue"])
    axes[0].imshow(allowed, cmap=colors, extent=extent, interpolation="nearest", vmin=0, vmax=1)
    axes[0].set_ylabel("query position")
    axes[0].set_title(f"a packed row: {len(doc_lens)} conversations, none sees another")
    supervised = ListedColormap(["#f2f2f2", "tab:orange"])
    axes[1].imshow(
        loss_mask[None, :],
        cmap=supervised,
        extent=(0, seq_len, 1, 0),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    axes[1].set_yticks([])
    axes[1].set_xlabel("key position; orange: supervised (answers and their end)")
    _save(figure, path)


def _figure(rows: int = 1, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, **{"figsize": (8, 4.5), "dpi": 120, **options})
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, which a PNG names otherwise.
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
