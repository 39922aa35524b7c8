"""One result, any engine: losses, gradient norms and expert loads of a plain loop.

Every run goes through ``accelerate launch`` and the recipe, and proves by its run.json that it was
the engine that it should be. All runs of an engine share a launch (see several_runs.py).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file

from mini_llm import build_model
from mini_llm.data import collate, load_tokenizer, open_stream
from mini_llm.training.balancing import take_expert_load, update_expert_bias
from mini_llm.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from mini_llm.training.sizes import GIB, ParameterCounts, memory_per_rank
from tests.conftest import TinyData
from tests.launching import TINY_MODEL, TINY_RUN, facts, launch_several, metrics, series

STEPS = 20
ROWS = 16  # of a step, over all ranks and micro-batches
ENGINES = ["single", "ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
MODELS: dict[str, dict[str, Any]] = {
    "mini_llama3_tiny": TINY_MODEL,
    "mini_deepseekv3_tiny": {"num_hidden_layers": 2},
    "mini_qwen3_next_tiny": {},
}
LLAMA, DEEPSEEK, QWEN = MODELS
MODEL_CLASSES = {LLAMA: "Llama3", DEEPSEEK: "DeepseekV3", QWEN: "Qwen3Next"}
ACCUMULATION = [1, 4]


@dataclass(frozen=True)
class Run:
    """One run of 20 steps: under which engine, how a step is cut, what else is switched on."""

    engine: str
    model: str
    accumulation: int = 4
    gradient_checkpointing: bool = False
    bf16: bool = False
    torch_compile: bool = False
    interrupted_at: int | None = None  # left after this step, then started again

    def __str__(self) -> str:
        switches = {
            "checkpointed": self.gradient_checkpointing,
            "bf16": self.bf16,
            "compiled": self.torch_compile,
            f"interrupted_at_{self.interrupted_at}": self.interrupted_at is not None,
        }
        words = [self.engine, self.model, f"accumulation_{self.accumulation}"]
        return "-".join([*words, *(name for name, on in switches.items() if on)])

    @property
    def ranks(self) -> int:
        """Processes of the launch."""
        return 1 if self.engine == "single" else 2

    @property
    def zero_stage(self) -> int | None:
        """None without DeepSpeed."""
        return int(self.engine[4]) if self.engine.startswith("zero") else None


def pairwise() -> list[Run]:
    """24 of the 96 combinations, in which every two values of two dimensions meet."""
    runs = []
    for i, engine in enumerate(ENGINES):
        for j, model in enumerate(MODELS):
            accumulation = ACCUMULATION[(i + j) % 2]
            runs.append(Run(engine, model, accumulation, (i // 2 + j // 2) % 2 == 1))
    return runs


PAIRWISE = pairwise()
OTHERS = [
    run
    for run in itertools.starmap(
        Run, itertools.product(ENGINES, MODELS, ACCUMULATION, (False, True))
    )
    if run not in PAIRWISE
]
# ZeRO-0 refuses bf16, see test_engine_bugs.py.
BF16_ENGINES = [engine for engine in ENGINES if engine != "zero0"]
BF16 = [Run(engine, LLAMA, bf16=True) for engine in ("single", "zero1", "zero2", "zero3")]
BF16_OTHERS = [
    Run(engine, model, accumulation=1, bf16=True) for engine in BF16_ENGINES for model in MODELS
]
# Against fp32, relative: the largest difference of all steps, and the median. Measured over all
# engines and models: losses 1.7e-3 and 4.6e-4, norms 6.3e-2 (at a step where it jumps, the next is
# 2.9e-2) and 6.4e-3. One process rounds no weights, DeepSpeed keeps them in bf16.
BF16_TOLERANCE = {"train/loss": (3e-3, 1e-3), "train/grad_norm": (1e-1, 1.5e-2)}
COMPILED = [Run("zero2", m, accumulation=1, torch_compile=True) for m in (LLAMA, QWEN)]


def twin(pool: list[Run], engine: str, step: int) -> Run:
    """The pool's first run of the expert model under ``engine``, interrupted at ``step``."""
    whole = next(run for run in pool if run.engine == engine and run.model == DEEPSEEK)
    return replace(whole, interrupted_at=step)


