"""The same losses under every engine, proved to be that engine by what each rank holds."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed

from mini_llm import build_model
from mini_llm.data import collate, load_tokenizer, open_stream
from mini_llm.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from tests.conftest import TinyData
from tests.launching import TINY_MODEL, TINY_RUN, facts, launch, metrics, series

ENGINES = ["zero0", "zero1", "zero2", "zero3", "ddp"]
STEPS = 20


@pytest.fixture(scope="module")
def run_of(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory):
    """Engine name -> run folder of 20 steps on 2 ranks with accumulation 2; launched once each."""
    folder = tmp_path_factory.mktemp("engines")

    @cache
    def run(engine: str) -> Path:
        output_dir = folder / engine
        environment = {}
        if engine == "zero1":  # a lock as a killed build leaves it: must not hang the start
            lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"
            lock.parent.mkdir(parents=True)
            lock.touch()
            environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
        launch(
            *(*TINY_RUN, *tiny_data.flags, "--output_dir", str(output_dir)),
            config=engine,
            env=environment,
        )
        return output_dir

    return run


@pytest.fixture(scope="module")
def reference(tiny_data: TinyData) -> dict[str, list[float]]:
    """Losses and gradient norms of a plain PyTorch loop over the same rows, one pass a step."""
    tokenizer = load_tokenizer(tiny_data.tokenizer)
    set_seed(42)
    model = build_model(
        "mini_llama3_tiny",
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **TINY_MODEL,
    )
    optimizer = build_optimizer(
        model, learning_rate=3e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    data = {"tiny": {"path": str(tiny_data.packed), "weight": 1}}
    result: dict[str, list[float]] = {"loss": [], "grad_norm": []}
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
            # Plain cross-entropy over full logits: nothing of the chunked loss is used here.
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
            )
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            result["loss"].append(loss.item())
            result["grad_norm"].append(norm.item())
    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_losses_of_a_plain_single_process_loop(engine, run_of, reference):
    run = run_of(engine)
    assert [m["step"] for m in metrics(run)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(series(run, "train/loss"), reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(series(run, "train/grad_norm"), reference["grad_norm"], rtol=1e-4)
    assert reference["loss"][-1] < reference["loss"][0] - 1  # it trains: 20 equal losses prove less


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
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-5)
