"""What transformers asks of any causal language model, for each of our classes."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_llm import build_model, list_models, load_model
from mini_llm.bench.operators import Operators
from mini_llm.data.collate import collate

TINY = [name for name in list_models() if name.endswith("_tiny")]
SMALL = {"vocab_size": 160, "pad_token_id": 0, "eos_token_id": 0}


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(1))


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance)


@pytest.fixture(scope="module", params=TINY)
def trained(request, tmp_path_factory):
    """(our model after 20 training steps, its saved folder)."""
    torch.manual_seed(0)
    model = build_model(request.param, **SMALL).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        tokens = torch.randint(1, 160, (4, 32), generator=torch.Generator().manual_seed(step))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model.eval(), folder


def _assert_same_logits_and_gradients(ours, stock) -> None:
    tokens = _tokens(2, 40)
    with torch.no_grad():
        assert _same(ours.eval()(tokens).logits, stock.eval()(tokens).logits)
    for model in (ours.train(), stock.train()):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert _same(gradients[name], parameter.grad, 1e-4 * parameter.grad.abs().max()), name
    ours.eval()


def test_logits_and_gradients_equal_the_stock_class_after_training(trained):
    ours, folder = trained
    _assert_same_logits_and_gradients(ours, AutoModelForCausalLM.from_pretrained(folder))


def test_a_bf16_checkpoint_gives_the_same_logits_and_gradients_in_both_classes(trained, tmp_path):
    _, folder = trained
    load_model(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _assert_same_logits_and_gradients(ours, stock)
    assert load_model(tmp_path).dtype == torch.bfloat16  # as saved, where nothing else is asked


@torch.no_grad()
def test_many_shards_load_like_one_in_both_classes(trained, tmp_path):
    ours, _ = trained
    ours.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]  # tied: saved once
    tokens = _tokens(1, 20)
    expected = ours(tokens).logits
    loaded = load_model(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert _same(loaded(tokens).logits, expected)
    assert _same(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, expected)


@torch.no_grad()
def test_a_stock_checkpoint_loads_into_our_class_and_back(trained, tmp_path):
    _, folder = trained
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    if hasattr(stock.config, "num_nextn_predict_layers"):
        stock.config.num_nextn_predict_layers = 0  # stock classes neither have nor save them
    stock.save_pretrained(tmp_path / "stock")
    ours, info = load_model(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = _tokens(2, 30)
    assert _same(ours.eval()(tokens).logits, stock(tokens).logits)
    ours.save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours"
    back, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, a), b in zip(stock.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_embeddings_in_place_of_tokens_give_the_same_logits(trained):
    ours, _ = trained
    tokens = _tokens(2, 20)
    embeddings = ours.get_input_embeddings()(tokens)
    assert torch.equal(ours(inputs_embeds=embeddings).logits, ours(tokens).logits)
    with pytest.raises(ValueError, match="exactly one"):
        ours(tokens, inputs_embeds=embeddings)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_stock_class(trained):
    _, folder = trained
    ours = load_model(folder, attn_implementation="eager").eval()
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    kwargs = {"output_hidden_states": True, "output_attentions": True}
    a, b = ours(_tokens(2, 20), **kwargs), stock(_tokens(2, 20), **kwargs)
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.num_hidden_layers + 1
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert _same(x, y, 1e-4)
    assert len(a.attentions) == len(b.attentions) > 0
    for x, y in zip(a.attentions, b.attentions, strict=True):
        assert _same(x, y)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits(trained):
    ours, _ = trained
    tokens = _tokens(2, 40)
    before = ours(tokens).logits
    changed = tokens.clone()
    changed[:, 25] = 159 - changed[:, 25]
    after = ours(changed).logits
    assert torch.equal(after[:, :25], before[:, :25]) or _same(after[:, :25], before[:, :25], 1e-6)
    assert not _same(after[:, 25:], before[:, 25:], 1e-3)


@torch.no_grad()
def test_padding_on_either_side_leaves_a_rows_logits_alone(trained):
    ours, _ = trained
    tokens, mask = _tokens(1, 12), torch.ones(1, 20, dtype=torch.long)
    alone = ours(tokens).logits
    padding = torch.zeros(1, 8, dtype=torch.long)
    mask[:, :8] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = ours(torch.cat((padding, tokens), 1), attention_mask=mask, position_ids=positions).logits
    assert _same(left[:, 8:], alone)
    right = ours(torch.cat((tokens, padding), 1), attention_mask=mask.flip(1)).logits
    assert _same(right[:, :12], alone)


@torch.no_grad()
def test_evaluation_is_deterministic_and_the_last_logits_can_be_had_alone(trained):
    ours, _ = trained
    tokens = _tokens(2, 16)
    whole = ours(tokens).logits
    assert torch.equal(ours(tokens).logits, whole)
    assert _same(ours(tokens, logits_to_keep=3).logits, whole[:, -3:], 1e-6)


def test_sampling_follows_the_seed_and_stops_within_the_limit(trained):
    ours, _ = trained
    kwargs = {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "num_return_sequences": 3}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(ours.generate(_tokens(2, 6), **kwargs))
    assert torch.equal(runs[0], runs[1]) and runs[0].shape[0] == 6 and runs[0].shape[1] <= 14
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", TINY)
def test_weights_begin_as_the_config_says_whatever_the_class(name):
    torch.manual_seed(0)
    model = build_model(name, **SMALL)
    std = model.config.initializer_range
    for key, parameter in model.named_parameters():
        if "norm" in key:  # a zero-centred norm's gain is 1 + w
            module = model.get_submodule(key.removesuffix(".weight"))
            gain = 0.0 if type(module).__name__ == "ZeroCenteredRMSNorm" else 1.0
            assert (parameter == gain).all(), key
        elif parameter.ndim >= 2 and "conv" not in key:  # matrices, and experts' stacks of them
            enough = 5 * std / (2 * parameter.numel()) ** 0.5  # five standard errors
            assert parameter.std().item() == pytest.approx(std, abs=enough + 0.02 * std), key
            assert abs(parameter.mean().item()) <= 5 * std / parameter.numel() ** 0.5, key
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            assert not buffer.any(), key
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_a_training_step_of_mini_llama3_dispatches_few_operators():
    model = build_model("mini_llama3", vocab_size=32_000).train()
    tokens = torch.randint(32_000, (2, 256))
    # A fused call a document: in packed rows more operators, and no T × T mask.
    packed = torch.cat([torch.arange(n) for n in (100, 156)]).expand(2, -1)
    for positions, limit in ((None, 1_300), (packed, 1_500)):
        model.zero_grad()
        with Operators() as count:
            model(tokens, position_ids=positions, labels=tokens, use_cache=False).loss.backward()
        assert count.operators.total() <= limit
        assert count.synchronisations.total() <= 1, count.synchronisations


@pytest.mark.parametrize("name", ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"])
def test_a_training_step_that_is_given_its_documents_never_waits_for_the_device(name):
    model = build_model(f"{name}_tiny", vocab_size=512).train()
    rows = [
        {"input_ids": np.arange(64), "doc_lens": np.array(lengths), "source": "made up"}
        for lengths in ([20, 30, 5], [64])
    ]
    batch = collate(rows)
    tensors = {key: batch[key] for key in ("input_ids", "position_ids", "labels", "documents")}
    losses = []
    for given in (tensors, {**tensors, "documents": None}):
        with Operators() as count:
            output = model(**given, use_cache=False)
            output.loss.backward()
        losses.append((output.loss.item(), count.synchronisations.total()))
    (loss, waits), (found_loss, found_waits) = losses
    assert loss == found_loss
    assert waits == 0
    assert found_waits > 0
