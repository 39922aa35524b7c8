"""What ranks send, counted call by call through the real launcher, is what traffic.py computes.

All integers are compared exactly, in every one of three steps and on every rank. Beside them the
kernel's own count of this process's socket bytes shows that no kind of call was missed.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mini_llm.data import load_tokenizer
from mini_llm.models import empty_model, load_model, preset_config
from mini_llm.parallel.traffic import (
    BOOKKEEPING,
    MAX_REUSE_DISTANCE,
    PERSISTENCE_THRESHOLD,
    StepShape,
    Traffic,
    step_traffic,
)
from mini_llm.training.losses import mtp_options
from mini_llm.training.sizes import model_shape
from tests.conftest import TINY_MODELS, TinyConversations, TinyData
from tests.launching import REPOSITORY, SFT_RUN, TINY_RUN, facts, launch_several

ROWS = 16  # of a step, over all ranks and micro-batches
# Odd widths: every group of the optimizer and many a tensor are padded.
MODELS: dict[str, dict[str, Any]] = {
    **TINY_MODELS,
    "mini_llama3_tiny": {
        **TINY_MODELS["mini_llama3_tiny"],
        **{"hidden_size": 63, "num_attention_heads": 3, "num_key_value_heads": 1},
        "intermediate_size": 97,
    },
}
LLAMA, DEEPSEEK, QWEN = MODELS


@dataclass(frozen=True)
class Run:
    """One run, which ends when its first five steps are done."""

    engine: str
    model: str = LLAMA
    micro_batches: int = 1
    bf16: bool = False
    ranks: int = 2
    expert_parallel_size: int = 1
    gradient_checkpointing: bool = False
    even_routing: bool = True  # of spread experts

    def __str__(self) -> str:
        words = [
            self.engine,
            self.model,
            f"{self.ranks}_ranks",
            f"{self.micro_batches}_micro_batches",
        ]
        switches = {
            "bf16": self.bf16,
            f"experts_over_{self.expert_parallel_size}": self.expert_parallel_size > 1,
            "checkpointed": self.gradient_checkpointing,
            "as_routed": not self.even_routing,
        }
        return "-".join([*words, *(name for name, on in switches.items() if on)])

    @property
    def step(self) -> StepShape:
        """What the formula is told."""
        return StepShape(
            engine=self.engine.removesuffix("_offload"),
            world_size=self.ranks,
            micro_batches=self.micro_batches,
            micro_batch_tokens=self.rows * 64,
            bf16=self.bf16,
            expert_parallel_size=self.expert_parallel_size,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    @property
    def rows(self) -> int:
        """Rows of a micro-batch of one rank."""
        return ROWS // self.ranks // self.micro_batches

    def flags(self, data: TinyData, folder: Path) -> list[str]:
        """Of the recipe."""
        return [
            *(*TINY_RUN, *data.flags, "--logging_steps", "100"),
            *("--model", self.model, "--model_overrides", json.dumps(MODELS[self.model])),
            *("--per_device_train_batch_size", str(self.rows), "--bf16", str(self.bf16).lower()),
            *("--gradient_checkpointing", str(self.gradient_checkpointing).lower()),
            *("--expert_parallel_size", str(self.expert_parallel_size)),
            *("--output_dir", str(folder), "--deepspeed", "none"),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """The engine of this run, which shares a launch with others, as Accelerate sets it."""
        engine = {"ACCELERATE_USE_DEEPSPEED": "false"}
        if self.engine != "ddp":
            file = str(REPOSITORY / f"ds_configs/{self.engine}.json")
            engine = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
        return engine | ({"EVEN_ROUTING": "1"} if self.even_routing else {})


DENSE = [
    Run("ddp", micro_batches=2),
    Run("zero0"),
    Run("zero1", micro_batches=2, bf16=True),
    Run("zero2", micro_batches=2),
    Run("zero3", micro_batches=2, bf16=True),
]
SPREAD = [
    Run("zero1", DEEPSEEK, expert_parallel_size=2, micro_batches=2),
    Run("zero2", DEEPSEEK, expert_parallel_size=2, even_routing=False),
    Run("zero3", DEEPSEEK, expert_parallel_size=2, bf16=True, gradient_checkpointing=True),
]


# Every engine, precision and accumulation, and what else changes what is sent.
SLOW = [
    run
    for run in [
        *(
            Run(engine, micro_batches=k, bf16=bf16)
            for engine in ("ddp", "zero0", "zero1", "zero2", "zero3")
            for k in (1, 2)
            for bf16 in (False, True)
            if not (engine == "zero0" and bf16)
        ),
        *(
            Run(engine, DEEPSEEK, expert_parallel_size=2, micro_batches=k, bf16=bf16)
            for engine in ("zero1", "zero2", "zero3")
            for k in (1, 2)
            for bf16 in (False, True)
        ),
        *(Run(engine, DEEPSEEK) for engine in ("ddp", "zero0", "zero1", "zero3")),
        Run("zero3", micro_batches=2, gradient_checkpointing=True),
        Run("zero1", QWEN, expert_parallel_size=2, gradient_checkpointing=True),
        Run("zero3", QWEN, expert_parallel_size=2, micro_batches=2, even_routing=False),
        Run("zero3", QWEN, bf16=True),
        Run("zero2_offload", micro_batches=2),
        Run("zero3_offload", micro_batches=2),
    ]
    if run not in [*DENSE, *SPREAD]
]
FOUR_RANKS = [
    *(
        Run(engine, DEEPSEEK, micro_batches=2, ranks=4, expert_parallel_size=2)
        for engine in ("zero1", "zero2", "zero3")
    ),
    Run("zero3", DEEPSEEK, ranks=4, expert_parallel_size=4, bf16=True, gradient_checkpointing=True),
    Run("zero2", ranks=4, micro_batches=2),
    Run("zero3", ranks=4),
]


@dataclass(frozen=True)
class Counted:
    """What a run's ranks wrote, and what they should have handed to collectives."""

    run: Run
    formula: list[Traffic]
    ranks: list[dict[str, Any]]  # step -> {calls, exchanged, socket_bytes}

    @property
    def steps(self) -> list[list[dict[str, Any]]]:
        """Of each step what each rank counted."""
        return [[rank[step] for rank in self.ranks] for step in self.ranks[0]]


