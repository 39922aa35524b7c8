"""The chunked LM-head loss against the readable reference."""

import pytest
import torch

from mini_llm.bench.measure import peak_memory
from mini_llm.bench.operators import Operators
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


@pytest.mark.parametrize("chunk_elements", [1, 97 * 130, 1 << 23])
@pytest.mark.parametrize(
    ("supervised", "promised"), [(0, 0), (1, 1), (90, 90), (90, 150), (200, 200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaving_out_what_is_not_supervised_changes_neither_loss_nor_gradients(
    dtype, supervised, promised, chunk_elements, monkeypatch
):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    results = []
    for num_targets in (promised, None):
        hidden, weight, _ = _inputs(dtype)
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(0, 97, (200,), generator=generator)
        targets[torch.randperm(200, generator=generator)[supervised:]] = -100
        loss = linear_cross_entropy(hidden, weight, targets, num_targets)
        (loss * 0.5).backward()
        results.append((loss, hidden.grad, weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_logits_are_computed_of_supervised_positions_only_if_their_number_is_known(monkeypatch):
    computed = []
    by_operator = loss_module._loss_and_gradient_in_place

    def counting(logits, *rest):
        computed.append(len(logits))
        return by_operator(logits, *rest)

    monkeypatch.setattr(loss_module, "_loss_and_gradient_in_place", counting)
    hidden, weight, targets = _inputs(torch.float32, tokens=2000)
    targets[:1500] = -100
    supervised = int((targets != -100).sum())
    assert supervised == 429
    for num_targets, expected in [(None, 2000), (supervised, 448), (2000, 2000), (1990, 2000)]:
        computed.clear()
        linear_cross_entropy(hidden, weight, targets, num_targets)
        assert sum(computed) == expected, num_targets


def test_a_loss_is_not_a_number_if_more_is_supervised_than_was_promised():
    hidden, weight, targets = _inputs(torch.float32)  # 171 are supervised
    assert linear_cross_entropy(hidden, weight, targets, 100).isnan()
    assert linear_cross_entropy(hidden, weight, targets, 171).isfinite()


def test_evaluation_computes_no_gradient():
    hidden, weight, targets = _inputs(torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets)
    assert expected.requires_grad
    for without in (torch.no_grad(), torch.inference_mode()):
        with without, Operators() as counted:
            loss = linear_cross_entropy(hidden, weight, targets)
        assert torch.equal(loss, expected)
        products = counted.operators["mm"] + counted.operators["linear"]
        assert products == 1  # the logits of the only chunk
        assert not counted.operators.keys() & {"addmm_", "scatter_add_"}


@pytest.mark.parametrize(
    ("rows", "at_most", "chunk"),
    [
        (65_536, 4_193, 4_096),
        (2_048, 262, 256),
        (2_048, 4_193, 2_048),
        (1, 64, 64),
        (0, 64, 64),
        (4_200, 4_193, 2_112),
    ],
)
def test_chunks_are_as_few_as_can_be_and_alike(rows, at_most, chunk):
    assert loss_module._even_chunk(rows, at_most=at_most) == chunk


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


def test_without_a_compiler_the_loss_of_a_gpu_is_computed_as_it_is_written(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    for missing, count in (("a C compiler", 0), (None, 1)):
        loss_module._loss_and_gradient_on_gpu.cache_clear()
        monkeypatch.setattr(loss_module, "missing_for_triton", lambda missing=missing: missing)
        assert loss_module._loss_and_gradient_on_gpu() is loss_module._loss_and_gradient
        assert len(compiled) == count
    loss_module._loss_and_gradient_on_gpu.cache_clear()
