"""How evenly the experts of a model are used: a heat map by layer, and the busiest as a curve."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .curves import STEP_LABEL, Curve, Picture, draw_curves
from .runs import Metrics, Run, keys_like
from .style import drawing, whole_numbers

MOST_COLUMNS = 400  # of a heat map; more logged steps are put together
BALANCE = Picture(
    "expert_balance",
    "Busiest expert of a layer",
    "tokens of the busiest ÷ mean (1 is balance)",
    "How much more than its share the busiest expert of a layer gets.",
    (Curve("worst", "worst layer", noisy=True), Curve("mean", "mean of the layers", noisy=True)),
)
DEAD = "#000000"


@dataclass(frozen=True)
class HeatMap:
    """A heat map: its file name, metric, title, what a row of it is, and what it shows."""

    name: str
    key: str
    title: str
    row: str
    caption: str


HEAT_MAPS = (
    HeatMap(
        "expert_load",
        "moe/layer_*/expert_load",
        "Load of the experts",
        "expert",
        "White: an equal share of the layer's tokens; orange: more; purple: less; black: none.",
    ),
    HeatMap(
        "rank_load",
        "moe/layer_*/rank_load",
        "Load of a group's ranks",
        "rank",
        "What each rank of a group computes for the experts that it holds.",
    ),
)


def draw_expert_balance(runs: Sequence[Run], folder: Path) -> Path | None:
    """Draw the busiest expert's tokens over the mean; None if no run has experts."""
    return draw_curves(BALANCE, [_with_balance(run) for run in runs], folder)


def _with_balance(run: Run) -> Run:
    """The run with the largest and the mean ratio over layers of each step as metrics."""
    keys = keys_like(run.steps, "moe/layer_*/load_max_over_mean")
    steps: list[Metrics] = []
    for m in run.steps:
        ratios = [m[key] for key in keys if m.get(key) is not None]
        if ratios:
            steps.append({**m, "worst": max(ratios), "mean": sum(ratios) / len(ratios)})
    return dataclasses.replace(run, steps=steps or run.steps)


def relative_load(counts: np.ndarray) -> np.ndarray:
    """Load ÷ the mean of the experts, float [rows, columns], of counts (steps, rows).

    Steps beyond 400 are put together, neighbours into one column, by the mean of their counts; an
    expert that got nothing in one of them is 0 there, so that none escapes the eye.
    """
    group = -(-len(counts) // MOST_COLUMNS)
    starts = np.arange(0, len(counts), group)
    sums = np.add.reduceat(counts, starts, axis=0).astype(np.float64)
    dead = np.minimum.reduceat(counts, starts, axis=0) == 0
    mean = sums.mean(axis=1, keepdims=True)
    return np.where(dead, 0.0, sums / np.where(mean > 0, mean, 1.0)).T


def edges_of(steps: Sequence[int]) -> np.ndarray:
    """Where each column of :func:`relative_load` begins, and the last one ends: halfway."""
    group = -(-len(steps) // MOST_COLUMNS)
    numbers = np.array(steps, dtype=np.float64)
    halfway = (numbers[1:] + numbers[:-1]) / 2
    edges = np.concatenate([[numbers[0] - 0.5], halfway, [numbers[-1] + 0.5]])
    return np.append(edges[:-1][::group], edges[-1])


def draw_heat_map(kind: HeatMap, run: Run, folder: Path) -> Path | None:
    """Draw load ÷ mean over steps, a panel a layer and a row an expert; None without experts.

    White is the mean, orange above it, purple below it, at a quarter and at four times the mean as
    deep as it gets; black is an expert that got no token.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    layers = {}
    for key, layer in keys_like(run.steps, kind.key).items():
        logged = [(m["step"], m[key]) for m in run.steps if m.get(key)]
        if logged:
            # Ranks may have become more or fewer on the way; as many as there are at the end.
            width = len(logged[-1][1])
            logged = [(step, load) for step, load in logged if len(load) == width]
            layers[layer] = ([step for step, _ in logged], np.array([load for _, load in logged]))
    if not layers:
        return None
    # Without its darkest ends, beside which black would not stand out.
    middle = ListedColormap(colormaps["PuOr_r"](np.linspace(0.16, 0.84, 256)))
    colors = middle.with_extremes(bad=DEAD)
    norm = LogNorm(0.25, 4.0, clip=True)
    heights = [min(max(0.11 * counts.shape[1], 0.6), 1.6) for _, counts in layers.values()]
    path = folder / f"{kind.name}.png"
    with drawing(
        path,
        figsize=(8, 1.4 + sum(heights)),
        nrows=len(layers),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.18},
    ) as panels:
        any_dead = False
        for axes, (layer, (steps, counts)) in zip(panels[:, 0], layers.items(), strict=True):
            load = relative_load(counts)
            any_dead |= bool((load == 0).any())
            rows = np.arange(len(load) + 1) - 0.5
            mesh = axes.pcolormesh(
                edges_of(steps), rows, np.ma.masked_equal(load, 0), cmap=colors, norm=norm
            )
            axes.grid(False)
            axes.invert_yaxis()
            axes.yaxis.set_major_locator(whole_numbers(4))
            axes.set_ylabel(f"layer {layer}\n{kind.row}", fontsize=9)
        axes.set_xlabel(STEP_LABEL)
        axes.xaxis.set_major_locator(whole_numbers())
        panels[0, 0].set_title(kind.title, loc="left")
        bar = axes.figure.colorbar(
            mesh, ax=panels, extend="both", aspect=30, pad=0.02, ticks=[0.25, 0.5, 1, 2, 4]
        )
        bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])
        bar.ax.minorticks_off()
        bar.set_label("tokens ÷ mean of the layer")
        if any_dead:
            panels[0, 0].legend(
                handles=[Patch(color=DEAD, label=f"no token: {kind.row} is dead")],
                loc="lower right",
                bbox_to_anchor=(1.0, 1.0),
                borderaxespad=0.2,
            )
    return path