INTERRUPTED = [twin(PAIRWISE, "zero1", 10)]
INTERRUPTED_OTHERS = [
    twin(OTHERS, engine, step)
    for engine, step in {
        **{"zero0": 1, "zero2": 7, "zero3": 19},
        **{"zero2_offload": 13, "zero3_offload": 4, "ddp": 16, "single": 9},
    }.items()
]
# A CPU has nowhere to offload to: here these engines are ZeRO-2 and 3 by other code, and slower.
OFFLOADED = [run for run in PAIRWISE if run.engine.endswith("_offload")]
NOT_OFFLOADED = [run for run in PAIRWISE if run not in OFFLOADED]
QUICK = [*NOT_OFFLOADED, *BF16, *INTERRUPTED]
SLOW = [*OFFLOADED, *OTHERS, *BF16_OTHERS, *INTERRUPTED_OTHERS, *COMPILED]


def quick_and_slow(quick: list[Run], slow: list[Run]) -> Any:
    """Parametrise a test with runs; the slow ones carry the mark."""
    params = [pytest.param(run, id=str(run)) for run in quick]
    params += [pytest.param(run, id=str(run), marks=pytest.mark.slow) for run in slow]
    return pytest.mark.parametrize("run", params)


def flags_of(run: Run, data: TinyData, output_dir: Path) -> list[str]:
    """The recipe's flags."""
    per_device = ROWS // run.ranks // run.accumulation
    return [
        *(*TINY_RUN, *data.flags, "--output_dir", str(output_dir), "--model", run.model),
        *("--model_overrides", json.dumps(MODELS[run.model])),
        *("--per_device_train_batch_size", str(per_device), "--bf16", str(run.bf16)),
        *("--gradient_checkpointing", str(run.gradient_checkpointing)),
        *("--torch_compile", str(run.torch_compile)),
        *(("--deepspeed", "none") if run.engine == "single" else ()),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's runs go."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def folder_of(tiny_data: TinyData, folder: Path) -> Callable[[Run], Path]:
    """run -> its folder; launches all runs of its engine in QUICK or in SLOW, once."""

    @cache
    def launch_all(engine: str, slow: bool) -> None:
        flags: list[list[str]] = []
        for run in SLOW if slow else QUICK:
            if run.engine == engine:
                whole = flags_of(run, tiny_data, folder / str(run))
                if run.interrupted_at is not None:
                    flags.append([*whole, "--stop_at_step", str(run.interrupted_at)])
                flags.append(whole)
        environment = {}
        if engine == "zero1" and not slow:
            # A lock as a killed build leaves it: must not hang the start.
            lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"
            lock.parent.mkdir(parents=True)
            lock.touch()
            environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
        plan = folder / f"{engine}-{slow}.json"
        ranks = 1 if engine == "single" else 2
        launch_several(flags, plan, config=engine, processes=ranks, env=environment)

    def of(run: Run) -> Path:
        launch_all(run.engine, run in SLOW)
        return folder / str(run)

    return of


@pytest.fixture(scope="module")
def reference_of(tiny_data: TinyData) -> Iterator[Callable[[str], dict[str, list[float]]]]:
    """model -> losses and gradient norms of a plain PyTorch loop over the same rows."""
    # One thread, as the launched ranks have: with more, sums round differently and a near-tie of a
    # router may send a token elsewhere.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cache(lambda model: plain_loop(tiny_data, model))
    torch.set_num_threads(threads)


def plain_loop(tiny_data: TinyData, name: str) -> dict[str, list[float]]:
    """One process, one pass a step, no engine, nothing of the chunked loss or the fused AdamW."""
    tokenizer = load_tokenizer(tiny_data.tokenizer)
    set_seed(42)
    model = build_model(
        name,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **MODELS[name],
    )
    optimizer = build_optimizer(
        model, learning_rate=3e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-4
    )
    for group in optimizer.param_groups:
        group["fused"] = None  # the update as single operations
    data = {"tiny": {"path": str(tiny_data.packed), "weight": 1}}
    result: dict[str, list[float]] = {}
    model.train()
    with open_stream(data, seq_len=64, seed=42, rows_per_step=ROWS) as stream:
        for step in range(1, STEPS + 1):
            batch = collate([next(stream) for _ in range(ROWS)])
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


def assert_close(run: Path, reference: dict[str, list[float]], rtol: float) -> None:
    """Every metric of the reference, step by step."""
    for key, expected in reference.items():
        ours = [math.nan if value is None else value for value in series(run, key)]
        np.testing.assert_allclose(ours, expected, rtol=rtol, err_msg=key)


def assert_near_in_bf16(run: Path, reference: Mapping[str, list[float]]) -> None:
    """Losses and norms are those of fp32 but for the rounding, which fp32 itself does not have."""
    for key, (largest, median) in BF16_TOLERANCE.items():
        found, expected = np.array(series(run, key)), np.array(reference[key])
        differences = np.abs(found / expected - 1)
        assert differences.max() <= largest, f"{key}: {differences}"
        assert 1e-6 < np.median(differences) <= median, f"{key}: {differences}"


def assert_is_the_engine(run: Run, folder: Path) -> None:
    """run.json says so, from the objects that trained."""
    found = facts(folder)
    assert found["world_size"] == run.ranks
    assert found["zero_stage"] == run.zero_stage
    assert found["gradient_accumulation_steps"] == run.accumulation
    assert found["kernels"]["optimizer"] == "AdamW (fused)"
    offloaded = "cpu" if run.engine.endswith("_offload") else None
    assert found["offload"] == {
        "optimizer": offloaded,
        "parameters": offloaded if run.zero_stage == 3 else None,
    }
    kind, wrapper = {
        "single": ("NO", f"Mini{MODEL_CLASSES[run.model]}ForCausalLM"),
        "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    }.get(run.engine, ("DEEPSPEED", "DeepSpeedEngine"))
    assert (found["distributed_type"], found["wrapper"]) == (kind, wrapper)


def test_the_quick_runs_let_every_two_values_of_two_dimensions_meet():
    rows = [(r.engine, r.model, r.accumulation, r.gradient_checkpointing) for r in PAIRWISE]
    dimensions = [ENGINES, list(MODELS), ACCUMULATION, [False, True]]
    for i, j in itertools.combinations(range(4), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(dimensions[i], dimensions[j]))
    assert len(PAIRWISE) == 24 and len(OTHERS) == 72


@quick_and_slow(NOT_OFFLOADED, [*OFFLOADED, *OTHERS, *COMPILED])
def test_losses_norms_and_expert_loads_are_those_of_a_plain_loop(run, folder_of, reference_of):
    folder, reference = folder_of(run), reference_of(run.model)
    assert_is_the_engine(run, folder)
    assert [m["step"] for m in metrics(folder)] == list(range(1, STEPS + 1))
    # moe/… are counts of tokens: within 1e-5 they are equal, the routers chose the same experts.
    assert_close(folder, reference, rtol=1e-5)
    # The reference computes what it should, and it trains: twenty equal losses would prove less.
    assert ("train/balance_loss" in reference) == ("moe/dead_experts" in reference)
    assert ("train/mtp_loss" in reference) == (run.model == DEEPSEEK)
    assert reference["train/loss"][-1] < reference["train/loss"][0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_changes_no_bit_of_losses_and_norms(engine, folder_of):
    pairs = [
        (run, replace(run, gradient_checkpointing=True))
        for run in OTHERS
        if run.engine == engine and not run.gradient_checkpointing
    ]
    pairs = [(plain, checkpointed) for plain, checkpointed in pairs if checkpointed in OTHERS]
    assert pairs
    for plain, checkpointed in pairs:
        for key in ("train/loss", "train/grad_norm"):
            found = series(folder_of(checkpointed), key)
            assert found == series(folder_of(plain), key), f"{checkpointed}: {key}"


@quick_and_slow(BF16, BF16_OTHERS)
def test_bf16_stays_near_the_losses_of_fp32(run, folder_of, reference_of):
    folder, reference = folder_of(run), reference_of(run.model)
    assert_is_the_engine(run, folder)
    assert_near_in_bf16(folder, reference)
    held = facts(folder)["bytes_per_rank"]
    # A bf16 weight, and the optimizer's fp32 one with two moments on half of the ranks; without
    # DeepSpeed the weights themselves are fp32, with two moments.
    expected = {None: 8 / 4, 1: 6 / 2, 2: 6 / 2, 3: 6 / 1}[run.zero_stage]
    assert held["optimizer_state"][0] / held["parameters"][0] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=pytest.mark.slow) if engine.endswith("_offload") else engine
        for engine in ENGINES
    ],
)
def test_run_json_shows_the_engine_by_the_bytes_that_each_rank_holds(engine, folder_of):
    # A model without large tensors: ZeRO-2 holds a gradient that a partition boundary cuts whole.
    run, undivided = (
        next(run for run in PAIRWISE if run.engine == name and run.model == LLAMA)
        for name in (engine, "ddp")
    )
    whole = facts(folder_of(undivided))["bytes_per_rank"]  # measured where nothing is split
    held = facts(folder_of(run))["bytes_per_rank"]
    share = {kind: np.array(held[kind]) / whole[kind][0] for kind in whole}
    expected = {
        "parameters": 0.5 if run.zero_stage == 3 else 1.0,
        # Accumulating over micro-batches, as here, ZeRO-1 holds whole gradients; ZeRO-2 its share.
        "gradients": 0.5 if run.zero_stage in (2, 3) else 1.0,
        # The whole is two moments; ZeRO-1 to 3 hold half of these and of a copy of the weights.
        "optimizer_state": 0.75 if run.zero_stage else 1.0,
    }
    assert run.accumulation == 4 or engine != "zero1"
    for kind, share_of_each_rank in share.items():
        # DeepSpeed pads partitions, and ZeRO-3 keeps norm weights whole on every rank.
        np.testing.assert_allclose(share_of_each_rank, expected[kind], atol=0.06, err_msg=kind)


