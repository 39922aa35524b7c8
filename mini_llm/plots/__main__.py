"""Draw the plots and the report of runs, finished or not, from their folders alone.

    python -m mini_llm.plots output/quickstart/pretrain
    python -m mini_llm.plots output/a output/b --output output/a_and_b

Each run gets RUN/plots/*.png and RUN/report.html; several also a comparison: comparison.html, with
its plots in comparison/ beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mini_llm.command_line import Parser

from . import draw_comparison, draw_run, told
from .report import report, write_comparison
from .runs import PlotError, common_parent, read_runs


def main(command_line: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit status, 2 after one sentence about a mistake."""
    parser = Parser(
        prog="python -m mini_llm.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder: the --output_dir of a run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the comparison of several runs (default: their common parent)",
    )
    arguments = parser.parse_args(command_line)
    try:
        if arguments.output and len(arguments.runs) == 1:
            raise PlotError("--output is the place of a comparison; give several runs")
        runs = read_runs(arguments.runs)  # all of them, before anything is drawn
        for run in runs:
            print(f"drew {told(draw_run(run))}")
            print(f"wrote {report(run)}")
        if len(runs) > 1:
            folder = arguments.output or common_parent(arguments.runs)
            drawn = draw_comparison(runs, folder / "comparison")
            print(f"drew {told(drawn)}")
            print(f"wrote {write_comparison(runs, folder, drawn)}")
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
