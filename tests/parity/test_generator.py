"""The Generator: its tokens are those of ``generate`` and of stock, its draws are exact."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from mini_llm import build_model, list_models
from mini_llm.data import load_tokenizer
from mini_llm.data.tokenizer import DEFAULT_TOKENIZER
from mini_llm.inference.generator import Generator
from mini_llm.inference.sampling import Penalties, Sampling, candidates, choose

TINY = [name for name in list_models() if name.endswith("_tiny")]
V = 160
GREEDY = Sampling(temperature=0, max_new_tokens=12, stop_token_ids=())


def prompts_of(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(1, V, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_TOKENIZER)


@pytest.fixture(scope="module", params=TINY)
def models(request, tmp_path_factory):
    """Ours and the stock class with the same weights, far enough apart that no two tokens tie."""
    torch.manual_seed(0)
    model = build_model(request.param, vocab_size=V, pad_token_id=0, eos_token_id=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return model, AutoModelForCausalLM.from_pretrained(folder).eval()


def transformers_greedy(model, prompt: list[int], tokens: int, eos: int | None = None) -> list[int]:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return model.generate(torch.tensor([prompt]), generation_config=config)[
        0, len(prompt) :
    ].tolist()


def padded_greedy(model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """``generate`` on a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()


def test_greedy_tokens_are_those_of_generate_and_of_stock_whatever_the_lengths(models, tokenizer):
    ours, stock = models
    prompts = prompts_of(5, 70, 1, 33, 12)  # 70: more than one chunk of the delta rule
    results = Generator(ours, tokenizer).generate(prompts, GREEDY)
    together = [result.token_ids for result in results]
    assert {result.finish_reason for result in results} == {"length"}
    assert len({tuple(tokens) for tokens in together}) == len(prompts)
    assert together == padded_greedy(ours, prompts, 12) == padded_greedy(stock, prompts, 12)
    assert together == [transformers_greedy(stock, prompt, 12) for prompt in prompts]
    # The Generator runs a stock class as well, and a prompt alone is what it is in a batch.
    assert Generator(stock, tokenizer).generate(prompts, GREEDY) == results
    alone = Generator(ours, tokenizer).generate(prompts[2:3], GREEDY)
    assert alone == results[2:3]


def test_a_row_that_ends_leaves_the_batch_and_the_others_go_on_as_before(models, tokenizer):
    ours, _ = models
    prompts = prompts_of(9, 4, 20, 9)
    free = Generator(ours, tokenizer).generate(prompts, GREEDY)
    end = free[1].token_ids[5]
    widths: list[int] = []
    hook = ours.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    results = Generator(ours, tokenizer).generate(prompts, replace(GREEDY, stop_token_ids=(end,)))
    hook.remove()
    assert widths == sorted(widths, reverse=True) and widths[0] == 4 and widths[-1] < 4
    for result, whole in zip(results, free, strict=True):
        tokens = whole.token_ids
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert result.token_ids == tokens[:length]
        assert result.finish_reason == ("stop" if end in tokens else "length")


def test_the_same_seed_gives_the_same_tokens_in_any_batch_and_samples_differ(models, tokenizer):
    ours, _ = models
    generator = Generator(ours, tokenizer)
    prompts = prompts_of(9, 4, 20)
    sampling = Sampling(temperature=1.5, top_k=50, max_new_tokens=8, stop_token_ids=(), seed=7)
    three = generator.generate(prompts, sampling, n=3)
    assert generator.generate(prompts[1:2], sampling, n=3) == three[3:6]
    assert generator.generate(prompts, sampling, n=3, batch_size=4) == three
    assert generator.generate(prompts, sampling) == three[::3]
    assert len({tuple(result.token_ids) for result in three}) == 9
    other = generator.generate(prompts, replace(sampling, seed=8))
    assert all(a != b for a, b in zip(other, three[::3], strict=True))
    torch.manual_seed(3)
    unseeded = generator.generate(prompts, replace(sampling, seed=None))
    torch.manual_seed(3)
    assert generator.generate(prompts, replace(sampling, seed=None)) == unseeded


def test_logprobs_are_the_models_own_whatever_the_sampling(models, tokenizer):
    ours, _ = models
    (prompt,) = prompts_of(7)
    sampling = Sampling(
        temperature=1.3, top_p=0.8, repetition_penalty=1.4, max_new_tokens=9, stop_token_ids=()
    )
    (result,) = Generator(ours, tokenizer).generate([prompt], sampling, logprobs=True)
    with torch.no_grad():
        logits = ours(torch.tensor([prompt + result.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(result.logprobs), expected, atol=1e-4)


def test_the_cache_holds_no_more_than_the_architecture_needs(models, tokenizer):
    """Latent and rotary key for deepseekv3, a state of fixed size for the delta nets."""
    from mini_llm.inference.generator import _Batch

    ours, _ = models
    batch = _Batch(ours, prompts_of(6), 10)
    with torch.inference_mode():
        batch.read_prompts()
    config = ours.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(batch.cache.layers)
    for kind, layer in zip(kinds, batch.cache.layers, strict=True):
        if kind == "linear_attention":
            heads, k, v = (
                *(config.linear_num_value_heads, config.linear_key_head_dim),
                config.linear_value_head_dim,
            )
            assert layer.recurrent_states[0].shape == (1, heads, k, v)
            assert layer.conv_states[0].shape[-1] == config.linear_conv_kernel_dim
        elif config.model_type == "deepseek_v3":
            assert layer.keys.shape == (1, 1, 16, config.kv_lora_rank)
            assert layer.values.shape == (1, 1, 16, config.qk_rope_head_dim)
        else:
            assert layer.keys.shape == (1, config.num_key_value_heads, 16, config.head_dim)


def test_a_prompt_without_room_for_an_answer_is_one_sentence_and_an_answer_stops_there(tokenizer):
    model = build_model(
        "mini_llama3_tiny", vocab_size=V, pad_token_id=0, eos_token_id=0, max_position_embeddings=16
    )
    generator = Generator(model, tokenizer)
    with pytest.raises(ValueError, match="prompt 2 has 16 tokens, .* context of 16; shorten it"):
        generator.generate(prompts_of(3, 16), GREEDY)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generator.generate([""], GREEDY)
    short, long = generator.generate(prompts_of(3, 12), GREEDY)
    assert (len(short.token_ids), len(long.token_ids)) == (12, 4)
    assert long.finish_reason == "length"


# ---- Which token is drawn ------------------------------------------------------------------------


def exact_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What the papers say, token by token, in fp64."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda token: -float(p[token]))
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(float(p[token]) for token in order)
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += float(p[token]) / total
        if mass >= sampling.top_p:
            break
    kept = [token for token in kept if p[token] >= sampling.min_p * p[order[0]]]
    exact = torch.zeros_like(p)
    exact[kept] = p[kept] / p[kept].sum()
    return exact


CUTS = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.8},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
}