def count(
    runs: list[Run],
    data: TinyData,
    folder: Path,
    ranks: int = 2,
    deepspeed: dict[str, str] | None = None,
) -> dict[Run, Counted]:
    """Do all the runs in one launch; ``deepspeed`` has variables that win over a run's own."""
    folders = {run: folder / str(number) for number, run in enumerate(runs)}
    launch_several(
        [run.flags(data, folders[run]) for run in runs],
        folder / "plan.json",
        processes=ranks,
        env_of_runs=[run.environment | (deepspeed or {}) for run in runs],
        script="counted_traffic.py",
        seconds=1800,
    )
    found = {}
    for run in runs:
        stage = None if run.engine == "ddp" else int(run.engine[4])
        assert facts(folders[run])["zero_stage"] == stage
        files = [folders[run] / f"traffic-{rank}.json" for rank in range(ranks)]
        config = preset_config(
            run.model,
            vocab_size=len(load_tokenizer(data.tokenizer)),
            pad_token_id=0,
            **MODELS[run.model],
        )
        formula = step_traffic(model_shape(empty_model(config)), run.step)
        found[run] = Counted(run, formula, [json.loads(file.read_text()) for file in files])
    return found


def is_bookkeeping(call: dict[str, Any]) -> bool:
    """Whether a call carries neither gradients nor weights nor tokens."""
    integers = call["type"] in ("int64", "uint8")
    scalars = call["kind"] == "all_reduce" and call["elements"] <= 5
    return integers or scalars or call["kind"] == "broadcast"


def counted_bytes(calls: Iterable[dict[str, Any]]) -> Counter[tuple[str, int, int]]:
    """Bytes by kind of collective, size of its group and distance of the ranks in it."""
    total: Counter[tuple[str, int, int]] = Counter()
    for call in calls:
        if call["ranks"] > 1:  # a group of one rank sends nothing
            total[call["kind"], call["ranks"], call["stride"]] += call["bytes"]
    return total


