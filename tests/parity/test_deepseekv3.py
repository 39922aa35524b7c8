"""What only mini_deepseekv3 has: routing, experts, compressed cache, multi-token prediction."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.modeling_layers import MtpModel

from mini_llm import build_model, load_model
from mini_llm.bench.operators import Operators
from mini_llm.models.common.loss import next_tokens
from mini_llm.models.deepseekv3.modeling import mtp_targets, reaches, sequence_balance_loss

SMALL = {"vocab_size": 160, "pad_token_id": 0, "eos_token_id": 0}


def _build(seed: int = 0, **overrides):
    """A tiny model whose norms, router biases and weights are all off their initial values."""
    torch.manual_seed(seed)
    model = build_model("mini_deepseekv3_tiny", **{**SMALL, **overrides})
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += 0.02 * torch.randn_like(buffer)
    return model


def _tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(seed))


def _positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def _stock(model, folder, **kwargs):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def _names_of_disk(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# ---- Stock checkpoints ---------------------------------------------------------------------------


def test_a_stock_checkpoint_loads_with_no_missing_or_unexpected_key_and_the_same_logits(tmp_path):
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(_build(num_nextn_predict_layers=0).config).eval()
    stock.save_pretrained(tmp_path)
    ours, info = load_model(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        difference = ours.eval()(_tokens(2, 40)).logits - stock(_tokens(2, 40)).logits
    assert difference.abs().max() <= 1e-5


def test_a_saved_folder_is_the_published_layout(tmp_path):
    _build().save_pretrained(tmp_path)
    names = _names_of_disk(tmp_path)
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names  # un-fused, as on the hub
    assert not [name for name in names if "gate_up_proj" in name]
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "mlp.experts.0.down_proj"):
        assert f"model.layers.4.{name}.weight" in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["topk_method"] == "noaux_tc" and config["scoring_func"] == "sigmoid"
    assert config["num_nextn_predict_layers"] == 1
    assert "auto_map" not in config


def test_mtp_layers_survive_a_round_trip_in_shards_and_can_be_dropped(tmp_path):
    model = _build()
    model.save_pretrained(tmp_path / "full", max_shard_size="300KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 2
    again, info = load_model(tmp_path / "full", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    model.save_pretrained(tmp_path / "dropped", drop_mtp=True)
    assert model.config.num_nextn_predict_layers == 1
    assert not [n for n in _names_of_disk(tmp_path / "dropped") if "layers.4." in n]
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        dropped, info = load(tmp_path / "dropped", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert dropped.config.num_nextn_predict_layers == 0
        with torch.no_grad():
            logits = dropped.eval()(_tokens(1, 20)).logits
            assert (logits - model.eval()(_tokens(1, 20)).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        {"q_lora_rank": None},
        {"rope_interleave": False},
        {"attention_bias": True},
        {"norm_topk_prob": False},
        {"n_group": 1, "topk_group": 1},
        {"n_shared_experts": 2},
        {"tie_word_embeddings": False},
        {"num_hidden_layers": 2},
        {"num_attention_heads": 8},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0,
                             "mscale": 1.0, "mscale_all_dim": 1.0,
                             "original_max_position_embeddings": 64}},
    ],
    ids=str,
)  # fmt: skip
def test_every_variant_of_the_stock_config_gives_the_stock_logits_and_gradients(
    overrides, tmp_path
):
    ours = _build(**overrides).train()
    stock = _stock(ours, tmp_path).train()
    tokens = _tokens(2, 90)
    loss, reference = ours(tokens, labels=tokens).loss, stock(tokens, labels=tokens).loss
    assert (ours.eval()(tokens).logits - stock.eval()(tokens).logits).abs().max() <= 1e-5
    loss.backward()
    reference.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        scale = parameter.grad.abs().max()
        assert (gradients[name].grad - parameter.grad).abs().max() <= 1e-4 * scale, name


@torch.no_grad()
def test_the_router_bias_takes_part_in_the_choice(tmp_path):
    ours = _build().eval()
    stock = _stock(ours, tmp_path).eval()
    tokens = _tokens(2, 50)
    reference = stock(tokens).logits
    assert (ours(tokens).logits - reference).abs().max() <= 1e-5
    ours.model.layers[2].mlp.gate.e_score_correction_bias[3] += 0.1
    assert (ours(tokens).logits - reference).abs().max() > 1e-3


def test_twenty_training_steps_and_a_bf16_checkpoint_keep_the_parity(tmp_path):
    ours = _build().train()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    for step in range(20):
        tokens = _tokens(2, 40, seed=step)
        output = ours(tokens, labels=tokens)
        (output.loss + 0.3 * output.mtp_loss + 1e-4 * output.balance_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = _tokens(2, 50)
    ours.eval()
    with torch.no_grad():
        stock = _stock(ours, tmp_path / "fp32").eval()
        assert (ours(tokens).logits - stock(tokens).logits).abs().max() <= 1e-5
        stock = _stock(ours.to(torch.bfloat16), tmp_path / "bf16", dtype=torch.float32).eval()
        ours = load_model(tmp_path / "bf16", dtype=torch.float32).eval()
        assert (ours(tokens).logits - stock(tokens).logits).abs().max() <= 1e-5


def test_the_router_bias_stays_fp32_in_a_bf16_model_and_its_checkpoint(tmp_path):
    model = _build()
    exact = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    for bf16_model in (model, loaded):
        gate = bf16_model.model.layers[1].mlp.gate
        assert gate.weight.dtype == torch.bfloat16
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, exact)


# ---- Router and experts --------------------------------------------------------------------------


def test_the_chosen_experts_lie_in_the_best_groups_and_weigh_by_their_raw_score():
    model = _build()
    gate, config = model.model.layers[1].mlp.gate, model.config
    hidden = torch.randn(30, config.hidden_size)
    logits, weights, chosen = gate(hidden)
    for n in range(30):
        scores = (gate.weight @ hidden[n]).sigmoid()
        biased = scores + gate.e_score_correction_bias
        groups = biased.view(4, 2).sum(1).topk(2).indices.tolist()
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        best = sorted(allowed, key=lambda e: -biased[e].item())[:2]
        assert set(chosen[n].tolist()) == set(best)
        expected = 2.5 * scores[chosen[n]] / scores[chosen[n]].sum()
        torch.testing.assert_close(weights[n], expected)
        torch.testing.assert_close(logits[n].sigmoid(), scores)


def test_autocast_runs_expert_matrices_in_bf16_and_the_router_in_fp32():
    model = _build().train()
    tokens = _tokens(2, 24)
    with Operators() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens, labels=tokens)
        output.loss.backward()
    # 3 layers with experts and an MTP layer, forward and backward.
    assert seen.product_dtypes["_grouped_mm", torch.bfloat16] == 2 * 4 + 4 * 4
    assert seen.product_dtypes["_grouped_mm", torch.float32] == 0
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = model.model.layers[1].mlp.gate(torch.randn(5, 128))
    assert logits.dtype == weights.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.slow
def test_the_preset_has_the_designed_size_and_needs_few_operators_and_one_synchronisation():
    model = build_model("mini_deepseekv3", vocab_size=32_000, num_nextn_predict_layers=0).train()
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(n for name, n in parameters.items() if ".mlp.experts." in name)
    assert abs(sum(parameters.values()) - routed * 6 / 8 - 103e6) < 1e6  # active: 2 experts of 8
    with torch.device("meta"):
        with_mtp = build_model("mini_deepseekv3", vocab_size=32_000)
    assert abs(sum(p.numel() for p in with_mtp.parameters()) - 181e6) < 1e6

    tokens = _tokens(2, 256)
    packed = _positions(100, 156).expand(2, -1)
    for positions in (None, packed):
        model.zero_grad()
        with Operators() as seen:
            output = model(tokens, position_ids=positions, labels=tokens, use_cache=False)
            (output.loss + 1e-4 * output.balance_loss).backward()
        assert seen.operators.total() <= 3_000
        assert seen.synchronisations.total() <= 1, seen.synchronisations


# ---- Cache ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_cache_holds_only_the_latent_and_the_shared_rotary_key():
    model = _build().eval()
    cache = model(_tokens(2, 10), use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 10, model.config.kv_lora_rank)
        assert layer.values.shape == (2, 1, 10, model.config.qk_rope_head_dim)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attending_to_the_compressed_cache_equals_expanding_it(implementation, monkeypatch):
    model = _build().eval()
    model.set_attn_implementation(implementation)
    tokens = _tokens(2, 12)
    attention = type(model.model.layers[0].self_attn)
    forms = []
    compressed = attention.compressed
    monkeypatch.setattr(
        attention, "compressed", lambda *args: (forms.append(1), compressed(*args))[1]
    )
    results = []
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(attention, "can_stay_compressed", lambda *_: False)
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        results.append(model(tokens[:, -1:], past_key_values=cache).logits)
    assert len(forms) == model.config.num_hidden_layers
    assert (results[0] - results[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "strategy",
    [
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static", "num_beams": 2},
        {"do_sample": True, "top_k": 20},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_every_decoding_strategy_generates_what_the_stock_class_does(strategy, tmp_path):
    ours = _build().eval()
    stock = _stock(ours, tmp_path).eval()
    outputs = []
    for model in (ours, stock):
        torch.manual_seed(0)
        outputs.append(
            model.generate(_tokens(1, 12), max_new_tokens=10, **{"do_sample": False, **strategy})
        )
    assert torch.equal(*outputs)


def test_a_static_cache_decodes_in_one_compiled_graph():
    model = _build(num_hidden_layers=2).eval()
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # transformers compiles by itself on GPUs only
    tokens = _tokens(2, 12)
    kwargs = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    compiled = model.generate(
        tokens, cache_implementation="static", compile_config=compile_config, **kwargs
    )
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, model.generate(tokens, **kwargs))


# ---- Multi-token prediction ----------------------------------------------------------------------


@torch.no_grad()
def test_mtp_equals_transformers_own_mtp_model_which_drafts_with_its_weights(tmp_path):
    ours = _build(num_nextn_predict_layers=2).eval()
    stock = _stock(ours, tmp_path).eval()
    stock._keys_to_ignore_on_load_unexpected |= {r"model\.layers\.4.*", r"model\.layers\.5.*"}
    reference = MtpModel.from_pretrained(stock).eval()
    tokens, T = _tokens(2, 20), 20
    hidden = stock(tokens, output_hidden_states=True).hidden_states[-1]
    expected = []
    for depth, layer in enumerate(reference.layers, start=1):
        positions = torch.arange(T - depth)[None]
        hidden = layer(
            stock.model.embed_tokens(tokens[:, depth:]),
            hidden[:, : T - depth],
            position_embeddings=stock.model.rotary_emb(hidden, positions),
            attention_mask=torch.full((T - depth, T - depth), -torch.inf).triu(1)[None, None],
            position_ids=positions,
            past_key_values=None,
        )
        logits = stock.lm_head(hidden)[:, : T - depth - 1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, depth + 1 :].flatten())
        expected.append(loss)
    output = ours(tokens, labels=tokens, predict_further=True)
    torch.testing.assert_close(output.mtp_loss, torch.stack(expected).mean())
    greedy = ours.generate(tokens[:1], max_new_tokens=12, do_sample=False)
    drafted = stock.generate(tokens[:1], max_new_tokens=12, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, greedy)


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_loss_and_gradients_of_a_packed_row_are_those_of_its_documents(depths):
    lengths, padding = [9, 1, 2, 20, 3], 5
    tokens = _tokens(2, sum(lengths) + padding)
    labels = tokens.clone()
    labels[:, 14:18] = -100  # a stretch that is not supervised, as a prompt in fine-tuning
    positions = _positions(*lengths, *[1] * padding).expand(2, -1)
    packed = _build(num_nextn_predict_layers=depths).train()
    packed_labels = labels.masked_fill(positions == 0, -100)
    output = packed(tokens, position_ids=positions, labels=packed_labels, num_items_in_batch=10)
    output.mtp_loss.backward()
    separate = _build(num_nextn_predict_layers=depths).train()
    total = 0.0
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        loss = separate(tokens[:, part], labels=labels[:, part], num_items_in_batch=10).mtp_loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(output.mtp_loss.detach(), total, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(packed.named_parameters(), separate.parameters(), strict=True):
        scale = b.grad.abs().max()
        assert (a.grad - b.grad).abs().max() <= 1e-3 * scale + 1e-9, name


def test_mtp_targets_are_the_tokens_after_next_inside_the_document_and_supervised():
    positions = _positions(4, 2, 1, 1)[None]  # two documents and padding
    labels = torch.tensor([[-100, 11, 12, 13, -100, 21, -100, -100]])
    real = torch.tensor([[True] * 6 + [False] * 2])
    targets = mtp_targets(next_tokens(labels), reaches(positions, real, 2), depth=1)
    # Position t answers for labels[t + 2].
    assert targets.tolist() == [[12, 13, -100, -100, -100, -100, -100, -100]]
    labels[0, 2] = -100
    targets = mtp_targets(next_tokens(labels), reaches(positions, real, 2), depth=1)
    assert targets.tolist() == [[-100, 13, -100, -100, -100, -100, -100, -100]]
    assert not reaches(positions, real, 9).any()
    assert (mtp_targets(labels, reaches(positions, real, 10), depth=9) == -100).all()


def test_mtp_ignores_left_and_right_padding():
    model = _build().train()
    tokens = _tokens(2, 10)
    bare = model(tokens, labels=tokens).mtp_loss
    for before, after in ((3, 0), (0, 3)):
        padded = F.pad(tokens, (before, after))
        mask = F.pad(torch.ones_like(tokens), (before, after))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        labels = F.pad(tokens, (before, after), value=-100)
        loss = model(padded, attention_mask=mask, position_ids=positions, labels=labels).mtp_loss
        # The first token of a left-padded row has a label of its own, and nobody to predict it.
        torch.testing.assert_close(loss, bare, rtol=1e-4, atol=1e-5)


def test_mtp_stays_out_of_the_main_loss_and_of_evaluation():
    with_mtp, without = _build(), _build(num_nextn_predict_layers=0)
    shared = {k: v for k, v in with_mtp.state_dict().items() if "layers.4." not in k}
    without.load_state_dict(shared)
    tokens = _tokens(2, 20)
    output = with_mtp.train()(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, without.train()(tokens, labels=tokens).loss)
    assert without(tokens, labels=tokens).mtp_loss is None
    assert with_mtp(tokens, labels=tokens, predict_further=False).mtp_loss is None
    assert with_mtp.eval()(tokens, labels=tokens).mtp_loss is None
    output.loss.backward()  # DDP asks for a gradient of every parameter; here it is nought
    assert not with_mtp.model.layers[4].eh_proj.weight.grad.any()


# ---- Balance loss --------------------------------------------------------------------------------


def test_balance_loss_is_the_papers_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    L, B, T, E, K = 2, 3, 7, 8, 2
    logits = torch.randn(L, B * T, E, generator=generator)
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 4:] = False
    expected = 0.0
    for layer in range(L):
        scores = logits[layer].view(B, T, E).sigmoid()
        for row in range(B):
            kept = scores[row][real[row]]
            for i in range(E):
                hits = sum(i in s.topk(K).indices.tolist() for s in kept)
                f_i = E / (K * len(kept)) * hits
                P_i = (kept[:, i] / kept.sum(1)).mean()
                expected += f_i * P_i / B
    torch.testing.assert_close(sequence_balance_loss(logits, K, real), expected)


def test_balance_loss_is_one_a_layer_in_balance_and_does_not_grow_with_the_batch():
    balanced = torch.eye(8).repeat(1, 4, 1).mul(20) - 10  # every expert first for 4 of 32 tokens
    balanced = balanced + torch.eye(8).roll(1, 1).repeat(1, 4, 1).mul(20)
    real = torch.ones(1, 32, dtype=torch.bool)
    one = sequence_balance_loss(balanced, 2, real)
    torch.testing.assert_close(one, torch.tensor(1.0), rtol=1e-3, atol=0)
    three = sequence_balance_loss(balanced.repeat(1, 3, 1), 2, real.repeat(3, 1))
    torch.testing.assert_close(three, one)
    collapsed = torch.tensor([10.0, 10.0] + [-10.0] * 6).expand(1, 32, 8)
    assert sequence_balance_loss(collapsed, 2, real) > 3.9  # E / K = 4 at worst


def test_balance_loss_reaches_the_routers_also_through_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = _build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = _tokens(2, 20)
        model(tokens, labels=tokens).balance_loss.backward()
        gradients.append([layer.mlp.gate.weight.grad for layer in model.model.layers[1:]])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain)


def test_the_stock_config_class_is_used_as_it_is():
    assert type(_build().config) is DeepseekV3Config