def chi_square_limit(degrees: int) -> float:
    """Exceeded once in about 100,000 (Wilson and Hilferty's approximation, z = 4.26)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + 4.26 * part**0.5) ** 3


@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS.keys())
def test_first_tokens_have_the_exact_distribution_by_chi_square(tokenizer, settings):
    torch.manual_seed(0)
    model = build_model("mini_llama3_tiny", vocab_size=40, pad_token_id=0, eos_token_id=0).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(6.0)  # probabilities from 0.001 to 0.3
        prompt = [3, 1, 4]
        logits = model(torch.tensor([prompt])).logits[0, -1]
    sampling = Sampling(max_new_tokens=1, stop_token_ids=(), seed=11, **settings)
    exact = exact_distribution(logits, sampling)
    draws = 4000
    results = Generator(model, tokenizer).generate([prompt], sampling, n=draws, batch_size=draws)
    drawn = torch.tensor([result.token_ids[0] for result in results])
    observed = drawn.bincount(minlength=40).double()
    assert observed[exact == 0].sum() == 0  # what is cut off is never drawn
    expected = exact * draws
    common = expected >= 5  # the test's approximation needs that; the rest is one cell
    cells = [(observed[i], expected[i]) for i in common.nonzero().flatten()]
    rest = observed[~common].sum(), expected[~common].sum()
    cells += [rest] if rest[1] >= 5 else []
    assert len(cells) >= 3
    statistic = sum(float((o - e) ** 2 / e) for o, e in cells)
    assert statistic < chi_square_limit(len(cells) - 1)
    # A neighbour's distribution fails the same test: it has the power to tell.
    other = exact_distribution(logits, replace(sampling, temperature=sampling.temperature * 1.4))
    wrong = float(((observed - other * draws) ** 2 / (other * draws))[common].sum())
    assert wrong > chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS.keys())
def test_weights_are_those_of_transformers_processors(settings):
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling = Sampling(**settings)
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(2)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    warpers += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    expected = warpers(torch.zeros(6, 1, dtype=torch.long), logits).softmax(-1)
    weights, ids = candidates(logits, sampling)
    if ids is not None:
        weights = torch.zeros_like(logits).scatter(1, ids, weights)
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), expected, atol=1e-6)


def test_uniform_numbers_at_the_ends_of_their_range_draw_tokens_that_can_be_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, Sampling(), uniform).tolist() == [1, 2]
    assert choose(logits, Sampling(top_k=3), uniform).tolist() == [2, 1]


def test_penalties_are_those_of_their_definitions():
    """CTRL's over prompt and answer, OpenAI's over the answer; against a loop over all tokens."""
    draw = torch.Generator().manual_seed(0)
    prompts = [[1, 2, 2, 9], [5]]
    answers = [[2, 7, 7, 7], [5, 5, 0, 3]]
    sampling = Sampling(repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=-0.4)
    penalties = Penalties(sampling, prompts, 12, torch.device("cpu"))
    for tokens in zip(*answers, strict=True):
        penalties.add(torch.tensor(tokens))
    logits = torch.randn(2, 12, generator=draw)
    expected = logits.clone()
    for row in range(2):
        for token in range(12):
            value = float(logits[row, token])
            if token in prompts[row] + answers[row]:
                value = value / 1.7 if value > 0 else value * 1.7
            count = answers[row].count(token)
            expected[row, token] = value - 0.3 * count - (-0.4 if count else 0)
    assert torch.allclose(penalties.apply(logits), expected, atol=1e-6)
    penalties.select(torch.tensor([1]))
    assert torch.allclose(penalties.apply(logits[1:]), expected[1:], atol=1e-6)


def test_the_repetition_penalty_gives_the_tokens_of_generate(models, tokenizer):
    ours, stock = models
    (prompt,) = prompts_of(12)
    config = GenerationConfig(
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=1.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = stock.generate(torch.tensor([prompt]), generation_config=config)[0, 12:].tolist()
    sampling = Sampling.from_generation_config(config, max_new_tokens=20, stop_token_ids=())
    (result,) = Generator(ours, tokenizer).generate([prompt], sampling)
    assert result.token_ids == expected
    (free,) = Generator(ours, tokenizer).generate([prompt], replace(GREEDY, max_new_tokens=20))
    assert free.token_ids != expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0)],
        *[("min_p", 1.1), ("repetition_penalty", 0), ("max_new_tokens", 0)],
        *[("temperature", 1e-40), ("frequency_penalty", float("nan"))],
    ],
)
def test_sampling_that_means_nothing_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be"):
        Sampling(**{field: value})
