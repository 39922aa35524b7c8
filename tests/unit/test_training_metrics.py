"""metrics.jsonl, counted tokens, sizes."""

import errno
import json
import math
import resource

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mini_llm import build_model, list_models
from mini_llm.training import run_lock
from mini_llm.training.arguments import PretrainArguments, SftArguments
from mini_llm.training.metrics import MetricsLog, TokenCounter, start_trackers
from mini_llm.training.run_folder import (
    check_run_folder,
    final_step,
    set_final_aside,
    write_json,
)
from mini_llm.training.run_lock import RunLock
from mini_llm.training.sizes import (
    ParameterCounts,
    count_parameters,
    dry_run_report,
    memory_per_rank,
    training_flops,
)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_a_resumed_run_cuts_what_lies_after_its_checkpoint_and_half_a_line(tmp_path, accelerator):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4')
    log = MetricsLog(tmp_path, accelerator, start_step=2, max_steps=5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    log.write(3, {"eval/a/loss": 1.5, "eval/a/bits_per_byte": 0.5})
    assert json.loads(path.read_text().splitlines()[-1])["eval/a/loss"] == 1.5


def test_a_disk_too_full_to_cut_the_metrics_loses_none_of_them(tmp_path, accelerator):
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 501))
    path.write_text(lines)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            MetricsLog(tmp_path, accelerator, start_step=490, max_steps=500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == lines


def test_a_source_may_have_a_slash_in_its_name(tmp_path, accelerator, capsys):
    log = MetricsLog(tmp_path, accelerator, start_step=0, max_steps=5)
    log.write(1, {"eval/web/zh/loss": 1.5, "eval/web/zh/bits_per_byte": 0.5})
    assert "held-out web/zh 1.5000 (0.500 bits/byte)" in capsys.readouterr().out


def test_tokens_are_counted_by_source_without_padding_and_survive_a_resume(accelerator):
    counter = TokenCounter(accelerator, sources=["a", "b"])
    counter.add([{"source": "a", "doc_lens": np.array([3, 4])}])
    counter.add([{"source": "b", "doc_lens": np.array([5])}])
    assert counter.read() == {"train/tokens": 12, "data/a/tokens": 7, "data/b/tokens": 5}
    resumed = TokenCounter(accelerator, sources=["a", "b"])
    resumed.load_state_dict(counter.state_dict())
    resumed.add([{"source": "b", "doc_lens": np.array([1])}])
    assert resumed.read()["train/tokens"] == 13


def test_tokens_of_steps_that_a_rewind_undoes_are_not_counted(accelerator):
    counter = TokenCounter(accelerator, sources=["a"])
    counter.add([{"source": "a", "doc_lens": np.array([3])}])
    saved = counter.state_dict()
    counter.add([{"source": "a", "doc_lens": np.array([50])}])  # nobody has read them
    counter.load_state_dict(saved)
    counter.add([{"source": "a", "doc_lens": np.array([4])}])
    assert counter.read() == {"train/tokens": 7, "data/a/tokens": 7}


def grouped_mm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """torch counts none for it: every row of a (S, D) meets one (D, F) matrix of b (E, D, F)."""
    if len(b_shape) == 3:
        return 2 * a_shape[0] * a_shape[1] * b_shape[2]
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]  # gradient of b: (D, S) x (S, F)


def depthwise_backward_flops(grad_shape, x_shape, w_shape, *args, **kwargs) -> int:
    """Twice the forward's; torch's own count multiplies every channel with every other."""
    return 2 * 2 * math.prod(grad_shape) * w_shape[-1]


def triangular_solve_flops(a_shape, b_shape, *args, **kwargs) -> int:
    """C² a right-hand side (C multiply-adds a row, on average half)."""
    return math.prod(b_shape) * a_shape[-1]


@pytest.mark.parametrize("predict_further", [True, False])
@pytest.mark.parametrize("supervised", [256, 128])
@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith("_tiny")])
def test_flops_equal_an_exact_operator_count(name, supervised, predict_further):
    from torch.utils.flop_counter import FlopCounterMode

    # Values as wide as keys, else eager attention also multiplies the zeros that fill them up.
    fields = {"v_head_dim": 32} if "deepseek" in name else {}
    model = build_model(name, vocab_size=512, **fields).train()
    model.set_attn_implementation("eager")  # its products are plain matmuls, all of them counted
    B, T = 2, 128
    tokens = torch.randint(0, 512, (B, T))
    labels = tokens.flatten().clone()
    labels[supervised:] = -100
    options: dict[str, bool] = {}
    if hasattr(model.config, "num_nextn_predict_layers"):
        options["predict_further"] = predict_further
    uncounted = {
        torch.ops.aten._grouped_mm: grouped_mm_flops,
        torch.ops.aten.convolution_backward: depthwise_backward_flops,
        torch.ops.aten.linalg_solve_triangular: triangular_solve_flops,
        torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        outputs = model(tokens, labels=labels.view(B, T), num_target_tokens=supervised, **options)
        loss = outputs.loss
        if getattr(outputs, "mtp_loss", None) is not None:
            loss = loss + outputs.mtp_loss
        loss.backward()
    parameters = count_parameters(model)
    stated = training_flops(model.config, parameters, T, predict_further=predict_further)
    expected = B * T * stated.layers + supervised * stated.head
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "weight", "further"),
    [
        (PretrainArguments, 0.3, True),
        (PretrainArguments, 0.0, True),  # computed whatever its weight
        (SftArguments, 0.3, True),
        (SftArguments, 0.0, False),  # frozen
    ],
)
def test_a_dry_run_tells_the_flops_of_what_its_recipe_computes(kind, weight, further):
    model = build_model("mini_deepseekv3_tiny", vocab_size=512)
    parameters = count_parameters(model)
    args = kind(output_dir="", model="", tokenizer="", mtp_loss_weight=weight)
    report = dry_run_report(args, model.config, parameters, world_size=1, micro_batches=1)
    flops = training_flops(model.config, parameters, args.seq_len, predict_further=further)
    stated = f"training FLOPs/token  {flops.layers:.3e}, and {flops.head:.3e} if it is supervised"
    assert stated in report.splitlines()


