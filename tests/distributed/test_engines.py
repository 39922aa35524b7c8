"""The same losses under every engine, proved to be that engine by what each rank holds."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed

from mini_llm import build_model
from mini_llm.data import collate, load_tokenizer, open_stream
from mini_llm.training.balancing import take_expert_load, update_expert_bias
from mini_llm.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from tests.conftest import TinyData
from tests.launching import TINY_MODEL, TINY_RUN, facts, launch, metrics, series

ENGINES = ["zero0", "zero1", "zero2", "zero3", "ddp"]
STEPS = 20
OVERRIDES: dict[str, dict[str, Any]] = {
    "mini_llama3_tiny": TINY_MODEL,
    "mini_deepseekv3_tiny": {"num_hidden_layers": 2},
    "mini_qwen3_next_tiny": {},
}


@pytest.fixture(scope="module")
def run_of(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory):
    """(engine, model) -> run folder of 20 steps on 2 ranks with accumulation 2; launched once."""
    folder = tmp_path_factory.mktemp("engines")

    @cache
    def run(engine: str, model: str = "mini_llama3_tiny") -> Path:
        output_dir = folder / f"{engine}-{model}"
        flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(output_dir), "--model", model]
        flags += ["--model_overrides", json.dumps(OVERRIDES[model])]
        environment = {}
        if output_dir.name == "zero1-mini_llama3_tiny":
            # A lock as a killed build leaves it: must not hang the start.
            lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"
            lock.parent.mkdir(parents=True)
            lock.touch()
            environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
        launch(*flags, config=engine, env=environment)
        return output_dir

    return run


@pytest.fixture(scope="module")
def reference_of(tiny_data: TinyData):
    """model -> losses and gradient norms of a plain PyTorch loop over the same rows."""
    # One thread, as the launched ranks have: with more, sums round differently and a near-tie of a
    # router may send a token elsewhere.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cache(lambda model="mini_llama3_tiny": plain_loop(tiny_data, model))
    torch.set_num_threads(threads)


def plain_loop(tiny_data: TinyData, name: str) -> dict[str, list[float]]:
    """One process, one pass a step, no engine and nothing of the chunked loss."""
    tokenizer = load_tokenizer(tiny_data.tokenizer)
    set_seed(42)
    model = build_model(
        name,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **OVERRIDES[name],
    )
    optimizer = build_optimizer(
        model, learning_rate=3e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-4
    )
    data = {"tiny": {"path": str(tiny_data.packed), "weight": 1}}
    result: dict[str, list[float]] = {}
    model.train()
    with open_stream(data, seq_len=64, seed=42, rows_per_step=16) as stream:
        for step in range(1, STEPS + 1):
            batch = collate([next(stream) for _ in range(16)])
            set_learning_rate(
                optimizer,
                learning_rate_at(
                    step, peak=3e-3, max_steps=STEPS, warmup_steps=1, min_lr_ratio=0.1
                ),
            )
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=batch["labels"],
                num_items_in_batch=batch["num_target_tokens"],
                skip_logits=False,
            )
            loss = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1),
                batch["labels"][:, 1:].flatten(),
                ignore_index=-100,
            )
            objective, logged = loss, {"train/loss": loss}
            if getattr(outputs, "mtp_loss", None) is not None:
                objective = objective + (0.3 if step <= 13 else 0.1) * outputs.mtp_loss
                logged["train/mtp_loss"] = outputs.mtp_loss
            if getattr(outputs, "balance_loss", None) is not None:
                objective = objective + 0.01 * outputs.balance_loss
                logged["train/balance_loss"] = outputs.balance_loss
            optimizer.zero_grad()
            objective.backward()
            logged["train/grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            load = take_expert_load(model)
            if load is not None:
                update_expert_bias(model, load, speed=0.01)
                logged |= load.metrics()
            for key, value in logged.items():
                value = value.item() if torch.is_tensor(value) else value
                result.setdefault(key, []).append(math.nan if value is None else value)
    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_losses_of_a_plain_single_process_loop(engine, run_of, reference_of):
    run, reference = run_of(engine), reference_of()
    assert [m["step"] for m in metrics(run)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(series(run, "train/loss"), reference["train/loss"], rtol=1e-5)
    norms = series(run, "train/grad_norm")
    np.testing.assert_allclose(norms, reference["train/grad_norm"], rtol=1e-4)
    # It trains: twenty equal losses would prove less.
    assert reference["train/loss"][-1] < reference["train/loss"][0] - 1


@pytest.mark.parametrize(
    ("engine", "model"), [("zero3", "mini_deepseekv3_tiny"), ("zero1", "mini_qwen3_next_tiny")]
)
def test_expert_models_give_the_losses_and_loads_of_a_plain_loop(
    engine, model, run_of, reference_of
):
    run, reference = run_of(engine, model), reference_of(model)
    assert "train/balance_loss" in reference and "moe/dead_experts" in reference
    for key, expected in reference.items():
        # moe/… are counts of tokens: equal if the routers chose the same experts
        tolerance = 1e-4 if key == "train/grad_norm" else 1e-5
        ours = [math.nan if value is None else value for value in series(run, key)]
        np.testing.assert_allclose(ours, expected, rtol=tolerance, err_msg=key)


@pytest.mark.parametrize("engine", ENGINES)
def test_run_json_shows_the_engine_by_the_bytes_that_each_rank_holds(engine, run_of):
    run = facts(run_of(engine))
    stage = int(engine[-1]) if engine.startswith("zero") else None
    assert run["world_size"] == 2 and run["backend"] == "gloo"
    assert run["distributed_type"] == ("MULTI_CPU" if stage is None else "DEEPSPEED")
    assert run["zero_stage"] == stage
    assert run["wrapper"] == ("DistributedDataParallel" if stage is None else "DeepSpeedEngine")

    whole = facts(run_of("ddp"))["bytes_per_rank"]  # measured where nothing is split
    share = {kind: np.array(run["bytes_per_rank"][kind]) / whole[kind][0] for kind in whole}
    expected = {
        "parameters": 0.5 if stage == 3 else 1.0,
        # Accumulating over two micro-batches, ZeRO-1 holds whole gradients, ZeRO-2 its share.
        "gradients": 0.5 if stage in (2, 3) else 1.0,
        # The whole is two moments; ZeRO-1 to 3 hold half of these and of a copy of the weights.
        "optimizer_state": 0.75 if stage else 1.0,
    }
    for kind, share_of_each_rank in share.items():
        # DeepSpeed pads partitions, and ZeRO-3 keeps norm weights whole on every rank.
        np.testing.assert_allclose(share_of_each_rank, expected[kind], atol=0.06, err_msg=kind)


def test_a_stale_deepspeed_build_lock_is_removed_at_the_start(run_of):
    extensions = run_of("zero1").parent / "extensions"
    assert extensions.is_dir() and not list(extensions.rglob("lock"))


def test_stop_and_resume_gives_bitwise_the_losses_of_the_uninterrupted_run(
    run_of, tiny_data, tmp_path
):
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path)]
    launch(*flags, "--stop_at_step", "10")
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 11))
    assert not (tmp_path / "final").exists()
    launch(*flags)
    whole = run_of("zero1")
    for key in ("train/loss", "train/grad_norm", "train/lr", "train/tokens"):
        assert series(tmp_path, key) == series(whole, key), key
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-10",
        "step-20",
    ]
    from safetensors.torch import load_file

    resumed = load_file(tmp_path / "final" / "model.safetensors")
    uninterrupted = load_file(whole / "final" / "model.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_zero3_saves_the_same_whole_model_as_zero1(run_of):
    from safetensors.torch import load_file

    split = load_file(run_of("zero3") / "final" / "model.safetensors")
    whole = load_file(run_of("zero1") / "final" / "model.safetensors")
    assert split.keys() == whole.keys()
    for name in whole:
        # As whole matrices: where a gradient is nearly 0, AdamW's division makes one element's
        # rounding 1e-5 large.
        error = (split[name].double() - whole[name].double()).norm() / whole[name].double().norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
