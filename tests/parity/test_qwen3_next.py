"""What mini_qwen3_next alone has: recurrent state, short convolution, gates, routed experts.

The tests that every architecture shares are in ``test_stock_parity.py``.
"""

import math

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3NextForCausalLM, StaticCache

from mini_llm import build_model, load_model
from mini_llm.bench.operators import Operators
from mini_llm.models.qwen3_next import kernels_in_use
from mini_llm.training.sizes import count_parameters, training_flops

SMALL = {"vocab_size": 160, "pad_token_id": 0, "eos_token_id": 0}


def _build(**overrides):
    torch.manual_seed(0)
    model = build_model("mini_qwen3_next_tiny", **{**SMALL, **overrides})
    for parameter in model.parameters():  # norms at exactly 0 would hide a wrong norm
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return _build()


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(1))


def _packed(lengths: list[int], rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    return _tokens(rows, sum(lengths)), positions


# ---- The checkpoint is a stock checkpoint --------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"norm_topk_prob": False, "num_experts_per_tok": 3},
        {"mlp_only_layers": [], "decoder_sparse_step": 2},
        {"num_experts": 0},
        {"linear_num_key_heads": 4, "linear_value_head_dim": 40, "linear_conv_kernel_dim": 3},
        {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 6},
    ],
    ids=str,
)
def test_a_stock_model_loads_here_and_ours_there_with_the_same_logits(overrides, tmp_path):
    ours = _build(**overrides)
    torch.manual_seed(2)
    stock = Qwen3NextForCausalLM(ours.config).eval()
    stock.save_pretrained(tmp_path / "stock")
    loaded, info = type(ours).from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = _tokens(2, 70)
    assert (loaded.eval()(tokens).logits - stock(tokens).logits).abs().max() <= 1e-5
    ours.save_pretrained(tmp_path / "ours")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (back.eval()(tokens).logits - ours(tokens).logits).abs().max() <= 1e-5


