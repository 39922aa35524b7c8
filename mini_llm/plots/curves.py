"""Curves over optimizer steps, of one run or of several in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .runs import Run, keys_like, values
from .style import COLORS, HATCHES, LINE_STYLES, drawing, plain, whole_numbers

SMOOTHED_POINTS = 100  # a noisy curve of more points gets a moving mean
STEP_LABEL = "optimizer step"


@dataclass(frozen=True)
class Curve:
    """Metrics that are drawn alike: one, or with a ``*`` in ``key`` one a source.

    ``label`` names it in the legend, ``*`` being the source; ``noisy`` ones are smoothed where they
    are long, ``dots`` are measured so rarely that each point is marked. ``scale`` is multiplied in.
    """

    key: str
    label: str
    noisy: bool = False
    dots: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Picture:
    """A picture of curves: its file name, title, the unit of its values, and what it shows.

    ``whole`` values are counts, without fractions on their axis.
    """

    name: str
    title: str
    unit: str
    caption: str
    curves: tuple[Curve, ...]
    from_zero: bool = False
    whole: bool = False


PICTURES = (
    Picture(
        "loss",
        "Loss",
        "cross-entropy (nats per token)",
        "Of the logged steps over all ranks, and of the held-out rows of each source.",
        (
            Curve("train/loss", "training", noisy=True),
            Curve("eval/*/loss", "held-out *", dots=True),
        ),
    ),
    Picture(
        "bits_per_byte",
        "Held-out bits per byte",
        "bits per UTF-8 byte",
        "What the held-out loss costs per byte of text: comparable between tokenizers.",
        (Curve("eval/*/bits_per_byte", "held-out *", dots=True),),
    ),
    Picture(
        "mtp_loss",
        "Multi-token-prediction loss",
        "cross-entropy (nats per token)",
        "Of the modules that predict a token further ahead.",
        (Curve("train/mtp_loss", "multi-token prediction", noisy=True),),
    ),
    Picture(
        "balance_loss",
        "Load-balance loss",
        "loss (1 per layer if balanced)",
        "The term that draws experts to equal load, a mean over rows and a sum over layers.",
        (Curve("train/balance_loss", "load balance", noisy=True),),
    ),
    Picture(
        "learning_rate",
        "Learning rate",
        "learning rate",
        "Warmup, then the schedule of the run.",
        (Curve("train/lr", "learning rate"),),
        from_zero=True,
    ),
    Picture(
        "grad_norm",
        "Gradient norm before clipping",
        "global L2 norm",
        "Gradients above --max_grad_norm are scaled down to it.",
        (Curve("train/grad_norm", "gradient norm", noisy=True),),
        from_zero=True,
    ),
    Picture(
        "throughput",
        "Throughput over all ranks",
        "tokens per second",
        "Between two logged steps, without evaluation and saving; padding counts.",
        (Curve("perf/tokens_per_second", "throughput", noisy=True),),
        from_zero=True,
    ),
    Picture(
        "mfu",
        "Model FLOP/s utilisation",
        "share of the devices' bf16 peak (%)",
        "Model FLOP/s over what the devices could do.",
        (Curve("perf/mfu", "utilisation", noisy=True, scale=100.0),),
        from_zero=True,
    ),
    Picture(
        "samples",
        "Answers that stopped by themselves",
        "share of answers (%)",
        "Answers to the sample prompts that ended before their limit.",
        (Curve("samples/stopped", "stopped", dots=True, scale=100.0),),
        from_zero=True,
    ),
    Picture(
        "dead_experts",
        "Dead experts",
        "experts without a token, all layers",
        "Experts that no token of a step was sent to.",
        (Curve("moe/dead_experts", "dead experts"),),
        from_zero=True,
        whole=True,
    ),
)
# Of several runs; a single run's sources are stacked, see draw_tokens_by_source.
COMPARED_TOKENS = Picture(
    "tokens_by_source",
    "Trained tokens by source",
    "tokens since step 0",
    "Padding is not counted.",
    (Curve("data/*/tokens", "*"),),
    from_zero=True,
)


def draw_curves(picture: Picture, runs: Sequence[Run], folder: Path) -> Path | None:
    """Draw ``picture`` of one run or several into ``folder``; None if no run has its metrics.

    The curves of one run differ in colour; of several, each run has a colour, and its curves differ
    in their lines.
    """
    lines: list[tuple[Run, Curve, str, list[int], np.ndarray]] = []
    for run in runs:
        for curve in picture.curves:
            for key, source in keys_like(run.steps, curve.key).items():
                steps, found = values(run.steps, key)
                if steps:
                    label = curve.label.replace("*", source)
                    lines.append((run, curve, label, steps, np.array(found) * curve.scale))
    if not lines:
        return None
    several = len(runs) > 1
    kinds = list(dict.fromkeys(label for _, _, label, _, _ in lines))
    with drawing(folder / f"{picture.name}.png") as axes:
        for run, curve, label, steps, numbers in lines:
            kind = kinds.index(label)
            place = runs.index(run) if several else kind
            look: dict[str, Any] = {
                "color": COLORS[place % len(COLORS)],
                # Where colours repeat, and between the curves of a run, the line tells them apart.
                "linestyle": LINE_STYLES[
                    ((kind if several else 0) + place // len(COLORS)) % len(LINE_STYLES)
                ],
            }
            if several:
                label = run.name if len(kinds) == 1 else f"{run.name}: {label}"
            draw_line(axes, steps, numbers, label, look, noisy=curve.noisy, dots=curve.dots)
        smoothed = any(curve.noisy and len(at) > SMOOTHED_POINTS for _, curve, _, at, _ in lines)
        legend = several or len(kinds) > 1 or smoothed
        finish_axes(axes, picture.title, picture.unit, legend=legend)
        if picture.from_zero:
            highest = max(n[np.isfinite(n)].max(initial=0) for *_, n in lines)
            axes.set_ylim(0, 1.05 * highest or 1)
        if picture.whole:
            axes.yaxis.set_major_locator(whole_numbers())
    return folder / f"{picture.name}.png"


def draw_line(
    axes: Any,
    steps: Sequence[int],
    numbers: np.ndarray,
    label: str,
    look: dict[str, Any],
    *,
    noisy: bool = False,
    dots: bool = False,
) -> None:
    """One curve; a long noisy one pale, with its moving mean over it. A lone point is a dot."""
    if noisy and len(steps) > SMOOTHED_POINTS:
        axes.plot(steps, numbers, **look, alpha=0.3, linewidth=0.8)
        width = len(steps) // SMOOTHED_POINTS * 2 + 1
        numbers = moving_mean(numbers, width)
        label = f"{label} (mean of {width} logged steps)"
    lonely = ~np.isfinite(np.concatenate([[np.nan], numbers[:-1]])) & ~np.isfinite(
        np.concatenate([numbers[1:], [np.nan]])
    )
    marks = np.flatnonzero(np.isfinite(numbers) & (lonely | dots)).tolist()
    marker = {"marker": "o", "markevery": marks} if marks else {}
    axes.plot(steps, numbers, **look, **marker, label=plain(label))


def moving_mean(numbers: np.ndarray, width: int) -> np.ndarray:
    """Mean of the values within ``width // 2`` of each, fewer at the ends; NaN (null) left out."""
    finite = np.isfinite(numbers)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, numbers, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    here = np.arange(len(numbers))
    first = np.maximum(here - width // 2, 0)
    end = np.minimum(here + width // 2 + 1, len(numbers))
    count = counts[end] - counts[first]
    mean = (sums[end] - sums[first]) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)


def finish_axes(axes: Any, title: str, unit: str, *, legend: bool) -> None:
    """Title, axis labels, whole steps, numbers without an offset, and the legend if asked for."""
    from matplotlib.ticker import EngFormatter

    axes.set_title(title)
    axes.set_xlabel(STEP_LABEL)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.ticklabel_format(axis="y", useOffset=False)
    if axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter())  # 1.2 M
    if legend:
        place_legend(axes, loc="best")


