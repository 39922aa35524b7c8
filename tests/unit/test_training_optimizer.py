"""Decay groups and the learning-rate schedule."""

import torch

from mini_llm import build_model
from mini_llm.training.optimizer import build_optimizer, describe_optimizer, learning_rate_at


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


def test_the_fused_update_is_that_of_single_operations():
    def trained(fused: bool) -> tuple[str, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = build_model("mini_qwen3_next_tiny", vocab_size=64)  # has a 3-dimensional filter too
        optimizer = build_optimizer(
            model, learning_rate=1e-2, weight_decay=0.5, betas=(0.9, 0.95), epsilon=1e-8
        )
        if not fused:
            for group in optimizer.param_groups:
                group["fused"] = None
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return describe_optimizer(optimizer), [p.detach() for p in model.parameters()]

    (name, fused), (plain_name, plain) = trained(True), trained(False)
    assert (name, plain_name) == ("AdamW (fused)", "AdamW")
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


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


def wsd(step: int, max_steps: int, decay_steps: int) -> float:
    return learning_rate_at(
        step,
        peak=2.0,
        max_steps=max_steps,
        warmup_steps=10,
        min_lr_ratio=0.1,
        schedule="wsd",
        decay_steps=decay_steps,
    )


def test_wsd_stays_at_the_peak_until_the_decay_and_ends_at_the_given_share():
    rates = [wsd(step, 100, 20) for step in range(1, 101)]
    assert rates[:10] == [2.0 * step / 10 for step in range(1, 11)]
    assert set(rates[9:80]) == {2.0}
    assert abs(rates[84] - (0.2 + 1.8 * 0.5)) < 1e-12  # a quarter of the decay: 1 - sqrt(1/4)
    assert abs(rates[99] - 0.2) < 1e-12
    assert rates[79:] == sorted(rates[79:], reverse=True)


def test_wsd_decay_branches_from_any_step_of_the_stable_part():
    long_run = [wsd(step, 1000, 200) for step in range(1, 801)]
    # A run to step 350 that decays over its last 50 steps shares the first 300 with it.
    branch = [wsd(step, 350, 50) for step in range(1, 351)]
    assert branch[:300] == long_run[:300]
    assert branch[300] < 2.0 and abs(branch[-1] - 0.2) < 1e-12


def test_constant_never_falls():
    rates = {
        learning_rate_at(
            step, peak=2.0, max_steps=50, warmup_steps=5, min_lr_ratio=0.1, schedule="constant"
        )
        for step in range(5, 51)
    }
    assert rates == {2.0}
