"""Decay groups and the learning-rate schedule."""

import torch

from mini_llm import build_model
from mini_llm.training.optimizer import build_optimizer, learning_rate_at


def test_matrices_decay_and_norm_weights_do_not():
    model = build_model("mini_llama3_tiny", vocab_size=64)
    optimizer = build_optimizer(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    decay, no_decay = optimizer.param_groups
    assert decay["weight_decay"] == 0.1 and no_decay["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decay["params"])
    assert all(p.ndim == 1 for p in no_decay["params"])
    counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters())


def test_a_partitioned_matrix_decays_by_its_real_shape():
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(16))
    model.weight.ds_shape = (4, 4)
    optimizer = build_optimizer(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_schedule_warms_up_linearly_peaks_and_falls_to_the_given_share():
    def at(step: int) -> float:
        return learning_rate_at(step, peak=2.0, max_steps=110, warmup_steps=10, min_lr_ratio=0.1)

    assert at(1) == 0.2 and at(5) == 1.0 and at(10) == 2.0
    assert abs(at(60) - (0.2 + 1.8 * 0.5)) < 1e-12  # half-way down the cosine
    assert abs(at(110) - 0.2) < 1e-12
    falling = [at(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    rates = [
        learning_rate_at(step, peak=1.0, max_steps=5, warmup_steps=10, min_lr_ratio=0.1)
        for step in range(1, 6)
    ]
    assert rates == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_no_warmup_begins_below_the_peak_and_never_divides_by_zero():
    assert learning_rate_at(1, peak=1.0, max_steps=1, warmup_steps=0, min_lr_ratio=0.5) == 0.5
