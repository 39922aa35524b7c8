"""The collator against a slow loop over tokens."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_llm.data.collate import IGNORE_INDEX, Batch, collate
from mini_llm.data.stream import Row
from mini_llm.models.common.documents import document_ids, find_documents
from tests.launching import REPOSITORY


def make_row(seq_len: int, doc_lens: list[int], first_id: int = 1) -> Row:
    used = sum(doc_lens)
    input_ids = np.zeros(seq_len, np.uint16)
    input_ids[:used] = first_id + np.arange(used)
    return Row(input_ids=input_ids, doc_lens=np.array(doc_lens, np.int32), source="test")


def slow_reference(rows: list[Row]) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return positions, labels and segment boundaries, token by token."""
    positions, labels, boundaries = [], [], [0]
    for number, row in enumerate(rows):
        seq_len = len(row["input_ids"])
        row_positions, row_labels = [0] * seq_len, [IGNORE_INDEX] * seq_len
        place = 0
        for length in row["doc_lens"].tolist():
            for offset in range(length):
                row_positions[place] = offset
                if offset > 0:
                    row_labels[place] = int(row["input_ids"][place])
                place += 1
            boundaries.append(number * seq_len + place)
        if place < seq_len:
            boundaries.append((number + 1) * seq_len)
        positions.append(row_positions)
        labels.append(row_labels)
    return positions, labels, boundaries


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seq_len=st.integers(1, 20), num_rows=st.integers(1, 5))
def test_collate_equals_the_slow_loop(data: st.DataObject, seq_len: int, num_rows: int) -> None:
    rows = []
    for index in range(num_rows):
        doc_lens: list[int] = []
        left = seq_len
        while left and data.draw(st.booleans() if doc_lens else st.just(True)):
            doc_lens.append(data.draw(st.integers(1, left)))
            left -= doc_lens[-1]
        rows.append(make_row(seq_len, doc_lens, first_id=1 + index * seq_len))
    batch = collate(rows)
    positions, labels, boundaries = slow_reference(rows)
    assert batch["input_ids"].tolist() == [row["input_ids"].tolist() for row in rows]
    assert batch["position_ids"].tolist() == positions
    assert batch["labels"].tolist() == labels
    assert batch["cu_seq_lens"].tolist() == boundaries
    found = find_documents(batch["position_ids"], num_rows)  # None where each row is one
    assert (found or batch["documents"]).lengths == batch["documents"].lengths
    assert (found is None) == (len(batch["documents"].lengths) == num_rows)
    assert batch["num_target_tokens"] == sum(x != IGNORE_INDEX for row in labels for x in row)


def test_dtypes_and_shapes_are_those_a_model_takes() -> None:
    batch = collate([make_row(6, [2, 3]), make_row(6, [6])], device="cpu")
    for key in ("input_ids", "position_ids", "labels"):
        tensor = batch[key]
        assert tensor.dtype == torch.int64 and tensor.shape == (2, 6)
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["cu_seq_lens"].tolist() == [0, 2, 5, 6, 12]


def test_end_of_document_is_supervised_and_first_token_and_padding_are_not() -> None:
    row = make_row(6, [2, 3])
    row["input_ids"][[1, 4]] = 0  # <|endoftext|>
    labels = collate([row])["labels"][0].tolist()
    assert labels == [IGNORE_INDEX, 0, IGNORE_INDEX, 4, 0, IGNORE_INDEX]


def test_row_without_documents_is_all_padding() -> None:
    batch = collate([make_row(4, []), make_row(4, [4])])
    assert batch["labels"][0].tolist() == [IGNORE_INDEX] * 4
    assert batch["cu_seq_lens"].tolist() == [0, 4, 8]
    assert batch["num_target_tokens"] == 3


@pytest.mark.parametrize("doc_lens", [[3, 2], [0, 2], [5]])
def test_documents_that_do_not_fit_their_row_are_refused(doc_lens: list[int]) -> None:
    row = Row(
        input_ids=np.zeros(4, np.uint16), doc_lens=np.array(doc_lens, np.int32), source="test"
    )
    with pytest.raises(ValueError, match="doc_lens"):
        collate([row])


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([])


def test_package_gives_the_function_whichever_way_it_was_imported_before() -> None:
    code = (
        "import sys, mini_llm.data.collate; from mini_llm.data import collate; "
        "assert callable(collate); assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_padding_of_a_row_is_one_document_for_kernels():
    rows = [make_row(8, [3, 2]), make_row(8, [1, 1]), make_row(8, [8])]
    batch = collate(rows)
    documents, cpu = batch["documents"], torch.device("cpu")
    boundaries = documents.cu_seq_lens(cpu)
    assert boundaries.tolist() == [0, 3, 5, 8, 9, 10, 16, 24]
    assert torch.equal(boundaries, batch["cu_seq_lens"])
    assert document_ids(boundaries, 3, 8).tolist() == [
        [0, 0, 0, 1, 1, 2, 2, 2],
        [0, 1, 2, 2, 2, 2, 2, 2],
        [0] * 8,
    ]
    assert documents.max_length == 8 and collate(rows[1:2])["documents"].max_length == 6
    # Who has to look for the documents cannot tell padding from documents of one token.
    found = find_documents(batch["position_ids"], 3)
    assert found == documents and found.lengths == (3, 2, *[1] * 3, 1, 1, *[1] * 6, 8)
    assert found.cu_seq_lens(cpu).diff().tolist() == list(found.lengths)


@pytest.mark.parametrize(
    "source",
    [
        *("recipes/pretrain.py", "recipes/sft.py"),
        *("mini_llm/training/evaluation.py", "mini_llm/bench/loops.py"),
    ],
)
def test_a_loop_gives_the_model_all_that_collate_knows(source):
    """Without ``documents`` the host waits for the device, without the number logits cost more."""
    known = set(Batch.__annotations__) - {"cu_seq_lens"}  # for kernels called directly
    calls = [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse((REPOSITORY / source).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "model"
    ]
    packed = [call for call in calls if "documents" in call]
    assert len(packed) == 1 and known <= packed[0]
