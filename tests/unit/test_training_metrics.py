"""metrics.jsonl, throughput, sizes."""

import json

import pytest
import torch
from accelerate import Accelerator

from mini_llm import build_model
from mini_llm.training.metrics import MetricsLog, Throughput, TokenCounter
from mini_llm.training.plots import plot_loss
from mini_llm.training.run_folder import check_run_folder, write_json
from mini_llm.training.sizes import count_parameters, memory_per_rank, training_flops_per_token


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


def test_throughput_counts_the_tokens_of_its_interval_alone(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 6.0, 6.0])
    monkeypatch.setattr("mini_llm.training.metrics.time.perf_counter", lambda: next(clock))
    throughput = Throughput(flops_per_token=1.0, device=torch.device("cpu"), num_processes=2)
    throughput.add(100)
    assert throughput.read() == {"perf/tokens_per_second": 50.0, "perf/mfu": None}
    throughput.add(20)
    assert throughput.read()["perf/tokens_per_second"] == 5.0


def test_tokens_are_counted_by_source_without_padding_and_survive_a_resume(accelerator):
    import numpy as np

    counter = TokenCounter(accelerator, sources=["a", "b"])
    counter.add([{"source": "a", "doc_lens": np.array([3, 4])}])
    counter.add([{"source": "b", "doc_lens": np.array([5])}])
    assert counter.read() == {"train/tokens": 12, "data/a/tokens": 7, "data/b/tokens": 5}
    resumed = TokenCounter(accelerator, sources=["a", "b"])
    resumed.load_state_dict(counter.state_dict())
    resumed.add([{"source": "b", "doc_lens": np.array([1])}])
    assert resumed.read()["train/tokens"] == 13


def test_flops_per_token_equal_an_exact_operator_count():
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model("mini_llama3_tiny", vocab_size=512)
    model.set_attn_implementation("eager")  # its products are plain matmuls, all of them counted
    B, T = 2, 64
    tokens = torch.randint(0, 512, (B, T))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.float().logsumexp(-1).sum().backward()
    stated = training_flops_per_token(model.config, count_parameters(model), T)
    # Eager attention multiplies the masked half too, which the causal formula leaves out. Norm
    # weights are parameters that no matmul uses: far below a per cent.
    masked_half = 6 * model.config.num_hidden_layers * model.config.num_attention_heads
    masked_half *= model.config.head_dim * T
    assert counter.get_total_flops() / (B * T) == pytest.approx(stated + masked_half, rel=0.01)


def test_memory_falls_with_the_stage_and_zero3_splits_everything():
    memory = memory_per_rank(10**9, world_size=4, bf16=True)
    sizes = [memory[f"zero{stage}"] for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    # 2 weights + 4 gradients + 12 optimizer and master bytes a parameter, over four ranks
    assert sizes[3] == pytest.approx(18e9 / 4 / 2**30)


def test_a_folder_of_the_same_run_is_accepted_and_another_names_the_keys(tmp_path):
    write_json(tmp_path / "run.json", {"identity": {"seed": 1, "model": "a"}})
    check_run_folder(tmp_path, {"seed": 1, "model": "a"})
    with pytest.raises(ValueError, match="seed: 1 there, 2 here") as error:
        check_run_folder(tmp_path, {"seed": 2, "model": "a"})
    assert "model" not in str(error.value)


def test_the_loss_plot_is_drawn_from_metrics_alone(tmp_path):
    lines = [
        {"step": 1, "train/loss": 3.0, "eval/a/loss": 3.0, "eval/a/bits_per_byte": 1.0},
        {"step": 2, "train/loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plot_loss(tmp_path)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000
