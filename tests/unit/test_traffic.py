"""The formula of communication, by hand on round numbers; tests/distributed counts real runs."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mini_llm import build_model
from mini_llm.bench import __main__ as bench
from mini_llm.models import preset_config
from mini_llm.parallel.traffic import (
    BOOKKEEPING,
    ModelShape,
    StepShape,
    Traffic,
    sent,
    sent_between_nodes,
    step_traffic,
)
from mini_llm.training.arguments import PretrainArguments, SftArguments
from mini_llm.training.sizes import communication_line, count_parameters, model_shape

DENSE = ModelShape(matrices=(8000, 1999), vectors=(101,), buffers=16)
# Two layers of 8 experts, F 10 and D 20: 1600 numbers for each of w1, w2 and w3.
EXPERTS = replace(DENSE, experts=((8, 10, 20), (8, 10, 20)), experts_per_token=2)
STEP = StepShape("zero1", world_size=4, micro_batches=3, micro_batch_tokens=100)


def handed(model: ModelShape, step: StepShape) -> dict[tuple[str, str, int], int]:
    """Bytes by purpose, kind and ranks, bookkeeping left out."""
    found: dict[tuple[str, str, int], int] = {}
    for part in step_traffic(model, step):
        if part.purpose != BOOKKEEPING:
            key = part.purpose, part.kind, part.ranks
            found[key] = found.get(key, 0) + part.bytes
    return found


@pytest.mark.parametrize("engine", ["ddp", "zero0"])
def test_replicated_weights_cost_one_fp32_all_reduce(engine: str) -> None:
    step = replace(STEP, engine=engine)
    assert handed(DENSE, step) == {("gradients", "all_reduce", 4): 4 * 10_100}


@pytest.mark.parametrize(("engine", "reductions"), [("zero1", 1), ("zero2", 3)])
@pytest.mark.parametrize(("bf16", "width"), [(False, 4), (True, 2)])
def test_zero_1_and_2_reduce_whole_gradients_and_gather_padded_weights(
    engine: str, reductions: int, bf16: bool, width: int
) -> None:
    assert handed(DENSE, replace(STEP, engine=engine, bf16=bf16)) == {
        ("gradients", "all_reduce", 4): reductions * width * 10_100,
        ("weights", "all_gather", 4): width * (10_000 + 104),  # multiples of 2 × 4
    }


def test_zero_3_gathers_large_tensors_a_micro_batch_and_small_ones_a_step() -> None:
    assert handed(DENSE, replace(STEP, engine="zero3", bf16=True)) == {
        ("gradients", "reduce_scatter", 4): 3 * 2 * (8000 + 2000 + 104),  # multiples of 4
        ("weights", "all_gather", 4): 2 * (3 * (8000 + 2000) + 104),
    }


@pytest.mark.parametrize(("checkpointing", "exchanges"), [(False, 4), (True, 6)])
def test_spread_experts_exchange_tokens_and_reduce_over_the_ranks_that_share_them(
    checkpointing: bool, exchanges: int
) -> None:
    step = replace(STEP, expert_parallel_size=2, gradient_checkpointing=checkpointing)
    found = handed(EXPERTS, step)
    assert found["tokens", "all_to_all", 2] == exchanges * 3 * 100 * 2 * 20 * 4 * 2
    assert found["expert gradients", "all_reduce", 2] == 4 * 2 * 3 * 1600 // 2
    assert found["expert weights", "all_gather", 2] == 4 * 2 * 3 * 1600 // 2
    assert found["gradients", "all_reduce", 4] == 4 * 10_100
    of_all = [part for part in step_traffic(EXPERTS, step) if part.purpose == "tokens"]
    assert sent(of_all) == found["tokens", "all_to_all", 2] / 2  # half of them stay
    whole = replace(step, expert_parallel_size=4)
    assert not [key for key in handed(EXPERTS, whole) if key[0].startswith("expert")]


def test_rings_send_every_byte_n_minus_1_times_round() -> None:
    assert Traffic("", "all_reduce", 4, 1000).sent == 1500
    assert Traffic("", "all_gather", 4, 1000).sent == 750
    assert Traffic("", "reduce_scatter", 3, 1000).sent == Fraction(2000, 3)
    assert Traffic("", "all_to_all", 2, 1000).sent == 500


def test_between_nodes_goes_what_the_last_rank_of_a_node_sends() -> None:
    ring = Traffic("", "all_gather", 64, 6400)
    assert ring.sent == 6300
    assert ring.sent_between_nodes(8) == Fraction(6300, 8)
    assert Traffic("", "all_gather", 8, 6400).sent_between_nodes(8) == 0
    # The same experts on every 8th rank: each step of the ring goes to another node.
    strided = Traffic("", "all_gather", 8, 6400, stride=8)
    assert strided.sent_between_nodes(8) == strided.sent
    assert Traffic("", "all_gather", 32, 6400, stride=2).sent_between_nodes(8) == Fraction(6200, 4)
    # All-to-all over two nodes: 8 of the 15 others are on the other one.
    exchange = Traffic("", "all_to_all", 16, 1600)
    assert exchange.sent_between_nodes(8) == 800
    assert sent_between_nodes([ring, exchange]) == 6300 / 8 + 800
    with pytest.raises(ValueError, match="12 ranks"):
        Traffic("", "all_gather", 12, 6400).sent_between_nodes(8)


def test_one_rank_sends_nothing() -> None:
    for engine in ("ddp", "zero1", "zero3"):
        assert step_traffic(DENSE, replace(STEP, engine=engine, world_size=1)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": "fsdp"}, "no formula for the engine 'fsdp'"),
        ({"engine": "zero0", "bf16": True}, "ZeRO-0 does not run in bf16"),
        ({"engine": "ddp", "expert_parallel_size": 2}, "not spread under ddp"),
        ({"expert_parallel_size": 3}, "--expert_parallel_size 3 must divide"),
    ],
)
def test_what_no_recipe_runs_has_no_formula(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        step_traffic(EXPERTS, replace(STEP, **change))  # type: ignore[arg-type]


def test_zero_3_of_a_model_that_would_not_stay_whole_has_no_formula() -> None:
    large = ModelShape(matrices=(400_000_000,), vectors=())
    step_traffic(large, replace(STEP, engine="zero3"))
    with pytest.raises(ValueError, match="too many"):
        step_traffic(large, replace(STEP, engine="zero3", gradient_checkpointing=True))


def test_a_model_s_shape_holds_every_parameter_once() -> None:
    for name in ("mini_llama3_tiny", "mini_deepseekv3_tiny", "mini_qwen3_next_tiny"):
        model = build_model(name, vocab_size=320)
        shape = model_shape(model)
        experts = sum(3 * E * F * D for E, F, D in shape.experts)
        total = sum(shape.matrices) + sum(shape.vectors) + experts
        assert total == count_parameters(model).total
        assert bool(shape.experts) == (name != "mini_llama3_tiny")


def planned(world_size: int, stage: int | None) -> Any:
    """As much of an Accelerator as the dry run looks at."""
    config = {"zero_optimization": {"stage": stage}}
    plugin = None if stage is None else SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(num_processes=world_size, state=SimpleNamespace(deepspeed_plugin=plugin))


SIZES: dict[str, Any] = {
    **{"output_dir": "", "model": "mini_deepseekv3_tiny", "tokenizer": ""},
    **{"global_batch_tokens": 4096, "seq_len": 64, "per_device_train_batch_size": 8},
}


def test_the_dry_run_s_line_is_the_formula_s() -> None:
    config = preset_config("mini_deepseekv3_tiny")
    args = PretrainArguments(**SIZES, bf16=True, expert_parallel_size=2)
    step = StepShape("zero2", 4, 2, 8 * 64, bf16=True, expert_parallel_size=2)
    traffic = step_traffic(model_shape(build_model("mini_deepseekv3_tiny")), step)
    line = communication_line(args, config, planned(4, 2))
    assert f" {sent(traffic) / 1e6:,.3f} MB under zero2 (" in line and "by formula" in line
    tokens = sent(part for part in traffic if part.purpose == "tokens")
    assert f"tokens {tokens / 1e6:,.3f}" in line
    assert "MB under ddp (gradients" in communication_line(
        PretrainArguments(**SIZES), config, planned(4, None)
    )
    assert "nothing: one rank" in communication_line(args, config, planned(1, 2))
    odd = replace(args, expert_parallel_size=3)
    assert "not computed: --expert_parallel_size 3" in communication_line(
        odd, config, planned(4, 2)
    )


def test_the_dry_run_of_fine_tuning_counts_no_gradients_of_frozen_layers() -> None:
    config = preset_config("mini_deepseekv3_tiny")
    lines = [
        communication_line(SftArguments(**SIZES, mtp_loss_weight=weight), config, planned(4, 1))
        for weight in (0.0, 0.3)
    ]
    without, with_mtp = (float(line.split("gradients ")[1].split(",")[0]) for line in lines)
    assert 0 < without < with_mtp


TRAFFIC_FLAGS = ["traffic", "--model", "mini_llama3_tiny", "mini_deepseekv3_tiny"]


def test_printed_table_is_the_formula_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*TRAFFIC_FLAGS, "--bf16", "true", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    assert "by formula" in printed and "not measured" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 4 + 4 + 3  # zero0 does not run in bf16; experts spread under ZeRO-1 to 3
    model = model_shape(build_model("mini_deepseekv3_tiny"))
    # 2**20 tokens in rows of 2048: 16 rows at most in a micro-batch.
    for gpus, micro_batches, rows in ((8, 4, 16), (64, 1, 8), (512, 1, 1)):
        for engine, label, size in (
            ("zero2", "mini_deepseekv3_tiny zero2", 1),
            ("zero3", "mini_deepseekv3_tiny zero3, experts over 8", 8),
        ):
            traffic = step_traffic(
                model, StepShape(engine, gpus, micro_batches, rows * 2048, True, size)
            )
            assert figures[label][str(gpus)] == {
                "sent": sent(traffic),
                "sent_between_nodes": sent_between_nodes(traffic),
            }
    rows_of_table = [line for line in printed.splitlines() if line.startswith("| mini")]
    assert len(rows_of_table) == len(figures)
    for line, (label, of_gpus) in zip(rows_of_table, figures.items(), strict=True):
        numbers = [value / 1e6 for cell in of_gpus.values() for value in cell.values()]
        assert line == f"| {label} | " + " | ".join(f"{x:,.0f}" for x in numbers) + " |"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "llama"], "--model: no preset is named 'llama'"),
        (["--gpus", "3"], "--global_batch_tokens 1048576 is no multiple of 3 GPUs"),
    ],
)
def test_what_cannot_be_divided_is_one_sentence(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main([*TRAFFIC_FLAGS, *flags])
    assert capsys.readouterr().err.startswith(words)
