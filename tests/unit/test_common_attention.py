"""Which attention computes a run, and what is said of it."""

import re

import pytest
import torch

from mini_llm import build_model
from mini_llm.models import kernels_in_use, preset_config
from mini_llm.models.common.attention import check_attention, why_no_varlen_kernel

GPU, CPU = torch.device("cuda"), torch.device("cpu")
HALF = torch.bfloat16


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("model", "overrides", "why"),
    [
        *((f"{name}{size}", {}, "") for name in ("mini_llama3", "mini_qwen3_next")
          for size in ("", "_tiny")),
        ("mini_deepseekv3", {}, ""),
        ("mini_deepseekv3_tiny", {}, ""),
        ("mini_llama3_tiny", {"head_dim": 20}, "heads of 20"),
        ("mini_llama3_tiny", {"head_dim": 264}, "heads of 264"),
        ("mini_deepseekv3_tiny", {"v_head_dim": 512}, "heads of 512"),
        ("mini_llama3_tiny", {"attention_dropout": 0.1}, "attention_dropout"),
    ],
)  # fmt: skip
def test_packed_rows_take_the_variable_length_kernel_unless_it_cannot_compute_them(
    model, overrides, why
):
    assert why_no_varlen_kernel(preset_config(model, **overrides), GPU, HALF) == why


def test_no_variable_length_kernel_without_a_recent_gpu_or_in_fp32(monkeypatch):
    config = preset_config("mini_llama3_tiny")
    assert why_no_varlen_kernel(config, CPU, HALF) == "no GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert why_no_varlen_kernel(config, GPU, torch.float32) == "fp32"
    assert why_no_varlen_kernel(config, GPU, HALF) == "a GPU older than Ampere"


@pytest.mark.usefixtures("ampere")
def test_the_kernels_that_are_named_are_those_that_compute(monkeypatch):
    def named(device_type: str, *, half: bool, compiled: bool = True, **overrides):
        config = build_model("mini_deepseekv3_tiny", vocab_size=64, **overrides).config
        config._attn_implementation = "sdpa"
        return kernels_in_use(
            config, device_type=device_type, half_precision=half, compiled=compiled
        )

    monkeypatch.setattr("mini_llm.models.common.triton.missing_for_triton", lambda: None)
    found = named("cuda", half=True)
    assert found["attention"] == "sdpa (packed rows: varlen_attn)"
    assert found["loss"].endswith(", compiled") and found["experts"] == "grouped_mm"
    found = named("cuda", half=False)
    assert found["attention"] == "sdpa (packed rows: block-diagonal mask, for fp32)"
    assert found["experts"] == "transformers' grouped_mm"
    assert named("cuda", half=False, compiled=False)["experts"] == "grouped_mm"
    found = named("cuda", half=True, attention_dropout=0.1)
    assert found["attention"].endswith("block-diagonal mask, for attention_dropout)")
    found = named("cpu", half=True)
    assert found["attention"] == "sdpa (packed rows: one call a document)"
    assert found["loss"] == "chunked linear cross-entropy"
    monkeypatch.setattr("mini_llm.models.common.triton.missing_for_triton", lambda: "gcc")
    assert named("cuda", half=True)["loss"].endswith(", not compiled: that needs gcc")


@pytest.mark.parametrize(
    ("implementation", "device", "bf16", "sentence"),
    [
        ("flex_attention", CPU, True, "it has no gradient on a CPU"),
        ("flash_attention_2", CPU, True, "it needs a GPU"),
        ("flash_attention_2", GPU, False, "it computes in half precision alone; add --bf16 true"),
    ],
)
def test_an_attention_that_cannot_train_is_refused(implementation, device, bf16, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_attention(implementation, device, bf16=bf16)
    check_attention(implementation, GPU, bf16=True)
    check_attention("sdpa", CPU, bf16=False)
