"""Norms and rotary embeddings: the forms that training uses against their references."""

import pytest
import torch

from mini_llm.models.common.norm import rms_normalize, rms_normalize_reference
from mini_llm.models.common.rope import apply_rotary_pos_emb, rotate_reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def assert_same_with_gradients(ours, reference, x, tolerance):
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, x, weight)[0] for y in (ours, reference)]
    assert gradients[0].dtype == x.dtype
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(ours, reference, **close)
    torch.testing.assert_close(*gradients, **close)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_normalised_vector_and_its_gradient_are_those_of_the_reference(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 16) * torch.logspace(-3, 3, 5)[:, None]).to(dtype).requires_grad_()
    for eps in (1e-6, 1.0):
        ours, reference = rms_normalize(x, eps), rms_normalize_reference(x, eps)
        assert_same_with_gradients(ours, reference, x, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotated_queries_and_keys_and_their_gradients_are_those_of_the_reference(dtype, rotary_dim):
    torch.manual_seed(0)
    query = torch.randn(2, 7, 3, 8).to(dtype).transpose(1, 2).requires_grad_()
    key = torch.randn(2, 7, 1, 8).to(dtype).transpose(1, 2).requires_grad_()
    angles = torch.randn(2, 7, rotary_dim // 2)
    # Under autocast the angles are fp32 beside 16-bit queries.
    of_angles = dtype if dtype == torch.float64 else torch.float32
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(of_angles) for f in (torch.cos, torch.sin))
    rotated = apply_rotary_pos_emb(query, key, cos, sin)
    for x, ours in zip((query, key), rotated, strict=True):
        turned = rotate_reference(x[..., :rotary_dim], cos[:, None], sin[:, None])
        reference = torch.cat((turned, x[..., rotary_dim:]), -1)
        assert_same_with_gradients(ours, reference, x, TOLERANCES[dtype])
