"""Pictures and reports of runs, drawn from their folders alone: no service is needed.

``python -m mini_llm.plots RUN [RUN…]`` draws them at any time; recipes do when a run ends.
"""

from collections.abc import Sequence
from pathlib import Path

from .curves import COMPARED_TOKENS, PICTURES, draw_curves, draw_tokens_by_source
from .experts import HEAT_MAPS, draw_expert_balance, draw_heat_map
from .runs import Run, read_run
from .style import PLOTS

__all__ = ["draw_comparison", "draw_loss", "draw_plots", "draw_run", "told"]


def draw_plots(run: Path) -> list[Path]:
    """Draw all that a run folder has metrics for into ``RUN/plots``; return the files, loss first.

    Raises PlotError where it is no run folder.
    """
    return draw_run(read_run(run))


def draw_run(run: Run) -> list[Path]:
    """Draw a run that was read: see :func:`draw_plots`."""
    folder = run.folder / PLOTS
    drawn = [draw_curves(picture, [run], folder) for picture in PICTURES]
    drawn += [draw_tokens_by_source(run, folder), draw_expert_balance([run], folder)]
    drawn += [draw_heat_map(kind, run, folder) for kind in HEAT_MAPS]
    return [path for path in drawn if path is not None]


def draw_loss(run: Path, folder: Path) -> Path | None:
    """Draw only the losses of a run folder, to ``folder/loss.png``; None where it has none."""
    return draw_curves(PICTURES[0], [read_run(run)], folder)


def draw_comparison(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw the curves of several runs over each other into ``folder``; return the files."""
    pictures = [*PICTURES, COMPARED_TOKENS]
    drawn = [draw_curves(picture, runs, folder) for picture in pictures]
    drawn.append(draw_expert_balance(runs, folder))
    return [path for path in drawn if path is not None]


def told(drawn: Sequence[Path]) -> str:
    """What was drawn, in a few words: the first file, and how many more."""
    if not drawn:
        return "no plots: no metric has a value"
    more = f" and {len(drawn) - 1} more beside it" if len(drawn) > 1 else ""
    return f"{drawn[0]}{more}"
