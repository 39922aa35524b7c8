"""--torch_compile: which modules, what stays, what they compute, the error without a compiler."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mini_llm import build_model
from mini_llm.parallel.compile import (
    compile_layers,
    decoder_layers,
    eagerly,
    is_compiled,
    wants_compile,
)

CPU = torch.device("cpu")


MODELS = ["mini_llama3_tiny", "mini_deepseekv3_tiny", "mini_qwen3_next_tiny"]


@pytest.mark.parametrize("name", MODELS)
def test_every_decoder_layer_is_compiled_and_nothing_else_and_the_weights_keep_their_names(
    name, monkeypatch
):
    monkeypatch.setenv("CXX", "true")  # there, and not called before a layer runs
    model = build_model(name, vocab_size=320)
    keys = list(model.state_dict())
    compile_layers(model, CPU)
    compiled = [n for n, m in model.named_modules() if m._compiled_call_impl is not None]
    layers = model.config.num_hidden_layers + getattr(model.config, "num_nextn_predict_layers", 0)
    assert compiled == [f"model.layers.{i}" for i in range(layers)]
    assert list(model.state_dict()) == keys


def test_a_cpu_without_a_cpp_compiler_is_told_before_anything_is_compiled(monkeypatch):
    model = build_model("mini_llama3_tiny", vocab_size=320)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler and there is none; install g"):
        compile_layers(model, CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="install g"):
        compile_layers(model, CPU)
    assert all(module._compiled_call_impl is None for module in model.modules())


def script(folder: Path, text: str) -> str:
    """An executable file for the place of a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_gpu_without_a_c_compiler_or_pythons_headers_is_told_before_anything_is_compiled(
    monkeypatch, tmp_path
):
    model = build_model("mini_llama3_tiny", vocab_size=320)
    gpu = torch.device("cuda")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C compiler and there is none named no-such"):
        compile_layers(model, gpu)
    monkeypatch.setenv("CC", script(tmp_path, "! grep -q Python.h"))  # it has not the header
    with pytest.raises(RuntimeError, match=r"needs Python.h.*--torch_compile false"):
        compile_layers(model, gpu)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"needs a C compiler and there is none; install gcc"):
        compile_layers(model, gpu)
    assert all(module._compiled_call_impl is None for module in model.modules())
    monkeypatch.setenv("CC", script(tmp_path, "exit 0"))
    compile_layers(model, gpu)
    assert is_compiled(model)


def packed(rows: int, *documents: int) -> dict[str, Any]:
    """Rows of random tokens that hold documents of these lengths."""
    ids = torch.randint(320, (rows, sum(documents)))
    positions = torch.cat([torch.arange(length) for length in documents]).expand(rows, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}


def captured_calls(name: str, *documents: int) -> int:
    """Operations in all graphs that torch.compile takes a packed row's layers apart into."""
    torch._dynamo.reset()
    counters.clear()
    model = build_model(name, vocab_size=320, num_hidden_layers=1, mlp_only_layers=[0])
    for layer in decoder_layers(model):
        layer.compile(backend="eager")
    model(**packed(1, *documents))
    return counters["stats"]["calls_captured"]


def test_the_graph_of_a_delta_net_layer_does_not_grow_with_the_row():
    assert captured_calls("mini_qwen3_next_tiny", 100, 412) == (
        captured_calls("mini_qwen3_next_tiny", 30, 34)
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_with_experts_is_one_graph_under_autocast_too(autocast):
    torch._dynamo.reset()
    counters.clear()
    model = build_model(
        "mini_deepseekv3_tiny",
        vocab_size=320,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
    )
    for layer in decoder_layers(model):
        layer.compile(backend="eager")
    tokens = torch.randint(320, (2, 32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(tokens, labels=tokens, use_cache=False).loss.isfinite()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_layers_of_packed_rows_give_the_loss_and_gradients_of_eager_ones():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    # Layers of all three kinds: delta net or attention, dense or experts.
    model = build_model("mini_qwen3_next_tiny", vocab_size=320, num_hidden_layers=4).train()
    batches = [packed(2, 30, 98), packed(2, 60, 68), packed(2, 20, 50, 58)]

    def loss_and_gradients(batch: dict[str, Any]) -> list[torch.Tensor]:
        model.zero_grad()
        outputs = model(**batch)
        (outputs.loss + 0.1 * outputs.balance_loss).backward()
        return [outputs.loss.detach(), *(p.grad.clone() for p in model.parameters())]

    eager = [loss_and_gradients(batch) for batch in batches]
    compile_layers(model, CPU)
    for batch, expected in zip(batches, eager, strict=True):
        for ours, theirs in zip(loss_and_gradients(batch), expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert counters["stats"]["unique_graphs"] >= 3


@pytest.mark.parametrize(
    ("asked", "device", "zero_stage", "expert_parallel_size", "compiled"),
    [
        (None, "cuda", 0, 1, True),
        (None, "cuda", 2, 1, True),
        (None, "cuda", 3, 1, False),
        (None, "cuda", 1, 2, False),  # a compiled layer cannot spread its experts
        (None, "cpu", 1, 1, False),  # little to win there
        (True, "cpu", 1, 1, True),
        (False, "cuda", 1, 1, False),
    ],
)
def test_layers_are_compiled_where_it_pays_unless_the_run_says_otherwise(
    asked, device, zero_stage, expert_parallel_size, compiled
):
    wants = wants_compile(
        asked,
        torch.device(device),
        zero_stage=zero_stage,
        expert_parallel_size=expert_parallel_size,
    )
    assert wants is compiled


def test_evaluation_of_another_shape_runs_compiled_layers_as_they_are_written():
    model = build_model("mini_llama3_tiny", num_hidden_layers=1, vocab_size=64)
    runs = []

    def backend(graph, inputs):
        runs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer.compile(backend=backend)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
        compiled = len(runs)
        with eagerly():
            model(input_ids=torch.ones(2, 5, dtype=torch.long), use_cache=False)
    assert compiled > 0
    assert len(runs) == compiled
