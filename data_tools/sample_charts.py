"""The picture that sample.py draws: the share of each source before and after."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

# Fonts with Chinese characters, in the order of preference; matplotlib brings none along.
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
)


def draw_source_shares(path: Path, sources: Sequence[tuple[str, int, int]]) -> bool:
    """Draw (name, documents before, documents after) as two bars each, the first at the top.

    Returns False when no installed font has all characters of the names; boxes stand for them then.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]
    totals = [max(sum(source[column] for source in sources), 1) for column in (1, 2)]
    with (
        pyplot.rc_context({"font.family": fonts}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.52 * len(sources)), dpi=120)
        for column, label, color in (
            (1, f"before ({totals[0]:,} documents)", "tab:orange"),
            (2, f"after ({totals[1]:,} documents)", "tab:blue"),
        ):
            counts = [source[column] for source in sources]
            shares = [100 * count / totals[column - 1] for count in counts]
            heights = [place + 0.4 * (column - 1.5) for place in range(len(sources))]
            bars = axes.barh(heights, shares, height=0.38, color=color, label=label)
            words = [f"{share:.2f}%  ({n:,})" for share, n in zip(shares, counts, strict=True)]
            axes.bar_label(bars, words, padding=4, fontsize=8)
        # A name with $ is no formula.
        axes.set_yticks(range(len(sources)), [name for name, _, _ in sources], parse_math=False)
        axes.invert_yaxis()
        axes.margins(x=0.22, y=0.02)
        axes.set_xlabel("share of documents (%)")
        axes.spines[["top", "right"]].set_visible(False)
        # Below, where no bar is hidden however long it is.
        figure.legend(loc="outside lower center" if False else "upper center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib, which a PNG names otherwise.
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return not any("missing from" in str(warning.message) for warning in caught)
