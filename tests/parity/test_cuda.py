"""What only a CUDA GPU can show: its kernels compute what the readable references compute."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_llm.models import build_model
from mini_llm.models.common import delta_net
from mini_llm.models.common.loss import linear_cross_entropy, linear_cross_entropy_reference
from mini_llm.parallel import snapshot
from mini_llm.parallel.compile import compile_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def one_configuration_a_triton_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tuning flash-linear-attention's kernels takes minutes, and what they compute is the same."""
    from triton.runtime.autotuner import Autotuner

    choose = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda *args: choose(*args)[:1])
    # Else later runs would find the untuned choice in the cache.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


MODELS = ["mini_llama3_tiny", "mini_deepseekv3_tiny", "mini_qwen3_next_tiny"]
LENGTHS = [[100, 1, 60, 95], [3, 200, 53], [256]]  # documents of three rows of 256 tokens


def batch(vocab_size: int = 512) -> dict[str, torch.Tensor]:
    """Three packed rows on the GPU, without padding."""
    torch.manual_seed(0)
    input_ids = torch.randint(1, vocab_size, (3, 256), device="cuda")
    positions = [torch.cat([torch.arange(n) for n in row]) for row in LENGTHS]
    position_ids = torch.stack(positions).cuda()
    labels = input_ids.masked_fill(position_ids == 0, -100)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def model_of(name: str, **overrides: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_model(name, vocab_size=512, pad_token_id=0, eos_token_id=0, **overrides).cuda()


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.float() - reference.float()).norm() / reference.float().norm())


def loss_and_gradients(model: torch.nn.Module, **inputs: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss), gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_on_packed_rows_is_fp32s_within_rounding(name: str, compiled: bool) -> None:
    inputs = batch()
    reference = model_of(name)
    reference.set_attn_implementation("eager")
    loss, gradients = loss_and_gradients(reference, **inputs)
    model = model_of(name)
    if compiled:
        compile_layers(model, torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        bf16_loss, bf16_gradients = loss_and_gradients(model, **inputs)
    assert abs(bf16_loss - loss) < 2e-3 * loss
    key = "model.embed_tokens.weight"
    assert relative_error(bf16_gradients[key], gradients[key]) < 0.05


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_of_a_packed_row_do_not_see_each_other(name: str, dtype: torch.dtype) -> None:
    inputs = batch()
    model = model_of(name).to(dtype).eval()
    del inputs["labels"]
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        inputs["input_ids"][0, :100] = 7  # the first row's first document
        after = model(**inputs, use_cache=False).logits
    assert not torch.equal(after[0, :100], before[0, :100])
    # Not bit for bit: other numbers of tokens for an expert change the shapes of products.
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert relative_error(after[0, 100:], before[0, 100:]) < tolerance
    assert relative_error(after[1:], before[1:]) < tolerance


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_reference(dtype: torch.dtype, known: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5000, 96, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(32_004, 96, device="cuda", dtype=dtype) * 0.05
    weight.requires_grad_()
    targets = torch.randint(0, 32_004, (5000,), device="cuda")
    targets[::7] = -100
    num_targets = int((targets != -100).sum()) if known else None
    ours = partial(linear_cross_entropy, num_targets=num_targets)
    results = []
    for function in (ours, linear_cross_entropy_reference):
        hidden.grad = weight.grad = None
        loss = function(hidden, weight, targets)
        loss.backward()
        results.append((float(loss), hidden.grad.float(), weight.grad.float()))
    (loss, hidden_grad, weight_grad), (reference, *reference_grads) = results
    assert abs(loss - reference) < 1e-5 * reference
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert relative_error(hidden_grad, reference_grads[0]) < tolerance
    assert relative_error(weight_grad, reference_grads[1]) < tolerance


@pytest.mark.parametrize("packed", [False, True])
def test_the_delta_rule_kernel_is_the_reference(packed: bool) -> None:
    kernels = delta_net.find_kernels()
    if kernels.delta_rule is None:
        pytest.skip("needs flash-linear-attention")
    torch.manual_seed(0)
    B, T, K, H, d = 3, 256, 2, 4, 64
    shapes = [(B, T, K, d), (B, T, K, d), (B, T, H, d)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    inputs.append(-torch.rand(B, T, H, device="cuda"))
    inputs.append(torch.rand(B, T, H, device="cuda").bfloat16())
    for x in inputs:
        x.requires_grad_()
    boundaries = None
    if packed:
        ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in LENGTHS])
        ends = torch.tensor([0, *(n for row in LENGTHS for n in row)]).cumsum(0)
        boundaries = delta_net.Boundaries(ids.int().cuda(), ends.int().cuda())
    direction = torch.randn(B, T, H, d, device="cuda")
    results = []
    for use in (kernels, None):
        output, state = delta_net.delta_rule(
            *([x if use else x.float() for x in inputs]), boundaries=boundaries, kernels=use
        )
        gradients = torch.autograd.grad((output.float() * direction).sum(), inputs)
        results.append((output, state, *gradients))
    names = ["output", "state", "query", "key", "value", "log decay", "beta"]
    for name, computed, reference in zip(names, *results, strict=True):
        assert relative_error(computed, reference) < 0.02, name


def test_a_training_step_on_packed_rows_makes_no_mask_of_t_by_t() -> None:
    inputs = {k: v.repeat(1, 8) for k, v in batch().items()}  # rows of 2,048 tokens
    model = model_of("mini_llama3_tiny", num_hidden_layers=1).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model.model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        )
    peak = torch.cuda.max_memory_allocated() - before
    hidden = 3 * 2048 * model.config.hidden_size * 2
    assert peak < 40 * hidden, f"{peak} bytes, {peak / hidden:.0f} times the hidden states"


@pytest.mark.parametrize("share_of_room", [snapshot.SHARE_OF_ROOM, 0.0])
def test_a_snapshot_is_of_its_moment_wherever_its_copies_lie(
    share_of_room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SHARE_OF_ROOM", share_of_room)
    flat = torch.arange(2.0**24, device="cuda")
    expected = flat.cpu()
    state = {"flat": flat, "view": flat[1000:2000], "on_host": torch.arange(5)}
    before = torch.cuda.memory_allocated()
    taken = snapshot.Snapshot(flat.device)
    with taken.taking_saves():
        torch.save(state, tmp_path / "state.pt")
    weights = taken.copy(flat)
    taken.close()
    held = torch.cuda.memory_allocated() - before
    assert weights.is_cuda == (share_of_room > 0) == (held > flat.numel())
    for _ in range(50):  # training goes on, also while it is written
        flat.mul_(-1.001)
    written: list[torch.Tensor] = []

    def write() -> None:
        taken.write()
        with taken.reading():
            written.append(weights.cpu())

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        flat.mul_(-1.001)
    found = torch.load(tmp_path / "state.pt")
    assert found["flat"].cpu().equal(expected) and written[0].equal(expected)
    assert found["view"].cpu().equal(expected[1000:2000]) and found["on_host"].tolist()[4] == 4
