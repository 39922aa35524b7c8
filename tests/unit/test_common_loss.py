"""The chunked LM-head loss against the readable reference."""

import pytest
import torch

from mini_llm.bench.measure import peak_memory
from mini_llm.models.common import loss as loss_module
from mini_llm.models.common.loss import linear_cross_entropy, linear_cross_entropy_reference


def _inputs(dtype: torch.dtype, tokens: int = 200, vocabulary: int = 97):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 16, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::7] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_elements", [1, 97 * 64, 97 * 130, 1 << 23])
def test_chunked_loss_and_gradients_equal_full_fp32_logits(chunk_elements, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight, targets = _inputs(torch.float32)
        loss = function(hidden, weight, targets)
        (loss * 0.5).backward()
        results.append((loss, hidden.grad, weight.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_give_an_fp32_loss_and_close_gradients():
    hidden, weight, targets = _inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    exact_hidden, exact_weight, _ = _inputs(torch.bfloat16)
    exact = linear_cross_entropy_reference(exact_hidden, exact_weight, targets)
    exact.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(hidden.grad, exact_hidden.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad, exact_weight.grad, rtol=2e-2, atol=2e-2)


def test_all_targets_ignored_gives_zero_loss_and_zero_gradient():
    hidden, weight, targets = _inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("rows", [1, 64, 1 << 12])
def test_bf16_weight_gradient_does_not_depend_on_how_many_rows_are_added_at_once(rows, monkeypatch):
    gradients = []
    for added in (rows, 97):
        monkeypatch.setattr(loss_module, "_CACHED_ROWS", added)
        hidden, weight, targets = _inputs(torch.bfloat16)
        linear_cross_entropy(hidden, weight, targets).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


def test_second_backward_pass_is_refused_instead_of_giving_other_gradients():
    loss = linear_cross_entropy(*_inputs(torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_within_1e_5_of_fp32_arithmetic_on_the_same_inputs(dtype):
    hidden, weight, targets = (x.detach() for x in _inputs(dtype, tokens=500, vocabulary=997))
    exact = linear_cross_entropy_reference(hidden.float(), weight.float(), targets)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_stays_below_a_quarter_of_full_logits(dtype):
    tokens, vocabulary, size = 2048, 32_004, 256

    def peak(function) -> int:
        hidden = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
        weight = torch.randn(vocabulary, size, dtype=dtype, requires_grad=True)
        targets = torch.randint(0, vocabulary, (tokens,))
        return peak_memory(lambda: function(hidden, weight, targets).backward())

    full = peak(linear_cross_entropy_reference)
    assert full > 2 * tokens * vocabulary * 4  # logits and their gradient: the meter works
    assert peak(linear_cross_entropy) <= 0.25 * full
