"""Plots and reports of runs, from their folders alone."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mini_llm.plots import curves, draw_plots
from mini_llm.plots.__main__ import main
from mini_llm.plots.curves import moving_mean
from mini_llm.plots.experts import DEAD, edges_of, relative_load
from mini_llm.plots.report import write_report
from mini_llm.plots.runs import common_parent, keys_like, read_metrics, read_runs, values
from mini_llm.plots.style import COLORS, drawing
from tests.launching import REPOSITORY

ALWAYS = {"loss", "learning_rate", "grad_norm", "throughput", "tokens_by_source"}
HELD_OUT = {"bits_per_byte"}
EXPERTS = {"mtp_loss", "balance_loss", "dead_experts", "expert_balance", "expert_load"}
EVIL = "<script>alert('x')</script>"


def logged(step: int, **more: Any) -> dict[str, Any]:
    """A logged step of a plain run; ``more`` are metrics with ``__`` for ``/``."""
    return {
        "step": step,
        "train/loss": 8.0 / step,
        "train/grad_norm": 1.0,
        "train/lr": 1e-3,
        "train/tokens": 100 * step,
        "data/web/tokens": 60 * step,
        "data/chat/tokens": 40 * step,
        "perf/tokens_per_second": 5000.0,
        "perf/mfu": None,
        **{key.replace("__", "/"): value for key, value in more.items()},
    }


def with_experts(step: int, loads: list[list[int]]) -> dict[str, Any]:
    """A logged step of a run with experts, ``loads`` being those of its layers."""
    moe: dict[str, Any] = {"moe/dead_experts": float(sum(row.count(0) for row in loads))}
    for layer, load in enumerate(loads, start=1):
        moe[f"moe/layer_{layer}/expert_load"] = load
        moe[f"moe/layer_{layer}/load_max_over_mean"] = max(load) * len(load) / sum(load)
    return {**logged(step, train__mtp_loss=9.0, train__balance_loss=2.0), **moe}


def write_run(folder: Path, steps: list[dict[str, Any]], tail: str = "") -> Path:
    """A run folder that has metrics alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def names(drawn: list[Path]) -> set[str]:
    return {path.stem for path in drawn}


def pixels(path: Path, color: str) -> int:
    """How many pixels of a picture have a colour, given as #rrggbb."""
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


# ---- Reading ---------------------------------------------------------------------------------


def test_the_line_that_a_live_run_is_writing_does_not_count(tmp_path):
    run = write_run(tmp_path / "run", [logged(1), logged(2)], tail='{"step": 3, "tra')
    assert [m["step"] for m in read_metrics(run)] == [1, 2]
    assert names(draw_plots(run)) == ALWAYS


def test_steps_that_a_run_logged_anew_count_as_logged_last(tmp_path):
    again = logged(2, train__loss=0.5)
    run = write_run(tmp_path / "run", [logged(1), logged(2), logged(3), again, logged(4)])
    steps = read_metrics(run)
    assert [m["step"] for m in steps] == [1, 2, 4]
    assert steps[1]["train/loss"] == 0.5