def computed_bytes(formula: Iterable[Traffic]) -> Counter[tuple[str, int, int]]:
    """The same of the formula."""
    total: Counter[tuple[str, int, int]] = Counter()
    for part in formula:
        total[part.kind, part.ranks, part.stride] += part.bytes
    return total


def check_counted_is_computed(counted: Counted) -> None:
    """Byte for byte, training and bookkeeping apart; unevenly routed tokens over all ranks."""
    training = computed_bytes(part for part in counted.formula if part.purpose != BOOKKEEPING)
    bookkeeping = computed_bytes(part for part in counted.formula if part.purpose == BOOKKEEPING)
    if counted.run.engine == "zero3_offload":  # its two norms are fp32, not float64
        bookkeeping["all_reduce", counted.run.ranks, 1] -= 8
    assert bookkeeping.total() < 1000
    for ranks in counted.steps:
        total: Counter[tuple[str, int, int]] = Counter()
        for rank in ranks:
            of_step = counted_bytes(call for call in rank["calls"] if not is_bookkeeping(call))
            total += of_step
            if counted.run.even_routing:
                assert of_step == training
            assert counted_bytes(c for c in rank["calls"] if is_bookkeeping(c)) == bookkeeping
        assert total == Counter({key: value * len(ranks) for key, value in training.items()})


def check_exchanged_tokens(counted: Counted) -> None:
    """What left the ranks is what the run's own counter says and, evenly routed, the formula."""
    run, size = counted.run, counted.run.expert_parallel_size
    layers, top_k = len(counted_shape(run).experts), counted_shape(run).experts_per_token
    hidden = counted_shape(run).experts[0][2]
    for ranks in counted.steps:
        left = [sum(call.get("left", 0) for call in rank["calls"]) for rank in ranks]
        assert left == [rank["exchanged"][1] for rank in ranks]
        if run.even_routing:
            tokens = ROWS * 64
            exchanges = 6 if run.gradient_checkpointing else 4
            width = 2 if run.bf16 else 4
            rows = tokens * top_k * layers * (size - 1) // size
            assert sum(left) == exchanges * rows * hidden * width


@cache
def counted_shape(run: Run) -> Any:
    """Shape of a run's model but for its vocabulary."""
    return model_shape(empty_model(preset_config(run.model, **MODELS[run.model])))


def gloo_bytes(counted: Counted, without: str | None = None) -> list[list[int]]:
    """What gloo sends for the counted calls, of each step and rank: on two ranks, rings of two.

    A reduce-scatter is an all-reduce there; the first rank sends a broadcast; of an all-to-all
    what leaves. ``without`` leaves a kind of call out.
    """
    share = {"all_reduce": 1.0, "reduce_scatter": 1.0, "all_gather": 0.5, "all_to_all": 0.5}
    return [
        [
            sum(
                call.get("left", call["bytes"] * (share | {"broadcast": rank == 0})[call["kind"]])
                for call in of_rank["calls"]
                if call["ranks"] > 1 and call["kind"] != without
            )
            for rank, of_rank in enumerate(ranks)
        ]
        for ranks in counted.steps
    ]


def agrees_with_sockets(counted: Counted, without: str | None = None) -> bool:
    """Whether over the steps each rank's sockets sent what gloo sends for its calls.

    Gloo's headers, acknowledgements of the store and the like are under 3 % and some KiB.
    """
    for rank, of_rank in enumerate(counted.ranks):
        sockets = sum(step["socket_bytes"] for step in of_rank.values())
        calls = sum(ranks[rank] for ranks in gloo_bytes(counted, without))
        if not calls <= sockets <= 1.03 * calls + 8192:
            return False
    return True


