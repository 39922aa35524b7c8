"""Our classes against the stock transformers classes, preset by preset."""

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
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


@torch.no_grad()
def test_rows_of_a_batch_may_be_packed_differently(pair):
    ours, _, _ = pair
    tokens = _tokens(3, 40)
    packings = [[25, 15], [40], [1, 30, 1, 8]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in packings])
    packed = ours(tokens, position_ids=positions).logits
    for row, lengths in enumerate(packings):
        alone = [ours(part).logits for part in tokens[row : row + 1].split(lengths, 1)]
        assert (packed[row : row + 1] - torch.cat(alone, 1)).abs().max() <= 1e-5


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


def _flash_stand_in(monkeypatch) -> list[list[int]]:
    """Put plain attention behind transformers' flash interface; what it was called with, a call."""
    calls = []

    def variable_length(q_Nhd, k_Nhd, v_Nhd, *, cu_seqlens_q, causal, softmax_scale, **_):
        calls.append(cu_seqlens_q.tolist())
        lengths = cu_seqlens_q.diff().tolist()
        parts = [x.transpose(0, 1)[None].split(lengths, 2) for x in (q_Nhd, k_Nhd, v_Nhd)]
        kwargs = {"is_causal": causal, "scale": softmax_scale, "enable_gqa": True}
        outputs = [
            F.scaled_dot_product_attention(*qkv, **kwargs) for qkv in zip(*parts, strict=True)
        ]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    def arguments(*, is_causal, softmax_scale, **_):
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    kernels = (None, variable_length, None, None, None), (arguments, None)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: kernels)
    return calls


@torch.no_grad()
def test_flash_attention_gets_the_documents_of_all_rows_whoever_else_names_them(pair, monkeypatch):
    ours, _, folder = pair
    flash = load_model(folder).eval()
    if not flash._supports_flash_attn:
        return  # it is refused: see the next test
    flash.config._attn_implementation_internal = "flash_attention_2"
    calls = _flash_stand_in(monkeypatch)
    tokens = _tokens(2, 30)
    packings = ([12, 1, 17], [30])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in packings])
    expected = ours(tokens, position_ids=positions).logits
    # transformers' collator for flattened batches hands the boundaries to the model, too.
    boundaries = torch.tensor([0, 12, 13, 30, 60], dtype=torch.int32)
    collated = {f"cu_seq_lens_{side}": boundaries for side in "qk"}
    collated |= {f"max_length_{side}": 30 for side in "qk"}
    for kwargs in ({"use_cache": False}, {"use_cache": True}, collated):
        calls.clear()
        logits = flash(tokens, position_ids=positions, **kwargs).logits
        assert (logits - expected).abs().max() <= 1e-5
        assert calls and all(call == boundaries.tolist() for call in calls)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flashy"])
def test_an_attention_that_cannot_be_had_is_refused_by_name(pair, implementation):
    _, _, folder = pair
    if not torch.cuda.is_available():  # with a GPU and the package there is nothing to refuse
        with pytest.raises((ImportError, ValueError), match="(?i)flash"):
            load_model(folder, attn_implementation=implementation)


def test_training_with_flex_attention_needs_a_gpu_and_says_so():
    model, tokens = build_model("mini_llama3_tiny", **SMALL).train(), _tokens(1, 8)
    model.set_attn_implementation("flex_attention")
    if not torch.cuda.is_available():
        with pytest.raises(NotImplementedError, match="FlexAttention does not support backward"):
            model(tokens, labels=tokens).loss.backward()


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
    "strategy",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"do_sample": True, "top_k": 20},
        {"prefill_chunk_size": 5},
    ],
    ids=str,
)
def test_generate_with_left_padding_equals_the_stock_class_token_for_token(pair, strategy):
    ours, stock, _ = pair
    tokens = _tokens(3, 12)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 4, 9)):
        mask[row, :padding] = 0
        tokens[row, :padding] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, **strategy}
    generated = []
    for model in (ours, stock):
        torch.manual_seed(0)
        generated.append(model.generate(tokens, **kwargs))
    assert torch.equal(*generated)


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
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_rope_scaling_of_the_stock_config_gives_the_stock_logits(name, rope, tmp_path):
    unscaled = build_model(name, **SMALL).eval()
    rope = unscaled.config.rope_parameters | rope
    torch.manual_seed(0)
    ours = build_model(name, rope_parameters=rope, max_position_embeddings=96, **SMALL).eval()
    unscaled.load_state_dict(ours.state_dict())
    ours.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = _tokens(2, 120)
    assert (ours(tokens).logits - stock(tokens).logits).abs().max() <= 1e-5
    assert (ours(tokens).logits - unscaled(tokens).logits).abs().max() > 1e-3


def test_the_full_preset_has_about_a_hundred_million_parameters():
    with torch.device("meta"):
        model = build_model("mini_llama3")
    assert 95e6 < sum(p.numel() for p in model.parameters()) < 105e6
    assert model.config.num_hidden_layers == 12 and model.config.hidden_size == 768