def test_parameters_are_counted_once_and_split_into_active_and_idle():
    dense = count_parameters(build_model("mini_llama3_tiny", vocab_size=512))
    assert dense.active == dense.total and dense.mtp == 0
    assert str(dense) == f"{dense.total:,} parameters"


def test_memory_falls_with_the_stage_and_zero3_splits_everything():
    dense = ParameterCounts(10**9, active=10**9, mtp=0, experts=0, idle_experts=0)
    memory = memory_per_rank(dense, world_size=4, bf16=True)
    sizes = [memory[f"zero{stage}"] for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    # 2 weights + 4 gradients + 12 optimizer and master bytes a parameter, over four ranks
    assert sizes[3] == pytest.approx(18e9 / 4 / 2**30)


def test_memory_with_spread_experts_is_less_by_the_weights_and_gradients_of_the_others():
    counts = ParameterCounts(10**9, active=10**8, mtp=0, experts=8 * 10**8, idle_experts=0)
    whole = memory_per_rank(counts, world_size=4, bf16=True)
    spread = memory_per_rank(counts, world_size=4, bf16=True, expert_parallel_size=2)
    saved = {stage: whole[stage] - spread[stage] for stage in spread}
    weights = 2 * 4e8 / 2**30
    assert saved == pytest.approx({"zero1": 2 * weights, "zero2": weights, "zero3": 0}, abs=1e-6)


def test_a_folder_of_the_same_run_is_accepted_and_another_names_the_keys(tmp_path):
    write_json(tmp_path / "run.json", {"identity": {"seed": 1, "model": "a"}})
    check_run_folder(tmp_path, {"seed": 1, "model": "a"})
    with pytest.raises(ValueError, match="seed: 1 there, 2 here") as error:
        check_run_folder(tmp_path, {"seed": 2, "model": "a"})
    assert "model" not in str(error.value)


def test_the_final_model_of_a_run_that_goes_on_is_kept_under_its_step(tmp_path, capsys):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "weights").write_text("of step 6")
    assert final_step(tmp_path) is None  # nothing logged
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 6}\n{"st')
    assert final_step(tmp_path) == 6
    set_final_aside(tmp_path, max_steps=6)  # done anew, from a checkpoint before its end
    assert final_step(tmp_path) == 6 and capsys.readouterr().out == ""
    set_final_aside(tmp_path, max_steps=8)
    assert final_step(tmp_path) is None and not (tmp_path / "final").exists()
    assert (tmp_path / "final-step-6" / "weights").read_text() == "of step 6"
    assert f"step 6 is now {tmp_path}/final-step-6" in capsys.readouterr().out
    set_final_aside(tmp_path, max_steps=8)  # resumed
    assert (tmp_path / "final-step-6").is_dir()


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--output_dir \S+/file cannot be made \(File exists\)"):
        RunLock(tmp_path / "file").take(rank=0)


def test_a_disk_without_file_locks_is_named_with_its_flag(tmp_path, monkeypatch):
    def not_there(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", not_there)
    with pytest.raises(
        ValueError, match=r"--output_dir .*/run: its disk has no file locks \(No lo"
    ):
        RunLock(tmp_path / "run").take(0)


def tensorboard_curve(output_dir, name="train/loss"):
    """(step, value) of each point that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(output_dir / "logs/mini-llm")).Reload()
    return [(point.step, point.value) for point in board.Scalars(name)]


def test_the_curve_of_a_run_that_was_killed_before_its_first_save_is_dropped(tmp_path):
    args = PretrainArguments(str(tmp_path), "m", "t", report_to="tensorboard")
    for values in ([1.0, 2.0, 3.0], [4.0, 5.0]):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "logs")
        start_trackers(accelerator, args, start_step=0)
        for step, value in enumerate(values, start=1):
            accelerator.log({"train/loss": value}, step=step)
        accelerator.end_training()
    assert tensorboard_curve(tmp_path) == [(1, 4.0), (2, 5.0)]


def test_what_a_rewind_undoes_is_in_neither_metrics_jsonl_nor_tensorboard(tmp_path):
    args = PretrainArguments(str(tmp_path), "m", "t", report_to="tensorboard")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "logs")
    start_trackers(accelerator, args, start_step=0)
    log = MetricsLog(tmp_path, accelerator, start_step=0, max_steps=9)
    for last, value in ((5, 1.0), (4, 2.0), (3, 3.0)):
        for step in range(3 if value > 1 else 1, last + 1):
            log.write(step, {"eval/a/loss": value, "eval/a/bits_per_byte": value})
        if last > 3:
            log.rewind(2)
    accelerator.end_training()
    expected = [(1, 1.0), (2, 1.0), (3, 3.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["eval/a/loss"]) for line in lines] == expected
    assert tensorboard_curve(tmp_path, "eval/a/loss") == expected
