"""The rows that raw sources left out, over all ranks."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from mini_llm.training import rejected
from mini_llm.training.rejected import describe_rejected, rejected_rows


def test_rejected_rows_of_all_ranks_are_summed_by_reason_and_described(monkeypatch):
    ranks = [
        {"web": Counter(empty=3, not_utf8=1), "chat": Counter()},
        {"web": Counter(empty=2000), "chat": Counter()},
    ]
    monkeypatch.setattr(rejected, "gather_object", lambda own: own + ranks[1:])
    stream: Any = SimpleNamespace(rejected_per_source=ranks[0])
    total = rejected_rows(stream)
    assert total == {"web": {"empty": 2003, "not_utf8": 1}, "chat": {}}
    assert describe_rejected(total) == [
        "web: 2,004 rows or lines were nothing to train on and were left out "
        "(2,003 empty, 1 not_utf8)"
    ]


def test_without_raw_text_no_rank_waits_for_another(monkeypatch):
    monkeypatch.delattr(rejected, "gather_object")
    stream: Any = SimpleNamespace(rejected_per_source={})
    assert rejected_rows(stream) == {}
