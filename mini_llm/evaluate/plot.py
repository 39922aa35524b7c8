"""The picture of perplexity by document length and by position."""

from pathlib import Path

from mini_llm.plots.style import COLORS, LINE_STYLES, drawing, plain

from .results import PICTURE, Results

PANELS = (
    ("by_length", "document length (tokens)"),
    ("by_position", "position in the document (tokens)"),
)


def draw_by_length(results: Results, folder: Path) -> Path | None:
    """Draw ``folder``/perplexity_by_length.png; None where no source was evaluated."""
    sources = results["held_out"]
    if not sources:
        return None
    path = folder / PICTURE
    with drawing(path, ncols=len(PANELS), sharey=True, figsize=(10.0, 4.5)) as panels:
        for axes, (key, label) in zip(panels, PANELS, strict=True):
            for place, (name, source) in enumerate(sources.items()):
                buckets = source[key]
                axes.plot(
                    # The middle of a bucket on the logarithmic axis.
                    [(bucket["from"] * (bucket["to"] + 1)) ** 0.5 for bucket in buckets],
                    [bucket["perplexity"] for bucket in buckets],
                    color=COLORS[place % len(COLORS)],
                    linestyle=LINE_STYLES[place // len(COLORS) % len(LINE_STYLES)],
                    marker="o",
                    label=plain(name),
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:,.0f}")
                axis.set_minor_formatter("")
            axes.set_xlabel(label)
        panels[0].set_ylabel("perplexity")
        panels[0].legend()
    return path
