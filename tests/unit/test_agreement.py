"""What ranks that differ are told; that they stop is tests/distributed/test_agreement.py."""

from mini_llm.parallel.agreement import find_differences
from mini_llm.training.banner import describe_hosts

HOSTS = ["a", "a", "b", "b"]


def test_ranks_that_agree_have_no_differences():
    assert find_differences(HOSTS, [{"--seed": "42", "code version": "abc"}] * 4) == []


def test_every_difference_is_named_with_all_values_ranks_and_hosts():
    facts = [{"--seed": seed, "code version": "abc"} for seed in ("42", "42", "7", "42")]
    facts[1] = facts[1] | {"code version": "abd"}
    assert find_differences(HOSTS, facts) == [
        "--seed (42 on ranks 0-1, 3 (hosts a, b), 7 on rank 2 (host b))",
        "code version (abc on ranks 0, 2-3 (hosts a, b), abd on rank 1 (host a))",
    ]


def test_a_fact_that_only_some_ranks_know_differs():
    # One rank runs code that has an argument more.
    (difference,) = find_differences(["a", "b"], [{"--new": "1"}, {}])
    assert difference == "--new (1 on rank 0 (host a), nothing on rank 1 (host b))"


def test_long_values_are_cut_to_where_they_differ():
    long = [f"{'x' * 500}{stage}{'y' * 500}" for stage in "12"]
    (difference,) = find_differences(["a", "b"], [{"DeepSpeed config": value} for value in long])
    assert "xx1yy" in difference and "xx2yy" in difference and len(difference) < 300


def test_hosts_in_words():
    assert describe_hosts(HOSTS) == "4 on 2 host(s): a (ranks 0-1), b (ranks 2-3)"
