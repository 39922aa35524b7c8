"""Experts spread over ranks train as experts that every rank has: the same losses and weights.

The references are runs of one process without DeepSpeed, which test_engines.py compares with a
plain loop. All runs under one Accelerate config share a launch (see several_runs.py).
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mini_llm import load_model
from mini_llm.data import collate, open_validation
from mini_llm.training.balancing import find_routers
from mini_llm.training.sizes import GIB, count_parameters, memory_per_rank
from tests.conftest import TINY_MODELS, TinyConversations, TinyData
from tests.distributed.test_engines import assert_near_in_bf16
from tests.launching import SFT_RUN, TINY_RUN, facts, launch_several, metrics, series

STEPS = 30  # with 16 rows of 64 tokens each
_, DEEPSEEK, QWEN = TINY_MODELS
# At 3e-3, what was rounding grows to 1.3e-6 of a norm of QWEN in 20 steps, and to 0.7e-6 of one of
# DEEPSEEK in 30 with kernels for any CPU.
SCHEDULE = ("--max_steps", str(STEPS), "--learning_rate", "1e-3")
SPREAD_2 = ("--expert_parallel_size", "2")
CHECKPOINTED = ("--gradient_checkpointing", "true")
PLAIN = ("--deepspeed", "none", "--per_device_train_batch_size", "8")  # else 4: always 2 batches
STARVED = ("--model_overrides", "{}", "--expert_bias_update_speed", "0")
EVALUATED = ("--eval_steps", str(STEPS), "--max_eval_rows", "0")
KEEP_ALL = ("--save_total_limit", "9")
# Launches, one after the other: an Accelerate config, and its runs, each a name and flags.
Launches = list[tuple[str, list[tuple[str, ...]]]]
QUICK: Launches = [
    (
        "zero1",
        [
            (f"zero1-{DEEPSEEK}", *SPREAD_2, *CHECKPOINTED, *EVALUATED),
            ("starved", *SPREAD_2),
            ("moved", *SPREAD_2, "--stop_at_step", "8"),
        ],
    ),
    (
        "single",
        [
            (f"single-{DEEPSEEK}", *PLAIN),
            (f"single-{QWEN}", *PLAIN),
            ("single-starved", *PLAIN),
            ("moved", "--stop_at_step", "18"),  # under the recipe's own ZeRO-1, on one rank
        ],
    ),
    ("zero3", [(f"zero3-{QWEN}", *SPREAD_2), ("moved", *SPREAD_2, *KEEP_ALL)]),
]
SLOW: Launches = [
    (
        "zero3",
        [
            (f"zero3-{DEEPSEEK}", *SPREAD_2, *CHECKPOINTED),
            ("crossed", *SPREAD_2, "--stop_at_step", "8"),
        ],
    ),
    (
        "zero1",
        [(f"zero1-{QWEN}", *SPREAD_2), ("crossed", *SPREAD_2, "--stop_at_step", "18")],
    ),
    ("zero3", [("crossed", *SPREAD_2, *KEEP_ALL)]),
    (
        "zero2",
        [
            (f"zero2-{DEEPSEEK}", *SPREAD_2),
            (f"zero2-{QWEN}", *SPREAD_2, *CHECKPOINTED),
            ("interrupted", *SPREAD_2, "--stop_at_step", "7"),
            ("interrupted", *SPREAD_2),
            (f"bf16-spread-{DEEPSEEK}", *SPREAD_2, "--bf16", "true"),
            (f"bf16-whole-{DEEPSEEK}", "--bf16", "true"),
        ],
    ),
]
QUICK_STAGES = [(1, DEEPSEEK), (3, QWEN)]
SLOW_STAGES = [(1, QWEN), (2, DEEPSEEK), (2, QWEN), (3, DEEPSEEK)]


@pytest.fixture(scope="module")
def starved_model(tiny_conversations: TinyConversations, tmp_path_factory: Any) -> Path:
    """A checkpoint whose routers choose among the first half of the experts only."""
    model = load_model(tiny_conversations.models[DEEPSEEK], dtype=torch.float32)
    for router in find_routers(model).values():
        bias = router.e_score_correction_bias
        # More than any score, which is below 1, and no more: sums with 100 would have ties.
        bias.copy_(2.0 * (torch.arange(len(bias)) < len(bias) // 2))
    folder: Path = tmp_path_factory.mktemp("starved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's runs go."""
    return tmp_path_factory.mktemp("expert_parallel")