@pytest.mark.parametrize("line", ["{half", '{"train/loss": 1.0}', '{"step": "3"}', "[1]", "7"])
def test_a_damaged_line_is_named_with_its_number(tmp_path, line):
    run = write_run(tmp_path / "run", [logged(1)], tail=f"{line}\n" + json.dumps(logged(3)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(run)


def test_a_metric_is_nan_where_it_is_null_and_missing_where_it_always_is():
    steps = [{"step": 1, "a": 1.0, "b": None}, {"step": 2}, {"step": 3, "a": None, "b": None}]
    at, numbers = values(steps, "a")
    assert at == [1, 3] and numbers[0] == 1.0 and np.isnan(numbers[1])
    assert values(steps, "b") == ([], []) and values(steps, "c") == ([], [])


def test_layers_are_in_the_order_of_their_numbers():
    steps = [{"step": 1, **{f"moe/layer_{n}/expert_load": [1] for n in (10, 9, 2)}}]
    assert list(keys_like(steps, "moe/layer_*/expert_load").values()) == ["2", "9", "10"]


def test_runs_have_the_shortest_names_that_tell_them_apart(tmp_path):
    folders = [write_run(tmp_path / name, [logged(1)]) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "b/other"]
    assert [run.name for run in read_runs(folders[1:])] == ["run", "other"]
    assert common_parent(folders[1:]) == tmp_path / "b"
    assert common_parent(folders) == tmp_path


# ---- Pictures --------------------------------------------------------------------------------


def test_a_run_gets_the_pictures_of_its_metrics_and_no_others(tmp_path):
    plain = write_run(tmp_path / "plain", [logged(1), logged(2)])
    assert names(draw_plots(plain)) == ALWAYS == names(list((plain / "plots").iterdir()))
    moe = write_run(tmp_path / "moe", [with_experts(step, [[3, 1], [2, 2]]) for step in (1, 2, 4)])
    assert names(draw_plots(moe)) == ALWAYS | EXPERTS
    more = {"eval__web__loss": 3.0, "eval__web__bits_per_byte": 1.0, "samples__stopped": 0.5}
    more |= {"perf__mfu": 0.4, "moe__layer_1__rank_load": [3, 1]}
    everything = write_run(tmp_path / "all", [logged(1, **more), logged(2)])
    extra = {"samples", "mfu", "rank_load"}
    assert names(draw_plots(everything)) == ALWAYS | HELD_OUT | extra
    only_held_out = {"step": 1, "eval/web/loss": 3.0, "eval/web/bits_per_byte": 1.0}
    evaluated = write_run(tmp_path / "evaluated", [only_held_out])
    assert names(draw_plots(evaluated)) == {"loss", "bits_per_byte"}


def test_a_run_that_went_on_with_more_ranks_a_group_has_a_heat_map_of_the_last_ones(tmp_path):
    loads = [[3, 1], [2, 2], [4, 2, 1, 1], [2, 2, 2, 2]]
    steps = [logged(n, moe__layer_1__rank_load=load) for n, load in enumerate(loads, start=1)]
    moved = write_run(tmp_path / "moved", steps)
    last = write_run(tmp_path / "last", steps[2:])
    pictures = [next(p for p in draw_plots(r) if p.stem == "rank_load") for r in (moved, last)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_pictures_are_as_wide_as_a_page_and_the_same_each_time(tmp_path):
    run = write_run(tmp_path / "run", [with_experts(step, [[3, 1]] * 9) for step in range(1, 9)])
    drawn = draw_plots(run)
    before = [path.read_bytes() for path in drawn]
    for path in drawn:
        assert 750 <= Image.open(path).size[0] <= 960, path.name
    assert [path.read_bytes() for path in draw_plots(run)] == before


def test_a_single_logged_step_is_a_dot_and_a_null_is_a_gap(tmp_path):
    def shown(*rates: float | None) -> int:
        steps = [logged(step, train__lr=rate) for step, rate in enumerate(rates, start=1)]
        run = write_run(tmp_path / str(rates), steps)
        draw_plots(run)
        return pixels(run / "plots" / "learning_rate.png", COLORS[0])  # it has no legend

    assert 10 < shown(1e-3) < 100
    line = shown(1e-3, 1e-3, 1e-3, 1e-3)
    assert 0.2 * line < shown(1e-3, 1e-3, None, 1e-3) < 0.6 * line


@pytest.mark.parametrize("name", ["$", r"a $\frac$ b", "<b>&amp;", "a/b", "x" * 90])
def test_any_name_of_a_source_can_be_drawn(tmp_path, name):
    steps = [{"step": 1, f"data/{name}/tokens": 5, f"eval/{name}/loss": 2.0}]
    run = write_run(tmp_path / "run", steps)
    assert names(draw_plots(run)) == {"loss", "tokens_by_source"}
    Checked(write_report(run))


def test_an_underscore_does_not_hide_a_source_from_the_legend(tmp_path):
    black = []
    for name in ("source", "_source"):
        run = write_run(tmp_path / name, [{"step": 1, f"data/{name}/tokens": 5}])
        black.append(pixels(draw_plots(run)[0], "#000000"))
    assert black[1] >= black[0]  # the letters of the legend, among others


def test_a_long_noisy_curve_is_smoothed_by_the_mean_of_its_neighbours():
    numbers = np.array([1.0, 5.0, np.nan, 3.0, 7.0, 2.0])
    expected = [np.nanmean(numbers[max(i - 1, 0) : i + 2]) for i in range(len(numbers))]
    assert moving_mean(numbers, 3).tolist() == pytest.approx(expected)
    assert np.isnan(moving_mean(np.array([np.nan, np.nan, np.nan, 4.0]), 3)[:2]).all()


def test_load_is_over_the_mean_of_the_experts():
    load = relative_load(np.array([[30, 10, 20], [0, 0, 60]]))
    assert load.tolist() == [[1.5, 0.0], [0.5, 0.0], [1.0, 3.0]]
    assert edges_of([1, 5]).tolist() == [0.5, 3.0, 5.5]
    assert relative_load(np.array([[0, 0]])).tolist() == [[0.0], [0.0]]


def test_a_dead_expert_shows_in_the_picture_of_a_long_run_too():
    counts = np.full((4001, 4), 100)
    counts[1234, 2] = 0  # in one step of thousands
    load = relative_load(counts)
    assert load.shape == (4, 364) and len(edges_of(range(1, 4002))) == 365
    assert np.argwhere(load == 0).tolist() == [[2, 1234 // 11]]
    assert (load[load > 0] > 0.9).all()


def test_dead_experts_are_black_in_the_heat_map_and_the_busiest_are_not(tmp_path):
    def black(loads: list[list[int]]) -> int:
        folder = tmp_path / str(loads[0])
        run = write_run(folder, [with_experts(step, loads) for step in range(1, 5)])
        draw_plots(run)
        return pixels(run / "plots" / "expert_load.png", DEAD)

    alive, dead = black([[1, 1, 1, 397]]), black([[0, 200, 100, 100]])
    assert dead > alive + 5000


# ---- The command -----------------------------------------------------------------------------


def test_several_runs_are_compared_each_in_its_colour(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "output" / name, [logged(s, train__loss=loss) for s in (1, 2, 3)])
        for name, loss in {"a": 3.0, "b": 5.0}.items()
    ]
    assert main([str(run) for run in runs]) == 0
    told = capsys.readouterr().out
    for run in runs:
        assert (run / "report.html").is_file() and f"drew {run}/plots/loss.png" in told
    compared = tmp_path / "output" / "comparison"
    assert names(list(compared.iterdir())) == ALWAYS
    for color in COLORS[:2]:
        assert pixels(compared / "loss.png", color) > 200
    assert pixels(runs[1] / "plots" / "loss.png", COLORS[1]) == 0
    page = Checked(tmp_path / "output" / "comparison.html")
    assert len(page.images) == len(ALWAYS)
    assert {"a", "b", "5.0000"} <= set(page.cells)
    assert main([*map(str, runs), "--output", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "comparison.html").is_file()


@pytest.fixture
def axes_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of every picture that the test draws, by the file's name."""
    found: dict[str, Any] = {}

    @contextmanager
    def kept(path: Path, **options: Any) -> Iterator[Any]:
        with drawing(path, **options) as axes:
            yield axes
            found[path.stem] = axes

    monkeypatch.setattr(curves, "drawing", kept)
    return found


def test_the_axis_of_a_count_that_is_always_0_has_no_fractions(tmp_path, axes_of):
    steps = [with_experts(step, [[5, 5]]) for step in (1, 2)]
    draw_plots(write_run(tmp_path / "run", steps))
    assert axes_of["dead_experts"].get_ylim() == (0, 1)
    assert axes_of["dead_experts"].get_yticks().tolist() == [0, 1]
    assert axes_of["throughput"].get_ylim() == (0, 5250)  # a level line is not at the edge


def test_many_sources_look_different_and_their_names_hide_none(tmp_path, axes_of):
    tokens = {f"data__source {number}__tokens": 100 * number for number in range(1, 13)}
    draw_plots(write_run(tmp_path / "run", [logged(1, **tokens)]))
    axes = axes_of["tokens_by_source"]
    looks = {(tuple(area.get_facecolor()[0]), area.get_hatch()) for area in axes.collections}
    assert len(looks) == len(axes.collections) == 14
    assert axes.get_legend().get_window_extent().y1 < axes.bbox.y0


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["{run}", "{here}/nowhere"], "nowhere is no folder; "),
        (["{run}", "{here}/empty"], "empty is no run folder: it has no metrics.jsonl; "),
        (["{run}", "{here}/begun"], "has no logged step yet; "),
        (["{run}", "{here}/odd"], "run.json cannot be read: "),
        (["{run}", "{here}/garbled"], "config.yaml cannot be read: "),
        (["{run}", "{run}/../run"], "is given twice; "),
        (["{run}", "--output", "{here}/x"], "--output is the place of a comparison; "),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_drawn(tmp_path, capsys, words, sentence):
    run = write_run(tmp_path / "run", [logged(1)])
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "begun", [], tail='{"step": 1')
    (write_run(tmp_path / "odd", [logged(1)]) / "run.json").write_text("{")
    (write_run(tmp_path / "garbled", [logged(1)]) / "config.yaml").write_bytes(b"model: \xff")
    assert main([word.format(run=run, here=tmp_path) for word in words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and sentence in told.err and told.err.count("\n") == 1
    assert not told.out and not (run / "plots").exists()


def test_the_command_draws_a_run_without_importing_torch(tmp_path):
    run = write_run(tmp_path / "run", [logged(1)])
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-m", "mini_llm.plots", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"drew {run}/plots/loss.png and 4 more beside it",
        f"wrote {run}/report.html",
    ]


# ---- The report ------------------------------------------------------------------------------


class Checked(HTMLParser):
    """A page read strictly: balanced tags, unique ids, links that lead somewhere, all inside."""

    VOID = {"meta", "link", "img"}

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: dict[str, bytes] = {}
        self.text: dict[str, list[str]] = {}
        assert self.source.startswith("<!DOCTYPE html>\n")
        self.feed(self.source)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        assert all(link[0] == "#" and link[1:] in self.ids for link in self.links)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", self.source)
        assert not re.search(r"(@import|url\(|javascript:|\bon\w+=\")", self.source)

    @property
    def cells(self) -> list[str]:
        return [text for tag in ("td", "th", "dd", "dt") for text in self.text.get(tag, [])]

    def everything(self, tag: str) -> str:
        return "\n".join(self.text.get(tag, []))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}, tag
        given = dict(attrs)
        assert len(given) == len(attrs) and None not in given.values()
        for name in ("src", "href"):
            if name in given:
                assert given[name][:5] == "data:" or given[name][0] == "#", given[name]
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        if tag == "img":
            kind, _, content = given["src"].partition(",")
            assert kind == "data:image/png;base64" and given["alt"]
            self.images[given["alt"]] = base64.b64decode(content, validate=True)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)


def full_run(folder: Path) -> Path:
    """A finished run with everything that a run folder has, some of it hostile."""
    steps = [with_experts(step, [[3, 1], [4, 0]]) for step in (1, 2)]
    steps[1] |= {f"eval/{EVIL}/loss": 2.5, f"eval/{EVIL}/bits_per_byte": 0.75}
    write_run(folder, steps)
    packed = folder.parent / "packed"
    packed.mkdir()
    split = {"tokens": 400, "documents_per_source": {"news & more": 7}}
    manifest = {"splits": {"train": split, "validation": {"tokens": 30}}}
    (packed / "manifest.json").write_text(json.dumps(manifest))
    config = {
        "model": "mini_deepseekv3_tiny",
        "tokenizer": "data/tokenizer",
        "data": {"web": {"path": str(packed), "weight": 0.6}, "chat": {"path": EVIL, "weight": 1}},
        "max_steps": 2,
        "learning_rate": 0.004,
        "global_batch_tokens": 2048,
        "bf16": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    facts = {
        "parameters": {"total": 1234567, "active": 765432, "mtp": 111},
        "world_size": 4,
        "hosts": ["n1", "n1", "n2", "n2"],
        "distributed_type": "DEEPSPEED",
        "zero_stage": 2,
        "expert_parallel_size": 2,
        "expert_groups": [[0, 1], [2, 3]],
        "bytes_per_rank": {"optimizer_state": [1048576, 2097152, 1048576, 1048576]},
        "versions": {"torch": "2.13.0"},
        "kernels": {"attention": "sdpa"},
        "data_fingerprint": "ab" * 32,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    samples = f"--- sample 1\n{EVIL} </pre></body> & \x00\x1b[31m 中文 \udcff"
    (folder / "samples.txt").write_bytes(samples.encode(errors="surrogateescape"))
    (folder / "final").mkdir()
    model = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 3}
    (folder / "final" / "config.json").write_text(json.dumps(model))
    return folder


def test_a_report_is_one_valid_page_that_needs_nothing_else(tmp_path):
    run = full_run(tmp_path / f"run {EVIL[:8]}")
    drawn = draw_plots(run)
    assert names(drawn) == ALWAYS | HELD_OUT | EXPERTS
    page = Checked(write_report(run))
    assert sorted(page.images.values()) == sorted(path.read_bytes() for path in drawn)
    assert page.open == [] and page.everything("title") == "Run run <script>"
    first = page.source
    assert write_report(run).read_text(encoding="utf-8") == first


def test_a_report_tells_what_was_trained_on_what_and_how_well(tmp_path):
    page = Checked(write_report(full_run(tmp_path / "run")))
    assert (
        "mini_deepseekv3_tiny, 1,234,567 (765,432 active, 111 of multi-token prediction) "
        "parameters, trained for 2 of 2 optimizer steps on 200 tokens." in page.everything("p")
    )
    assert {"DeepseekV3ForCausalLM", "0.004", "2048", "true", "sdpa"} <= set(page.cells)
    # Of the data: what was trained on, its share, what the manifest says, and passes over it.
    assert {"web", "120", "60.0%", "400", "0.30", "30", "news & more 7"} <= set(page.cells)
    # Of the engine: ranks, hosts, expert groups, MiB of the ranks.
    assert {"DEEPSPEED", "4", "2", "groups of 2 ranks: [0, 1], [2, 3]"} <= set(page.cells)
    assert {"1.0", "2.0", "5.0", "torch 2.13.0"} <= set(page.cells)
    # Results: last and best.
    assert {"4.0000", "2.5000", "0.7500", f"held-out bits per byte, {EVIL}"} <= set(page.cells)
    assert f"{tmp_path}/run/final" in page.everything("pre")


def test_what_a_model_writes_is_text_and_never_markup(tmp_path):
    page = Checked(write_report(full_run(tmp_path / "run")))
    assert "<script" not in page.source and "</pre></body> &" not in page.source
    assert f"{EVIL} </pre></body> & ␀␛[31m 中文 \ufffd" in page.everything("pre")


def test_answers_of_the_last_step_come_first_and_earlier_ones_are_folded(tmp_path):
    run = write_run(tmp_path / "run", [logged(1), logged(2)])
    (run / "config.yaml").write_text("{model: some/final, packing: true, max_steps: 9}")
    parts = [f"=== step {n}: 1 of 1\n--- answer 1\n  === step 7: is text\n" for n in (1, 2)]
    (run / "samples.txt").write_text("".join(parts))
    page = Checked(write_report(run))
    shown = [text.strip("\n") for text in page.text["pre"] if "answer" in text]
    assert shown == [parts[1].strip("\n"), parts[0].strip("\n")]
    assert page.source.index("Earlier steps") > page.source.index("=== step 2")
    assert "fine-tuned for 2 of 9 optimizer steps" in page.everything("p")
    assert "has not finished" in page.everything("p")


def test_a_folder_with_metrics_alone_has_a_report_without_plots(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "eval/web/loss": None}])
    page = Checked(write_report(run))
    assert page.images == {} and page.everything("h2") == "How to load it"


def test_plots_of_the_packed_rows_are_in_the_report(tmp_path):
    from mini_llm.plots.packed_rows import plot_packing

    run = write_run(tmp_path / "run", [logged(1)])
    drawn = plot_packing(run, [{"doc_lens": np.array([3]), "loss_mask": np.ones(4, bool)}])
    page = Checked(write_report(run))
    assert page.images == {"What the packed rows hold": drawn.read_bytes()}
