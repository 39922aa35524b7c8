"""Bad steps, seen while the next one is computed, as on a GPU, or at once."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from mini_llm.parallel import engine
from mini_llm.training.bad_steps import BadSteps
from mini_llm.training.interruption import what_is_due
from mini_llm.training.optimizer import build_optimizer

NAN, FINE = torch.tensor(float("nan")), torch.tensor(1.0)


@pytest.fixture
def late():
    """As on a GPU, where a step is looked at when the next one has been handed to the device."""
    args = SimpleNamespace(bad_step_policy="skip", max_loss_jump=0.0)
    bad_steps = BadSteps(args, Accelerator(cpu=True))
    bad_steps._looks_later = True
    return bad_steps


def test_a_bad_step_is_seen_a_step_later_and_by_its_own_number(late):
    assert late.fault(1, FINE, NAN, now=False) is None
    assert late.count == 0
    fault = late.fault(2, FINE, FINE, now=False)
    assert (fault.step, late.count) == (1, 1)
    assert str(fault) == "step 1 went wrong: its gradient norm is nan"
    assert late.fault(3, FINE, FINE, now=True) is None


def test_a_step_that_a_rewind_has_left_behind_is_not_looked_at(late):
    assert late.fault(5, FINE, NAN, now=False) is None
    assert late.fault(6, FINE, NAN, now=False).step == 5
    late.rewind()
    assert late.fault(3, FINE, FINE, now=False) is None
    assert late.fault(4, FINE, FINE, now=True) is None
    assert late.count == 1


def test_nothing_is_logged_or_saved_before_its_step_was_looked_at(late):
    late.fault(1, FINE, FINE, now=False)
    assert late.fault(2, FINE, float("inf"), now=True).step == 2


def test_what_is_due_at_a_step():
    args = SimpleNamespace(logging_steps=4, eval_steps=6, save_steps=0, max_steps=9)
    args.sample_prompts = []

    def due(step, **facts):
        found = what_is_due(args, step, **{"is_last": False, "save_now": False, **facts})
        return "".join(name[0] for name in ("log", "evaluate", "save") if getattr(found, name))

    assert [due(step) for step in range(1, 9)] == ["le", "", "", "l", "", "e", "", "l"]
    assert due(9, is_last=True) == "les"
    assert due(3, save_now=True) == "s"


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments_nor_their_count():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(
        model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    wrapped = accelerator.prepare(optimizer)

    def step(factor: float) -> None:
        (model(torch.ones(2, 4)).sum() * factor).backward()
        engine.optimizer_step(model, wrapped, 1.0)

    def state() -> list[torch.Tensor]:
        tensors = [value for entry in optimizer.state.values() for value in entry.values()]
        return [tensor.detach().clone() for tensor in [*model.parameters(), *tensors]]

    step(1.0)
    before = state()
    step(float("nan"))
    assert all(a.equal(b) for a, b in zip(state(), before, strict=True))
    step(2.0)
    assert not any(a.equal(b) for a, b in zip(state(), before, strict=True))
