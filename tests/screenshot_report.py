"""The picture of a report in the README: its top in light, its experts in dark, side by side.

    python -m tests.screenshot_report output/some_run_with_experts docs/images/report.png

The run's plots and report are drawn anew for it.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from mini_llm.plots import draw_plots
from mini_llm.plots.report import write_report
from tests.browser import DESK, Browser

HEIGHT = 1640  # CSS pixels of the page in each half
SCALE = 0.55
MARGIN = 12  # between the halves


def main() -> None:
    """Write the picture."""
    run, picture = map(Path, sys.argv[1:])
    draw_plots(run)
    report = write_report(run)
    halves = []
    with Browser() as browser, tempfile.TemporaryDirectory() as temporary:
        for dark in (False, True):
            page = browser.open(report, width=DESK, dark=dark)
            top = page.evaluate("document.getElementById('throughput').offsetTop - 16")
            shot = Path(temporary) / "half.png"
            page.screenshot(shot, top=top if dark else 0, height=HEIGHT)
            size = (round(DESK * SCALE), round(HEIGHT * SCALE))
            halves.append(Image.open(shot).convert("RGB").resize(size, Image.Resampling.LANCZOS))
    width, height = halves[0].size
    both = Image.new("RGB", (2 * width + MARGIN, height), "#a1a1aa")
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (width + MARGIN, 0))
    both.quantize(256).save(picture, optimize=True)
    print(f"{picture}: {both.width} × {both.height}, {picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
