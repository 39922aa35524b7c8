"""Packed rows on the CPU never cost T × T: neither a mask nor scores nor anything else.

The tiny presets with T = 2,048 and a vocabulary of 160: T² is 4.2 M elements, and the largest
legitimate tensor, hidden states times the intermediate size of 352, is 0.17 of that. What kernels
take for themselves does not come by here as a tensor; the allocator tells about it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mini_llm import build_model
from mini_llm.bench.attention import DENSE, position_ids, random_batch
from mini_llm.bench.measure import allocations
from mini_llm.models.common.documents import Documents

T = 2_048
PRESETS = ["mini_llama3_tiny", "mini_deepseekv3_tiny", "mini_qwen3_next_tiny"]


class Largest(TorchDispatchMode):
    """Notes every operator, and the elements of the largest tensor that one returns, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.elements, self.made_by = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.operators.add(name)
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.numel() > self.elements:
                self.elements, self.made_by = x.numel(), f"{name} {tuple(x.shape)}"
        return outputs


def _training_pass(preset: str, implementation: str, bf16: bool) -> Callable[[], None]:
    """A forward and backward pass over a row of ten documents and padding."""
    torch.manual_seed(0)
    model = build_model(preset, vocab_size=160).train()
    model.set_attn_implementation(implementation)
    documents, padding = random_batch(1, T - 40, 10), 40
    row = Documents((*documents.lengths, *[1] * padding))
    tokens = torch.randint(160, (1, T))
    labels = tokens.clone()
    labels[:, -padding:] = -100

    def training_pass() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(input_ids=tokens, position_ids=position_ids(row, 1), labels=labels)
        losses = [out.loss, getattr(out, "mtp_loss", None), getattr(out, "balance_loss", None)]
        sum(loss for loss in losses if loss is not None).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.zero_grad()

    return training_pass


def _watched(training_pass: Callable[[], None]) -> tuple[Largest, int]:
    """What the pass dispatches, and the bytes of the largest block it takes from the allocator."""
    seen = Largest()

    def watched_pass() -> None:
        with seen:
            training_pass()

    return seen, max(allocations(watched_pass))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_packed_row_never_makes_a_tensor_of_t_by_t(preset: str, bf16: bool) -> None:
    seen, largest_block = _watched(_training_pass(preset, "sdpa", bf16))
    assert seen.elements < T * T, seen.made_by
    # Nor does a kernel take that much for itself: a boolean mask is T² bytes.
    assert largest_block < T * T
    # The fused kernel, the grouped experts and the chunked delta rule were watched, both ways.
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in seen.operators
    assert ("_grouped_mm" in seen.operators) == (preset != "mini_llama3_tiny")
    assert ("linalg_solve_triangular" in seen.operators) == (preset == "mini_qwen3_next_tiny")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dense_mask_would_be_seen(preset: str) -> None:
    seen, largest_block = _watched(_training_pass(preset, DENSE, bf16=False))
    assert seen.elements >= T * T
    assert largest_block >= T * T
