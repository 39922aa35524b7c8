"""How auxiliary losses join the objective."""

from types import SimpleNamespace

import pytest
import torch

from mini_llm.training.losses import combine_losses, mtp_weight_at


def test_the_mtp_weight_falls_after_two_thirds_of_the_run():
    weights = [mtp_weight_at(step, first=0.3, last=0.1, max_steps=9) for step in range(1, 10)]
    assert weights == [0.3] * 6 + [0.1] * 3


def test_a_dense_models_objective_is_its_loss():
    outputs = SimpleNamespace(loss=torch.tensor(2.0))
    objective, parts = combine_losses(outputs, mtp_weight=9, balance_weight=9, micro_batches=3)
    assert objective is outputs.loss and list(parts) == ["train/loss"]


def test_parts_sum_over_micro_batches_to_values_that_do_not_depend_on_the_division():
    balance_of_rows = torch.tensor([1.0, 2.0, 3.0, 6.0])
    for size in (1, 2, 4):
        total, reported = 0.0, {"train/loss": 0.0, "train/mtp_loss": 0.0, "train/balance_loss": 0.0}
        micro_batches = balance_of_rows.split(size)
        for rows in micro_batches:
            outputs = SimpleNamespace(
                loss=rows.numel() * torch.tensor(0.25),  # already a share of the step
                mtp_loss=rows.numel() * torch.tensor(0.5),
                balance_loss=rows.mean(),
            )
            objective, parts = combine_losses(
                outputs, mtp_weight=0.3, balance_weight=0.01, micro_batches=len(micro_batches)
            )
            total += objective.item()
            for name, part in parts.items():
                reported[name] += part.item()
        assert reported["train/balance_loss"] == pytest.approx(3.0)
        assert total == pytest.approx(1.0 + 0.3 * 2.0 + 0.01 * 3.0)