@pytest.fixture(scope="module")
def run_of(tiny_data: TinyData, starved_model: Path, folder: Path) -> Callable[[str], Path]:
    """name -> the folder of a run; launches all runs of QUICK or of SLOW, once."""

    def flags(name: str, *more: str) -> list[str]:
        model = next((model for model in TINY_MODELS if model in name), DEEPSEEK)
        base = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(folder / name), "--model", model]
        base += ["--model_overrides", json.dumps(TINY_MODELS[model])]
        base += [*SCHEDULE, *more]
        return [*base, "--model", str(starved_model), *STARVED] if "starved" in name else base

    @cache
    def launch_all(slow: bool) -> None:
        for i, (config, runs) in enumerate(SLOW if slow else QUICK):
            launch_several(
                [flags(*run) for run in runs],
                folder / f"{config}-{slow}-{i}.json",
                config=config,
                processes=1 if config == "single" else 2,
            )

    def of(name: str) -> Path:
        launch_all(name not in {run[0] for _, runs in QUICK for run in runs})
        return folder / name

    return of


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def expert_bytes(run: Path) -> int:
    """Of all routed experts of a run's model in fp32, the MTP layer's included."""
    return 4 * sum(w.numel() for name, w in weights(run).items() if ".mlp.experts." in name)


def assert_trained_alike(run: Path, reference: Path) -> None:
    """Losses, norms and expert loads of every step, and the weights that they lead to."""
    assert [m["step"] for m in metrics(run)] == list(range(1, STEPS + 1))
    first = metrics(reference)[0]
    keys = [key for key in first if key.startswith("moe/")]
    keys += ["train/loss", "train/grad_norm", "train/balance_loss"]
    keys += [key for key in ("train/mtp_loss",) if key in first]
    # moe/…/expert_load are counts: every token went to the same experts.
    for key in keys:
        ours, theirs = (
            [math.nan if value is None else value for value in series(path, key)]
            for path in (run, reference)
        )
        assert len(theirs) == STEPS, key
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=key)
    assert_same_weights(run, reference)