@pytest.mark.parametrize(
    "run",
    [r for r in [*PAIRWISE, *BF16] if r.model == LLAMA and not r.engine.endswith("_offload")],
    ids=str,
)
def test_every_rank_holds_the_bytes_that_a_dry_run_estimates(run, folder_of):
    weights = load_file(folder_of(run) / "final" / "model.safetensors")
    total = sum(weight.numel() for weight in weights.values())
    counts = ParameterCounts(total, active=total, mtp=0, experts=0, idle_experts=0)
    estimates = memory_per_rank(counts, world_size=run.ranks, bf16=run.bf16)
    held = facts(folder_of(run))["bytes_per_rank"]
    for of_one_rank in zip(*held.values(), strict=True):
        # Beyond the estimate: a gradient that ZeRO-2 holds uncut, norm weights that ZeRO-3 does.
        estimate = estimates[f"zero{run.zero_stage or 0}"]
        assert sum(of_one_rank) / GIB == pytest.approx(estimate, rel=0.02)


def test_a_stale_deepspeed_build_lock_is_removed_at_the_start(folder_of, folder):
    folder_of(INTERRUPTED[0])
    extensions = folder / "extensions"
    assert extensions.is_dir() and not list(extensions.rglob("lock"))


@quick_and_slow(INTERRUPTED, INTERRUPTED_OTHERS)
def test_an_interrupted_run_is_bitwise_the_uninterrupted_one(run, folder_of):
    resumed, whole = folder_of(run), folder_of(replace(run, interrupted_at=None))
    assert f"step-{run.interrupted_at}" in [
        path.name for path in (resumed / "checkpoints").iterdir()
    ]
    assert [m["step"] for m in metrics(resumed)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(metrics(resumed), metrics(whole), strict=True):
        assert {k: v for k, v in ours.items() if not k.startswith("perf/")} == {
            k: v for k, v in theirs.items() if not k.startswith("perf/")
        }
    weights = load_file(resumed / "final" / "model.safetensors")
    expected = load_file(whole / "final" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    biases = [weights[name] for name in weights if name.endswith("e_score_correction_bias")]
    assert biases and all(bias.any() for bias in biases)


def test_zero3_saves_the_same_whole_model_as_zero1(folder_of):
    split, whole = (
        load_file(folder_of(run) / "final" / "model.safetensors")
        for engine in ("zero3", "zero1")
        for run in PAIRWISE
        if run.engine == engine and run.model == LLAMA
    )
    assert split.keys() == whole.keys()
    for name in whole:
        # As whole matrices: where a gradient is nearly 0, AdamW's division makes one element's
        # rounding 1e-5 large.
        error = (split[name].double() - whole[name].double()).norm() / whole[name].double().norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
