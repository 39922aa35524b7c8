"""The report of real runs, in a browser."""

import json
from pathlib import Path

import pytest

from mini_llm.plots.__main__ import main
from mini_llm.plots.report import SHOWN
from tests.browser import CHROMIUM, DESK, PACKAGE, Browser, problems_of
from tests.conftest import TINY_MODELS, TinyData
from tests.launching import TINY_RUN, launch_several
from tests.requirements import require_debian_package


@pytest.mark.slow
def test_reports_and_comparison_of_real_runs_are_whole_in_a_browser(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    require_debian_package(PACKAGE, CHROMIUM)
    flags = [*TINY_RUN, *tiny_data.flags, "--max_steps", "6", "--eval_steps", "3"]
    flags += ["--sample_prompts", '["a loss"]']
    model = "mini_deepseekv3_tiny"
    spread = ["--model", model, "--model_overrides", json.dumps(TINY_MODELS[model])]
    spread += ["--expert_parallel_size", "2"]
    experts, dense = tmp_path / "experts", tmp_path / "dense"
    launch_several(
        [
            [*flags, *spread, "--output_dir", str(experts)],
            [*flags, "--output_dir", str(dense)],
        ],
        tmp_path / "plan.json",
    )
    assert main([str(experts), str(dense)]) == 0
    with Browser() as browser:
        for path in (experts / "report.html", dense / "report.html", tmp_path / "comparison.html"):
            assert problems_of(browser, path) == [], path
        page = browser.open(experts / "report.html", width=DESK)
        shown = [image["title"] for image in page.images()]
    drawn = {path.stem for path in (experts / "plots").iterdir()}
    assert {"loss", "bits_per_byte", "expert_load", "rank_load", "mtp_loss"} <= drawn
    assert shown == [title for name, title, _ in SHOWN if name in drawn]
    assert len(shown) == len(drawn)
