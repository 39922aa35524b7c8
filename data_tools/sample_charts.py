"""The picture that sample.py draws: the share of each source before and after."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from mini_llm.plots.style import fonts


def draw_source_shares(path: Path, sources: Sequence[tuple[str, int, int]]) -> bool:
    """Draw (name, documents before, documents after) as two bars each, the first at the top.

    Returns False when no installed font has all characters of the names; boxes stand for them then.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, _, _ in sources]
    with (
        pyplot.rc_context({"font.family": fonts()}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.52 * len(sources)), dpi=120)
        for label, counts, offset, color in (
            ("before", [before for _, before, _ in sources], -0.2, "tab:orange"),
            ("after", [after for _, _, after in sources], 0.2, "tab:blue"),
        ):
            total = max(sum(counts), 1)
            shares = [100 * count / total for count in counts]
            bars = axes.barh(
                [place + offset for place in range(len(sources))],
                shares,
                height=0.38,
                color=color,
                label=f"{label}: {total:,} documents",
            )
            words = [f"{share:.2f}%  ({n:,})" for share, n in zip(shares, counts, strict=True)]
            axes.bar_label(bars, words, padding=4, fontsize=8)
        # A name with $ is no formula.
        axes.set_yticks(range(len(sources)), names, parse_math=False)
        axes.invert_yaxis()
        axes.margins(x=0.22, y=0.02)
        axes.set_xlabel("share of documents (%)")
        axes.spines[["top", "right"]].set_visible(False)
        # Above, where it hides no bar.
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib, which a PNG names otherwise.
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return not any("missing from" in str(warning.message) for warning in caught)
