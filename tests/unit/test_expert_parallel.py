"""Spreading experts: what is refused, and which expert lands where. Training: tests/distributed."""

import pytest
import torch

from mini_llm import build_model
from mini_llm.parallel.expert_parallel import (
    check_expert_parallel,
    describe_groups,
    expert_groups,
    expert_parallel_size,
    expert_shapes,
    find_experts,
    spread_experts,
)
from mini_llm.training.arguments import PretrainArguments, check_arguments, parse_arguments
from mini_llm.training.balancing import ExpertLoad

MODELS = ["mini_deepseekv3_tiny", "mini_qwen3_next_tiny"]


def arguments(*flags: str) -> PretrainArguments:
    return parse_arguments(PretrainArguments, "recipes/configs/quickstart/pretrain.yaml", [*flags])


@pytest.mark.parametrize(
    ("flags", "ranks", "named"),
    [
        (["--expert_parallel_size", "2"], 3, "does not divide the 3 rank"),
        (["--expert_parallel_size", "2"], 1, "start more ranks"),
        (["--expert_parallel_size", "0"], 2, "--expert_parallel_size 0"),
        (["--expert_parallel_size", "2", "--torch_compile"], 2, "--torch_compile true"),
    ],
)
def test_sizes_and_compiling_that_do_not_fit_are_refused_before_the_engine(flags, ranks, named):
    with pytest.raises(ValueError, match=named):
        check_arguments(arguments(*flags), world_size=ranks)


@pytest.mark.parametrize(
    ("stage", "offloads", "named"),
    [(0, False, "ZeRO-1, 2 or 3"), (None, False, "zero1.yaml"), (2, True, "offload")],
)
def test_engines_that_cannot_train_spread_experts_are_refused(stage, offloads, named):
    with pytest.raises(ValueError, match=f"--expert_parallel_size 2.*{named}"):
        check_expert_parallel(2, zero_stage=stage, offloads=offloads)
    check_expert_parallel(1, zero_stage=stage, offloads=offloads)  # nothing to refuse


def test_a_dense_model_and_experts_that_cannot_be_divided_are_refused():
    dense = build_model("mini_llama3_tiny", vocab_size=64)
    with pytest.raises(ValueError, match="the model has no experts"):
        spread_experts(dense, 2, rank=0)
    model = build_model("mini_qwen3_next_tiny", vocab_size=64)
    with pytest.raises(ValueError, match="does not divide the 8 experts"):
        spread_experts(model, 3, rank=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_of_a_group_hold_every_expert_once_and_nothing_else_changes(name):
    torch.manual_seed(0)
    whole = build_model(name, vocab_size=64)
    experts = {n: m.gate_up_proj.detach().clone() for n, m in find_experts(whole).items()}
    others = {n: p for n, p in whole.named_parameters() if ".experts." not in n}
    shapes = expert_shapes(whole)
    parts = []
    for rank in range(4):  # two groups of two
        torch.manual_seed(0)
        model = build_model(name, vocab_size=64)
        spread_experts(model, 2, rank)
        assert expert_parallel_size(model) == 2
        assert expert_shapes(model) == shapes
        own = dict(model.named_parameters())
        assert {n for n in own if ".experts." not in n} == others.keys()
        assert all(torch.equal(own[n], others[n]) for n in others)
        parts.append(own)
    for module, gate_up in experts.items():
        for group in ([0, 1], [2, 3]):
            gate = torch.cat([parts[rank][f"{module}.experts.w1"] for rank in group])
            up = torch.cat([parts[rank][f"{module}.experts.w3"] for rank in group])
            assert torch.equal(torch.cat([gate, up], 1), gate_up)


def test_groups_are_neighbours_and_the_banner_says_who_holds_the_same_experts():
    assert expert_groups(2, 4) == [[0, 1], [2, 3]]
    assert describe_groups(2, 4) == (
        "spread over 2 ranks: groups [0, 1], [2, 3]; the same experts on ranks [0, 2], [1, 3]"
    )


def test_load_per_rank_is_that_of_the_experts_it_holds():
    load = ExpertLoad((1,), torch.tensor([[6, 2, 1, 3]]))
    found = load.metrics(expert_parallel_size=2)
    assert found["moe/layer_1/expert_load"] == [6, 2, 1, 3]
    assert found["moe/layer_1/rank_load"] == [8, 4]
    assert found["moe/layer_1/rank_load_max_over_mean"] == 8 / 6
    assert "moe/layer_1/rank_load_max_over_mean" not in load.metrics()