def place_legend(axes: Any, loc: str, **options: Any) -> None:
    """The legend inside the axes; many names below them, where they hide nothing."""
    if len(axes.get_legend_handles_labels()[1]) <= 6:
        axes.legend(loc=loc, **options)
    else:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, **options)


def draw_tokens_by_source(run: Run, folder: Path) -> Path | None:
    """Draw how the trained tokens of each source grow, one on the other; None if none is logged."""
    sources = keys_like(run.steps, "data/*/tokens")
    logged = [m for m in run.steps if all(m.get(key) is not None for key in sources)]
    if not sources or not logged:
        return None
    counts = np.array([[m[key] for m in logged] for key in sources], dtype=np.float64)
    total = counts[:, -1].sum()
    # From step 0, where nothing is trained: also a run with one logged step has an area.
    steps = [0, *(m["step"] for m in logged)]
    counts = np.concatenate([np.zeros((len(sources), 1)), counts], axis=1)
    labels = [
        plain(f"{name}: {int(last):,} ({100 * last / max(total, 1):.1f}%)")
        for name, last in zip(sources.values(), counts[:, -1], strict=True)
    ]
    path = folder / "tokens_by_source.png"
    with drawing(path) as axes:
        colors = [COLORS[i % len(COLORS)] for i in range(len(sources))]
        # Where colours repeat, lines tell them apart.
        hatches = [HATCHES[i // len(COLORS) % len(HATCHES)] for i in range(len(sources))]
        fill: dict[str, Any] = {"hatch": hatches, "edgecolor": "white", "linewidth": 0}
        axes.stackplot(steps, counts, labels=labels, colors=colors, alpha=0.8, **fill)
        finish_axes(axes, "Trained tokens by source", "tokens since step 0", legend=False)
        place_legend(axes, "upper left", reverse=True)
        axes.set_ylim(bottom=0)
    return path
