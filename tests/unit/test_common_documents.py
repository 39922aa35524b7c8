"""Document boundaries and the per-document attention path."""

import pytest
import torch
from torch import nn

from mini_llm.models.common.attention import eager_attention, packed_attention
from mini_llm.models.common.documents import Documents, find_documents

CASES = [[3, 1, 6], [1] * 10, [10], [4, 1, 1, 1, 3], [1, 9]]


def _positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


@pytest.mark.parametrize("lengths", CASES)
def test_documents_are_found_from_restarting_positions(lengths):
    position_ids = torch.stack([_positions(lengths), _positions(list(reversed(lengths)))])
    documents = find_documents(position_ids, batch_size=2)
    if lengths == [10]:
        assert documents is None
    else:
        assert documents is not None
        assert list(documents.lengths) == lengths + list(reversed(lengths))


def test_one_document_that_begins_late_is_not_a_packed_row():
    assert find_documents(torch.arange(5, 15)[None], batch_size=3) is None


def test_runs_of_one_token_documents_become_one_segment():
    documents = Documents((4, 1, 1, 1, 2, 1))
    assert documents.segments() == [(4, False), (3, True), (2, False), (1, True)]
    assert documents.cu_seq_lens(torch.device("cpu")).tolist() == [0, 4, 5, 6, 7, 9, 10]


@pytest.mark.parametrize("lengths", CASES)
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_attention_equals_a_block_diagonal_mask_in_output_and_gradient(lengths, groups):
    torch.manual_seed(0)
    B, H, T, d = 2, 4, 10, 8
    module = nn.Module()
    module.num_key_value_groups = groups
    per_row = [lengths, list(reversed(lengths))]
    documents = Documents(tuple(n for row in per_row for n in row))
    owner = torch.stack(
        [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in per_row]
    )
    allowed = (owner[:, None, :, None] == owner[:, None, None, :]) & torch.ones(T, T).tril().bool()
    mask = torch.zeros(B, 1, T, T).masked_fill(~allowed, float("-inf"))
    inputs = [torch.randn(B, h, T, d) for h in (H, H // groups, H // groups)]
    upstream = torch.randn(B, T, H, d)
    results = []
    for packed in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        if packed:
            out = packed_attention(module, q, k, v, documents, scaling=0.3)
        else:
            out, _ = eager_attention(module, q, k, v, mask, scaling=0.3)
        (out * upstream).sum().backward()
        results.append(
            [out] + [x.grad if x.grad is not None else torch.zeros_like(x) for x in (q, k, v)]
        )
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
