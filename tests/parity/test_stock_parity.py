"""Our classes against the stock transformers classes, preset by preset."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_llm import build_model, list_models, load_model

TINY = [name for name in list_models() if name.endswith("_tiny")]
SMALL = {"vocab_size": 160, "pad_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module", params=TINY)
def pair(request, tmp_path_factory):
    """(ours, stock) with the same random weights, through a saved folder."""
    torch.manual_seed(0)
    ours = build_model(request.param, **SMALL)
    for parameter in ours.parameters():  # norms at exactly 1 would hide a wrong norm
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    ours.save_pretrained(folder)
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # Multi-token-prediction layers are published behind the others, and stock classes skip them.
    further = range(ours.config.num_hidden_layers, len(ours.model.layers))
    prefixes = tuple(f"model.layers.{i}." for i in further)
    assert all(key.startswith(prefixes) for key in info["unexpected_keys"])
    assert type(stock).__module__.startswith("transformers.")
    return ours.eval(), stock.eval(), folder


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal_the_stock_class(pair):
    ours, stock, _ = pair
    tokens = _tokens(2, 50)
    difference = (ours(tokens).logits - stock(tokens).logits).abs().max()
    assert difference <= 1e-5


@torch.no_grad()
def test_the_comparison_notices_a_small_change_of_any_weight(pair):
    ours, stock, folder = pair
    changed = load_model(folder).eval()
    tokens = _tokens(2, 50)
    reference, stock_names = stock(tokens).logits, dict(stock.named_parameters())
    for name, parameter in changed.named_parameters():
        if name not in stock_names:
            continue
        kept = parameter.detach().clone()
        # Not one factor for all elements: what a norm follows would not notice.
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        assert (changed(tokens).logits - reference).abs().max() > 1e-5, name
        parameter.copy_(kept)


def test_loss_and_gradients_equal_the_stock_class(pair):
    ours, stock, _ = pair
    tokens = _tokens(2, 50)
    labels = tokens.clone()
    labels[:, ::5] = -100
    for model in (ours, stock):
        model.train()
        model.zero_grad()
    loss, reference = ours(tokens, labels=labels).loss, stock(tokens, labels=labels).loss
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    loss.backward()
    reference.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        scale = parameter.grad.abs().max()
        assert (gradients[name].grad - parameter.grad).abs().max() <= 1e-4 * scale, name
    for model in (ours, stock):
        model.eval()


def test_loss_in_training_leaves_the_logits_out_and_evaluation_keeps_them(pair):
    ours, _, _ = pair
    tokens = _tokens(1, 8)
    assert ours(tokens, labels=tokens).logits is not None
    assert ours.train()(tokens, labels=tokens).logits is None
    assert ours.eval()(tokens, labels=tokens, skip_logits=True).logits is None


def test_num_items_in_batch_divides_the_summed_loss(pair):
    ours, stock, _ = pair
    tokens = _tokens(2, 20)
    kwargs = {"labels": tokens, "num_items_in_batch": torch.tensor(1000)}
    torch.testing.assert_close(ours(tokens, **kwargs).loss, stock(tokens, **kwargs).loss)


@torch.no_grad()
def test_a_packed_row_equals_its_documents_one_by_one(pair):
    ours, _, _ = pair
    lengths, padding = [9, 1, 1, 20], 4
    tokens = _tokens(2, sum(lengths) + padding)
    positions = torch.cat([torch.arange(n) for n in [*lengths, *[1] * padding]])
    positions = positions.expand(2, -1)
    separate = torch.cat(
        [ours(part).logits for part in tokens.split([*lengths, padding], 1)[:-1]], 1
    )
    for mode in (ours.train, ours.eval):
        mode()
        for use_cache in (False, True):
            packed = ours(tokens, position_ids=positions, use_cache=use_cache).logits
            assert (packed[:, : sum(lengths)] - separate).abs().max() <= 1e-5
    ours.eval()
    edited = tokens.clone()
    edited[:, :9] = 3
    changed = ours(edited, position_ids=positions).logits
    assert (changed[:, 9:] - packed[:, 9:]).abs().max() <= 2e-6
    assert (changed[:, :9] - packed[:, :9]).abs().max() > 1e-3


def test_a_packed_rows_gradient_is_the_sum_of_its_documents_gradients(pair):
    _, _, folder = pair
    packed, separate = load_model(folder).train(), load_model(folder).train()
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    lengths, padding = [9, 1, 1, 20], 4
    tokens = _tokens(2, sum(lengths) + padding)
    positions = torch.cat([torch.arange(n) for n in [*lengths, *[1] * padding]]).expand(2, -1)
    labels = tokens.masked_fill(positions == 0, -100)  # nobody predicts a document's first token
    packed(tokens, position_ids=positions, labels=labels, num_items_in_batch=50).loss.backward()
    for part, target in zip(
        tokens.split([*lengths, padding], 1)[:-1],
        labels.split([*lengths, padding], 1)[:-1],
        strict=True,
    ):
        if part.shape[1] > 1:
            separate(part, labels=target, num_items_in_batch=50).loss.backward()
    for (name, a), b in zip(packed.named_parameters(), separate.parameters(), strict=True):
        if b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max(), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_every_attention_implementation_gives_the_same_packed_logits(pair, implementation):
    ours, _, folder = pair
    other = load_model(folder, attn_implementation=implementation).eval()
    switched = load_model(folder).eval()
    switched.set_attn_implementation(implementation)
    assert switched.model.layers[-1].self_attn.config._attn_implementation == implementation
    tokens = _tokens(2, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    for kwargs in ({}, {"position_ids": positions}):
        assert (other(tokens, **kwargs).logits - ours(tokens, **kwargs).logits).abs().max() <= 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(pair):
    ours, _, folder = pair
    tokens = _tokens(2, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    plain, checkpointed = load_model(folder).train(), load_model(folder).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        output = model(tokens, position_ids=positions, labels=tokens)
        sum(value for name, value in output.items() if name.endswith("loss")).backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=name)


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(pair):
    ours, _, _ = pair
    tokens = _tokens(2, 24)
    full = ours(tokens).logits
    for step in (1, 5):
        cache, parts = None, []
        for part in tokens.split(step, dim=1):
            output = ours(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert (torch.cat(parts, 1) - full).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "strategy", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str
)
def test_generate_with_left_padding_equals_the_stock_class_token_for_token(pair, strategy):
    ours, stock, _ = pair
    tokens = _tokens(3, 12)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 4, 9)):
        mask[row, :padding] = 0
        tokens[row, :padding] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, **strategy}
    assert torch.equal(ours.generate(tokens, **kwargs), stock.generate(tokens, **kwargs))


def test_resizing_the_vocabulary_keeps_the_loss_head_and_the_tie(pair):
    _, _, folder = pair
    model = load_model(folder)
    model.resize_token_embeddings(200)
    tokens = _tokens(1, 10)
    assert model.train()(tokens, labels=tokens).loss.isfinite()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.eval()(tokens).logits.shape[-1] == 200


def test_casting_to_bf16_keeps_the_rotary_frequencies_in_fp32(pair):
    _, _, folder = pair
    model = load_model(folder).to(torch.bfloat16)
    exact = load_model(folder).model.rotary_emb.inv_freq
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
@torch.no_grad()
def test_rope_scaling_of_the_stock_config_gives_the_stock_logits(rope, tmp_path):
    torch.manual_seed(0)
    ours = build_model("mini_llama3_tiny", rope_parameters=rope, **SMALL).eval()
    ours.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = _tokens(2, 100)
    assert (ours(tokens).logits - stock(tokens).logits).abs().max() <= 1e-5


def test_the_full_preset_has_about_a_hundred_million_parameters():
    with torch.device("meta"):
        model = build_model("mini_llama3")
    assert 95e6 < sum(p.numel() for p in model.parameters()) < 105e6
    assert model.config.num_hidden_layers == 12 and model.config.hidden_size == 768