@pytest.fixture(scope="module")
def runs(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[Run, Counted]:
    """All the quick runs, in one launch."""
    return count([*DENSE, *SPREAD], tiny_data, tmp_path_factory.mktemp("traffic"))


@pytest.mark.parametrize("run", DENSE, ids=str)
def test_bytes_of_a_step_are_the_formula_s(run: Run, runs: dict[Run, Counted]) -> None:
    check_counted_is_computed(runs[run])


@pytest.mark.parametrize("run", SPREAD, ids=str)
def test_bytes_of_a_step_with_spread_experts_are_the_formula_s(
    run: Run, runs: dict[Run, Counted]
) -> None:
    check_counted_is_computed(runs[run])
    check_exchanged_tokens(runs[run])


def test_no_kind_of_call_is_missed_the_kernel_counts_as_many_bytes(
    runs: dict[Run, Counted],
) -> None:
    for run, counted in runs.items():
        assert agrees_with_sockets(counted), run
        for kind in {part.kind for part in counted.formula if part.purpose != BOOKKEEPING}:
            assert not agrees_with_sockets(counted, without=kind), (run, kind)


@pytest.mark.slow
def test_bytes_of_a_step_are_the_formula_s_in_all_combinations(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    for run, counted in count(SLOW, tiny_data, tmp_path).items():
        print(run)  # shown of the one that fails
        check_counted_is_computed(counted)
        assert agrees_with_sockets(counted)
        if run.expert_parallel_size > 1:
            check_exchanged_tokens(counted)


@pytest.mark.slow
def test_bytes_of_a_step_on_four_ranks_are_the_formula_s(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    for run, counted in count(FOUR_RANKS, tiny_data, tmp_path, ranks=4).items():
        print(run)
        check_counted_is_computed(counted)
        if run.expert_parallel_size > 1:
            check_exchanged_tokens(counted)


@pytest.mark.slow
def test_bytes_do_not_depend_on_how_many_calls_they_come_in(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """A model of a preset's size is gathered in several calls, a tiny one otherwise in one."""
    config = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["stage3_prefetch_bucket_size"] = 50_000
    config["zero_optimization"]["reduce_bucket_size"] = 50_000
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    runs = [
        Run("zero3", DEEPSEEK, micro_batches=2),
        Run("zero3", DEEPSEEK, gradient_checkpointing=True, expert_parallel_size=2),
    ]
    file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json")}
    for run, counted in count(runs, tiny_data, tmp_path, deepspeed=file).items():
        check_counted_is_computed(counted)
        assert agrees_with_sockets(counted)
        for kind in ("all_gather", "reduce_scatter"):
            calls = [c for c in counted.steps[0][0]["calls"] if c["kind"] == kind]
            large = [c for c in calls if c["elements"] > PERSISTENCE_THRESHOLD]
            assert len(large) >= 4 * run.micro_batches


@pytest.mark.slow
def test_frozen_layers_send_nothing_but_their_small_tensors_under_zero3(
    tiny_conversations: TinyConversations, tmp_path: Path
) -> None:
    engines = ["zero2", "zero3"]
    launch_several(
        [
            [
                *(*SFT_RUN, *tiny_conversations.flags(DEEPSEEK), "--logging_steps", "100"),
                *("--mtp_loss_weight", "0", "--output_dir", str(tmp_path / engine)),
            ]
            for engine in engines
        ],
        tmp_path / "plan.json",
        recipe="sft",
        env_of_runs=[Run(engine).environment for engine in engines],
        script="counted_traffic.py",
    )
    model = load_model(tiny_conversations.models[DEEPSEEK])
    mtp_options(model, weight=0)
    shape = model_shape(model)
    assert any(n <= PERSISTENCE_THRESHOLD for n in shape.frozen)
    for engine in engines:
        run = Run(engine, DEEPSEEK, micro_batches=2)
        files = [tmp_path / engine / f"traffic-{rank}.json" for rank in range(2)]
        ranks = [json.loads(file.read_text()) for file in files]
        check_counted_is_computed(Counted(run, step_traffic(shape, run.step), ranks))


def test_constants_are_those_of_the_deepspeed_config() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text())["zero_optimization"]
    assert config["stage3_param_persistence_threshold"] == PERSISTENCE_THRESHOLD
    engine = DeepSpeedZeroConfig(**config)
    assert engine.max_reuse_distance == engine.max_live_parameters == MAX_REUSE_DISTANCE
