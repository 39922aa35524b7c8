"""python -m mini_llm.bench recipes: that what it launches is what its table says."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from mini_llm.bench import __main__ as bench
from mini_llm.bench import recipes
from mini_llm.bench.names import PRESETS
from mini_llm.bench.recipes import Run, Size, checked_facts, counted, flags
from mini_llm.training.arguments import PretrainArguments, SftArguments, parse_arguments

SIZE = Size("bf16", rows=32, seq_len=2048, micro_batches=2, steps=20, device="cuda")
QUICKSTART = "recipes/configs/quickstart/{}.yaml"


@pytest.mark.parametrize("model", [*PRESETS, "mini_llama3_tiny"])
def test_both_recipes_take_the_flags_and_mean_the_same_step_by_them(
    model: str, tmp_path: Path
) -> None:
    pretrain, sft = (
        parse_arguments(
            kind, QUICKSTART.format(recipe), flags(Run(recipe, model, "zero1"), tmp_path, SIZE, {})
        )
        for kind, recipe in ((PretrainArguments, "pretrain"), (SftArguments, "sft"))
    )
    for args in (pretrain, sft):
        assert args.rows_per_step() == 64 and args.gradient_accumulation_steps(1) == 2
        assert args.max_steps == 10 + 20 and args.bf16
        assert args.deepspeed == "ds_configs/zero1.json"
    assert sft.model == str(Path(pretrain.output_dir, "final")) and sft.packing
    assert sft.num_train_epochs == 0  # they would decide the number of steps
    assert pretrain.data["made_up"]["path"] != sft.data["made_up"]["path"]
    if "deepseek" in model:  # the model's own config, and not the quickstart's
        assert pretrain.expert_bias_update_speed == 0.001


def test_a_run_of_another_engine_than_the_one_asked_for_is_no_figure(tmp_path: Path) -> None:
    found = {"recipe": "pretrain", "world_size": 1, "zero_stage": 1}
    (tmp_path / "run.json").write_text(json.dumps(found))
    asked = Run("pretrain", "mini_llama3", "zero1")
    assert checked_facts(asked, tmp_path) == found
    for other in (replace(asked, engine="none"), replace(asked, engine="zero2_offload")):
        with pytest.raises(RuntimeError, match="was asked for, and recipe, ranks and ZeRO stage"):
            checked_facts(other, tmp_path)


def test_the_first_steps_do_not_count(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 5, 10, 15, 20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert counted(tmp_path) == [{"step": 15}, {"step": 20}]


@pytest.mark.parametrize(("flag", "value", "least"), [("steps", 0, 1), ("seq_len", 63, 64)])
def test_counts_that_cannot_be_are_one_sentence(
    capsys: pytest.CaptureFixture[str], flag: str, value: int, least: int
) -> None:
    with pytest.raises(SystemExit):
        bench.main(["recipes", "--model", "mini_llama3_tiny", f"--{flag}", str(value)])
    assert capsys.readouterr().err == f"--{flag} is {value}; it must be at least {least}\n"


def test_a_launch_that_fails_says_its_last_words(tmp_path: Path) -> None:
    run = Run("sft", "mini_llama3_tiny", "none")
    with pytest.raises(RuntimeError, match="error: --model: .*final is no folder"):
        recipes.launch(
            run, tmp_path, flags(run, tmp_path, replace(SIZE, precision="fp32"), {}), "cpu"
        )


def test_a_launch_that_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(one: Run, folder: Path, words: list[str], device: str) -> None:
        if one.engine == "zero2":
            raise RuntimeError("its last words")
        place = folder / one.folder()
        place.mkdir(parents=True)
        stage = None if one.engine == "none" else int(one.engine[-1])
        facts = {"recipe": one.recipe, "world_size": 1, "zero_stage": stage, "kernels": {}}
        (place / "run.json").write_text(json.dumps(facts))
        parts = ("step", "data", "forward", "backward", "optimizer")
        seconds = {f"perf/{part}_seconds": 0.5 for part in parts}
        rates = {"perf/tokens_per_second": 100.0, "perf/mfu": None, "perf/peak_memory_bytes": 1}
        line = {"step": 20, "train/tokens": 1, **seconds, **rates}
        (place / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(recipes, "launch", launch)
    monkeypatch.setattr(recipes, "write_data", lambda *_: None)
    written = tmp_path / "figures.json"
    command = ["recipes", "--model", "mini_llama3_tiny", "--without_sft", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        bench.main([*command, "--engine", "zero1", "zero2", "none", "--json", str(written)])
    assert end.value.code == 1
    found = json.loads(written.read_text())
    of = "mini_llama3_tiny pretrain, engine"
    assert list(found["runs"]) == [f"{of} zero1", f"{of} none"]
    assert found["failed"] == {f"{of} zero2": "its last words"}
    said = capsys.readouterr()
    assert f"{of} zero2 failed." in said.out and said.err.endswith(f"failed:\n{of} zero2\n")


@pytest.mark.slow
def test_pretraining_and_fine_tuning_are_launched_under_each_engine_and_their_rates_compared(
    tmp_path: Path,
) -> None:
    table = tmp_path / "table.md"
    bench.main(
        [
            *("recipes", "--model", "mini_llama3_tiny", "--engine", "none", "zero1"),
            *("--model_overrides", json.dumps({"num_hidden_layers": 1}), "--steps", "20"),
            *("--rows", "2", "--seq_len", "64", "--device", "cpu"),
            *("--json", str(tmp_path / "figures.json"), "--markdown", str(table)),
        ]
    )
    found = json.loads((tmp_path / "figures.json").read_text())["runs"]
    names = [
        f"mini_llama3_tiny {recipe}, engine {engine}"
        for engine in ("none", "zero1")
        for recipe in ("pretrain", "sft")
    ]
    assert list(found) == names
    first = found[names[0]]["tokens_per_second"]
    for name, of in found.items():
        assert of["intervals"] == 2 and of["peak_memory_bytes"] > 0
        step = statistics.median(2 * 64 / (ms / 1e3) for ms in of["step_milliseconds"])
        assert of["tokens_per_second"] == pytest.approx(step)
        if "sft" in name:  # what user and template say is not supervised
            assert 0.2 < of["supervised"] < 0.9
        else:
            assert of["supervised"] is None
        assert of["over_first"] == pytest.approx(of["tokens_per_second"] / first)
        assert f"| {name} |" in table.read_text()
        ours = of["tokens_per_second"]
        pretraining = found[name.replace(" sft", " pretrain")]["tokens_per_second"]
        assert of["over_pretraining"] == pytest.approx(ours / pretraining)
    assert f"{'; '.join(names)}: attention sdpa" in table.read_text()
