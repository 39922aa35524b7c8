"""TensorBoard and W&B: what they get, and that an interrupted run goes on there."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mini_llm.models import load_model
from mini_llm.training.sizes import count_parameters, training_flops
from tests.conftest import TINY_MODELS, TinyConversations, TinyData
from tests.launching import SFT_RUN, TINY_RUN, launch, launch_several, metrics, series
from tests.metrics_page import documented_metrics, names_without_a_row
from tests.trackers import assert_trackers_have_what_metrics_jsonl_has
from tests.wandb_server import HANG, WandbServer, recorded_history, uploaded_history

LLAMA, DEEPSEEK, QWEN = TINY_MODELS
PEAK_FLOPS = 1e10


@pytest.mark.slow
def test_interrupted_run_goes_on_as_one_tensorboard_curve_and_one_wandb_run(
    tiny_data: TinyData, tmp_path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(run), "--deepspeed", "none"]
    flags += ["--report_to", "tensorboard,wandb", "--save_steps", "3", "--max_steps", "8"]
    options = {"config": "single", "processes": 1, "env": {"WANDB_MODE": "offline"}}
    launch(*flags, "--stop_at_step", "5", **options)
    # As after a crash: steps 4 and 5 were logged, but not saved.
    shutil.rmtree(run / "checkpoints" / "step-5")
    launch(*flags, **options)

    folder = run / "logs" / "mini-llm"
    assert len(list(folder.glob("events.out.tfevents*"))) == 2
    curve = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [point.step for point in curve] == list(range(1, 9))
    assert [round(point.value, 4) for point in curve] == [
        round(loss, 4) for loss in series(run, "train/loss")
    ]
    assert len(list((run / "logs" / "wandb").glob("offline-run-*"))) == 2
    assert_trackers_have_what_metrics_jsonl_has(run)
    assert uploaded_history(run) == recorded_history(run)


@pytest.mark.slow
def test_a_wandb_server_that_hangs_does_not_stop_a_run(tiny_data: TinyData, tmp_path) -> None:
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run")]
    flags += ["--report_to", "wandb", "--max_steps", "4"]
    with WandbServer(HANG) as server:
        env = server.environment() | {"WANDB_INIT_TIMEOUT": "2"}
        output = launch(*flags, env=env).stdout
    assert output.count("--report_to wandb: the server cannot be had") == 1, output
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "final").is_dir()
    assert_trackers_have_what_metrics_jsonl_has(tmp_path / "run", tensorboard=False)


@pytest.fixture(scope="module")
def run_of(
    tiny_data: TinyData,
    tiny_conversations: TinyConversations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A run by name: both recipes, all models, on two ranks; "whole" is "qwen" on one."""
    folder = tmp_path_factory.mktemp("tracking")
    raw = folder / "raw.jsonl"
    record = {"instruction": "", "output": "训练 " * 9, "history": []}
    lines = [json.dumps(record | {"input": f"a model of {i} tokens"}) for i in range(600)]
    lines[::50] = ["no JSON"] * len(lines[::50])
    raw.write_text("\n".join(lines) + "\n")
    (tiny,) = json.loads(tiny_data.flags[-1]).values()
    packed = {"tiny": tiny, "twin": tiny | {"weight": 0.5}}
    mixed = {"tiny": tiny, "raw": {"path": str(raw), "weight": 1}}
    watched = [*("--report_to", "tensorboard,wandb", "--logging_steps", "3", "--eval_steps", "5")]
    watched += [
        "--max_eval_rows",
        "8",
        "--sample_max_new_tokens",
        "4",
        "--peak_flops",
        str(PEAK_FLOPS),
    ]

    def pretrain(name: str, model: str, *more: str) -> list[str]:
        flags = [*TINY_RUN, *tiny_data.flags, "--data", json.dumps(packed), *watched]
        flags += ["--model", model, "--model_overrides", json.dumps(TINY_MODELS[model])]
        flags += ["--max_steps", "8", "--sample_prompts", '["a model"]']
        return [*flags, "--output_dir", str(folder / name), *more]

    def sft(name: str, model: str) -> list[str]:
        flags = [*SFT_RUN, *tiny_conversations.flags(model), *watched]
        return [*flags, "--sample_prompts", '["what is it"]', "--output_dir", str(folder / name)]

    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    runs = [
        pretrain("spread", DEEPSEEK, *("--data", json.dumps(mixed), "--expert_parallel_size", "2")),
        pretrain("qwen", QWEN),
        pretrain("llama", LLAMA),
    ]
    launch_several(runs, folder / "pretrain.json", config="zero2", env=offline)
    launch(*sft("sft", LLAMA), recipe="sft", config="zero2", env=offline)
    whole = pretrain("whole", QWEN, "--deepspeed", "none")
    launch(*whole, config="single", processes=1, env=offline)
    return lambda name: folder / name