def assert_same_weights(run: Path, reference: Path) -> None:
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("stage", "model"),
    [*QUICK_STAGES, *(pytest.param(*other, marks=pytest.mark.slow) for other in SLOW_STAGES)],
)
def test_spread_experts_train_as_a_single_process_under_every_zero_stage(stage, model, run_of):
    run, single = run_of(f"zero{stage}-{model}"), run_of(f"single-{model}")
    found, without = facts(run), facts(single)
    assert (found["world_size"], found["zero_stage"]) == (2, stage)
    assert (found["expert_parallel_size"], found["expert_groups"]) == (2, [[0, 1]])
    assert found["gradient_accumulation_steps"] == 2
    assert (without["world_size"], without["zero_stage"]) == (1, None)
    assert without["expert_parallel_size"] == 1
    assert_trained_alike(run, single)
    # It trains, its gradients are clipped, and with what each model has beside the loss.
    losses = series(single, "train/loss")
    assert losses[-1] < losses[0] - 1 and max(series(single, "train/grad_norm")) > 1
    assert bool(series(single, "train/mtp_loss")) == (model == DEEPSEEK)
    biases = [w for name, w in weights(run).items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == (2 if model == DEEPSEEK else 0) and all(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("stage", "model"),
    [*QUICK_STAGES, *(pytest.param(*other, marks=pytest.mark.slow) for other in SLOW_STAGES)],
)
def test_each_rank_holds_half_of_the_experts_their_gradients_and_optimizer_state(
    stage, model, run_of
):
    run, single = run_of(f"zero{stage}-{model}"), run_of(f"single-{model}")
    held = facts(run)["bytes_per_rank"]
    half = expert_bytes(run) // 2
    assert held["expert_parameters"] == held["expert_gradients"] == [half] * 2
    for state in held["expert_optimizer_state"]:  # fp32 weights and two moments, and a step count
        assert 3 * half <= state < 3 * half + 100
    (whole,) = facts(single)["bytes_per_rank"]["parameters"]
    assert half > whole / 10
    if stage < 3:  # and all other weights
        assert held["parameters"] == [whole - half] * 2
    if stage != 2:  # which holds a gradient that a partition boundary cuts whole, here the largest
        estimate = memory_per_rank(
            count_parameters(load_model(run / "final")),
            world_size=2,
            bf16=False,
            expert_parallel_size=2,
        )[f"zero{stage}"]
        for kinds in zip(
            held["parameters"], held["gradients"], held["optimizer_state"], strict=True
        ):
            assert sum(kinds) / GIB == pytest.approx(estimate, rel=0.02)


@pytest.mark.slow
def test_an_interrupted_run_with_spread_experts_is_bitwise_the_uninterrupted_one(run_of):
    resumed, whole = run_of("interrupted"), run_of(f"zero2-{DEEPSEEK}")
    assert (resumed / "checkpoints" / "step-7").is_dir()
    assert len(metrics(whole)) == STEPS
    assert_bitwise_equal(resumed, whole)


def assert_bitwise_equal(run: Path, reference: Path) -> None:
    """All metrics but times, and all weights."""

    def untimed(path: Path) -> list[dict[str, Any]]:
        timed = ("perf/", "ep/all_to_all_seconds")
        return [{k: v for k, v in m.items() if not k.startswith(timed)} for m in metrics(path)]

    assert untimed(run) == untimed(reference)
    found, expected = weights(run), weights(reference)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_spread_then_whole_on_one_rank_then_spread_under_zero3_continues(run_of):
    run = run_of("moved")
    assert [
        (where["world_size"], where["zero_stage"], where["expert_parallel_size"])
        for where in engines(run)
    ] == [(2, 1, 2), (1, 1, 1), (2, 3, 2), (2, 3, 2)]
    assert_trained_alike(run, run_of(f"single-{DEEPSEEK}"))


@pytest.mark.slow
def test_spread_experts_go_on_from_zero3_to_zero1_and_back(run_of):
    run = run_of("crossed")
    assert [
        (where["world_size"], where["zero_stage"], where["expert_parallel_size"])
        for where in engines(run)
    ] == [(2, 3, 2), (2, 1, 2), (2, 3, 2), (2, 3, 2)]
    assert_trained_alike(run, run_of(f"single-{DEEPSEEK}"))


@pytest.mark.slow
def test_in_bf16_spread_experts_stay_as_near_to_fp32_as_whole_ones_do(run_of):
    spread, whole = run_of(f"bf16-spread-{DEEPSEEK}"), run_of(f"bf16-whole-{DEEPSEEK}")
    assert facts(spread)["expert_parallel_size"] == 2
    # A weight is 2 bytes, its gradient 4 (ZeRO-2 accumulates in fp32), its state 12.
    held = facts(spread)["bytes_per_rank"]
    assert held["expert_parameters"] == [expert_bytes(spread) // 4] * 2
    assert held["expert_gradients"] == [expert_bytes(spread) // 2] * 2
    single = run_of(f"single-{DEEPSEEK}")
    reference = {key: series(single, key) for key in ("train/loss", "train/grad_norm")}
    for run in (spread, whole):
        assert len(series(run, "train/loss")) == STEPS
        assert_near_in_bf16(run, reference)


def engines(run: Path) -> list[dict[str, Any]]:
    """Which engine wrote each of a run's checkpoints, then what run.json says of its last leg."""
    states = sorted((run / "checkpoints").glob("step-*/state.json"), key=step_of)
    written_by = [json.loads(path.read_text())["engine"] for path in states]
    return [*written_by, facts(run)]


def step_of(state: Path) -> int:
    return int(state.parent.name.removeprefix("step-"))


def test_a_rank_whose_experts_get_no_token_trains_as_a_single_process(run_of, starved_model):
    run = run_of("starved")
    assert series(run, "moe/dead_experts") == [8.0] * STEPS  # 4 of 8 in two layers
    assert_trained_alike(run, run_of("single-starved"))
    # The unused half has only decayed: all of its weights shrank by one and the same factor.
    before, after = load_file(starved_model / "model.safetensors"), weights(run)
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    unused, used = (after[name.format(e)] / before[name.format(e)] for e in (7, 0))
    assert unused.median() < 1 and (unused - unused.median()).abs().max() < 1e-5
    assert (used - unused.median()).abs().max() > 1e-3


@pytest.mark.parametrize("name", [f"zero1-{DEEPSEEK}", f"zero3-{QWEN}"])
def test_final_of_a_run_with_spread_experts_opens_in_plain_transformers(name, run_of):
    final = run_of(name) / "final"
    stock, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert type(stock).__module__.startswith("transformers.")
    mtp = "model.layers.2."  # behind the two layers; a stock model has none
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith(mtp) for key in info["unexpected_keys"])
    tokens = torch.arange(1, 61).view(2, 30)
    with torch.no_grad():
        ours = load_model(final).eval()(tokens).logits
        torch.testing.assert_close(stock.eval()(tokens).logits, ours, rtol=1e-4, atol=1e-4)


def test_final_of_a_run_with_spread_experts_has_its_held_out_loss_in_plain_transformers(
    run_of, tiny_data
):
    run = run_of(f"zero1-{DEEPSEEK}")
    stock = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    held_out = open_validation(
        json.loads(tiny_data.flags[-1]), seq_len=tiny_data.seq_len, tokenizer=tiny_data.tokenizer
    )["tiny"]
    nats = tokens = 0.0
    for row in held_out.rows:
        batch = collate([row], torch.device("cpu"))
        with torch.no_grad():
            logits = stock(
                batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        targets = batch["labels"][0, 1:]
        nats += F.cross_entropy(logits[0, :-1].double(), targets, reduction="sum").item()
        tokens += int((targets != -100).sum())
    first, last = series(run, "eval/tiny/loss")
    assert last < first - 1
    assert nats / tokens == pytest.approx(last, rel=1e-6)


@pytest.mark.slow
def test_fine_tuning_with_spread_experts_is_that_without_and_samples_and_resumes(
    tiny_conversations: TinyConversations, tmp_path: Path
) -> None:
    asked = ("--eval_steps", "3", "--sample_prompts", '["what is it"]')
    asked = (*asked, "--sample_max_new_tokens", "6", "--max_steps", "3")
    launch_several(
        [
            [*SFT_RUN, *tiny_conversations.flags(DEEPSEEK), *asked, *more]
            for more in (
                ("--output_dir", str(tmp_path / "spread"), *SPREAD_2),
                ("--output_dir", str(tmp_path / "whole")),
                ("--output_dir", str(tmp_path / "resumed"), *SPREAD_2, "--stop_at_step", "2"),
                ("--output_dir", str(tmp_path / "resumed"), *SPREAD_2),
                ("--output_dir", str(tmp_path / "next"), "--model", str(tmp_path / "spread/final")),
                ("--output_dir", str(tmp_path / "also"), "--model", str(tmp_path / "whole/final")),
            )
        ],
        tmp_path / "plan.json",
        recipe="sft",
        config="zero2",
    )
    spread, whole = tmp_path / "spread", tmp_path / "whole"
    assert (facts(spread)["zero_stage"], facts(spread)["expert_parallel_size"]) == (2, 2)
    assert facts(whole)["expert_parallel_size"] == 1
    for key in ("train/loss", "train/grad_norm", "eval/tiny/loss"):
        expected = series(whole, key)
        assert len(expected) == (2 if key.startswith("eval") else 3)
        np.testing.assert_allclose(series(spread, key), expected, rtol=1e-6, err_msg=key)
    assert_same_weights(spread, whole)
    assert len(series(spread, "samples/stopped")) == 2
    answers = (spread / "samples.txt").read_text()
    assert "what is it" in answers and answers == (whole / "samples.txt").read_text()
    assert (tmp_path / "resumed" / "checkpoints" / "step-2").is_dir()
    assert_bitwise_equal(tmp_path / "resumed", spread)
    # What it saved is where a run without spread experts begins.
    again, expected = (series(tmp_path / name, "train/loss") for name in ("next", "also"))
    assert facts(tmp_path / "next")["expert_parallel_size"] == 1
    assert again[0] < series(spread, "train/loss")[0] and len(again) == 3
    np.testing.assert_allclose(again, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_ranks_in_groups_of_two_or_four_train_as_a_single_process(
    stage, run_of, tiny_data, folder
):
    names = {size: f"zero{stage}-4-ranks-{size}" for size in (2, 4)}
    model = ("--model", DEEPSEEK, "--model_overrides", json.dumps(TINY_MODELS[DEEPSEEK]))
    base = [*TINY_RUN, *tiny_data.flags, *model, "--per_device_train_batch_size", "2"]
    base += SCHEDULE
    legs = [
        [*base, "--output_dir", str(folder / name), "--expert_parallel_size", str(size)]
        for size, name in names.items()
    ]
    # Stopped in groups of two, it goes on in one of four.
    moved = [*base, "--output_dir", str(folder / f"zero{stage}-2-then-4")]
    legs.append([*moved, "--expert_parallel_size", "2", "--stop_at_step", "9"])
    legs.append([*moved, "--expert_parallel_size", "4"])
    launch_several(legs, folder / f"four-{stage}.json", config=f"zero{stage}", processes=4)
    single = run_of(f"single-{DEEPSEEK}")
    for name, groups in [
        (names[2], [[0, 1], [2, 3]]),
        (names[4], [[0, 1, 2, 3]]),
        (f"zero{stage}-2-then-4", [[0, 1, 2, 3]]),
    ]:
        found = facts(folder / name)
        assert (found["world_size"], found["zero_stage"]) == (4, stage)
        assert found["expert_groups"] == groups
        assert found["expert_parallel_size"] == len(groups[0])
        assert_trained_alike(folder / name, single)
