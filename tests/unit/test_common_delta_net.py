"""The gated delta rule and its convolution: every form against the token-by-token one."""

import sys

import pytest
import torch

from mini_llm.models import check_model
from mini_llm.models.common import delta_net
from mini_llm.models.common.delta_net import (
    Boundaries,
    Kernels,
    convolution_reference,
    delta_rule,
    delta_rule_chunked,
    delta_rule_reference,
    short_convolution,
    why_fla_is_wrong,
)
from mini_llm.models.common.documents import document_ids, find_documents

B, K, H, k, v = 2, 2, 4, 8, 6
LENGTHS = [17, 1, 1, 30, *[1] * 70, 21, 10]  # crossing chunks, inside them, and a padding tail
T = sum(LENGTHS)


def _inputs(tokens: int = T, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v, log-decay from almost none to a factor e⁻²⁰ a token, β; leaves with gradients."""
    torch.manual_seed(0)
    rates = torch.tensor([0.01, 1.0, 5.0, 20.0])
    tensors = [
        torch.randn(B, tokens, K, k),
        torch.randn(B, tokens, K, k),
        torch.randn(B, tokens, H, v),
        -torch.rand(B, tokens, H) * rates,
        torch.rand(B, tokens, H),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def _boundaries(lengths: list[int], rows: int = B) -> Boundaries:
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    documents = find_documents(positions, rows)
    assert documents is not None
    cu_seq_lens = documents.cu_seq_lens(torch.device("cpu"))
    return Boundaries(document_ids(cu_seq_lens, *positions.shape), cu_seq_lens)


def _assert_same_gradients(a: torch.Tensor, b: torch.Tensor, leaves, tolerance: float) -> None:
    weights = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        torch.autograd.grad((a * weights).sum(), leaves),
        torch.autograd.grad((b * weights).sum(), leaves),
        strict=True,
    )
    for x, y in pairs:
        assert (x - y).abs().max() <= tolerance * x.abs().max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 64, T])
def test_the_chunked_rule_equals_the_token_by_token_rule_with_its_gradients(tokens, packed):
    inputs = _inputs(tokens)
    ids = _boundaries(LENGTHS).document_ids[:, :tokens] if packed else None
    start = torch.randn(B, H, k, v, dtype=torch.float64, requires_grad=True)
    output, state = delta_rule_reference(*inputs, start, ids)
    chunked, chunked_state = delta_rule_chunked(*inputs, start, ids)
    torch.testing.assert_close(chunked, output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chunked_state, state, rtol=1e-10, atol=1e-12)
    flat = torch.cat((output.flatten(), state.flatten()))
    chunked_flat = torch.cat((chunked.flatten(), chunked_state.flatten()))
    _assert_same_gradients(flat, chunked_flat, [*inputs, start], 1e-10)


def test_the_chunked_rule_keeps_its_digits_in_fp32():
    exact, state = delta_rule_reference(*_inputs())
    inputs = [x.detach().float() for x in _inputs()]
    output, rounded_state = delta_rule_chunked(*inputs)
    assert (output - exact).abs().max() <= 2e-6
    assert (rounded_state - state).abs().max() <= 2e-6
    assert rounded_state.dtype == torch.float32


def test_a_packed_row_equals_its_documents_one_by_one_with_their_gradients():
    inputs = _inputs()
    packed, state = delta_rule_chunked(*inputs, document_ids=_boundaries(LENGTHS).document_ids)
    parts = [
        delta_rule_reference(*document)
        for document in zip(*(x.split(LENGTHS, 1) for x in inputs), strict=True)
    ]
    separate = torch.cat([output for output, _ in parts], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, parts[-1][1], rtol=1e-10, atol=1e-12)
    _assert_same_gradients(packed, separate, inputs, 1e-10)


def test_what_a_document_holds_does_not_touch_the_next_one_by_a_single_bit():
    ids = _boundaries([40, 100]).document_ids
    inputs = [x.detach().float() for x in _inputs(140)]
    edited = [x.clone() for x in inputs]
    for x in edited:
        x[:, :40] *= 0.5
    before, _ = delta_rule_chunked(*inputs, document_ids=ids)
    after, _ = delta_rule_chunked(*edited, document_ids=ids)
    assert torch.equal(before[:, 40:], after[:, 40:])
    assert (before[:, :40] - after[:, :40]).abs().max() > 1e-2


def test_many_one_token_documents_cost_the_next_one_no_digits():
    inputs = [x.detach() for x in _inputs(64)]
    inputs[3] = inputs[3] * 0.01  # slow forgetting: the decays differ in their last digits
    alone, _ = delta_rule_reference(*(x[:, 60:] for x in inputs))
    ids = _boundaries([*[1] * 60, 4]).document_ids
    packed, _ = delta_rule_chunked(*(x.float() for x in inputs), document_ids=ids)
    assert (packed[:, 60:] - alone).abs().max() <= 1e-6


def test_strong_decays_leave_no_number_so_small_that_a_cpu_slows_down_with_it():
    log_decay = -torch.logspace(0, 4, 64).expand(64, 64).clone()
    visible = torch.ones(64, 64, dtype=torch.bool).tril()
    decays = delta_net._VisibleDecays.apply(log_decay.requires_grad_(), visible)
    assert decays[visible].min() >= torch.finfo(torch.float32).tiny
    assert not decays[~visible].any()
    exact = torch.where(visible, log_decay.double().exp(), 0.0)
    assert (decays - exact).abs().max() < 1e-7  # what a sum of numbers near 1 in fp32 notices
    decays.sum().backward()
    assert torch.equal(log_decay.grad, decays.detach())


def test_continuing_from_a_state_equals_one_pass():
    inputs = [x.detach() for x in _inputs(50)]
    output, state = delta_rule_reference(*inputs)
    outputs, carried = [], None
    for part in zip(*(x.split([20, 1, 7, 22], 1) for x in inputs), strict=True):
        out, carried = delta_rule(*part, carried)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(carried, state, rtol=1e-10, atol=1e-12)


def test_autocast_multiplies_in_bf16_and_keeps_decay_and_state_in_fp32():
    inputs = [x.detach().float() for x in _inputs()]
    for i in range(3):
        inputs[i] = inputs[i].bfloat16()
    exact, _ = delta_rule_reference(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = delta_rule_chunked(*inputs)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (output - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_history", [False, True])
def test_the_convolution_equals_its_reference_with_its_gradients(packed, with_history):
    torch.manual_seed(0)
    x = torch.randn(B, T, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    history = torch.randn(B, 3, 8, dtype=torch.float64) if with_history else None
    boundaries = _boundaries(LENGTHS) if packed else None
    ids = boundaries.document_ids if boundaries else None
    expected = convolution_reference(x, weight, history, ids)
    output = short_convolution(x, weight, history, boundaries)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    _assert_same_gradients(output, expected, [x, weight], 1e-10)


def test_the_convolution_starts_anew_with_each_document():
    x = torch.randn(B, T, 8, dtype=torch.float64)
    weight = torch.randn(8, 4, dtype=torch.float64)
    packed = short_convolution(x, weight, boundaries=_boundaries(LENGTHS))
    separate = torch.cat([short_convolution(part, weight) for part in x.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-12)


# ---- The kernels, played by stand-ins that know of boundaries only what they are told -----------


def _stand_in_delta_rule(
    q, k, v, g, beta, *, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=None,
    initial_state=None,
):  # fmt: skip
    assert output_final_state and use_qk_l2norm_in_kernel
    if cu_seqlens is None:
        return delta_rule_reference(q, k, v, g, beta, initial_state)
    assert q.shape[0] == 1 and initial_state is None
    lengths = cu_seqlens.diff().tolist()
    documents = zip(*(x.split(lengths, 1) for x in (q, k, v, g, beta)), strict=True)
    parts = [delta_rule_reference(*document) for document in documents]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])


def _stand_in_convolution(x, weight, bias=None, seq_idx=None, activation=None):
    assert x.stride(1) == 1, "seq_idx needs channels last"
    assert seq_idx is None or seq_idx.dtype == torch.int32
    return convolution_reference(x.transpose(1, 2), weight, None, seq_idx).transpose(1, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_are_given_both_boundary_arguments(packed):
    kernels = Kernels(_stand_in_delta_rule, _stand_in_convolution, device_type="cpu")
    boundaries = _boundaries(LENGTHS) if packed else None
    inputs = [x.detach().bfloat16() for x in _inputs()]
    expected, state = delta_rule(*inputs, None, boundaries)
    output, kernel_state = delta_rule(*inputs, None, boundaries, kernels)
    # The stand-in multiplies in fp32, the form by chunks multiplies bf16 inputs in bf16.
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(kernel_state, state, rtol=2e-2, atol=2e-2)
    x, weight = torch.randn(B, T, 8), torch.randn(8, 4)
    for history in (None, torch.randn(B, 3, 8)):
        torch.testing.assert_close(
            short_convolution(x, weight, history, boundaries, kernels),
            short_convolution(x, weight, history, boundaries),
        )


def test_fp32_inputs_do_not_go_to_the_tf32_kernel():
    def kernel(*_, **__):
        raise AssertionError("the kernel was called")

    inputs = [x.detach().float() for x in _inputs(8)]
    delta_rule(*inputs, kernels=Kernels(kernel, device_type="cpu"))
    assert Kernels(kernel).names(half_precision=False)["delta_rule"] == "pytorch"
    assert Kernels(kernel).names(half_precision=True)["delta_rule"] == "fla"


def test_on_a_cpu_beside_a_gpu_the_pytorch_forms_are_named():
    kernels = Kernels(_stand_in_delta_rule, _stand_in_convolution)
    assert set(kernels.names(True, "cuda").values()) == {"fla", "causal_conv1d"}
    assert set(kernels.names(True, "cpu").values()) == {"pytorch"}


def test_a_kernel_package_that_is_broken_is_one_sentence_before_a_run(monkeypatch, tmp_path):
    (tmp_path / "causal_conv1d.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    monkeypatch.setattr(delta_net, "find_spec", lambda name: name == "causal_conv1d" or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    delta_net.find_kernels.cache_clear()
    broken = r"^causal_conv1d is installed but cannot be used \(undefined symbol: _ZN3c10\)"
    try:
        with pytest.raises(ValueError, match=broken):
            check_model("mini_qwen3_next_tiny")
        check_model("mini_llama3_tiny")  # which has no use for it
    finally:
        delta_net.find_kernels.cache_clear()


def test_without_a_gpu_the_pytorch_forms_are_in_use_and_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    delta_net.find_kernels.cache_clear()
    names = delta_net.find_kernels().names(half_precision=True)
    delta_net.find_kernels.cache_clear()
    assert names == {"delta_rule": "pytorch", "short_convolution": "pytorch"}


@pytest.mark.parametrize(
    ("capability", "triton", "fla", "wrong"),
    [
        ((9, 0), "3.6.0", "0.6.0", True),  # Hopper, the triton of torch 2.11
        ((9, 0), "3.7.0", "0.6.0", True),
        ((9, 0), "3.7.1", "0.6.0", False),
        ((9, 0), "3.7.1", None, False),  # a checkout of it
        ((9, 0), "3.3.1", "0.5.2", False),
        ((8, 0), "3.6.0", "0.5.2", False),
        ((10, 0), "3.6.0", "0.6.0", False),
        ((9, 0), None, "0.6.0", False),
        ((8, 0), "3.6.0", "0.4.2", True),  # takes as many key as value heads
        ((9, 0), "3.7.1", "0.5.1", True),
    ],
)
def test_fla_is_left_alone_where_its_gradients_are_wrong_and_the_banner_says_why(
    capability, triton, fla, wrong
):
    reason = why_fla_is_wrong(capability, triton, fla)
    assert bool(reason) == wrong
    named = Kernels(refused=reason).names(half_precision=True)["delta_rule"]
    assert named == (f"pytorch ({reason})" if wrong else "pytorch")