RUNS = ("spread", "qwen", "llama", "sft")


@pytest.mark.slow
def test_the_table_of_metrics_has_what_runs_emit_and_nothing_else(run_of) -> None:
    emitted = {name for run in RUNS for line in metrics(run_of(run)) for name in line}
    emitted.remove("step")
    recorded = recorded_history(run_of("spread"))
    tables = {name for values in recorded.values() for name in values} - emitted
    assert tables == {"samples/answers"}
    names = emitted | tables
    assert names_without_a_row(names) == []
    assert [row.name for row in documented_metrics() if not any(map(row.matches, names))] == []
    # The spread run is the model with everything: all of them but those of fine-tuning.
    assert {row.name for row in documented_metrics()} - {
        row.name
        for row in documented_metrics()
        if any(row.matches(name) for values in recorded.values() for name in values)
    } == {
        *("moe/layer_<i>/expert_load", "moe/layer_<i>/rank_load"),  # lists
        *("train/supervised_tokens", "train/epoch"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_both_trackers_have_the_values_of_metrics_jsonl(run_of, name) -> None:
    assert_trackers_have_what_metrics_jsonl_has(run_of(name))


@pytest.mark.slow
def test_what_two_ranks_log_of_their_halves_is_what_one_logs_of_all(run_of) -> None:
    """Of values that differ between ranks, as their rows do, one rank's alone would be wrong."""
    of_two, of_one = metrics(run_of("qwen")), metrics(run_of("whole"))
    assert len(of_two) == len(of_one) == 5
    compared = set()
    for ours, theirs in zip(of_two, of_one, strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            if name.startswith("perf/"):
                continue
            compared.add(name)
            if isinstance(value, list) or value is None:
                assert ours[name] == value, name
            else:
                assert math.isclose(ours[name], value, rel_tol=1e-4, abs_tol=1e-5), name
    assert {"train/loss", "train/balance_loss", "train/grad_norm", "samples/tokens"} <= compared
    assert {"data/twin/tokens", "moe/layer_1/expert_load", "eval/twin/loss"} <= compared


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_parts_of_a_step_lie_within_it(run_of, name) -> None:
    for line in metrics(run_of(name)):
        if "perf/step_seconds" not in line:
            continue
        parts = [line[f"perf/{p}_seconds"] for p in ("data", "forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= line["perf/step_seconds"]
        assert line["perf/communication_seconds"] > 0
        if line["step"] == 1:  # else the mean of several steps stands beside that of one
            assert line["perf/communication_seconds"] <= line["perf/step_seconds"]
        assert line["perf/mfu"] > 0 and line["perf/peak_memory_bytes"] > 1e8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "sft"])
def test_utilisation_counts_the_supervised_tokens_of_all_ranks(
    run_of, name, tiny_data, tiny_conversations
) -> None:
    run, data = run_of(name), tiny_conversations if name == "sft" else tiny_data
    model = load_model(run / "final")
    flops = training_flops(model.config, count_parameters(model), data.seq_len)
    line = metrics(run)[0]
    tokens = line["perf/tokens_per_second"] * line["perf/step_seconds"]
    done = line["perf/mfu"] * 2 * PEAK_FLOPS * line["perf/step_seconds"]  # on two ranks
    if name == "sft":
        supervised = line["train/supervised_tokens"]
        assert supervised < 0.9 * tokens
        assert math.isclose(done, tokens * flops.layers + supervised * flops.head, rel_tol=1e-6)
    else:  # all but the first token of each document
        supervised = (done - tokens * flops.layers) / flops.head
        assert 0.9 * tokens < supervised < tokens
