"""Who is late, worked out from what the ranks said last."""

from typing import Any

import pytest

from mini_llm.parallel.hang_report import (
    BACKWARD,
    COLLECTIVE,
    ELSEWHERE,
    Frame,
    RankState,
    name_late_ranks,
    ranks_in_words,
    standing,
)

READING = (Frame("/x/recipes/pretrain.py", 250, "main"), Frame("/x/mini_llm/data.py", 7, "read"))


def state(rank: int, beats: int = 100, where: str = COLLECTIVE, **fields: Any) -> RankState:
    known = {"step": 12, "phase": "reading data", "clock": "14:03:22 UTC", "frames": READING}
    return RankState(rank, f"node-{rank // 2}", 4000 + rank, beats, where=where, **known | fields)


def report(*states: RankState, world_size: int = 4, **processes: str) -> str:
    fates = {int(rank.removeprefix("rank")): fate for rank, fate in processes.items()}
    return name_late_ranks({s.rank: s for s in states}, world_size, fates)


def test_a_rank_that_gives_no_sign_of_life_is_late_even_if_its_last_one_was_ahead():
    said = report(state(0), state(1), state(2, beats=101, where=""), state(3))
    assert said.startswith("rank 2 (host node-1, process 4002) is late at step 12, reading data")
    assert "no sign of life since 14:03:22 UTC" in said
    assert "its machine or network is gone" in said and said.count("is late") == 1


def test_what_became_of_a_silent_process_is_said_where_it_can_be_seen():
    said = report(*map(state, (0, 1, 2)), state(3, where=""), rank3="its process is suspended")
    assert said.startswith("rank 3 ") and "(its process is suspended)" in said


def test_a_rank_that_was_never_heard_of_is_named():
    said = report(state(0), state(1))
    assert said.startswith("ranks 2-3 never gave a sign of life")


def test_a_rank_that_failed_comes_before_those_that_fell_silent_with_it():
    failed = state(1, where="", failure="ValueError: row 7 is broken")
    said = report(state(0), failed, state(2), state(3, where=""))
    assert said == (
        "rank 1 (host node-0, process 4001) failed at step 12, reading data: "
        "ValueError: row 7 is broken"
    )


def test_the_rank_with_fewer_beats_is_late_wherever_the_others_stand():
    late = state(1, beats=99, where=ELSEWHERE)
    said = report(state(0, phase="optimizer step"), late, state(2, where=ELSEWHERE), state(3))
    assert said.startswith("rank 1 ") and said.count("is late") == 1
    assert "behind rank 0, which is at step 12, optimizer step" in said
    assert "recipes/pretrain.py:250 main > x/mini_llm/data.py:7 read" in said


def test_of_ranks_equally_far_behind_those_in_a_collective_only_wait_too():
    # Two groups of experts: rank 2 waits for rank 3 inside its group; 0 and 1 have got further.
    ahead = [state(0, beats=102), state(1, beats=102)]
    said = report(*ahead, state(2), state(3, where=ELSEWHERE))
    assert said.startswith("rank 3 ") and said.count("is late") == 1


def test_at_the_same_beat_the_one_outside_of_a_collective_is_late():
    said = report(state(0), state(1, where=BACKWARD), state(2, where=ELSEWHERE), state(3))
    assert said.startswith("rank 2 ") and said.count("is late") == 1
    assert "it alone is not in a collective" in said


def test_where_all_wait_in_collectives_none_is_blamed_and_all_places_are_given():
    said = report(*map(state, range(4)))
    assert "is late" not in said and "collectives that do not match" in said
    assert all(f"rank {rank} (host" in said for rank in range(4))


@pytest.mark.parametrize("wheres", [[ELSEWHERE] * 2, [COLLECTIVE, BACKWARD]])
def test_what_cannot_be_told_is_not_claimed(wheres):
    said = report(*(state(i, where=where) for i, where in enumerate(wheres)), world_size=2)
    assert "is late" not in said and "cannot be told" in said


def test_where_a_stack_stands():
    main = Frame("/x/recipes/pretrain.py", 250, "main")
    in_torch = Frame("/v/torch/distributed/distributed_c10d.py", 3252, "all_reduce")
    assert standing([main, in_torch]) == COLLECTIVE
    assert standing([main, Frame("/v/deepspeed/runtime/zero/stage3.py", 9, "wait")]) == COLLECTIVE
    assert standing([main, Frame("/v/torch/autograd/graph.py", 979, "_engine")]) == BACKWARD
    assert standing([main, Frame("/usr/lib/python3/threading.py", 320, "wait")]) == ELSEWHERE
    assert standing([main]) == ELSEWHERE and standing([]) == ELSEWHERE


def test_ranks_in_words():
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words([0, 1, 2, 5, 8, 7]) == "ranks 0-2, 5, 7-8"
