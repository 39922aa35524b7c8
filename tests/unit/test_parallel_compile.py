"""--torch_compile: which modules, what stays, and the error without a compiler."""

import pytest
import torch

from mini_llm import build_model
from mini_llm.parallel.compile import compile_layers

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
