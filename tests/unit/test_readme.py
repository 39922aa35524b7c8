"""README.md, README_zh.md and docs/: what they name exists, and both languages say the same."""

import re
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "README_zh.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
OF_OTHER_TOOLS = {
    *("--build-arg", "--gpus", "--init", "--ipc", "--network", "--rm", "--tag", "--volume"),
    *("--gpus-per-node", "--signal", "--ntasks-per-node", "--logdir"),
    *("--num_processes", "--num_cpu_threads_per_process"),
}


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _blocks(text: str) -> list[list[str]]:
    """The lines of each fenced block, without the comments in commands and code."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        [re.sub(r" *(?<!\S)# .*", "", line) if language else line for line in body.splitlines()]
        for language, body in fenced
    ]


def _sections(text: str) -> list[str]:
    """The text of each section, without fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.split(r"^## .*\n", prose, flags=re.MULTILINE)


def _said(section: str) -> dict[str, object]:
    """What a translation must not change: numbers, code, links and the shape of tables."""
    links = set(re.findall(r"\]\(([^)]+)\)", section)) - set(PAGES)
    return {
        "numbers": set(re.findall(r"(?<![\w.])\d(?:[\d,.]*\d)?", section)),
        "code": set(re.findall(r"`([^`]+)`", section)),
        "links": links,
        "cells": [line.count("|") for line in section.splitlines() if line.startswith("|")],
    }


def test_both_languages_have_the_same_commands_outputs_numbers_links_and_tables():
    english, chinese = _read("README.md"), _read("README_zh.md")
    assert _blocks(english) == _blocks(chinese)
    for one, other in zip_longest(_sections(english), _sections(chinese), fillvalue=""):
        assert _said(one) == _said(other)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_exists(page):
    here = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", _read(page)) if "://" not in link]
    missing = [link for link in links if not (here / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_is_a_flag_of_a_command(page):
    sources = [ROOT / "launch.sh"]
    for folder in ("mini_llm", "recipes", "data_tools"):
        sources += (ROOT / folder).rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unknown = set()
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", _read(page))) - OF_OTHER_TOOLS:
        # Those of a recipe are the fields of its arguments: `max_steps: int = …`.
        if not re.search(rf'{flag}\b|"{flag[2:]}"|^    {flag[2:]}: ', text, re.MULTILINE):
            unknown.add(flag)
    assert not unknown
