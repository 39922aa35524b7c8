"""Pictures of the packed rows that a run trains on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .style import drawing

PICTURE_POSITIONS = 1024  # of an attention mask, each way
PICTURE_ROWS = 32  # of packed rows

NOTHING, CONTEXT, SUPERVISED, OUTLINE = "#f0f0f0", "#9ecae1", "#f47b2a", "#3f3f3f"
PADDING = {"facecolor": NOTHING, "hatch": "////", "edgecolor": "#bdbdbd", "linewidth": 0}


def plot_packing(run: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draw what packed rows hold to ``plots/packing.png``; return it.

    A row has ``doc_lens`` (int) and ``loss_mask`` (T,) bool; the first 32 rows are drawn.
    """
    from matplotlib.ticker import MaxNLocator

    rows = rows[:PICTURE_ROWS]
    seq_len = len(rows[0]["loss_mask"])
    path = run / "plots" / "packing.png"
    with drawing(path, figsize=(10, 1.6 + 0.27 * len(rows))) as axes:
        axes.grid(False)
        for place, row in enumerate(rows):
            bar = (place - 0.4, 0.8)
            lengths, supervised = np.asarray(row["doc_lens"]), np.asarray(row["loss_mask"])
            starts, used = np.cumsum(lengths) - lengths, int(lengths.sum())
            axes.broken_barh([(0, used)], bar, color=CONTEXT, linewidth=0)
            axes.broken_barh(_spans(supervised), bar, color=SUPERVISED, linewidth=0)
            axes.broken_barh([(used, seq_len - used)], bar, **PADDING)
            documents = list(zip(starts, lengths, strict=True))
            axes.broken_barh(documents, bar, facecolor="none", edgecolor=OUTLINE, linewidth=0.7)
        tokens = sum(int(np.sum(row["doc_lens"])) for row in rows)
        supervised_tokens = sum(int(np.sum(row["loss_mask"])) for row in rows)
        conversations = sum(len(row["doc_lens"]) for row in rows)
        axes.set_title(
            f"{_count(conversations, 'conversation')} in {_count(len(rows), 'packed row')} of "
            f"{seq_len:,} tokens: {100 * tokens / (len(rows) * seq_len):.1f}% full, "
            f"{100 * supervised_tokens / max(tokens, 1):.1f}% of the tokens supervised",
        )
        axes.set_xlim(0, seq_len)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("position in the row (tokens)")
        axes.set_ylabel("packed row")
        _legend(
            axes,
            {
                "context: prompts and headers": {"color": CONTEXT},
                "supervised: answers and their ends": {"color": SUPERVISED},
                "padding": PADDING,
                "one conversation": {"facecolor": "none", "edgecolor": OUTLINE},
            },
        )
    return path


def plot_attention_mask(run: Path, row: Mapping[str, Any]) -> Path:
    """Draw which token of a packed row attends to which to ``plots/attention_mask.png``.

    The row is one of :func:`plot_packing`'s.
    """
    path = run / "plots" / "attention_mask.png"
    draw_attention_mask(path, np.asarray(row["doc_lens"]), np.asarray(row["loss_mask"]))
    return path


def attention_mask(doc_lens: np.ndarray, seq_len: int, step: int = 1) -> np.ndarray:
    """Return bool [P, P]: whether position i attends to position j, for every ``step``-th of both.

    A token attends to itself and what stands before it in its document; padding to nothing.
    """
    document = np.full(seq_len, -1)
    document[: int(doc_lens.sum())] = np.repeat(np.arange(len(doc_lens)), doc_lens)
    document = document[::step]
    same = (document[:, None] == document[None, :]) & (document >= 0)[:, None]
    return np.tril(same)


def draw_attention_mask(path: Path, doc_lens: np.ndarray, loss_mask: np.ndarray) -> None:
    """Draw what each token of a row (T,) attends to, the supervised ones in another colour."""
    from matplotlib.colors import ListedColormap

    seq_len = len(loss_mask)
    step = -(-seq_len // PICTURE_POSITIONS)
    allowed = attention_mask(doc_lens, seq_len, step)
    with drawing(path, figsize=(7, 7.6)) as axes:
        axes.grid(False)
        axes.imshow(
            allowed * np.where(loss_mask[::step], 2, 1)[:, None],
            cmap=ListedColormap([NOTHING, CONTEXT, SUPERVISED]),
            extent=(0, seq_len, seq_len, 0),
            interpolation="nearest",
            vmin=0,
            vmax=2,
        )
        axes.set_title(
            f"attention in a packed row: {_count(len(doc_lens), 'conversation')}, "
            "none sees another",
        )
        axes.set_xlabel("key: position of the token attended to (tokens)")
        axes.set_ylabel("query: position of the token that attends (tokens)")
        used = int(doc_lens.sum())
        if used < seq_len:
            axes.axhspan(used, seq_len, **PADDING)
        _legend(
            axes,
            {
                "a context token attends": {"color": CONTEXT},
                "a supervised token attends": {"color": SUPERVISED},
                "no attention": {"color": NOTHING},
                "padding": PADDING,
            },
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def _legend(axes: Any, labels: Mapping[str, Mapping[str, Any]]) -> None:
    """One line below the axes: what each colour means."""
    from matplotlib.patches import Patch

    handles = [Patch(label=label, **style) for label, style in labels.items()]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -38 / (axes.bbox.height * 72 / axes.figure.dpi)),  # 38 points below
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        columnspacing=1.2,
        handlelength=1.4,
    )