def test_each_expert_has_its_own_matrices_on_disk(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in keys
    assert not any("gate_up_proj" in key for key in keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_training_and_a_save_the_stock_class_still_agrees(dtype, tmp_path):
    model = _build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        tokens, positions = _packed([9, 1, 30, 1, 1])
        output = model((tokens + step) % 160, position_ids=positions, labels=tokens)
        (output.loss + 0.01 * output.balance_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(dtype).save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = _tokens(2, 100)
    with torch.no_grad():
        assert (ours(tokens).logits - stock(tokens).logits).abs().max() <= 1e-5
    for loaded in (ours, stock):
        loaded.train()(tokens, labels=tokens).loss.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        scale = parameter.grad.abs().max()
        assert (gradients[name].grad - parameter.grad).abs().max() <= 1e-4 * scale, name


@torch.no_grad()
def test_a_changed_decay_or_norm_breaks_the_agreement(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokens = _tokens(2, 50)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    for name in (
        *("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"),
        *("linear_attn.conv1d.weight", "linear_attn.in_proj_ba.weight", "input_layernorm.weight"),
    ):
        changed = load_model(tmp_path)
        changed.get_parameter(f"model.layers.1.{name}").add_(0.05)
        assert (changed(tokens).logits - stock).abs().max() > 1e-3, name


def test_layer_types_follow_the_number_of_layers():
    config = build_model("mini_qwen3_next_tiny", num_hidden_layers=8, **SMALL).config
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert len(config.layer_types) == 8 and full == [3, 7]


def test_the_full_preset_has_its_documented_size():
    with torch.device("meta"):
        model = build_model("mini_qwen3_next")
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = config.num_experts - config.num_experts_per_tok
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    active = total - 9 * idle * one_expert
    assert round(total / 1e6, 1) == 162.2 and round(active / 1e6, 1) == 98.5
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [
        3,
        7,
        11,
    ]


def test_initial_decays_span_short_and_long_memories():
    model = build_model("mini_qwen3_next_tiny", linear_num_value_heads=64, **SMALL)
    layer = model.model.layers[0].linear_attn
    with torch.no_grad():
        memory = 1 / (layer.A_log.exp() * torch.nn.functional.softplus(layer.dt_bias))
    assert memory.min() < 5 and memory.max() > 50  # tokens until a factor e is forgotten


# ---- Packed rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_row_gives_the_gradients_of_its_documents_one_by_one(checkpointing):
    lengths, padding = [70, 1, 1, 2, 40, 1, 90], 12
    tokens, positions = _packed([*lengths, *[1] * padding])
    labels = tokens.clone()
    starts = positions == 0
    labels[starts] = -100
    packed, separate = _build().train(), _build().train()
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
    items = torch.tensor(float((labels != -100).sum()))
    loss = packed(tokens, position_ids=positions, labels=labels, num_items_in_batch=items).loss
    loss.backward()
    total = torch.zeros(())
    for part, part_labels in zip(
        tokens.split([*lengths, padding], 1), labels.split([*lengths, padding], 1), strict=True
    ):
        if part.shape[1] > 1 and (part_labels != -100).any():
            output = separate(part, labels=part_labels, num_items_in_batch=items)
            output.loss.backward()
            total += output.loss.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=1e-6)
    for (name, a), b in zip(separate.named_parameters(), packed.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-3 * a.grad.abs().max(), name


@torch.no_grad()
def test_editing_one_document_of_a_row_leaves_the_others_alone(model):
    tokens, positions = _packed([3, 61, 1, 64, 5])
    before = model(tokens, position_ids=positions).logits
    edited = tokens.clone()
    edited[:, 3:64] = (edited[:, 3:64] + 7) % 160
    after = model(edited, position_ids=positions).logits
    changed = (before - after).abs().amax((0, 2))
    assert changed[:3].max() <= 2e-6 and changed[64:].max() <= 2e-6
    assert changed[3:64].min() > 1e-3


# ---- Decoding ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("parts", [[1] * 12, [2, 1, 70, 3, 1, 1, 12], [90]], ids=str)
def test_a_prompt_in_pieces_with_left_padding_equals_one_forward(model, kind, parts):
    T = sum(parts)
    tokens, mask = _tokens(3, T), torch.ones(3, T, dtype=torch.long)
    for row, padding in enumerate((0, 1, 5)):
        mask[row, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=T)
    )
    outputs, seen = [], 0
    for part in tokens.split(parts, 1):
        end = seen + part.shape[1]
        outputs.append(
            model(
                part,
                attention_mask=mask[:, :end],
                position_ids=positions[:, seen:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
        seen = end
    real = mask.bool()
    assert (torch.cat(outputs, 1) - full)[real].abs().max() <= 1e-4


@torch.no_grad()
def test_left_padding_does_not_change_a_row(model):
    tokens = _tokens(1, 20)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), tokens), 1)
    mask = (torch.arange(27) >= 7).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
    assert (output - model(tokens).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_the_state_in_the_cache_is_fp32_even_in_a_bf16_model():
    model = _build().to(torch.bfloat16)
    cache = model(_tokens(1, 30), use_cache=True).past_key_values
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@torch.no_grad()
def test_a_later_token_does_not_change_an_earlier_logit(model):
    tokens = _tokens(1, 130)
    before = model(tokens).logits
    for position in (1, 63, 64, 100, 129):
        edited = tokens.clone()
        edited[:, position] = (edited[:, position] + 1) % 160
        change = (model(edited).logits - before).abs().amax((0, 2))
        assert change[:position].max() <= 2e-6 and change[position] > 1e-4


def test_assisted_generation_is_refused_because_a_state_cannot_be_rolled_back(model):
    with pytest.raises(ValueError, match="stateful"):
        model.generate(_tokens(1, 5), max_new_tokens=3, prompt_lookup_num_tokens=2)


# ---- Experts -------------------------------------------------------------------------------------


def test_transformers_own_balance_loss_is_reproduced(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokens, mask = _tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    kwargs = {"labels": tokens, "attention_mask": mask, "output_router_logits": True}
    ours = load_model(tmp_path).train()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    a, b = ours(tokens, **kwargs), stock(tokens, **kwargs)
    torch.testing.assert_close(a.aux_loss, b.aux_loss)
    torch.testing.assert_close(a.loss, b.loss)
    assert len(a.router_logits) == len(b.router_logits) == 3
    assert (b.loss - ours(tokens, **{**kwargs, "output_router_logits": False}).loss).abs() > 1e-3
    a.loss.backward()
    b.loss.backward()
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.3.mlp.gate.weight"):
        x, y = ours.get_parameter(name).grad, stock.get_parameter(name).grad
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()


def test_the_balance_loss_is_a_mean_over_rows_and_is_not_part_of_the_loss():
    model = _build().train()
    tokens = _tokens(4, 30)
    whole = model(tokens, labels=tokens)
    halves = [model(part, labels=part) for part in tokens.split(2)]
    mean = (halves[0].balance_loss + halves[1].balance_loss) / 2
    torch.testing.assert_close(whole.balance_loss, mean)
    assert whole.balance_loss >= 3 * 0.9  # three layers with experts, each 1 if balanced
    torch.testing.assert_close(whole.loss, model.eval()(tokens, labels=tokens).loss)
    assert model(tokens, labels=tokens).balance_loss is None  # nothing to balance outside training


def test_padding_counts_neither_in_the_balance_loss_nor_as_load():
    tokens, positions = _packed([20, 11])
    padded = torch.cat((tokens, torch.zeros(2, 9, dtype=torch.long)), 1)
    padded_positions = torch.cat((positions, torch.zeros(2, 9, dtype=torch.long)), 1)
    results = []
    for ids, places in ((tokens, positions), (padded, padded_positions)):
        model = _build().train()
        balance_loss = model(ids, position_ids=places, labels=ids).balance_loss
        loads = [model.model.layers[i].mlp.gate.tokens_per_expert for i in (1, 2, 3)]
        results.append((balance_loss, torch.stack(loads)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1].sum(1) == 2 * 31 * 2).all()  # rows × tokens × experts a token


def test_checkpointing_and_evaluation_change_neither_load_nor_balance_gradient():
    tokens = _tokens(2, 30)
    results = []
    for checkpointing in (None, False, True):
        model = _build().train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model(tokens, labels=tokens).balance_loss.backward()
        model.eval()(tokens)
        gate = model.model.layers[2].mlp.gate
        results.append((gate.tokens_per_expert, gate.weight.grad))
    for load, gradient in results[1:]:
        assert torch.equal(load, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
    assert results[0][1].abs().max() > 0


# ---- Cost ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_step_of_the_full_preset_dispatches_few_operators():
    model = build_model("mini_qwen3_next", vocab_size=32_000).train()
    tokens = torch.randint(32_000, (2, 256))
    for positions in (None, _packed([100, 1, 155])[1]):
        model.zero_grad()
        with Operators() as count:
            output = model(tokens, position_ids=positions, labels=tokens, use_cache=False)
            (output.loss + 0.01 * output.balance_loss).backward()
        assert count.operators.total() <= 5_000
        assert count.synchronisations.total() <= 1, count.synchronisations


def test_under_autocast_experts_and_delta_nets_multiply_in_bf16_but_routers_do_not():
    model = _build().train()
    tokens = _tokens(2, 130)
    with torch.autocast("cpu", torch.bfloat16), Operators() as count:
        model(tokens)
    dtypes = count.product_dtypes
    assert dtypes["_grouped_mm", torch.bfloat16] == 6 and not dtypes["_grouped_mm", torch.float32]
    assert dtypes["bmm", torch.bfloat16] >= 3 * 8 and not dtypes["bmm", torch.float32]
    assert dtypes["mm", torch.float32] == 3  # one router in each of three layers
    assert dtypes["mm", torch.bfloat16] > 3


def test_the_training_flops_are_those_of_the_operators():
    model = build_model("mini_qwen3_next_tiny", **SMALL).train()
    model.set_attn_implementation("eager")  # the counter knows its products, not the fused kernel
    tokens = _tokens(1, 512)

    # What PyTorch's counter does not know, or (grouped convolution, backward) gets wrong.
    def grouped(a, b, *_, **__):  # (S, D)(E, D, F), or for the matrices' gradient (D, S)(S, F)
        return 2 * math.prod(a) * b[-1]

    def solve(matrix, right_side, *_, **__):
        return math.prod(right_side) * matrix[-1]

    def convolution_backward(grad, x, weight, *_, **__):
        return 4 * math.prod(grad) * weight[-1]

    mapping = {
        torch.ops.aten._grouped_mm: grouped,
        torch.ops.aten.linalg_solve_triangular: solve,
        torch.ops.aten.convolution_backward: convolution_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    parameters = count_parameters(model)
    expected = training_flops(model.config, parameters, 512).per_token * 512
    # 1% apart: in the first of 8 chunks the state is empty and has no gradient.
    assert abs(counter.get_total_flops() / expected - 1) <= 0.015


def test_the_kernels_in_use_are_named():
    names = kernels_in_use()
    assert set(names) == {"delta_rule", "short_convolution"}
    assert torch.cuda.is_available() or set(names.values()) == {"pytorch"}
