"""Grouped experts against the loop over experts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config

from mini_llm.models.common.experts import Experts, count_expert_load, real_tokens

E, D, F, K, N = 6, 16, 8, 2, 40


def _experts(implementation: str | None = None, dtype: torch.dtype = torch.float32) -> Experts:
    config = DeepseekV3Config(hidden_size=D, moe_intermediate_size=F)
    config._experts_implementation = implementation
    experts = Experts(config, num_experts=E, intermediate_size=F)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return experts.to(dtype)


def _inputs(dtype: torch.dtype = torch.float32, experts: int = E):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(N, experts, generator=generator).topk(K).indices
    weights = torch.rand(N, K, generator=generator).requires_grad_()
    return hidden, index, weights


def _run(
    implementation: str | None, dtype: torch.dtype, used_experts: int = E
) -> list[torch.Tensor]:
    experts = _experts(implementation, dtype)
    hidden, index, weights = _inputs(dtype, used_experts)
    out = experts(hidden, index, weights)
    out.square().sum().backward()
    gradients = [experts.gate_up_proj.grad, experts.down_proj.grad, hidden.grad, weights.grad]
    return [out.detach(), *gradients]


@pytest.mark.parametrize("used_experts", [E, 3, K], ids=lambda n: f"{n} of {E} experts get tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", [None, "grouped_mm", "batched_mm"])
def test_output_and_gradients_equal_the_loop_over_experts(implementation, dtype, used_experts):
    # fp32 sums in another order; bf16 rounds each of ~40 products to 8 bits.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    ours = _run(implementation, dtype, used_experts)
    for value, reference in zip(ours, _run("eager", dtype, used_experts), strict=True):
        assert value.dtype == reference.dtype
        assert (value - reference).abs().max() <= tolerance * reference.abs().max()


def test_the_reference_is_a_weighted_sum_of_swiglu_blocks():
    experts = _experts("eager")
    hidden, index, weights = _inputs()
    out = experts(hidden, index, weights)
    for n in (0, 17):
        expected = torch.zeros(D)
        for k in range(K):
            gate, up = (experts.gate_up_proj[index[n, k]] @ hidden[n]).split(F)
            swiglu = torch.nn.functional.silu(gate) * up
            expected = expected + weights[n, k] * (experts.down_proj[index[n, k]] @ swiglu)
        torch.testing.assert_close(out[n], expected)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    experts = _experts()
    hidden, index, weights = _inputs(experts=3)
    experts(hidden, index, weights).sum().backward()
    for gradient in (experts.gate_up_proj.grad, experts.down_proj.grad):
        assert gradient is not None
        assert gradient[3:].abs().max() == 0
        assert all(gradient[e].abs().max() > 0 for e in range(3))


class _Operators(TorchDispatchMode):
    """The aten operators that run, with the dtypes of their tensor arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dtypes = [a.dtype for a in args if isinstance(a, torch.Tensor)]
        self.calls.append((func.name(), dtypes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", [None, "eager", "grouped_mm", "batched_mm"])
def test_autocast_multiplies_experts_in_bf16_and_returns_the_input_dtype(implementation):
    experts = _experts(implementation)
    hidden, index, weights = _inputs()
    with _Operators() as seen, torch.autocast("cpu", torch.bfloat16):
        out = experts(hidden, index, weights)
        out.sum().backward()
    assert out.dtype == torch.float32
    products = [
        dtypes
        for name, dtypes in seen.calls
        if name in ("aten::_grouped_mm", "aten::mm", "aten::bmm", "aten::addmm")
    ]
    assert len(products) >= 6
    for dtypes in products:
        assert all(dtype == torch.bfloat16 for dtype in dtypes if dtype.is_floating_point)
    assert experts.gate_up_proj.grad.dtype == torch.float32


def test_grouped_experts_never_ask_the_device_and_cost_the_same_for_any_number_of_experts():
    experts = _experts()
    hidden, index, weights = _inputs()
    with _Operators() as seen:
        experts(hidden, index, weights).sum().backward()
    names = [name for name, _ in seen.calls]
    for synchronising in ("_local_scalar_dense", "nonzero", "bincount", "repeat_interleave"):
        assert not [name for name in names if synchronising in name]
    for name, dtypes in seen.calls:
        assert not ("index" in name and torch.bool in dtypes), name
    assert names.count("aten::_grouped_mm") == 6  # two products forward, two times two backward
    assert len(names) < 60


def test_sizes_that_the_kernel_cannot_take_are_refused_by_name():
    config = DeepseekV3Config(hidden_size=12)
    with pytest.raises(ValueError, match="hidden_size 12 and moe_intermediate_size 8"):
        Experts(config, num_experts=2, intermediate_size=8)


def test_load_counts_real_tokens_only_and_adds_up_over_forwards():
    routers = [torch.nn.Module() for _ in range(2)]
    for router in routers:
        router.tokens_per_expert = None
    indices = [torch.tensor([[0, 1], [0, 2], [3, 0], [3, 1]]), torch.tensor([[4, 5]] * 4)]
    real = torch.tensor([[True, True], [True, False]])
    count_expert_load(routers, indices, real, E)
    assert routers[0].tokens_per_expert.tolist() == [3, 1, 1, 1, 0, 0]
    assert routers[1].tokens_per_expert.tolist() == [0, 0, 0, 0, 3, 3]
    count_expert_load(routers, indices, None, E)
    assert routers[0].tokens_per_expert.tolist() == [6, 3, 2, 3, 0, 0]


def test_padding_is_the_masked_tokens_or_the_zero_positions_that_end_a_packed_row():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    expected = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
    assert torch.equal(real_tokens(None, positions, 2), expected)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(real_tokens(mask, None, 2), mask.bool())
    assert real_tokens(None, None, 2) is None
