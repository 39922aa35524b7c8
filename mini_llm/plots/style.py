"""How every picture of this project looks: size, fonts, colours, and where it is written."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow: too pale on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")

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

SIZE = (8.0, 4.5)  # inches; 120 dots an inch, so that text is legible at a width of 800 pixels
DPI = 120
PLOTS = "plots"  # the folder of the pictures in a run folder
STYLE: Any = {  # matplotlib types every key
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}


def fonts() -> list[str]:
    """The font of all text, then those installed that have Chinese characters."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]


@contextmanager
def drawing(path: Path, **options: Any) -> Iterator[Any]:
    """Axes (those of ``Figure.subplots``, which takes ``options``) to draw on; then write ``path``.

    ``figsize`` is in inches. No display, window or state of pyplot is involved.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.family": fonts()}):
        figure = Figure(figsize=options.pop("figsize", SIZE), dpi=DPI)
        yield figure.subplots(**options)
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Without the version of matplotlib, which a PNG names otherwise.
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    for warning in caught:
        if "missing from font" in str(warning.message):
            _tell_of_missing_characters()
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@cache
def _tell_of_missing_characters() -> None:
    """Once, not for every character of every picture."""
    print(
        "plots: no installed font has all characters of the names; boxes stand for the missing "
        "ones (Chinese: apt-get install fonts-noto-cjk)",
        flush=True,
    )


def plain(name: str) -> str:
    """A name as a label: ``$`` begins no formula, and an underscore in front does not hide it."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def whole_numbers(most: int = 9) -> Any:
    """Ticks at round whole numbers, about ``most`` of them."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
