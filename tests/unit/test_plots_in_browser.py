"""The pages in a browser, as a reader gets them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mini_llm.plots import draw_plots
from mini_llm.plots.report import write_comparison, write_report
from mini_llm.plots.runs import read_runs
from tests.browser import CHROMIUM, DESK, PACKAGE, PHONE, Browser, problems_at, problems_of
from tests.requirements import require_debian_package
from tests.unit.test_plots import EXPERTS, full_run, logged, write_run

LONG = "a_name_without_any_space_" * 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require_debian_package(PACKAGE, CHROMIUM)
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts, hostile names, and names too long for a phone."""
    run = full_run(tmp_path_factory.mktemp("browser") / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"model": f"/runs/{LONG}/final", "tokenizer": LONG}
    config["data"][LONG] = {"path": f"/data/{LONG}", "weight": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    facts = json.loads((run / "run.json").read_text())
    facts["kernels"] |= {LONG: LONG}
    (run / "run.json").write_text(json.dumps(facts))
    (run / "samples.txt").write_text(f"=== step 1: {LONG}\n=== step 2: {LONG}\n")
    draw_plots(run)
    write_report(run)
    return run


def test_a_report_is_whole_on_a_phone_and_on_a_desk_in_light_and_in_dark(browser, run):
    assert problems_of(browser, run / "report.html") == []
    page = browser.open(run / "report.html", width=DESK)
    assert len(page.images()) == len(list((run / "plots").glob("*.png"))) > len(EXPERTS)
    assert page.evaluate("document.title") == "Run run"
    # What is folded is part of it too.
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.overflow() == (0, [])
    page.close()


def test_plots_stand_side_by_side_on_a_desk_and_one_by_one_on_a_phone(browser, run):
    for width, columns in ((DESK, 2), (PHONE, 1)):
        page = browser.open(run / "report.html", width=width)
        lefts = page.evaluate("[...document.images].map(i => i.getBoundingClientRect().left)")
        assert len(set(lefts)) == columns
        page.close()


def test_the_page_is_dark_where_the_reader_s_system_is(browser, run):
    colors = {}
    for dark in (False, True):
        page = browser.open(run / "report.html", width=DESK, dark=dark)
        style = "getComputedStyle(document.documentElement)"
        colors[dark] = (page.evaluate(f"{style}.backgroundColor"), page.evaluate(f"{style}.color"))
        page.close()
    assert colors[False] == ("rgb(255, 255, 255)", "rgb(27, 27, 31)")
    assert colors[True] == ("rgb(24, 24, 27)", "rgb(236, 236, 241)")


def test_a_comparison_is_whole_on_a_phone_and_on_a_desk_in_light_and_in_dark(
    browser, run, tmp_path
):
    other = write_run(tmp_path / LONG, [logged(1), logged(2)])
    (other / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(other)}))
    drawn = list((run / "plots").glob("*.png"))
    page = write_comparison(read_runs([run, other]), tmp_path, drawn)
    assert problems_of(browser, page) == []


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("data:image/png;base64,iVBORw0KGgo", "data:image/png;base64,AAAAAAAAAAA", "not there"),
        ("</main>", '<img src="missing.png" alt="a"></main>', "failed request"),
        ("</main>", '<img src="http://127.0.0.1:9/a.png" alt="a"></main>', "it asks for http://"),
        ("</main>", '<script>console.warn("careful")</script></main>', "console: ['careful']"),
        ("</main>", "<script>nothing()</script></main>", "exception: "),
        ("</main>", f"<p style='overflow-wrap: normal'>{LONG}</p></main>", "pixels too wide"),
        ("max-width: 100%;", "max-width: 9rem;", "is small"),
    ],
)
def test_the_browser_sees_what_is_wrong_with_a_page(browser, run, tmp_path, old, new, says):
    source = (run / "report.html").read_text()
    assert old in source
    page = tmp_path / "broken.html"
    page.write_text(source.replace(old, new, 1))
    assert any(says in problem for problem in problems_at(browser, page, width=DESK))
