"""What generates: each request of a batch gets what it would get alone."""

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mini_llm.inference.serve.engines import (
    ContinuousBatching,
    Delivery,
    Engine,
    EngineDeadError,
    Job,
    PlainBatching,
    RowSampling,
    make_engine,
)
from tests.serving import ARCHITECTURES, PROMPTS, make_checkpoint, reference_tokens

EXPECTED = {
    "mini_llama3_tiny": ContinuousBatching,
    "mini_deepseekv3_tiny": PlainBatching,
    "mini_qwen3_next_tiny": PlainBatching,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def engine(model: Any) -> Any:
    engine = make_engine(model, frozenset({0}), rows=3, context=128)
    yield engine
    engine.close()


class Collected:
    """A job and what was delivered of it."""

    def __init__(self, engine: Engine, prompt: list[int], new_tokens: int, **changes: Any) -> None:
        self.deliveries: queue.Queue[Delivery] = queue.Queue()
        sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 5, **changes}
        self.job = Job(prompt, new_tokens, deliver=self.deliveries.put, **sampling)
        engine.submit(self.job)

    def tokens(self) -> list[int]:
        """All tokens, once the answer has ended."""
        tokens: list[int] = []
        while True:
            delivery = self.deliveries.get(timeout=120)
            assert delivery.error is None
            tokens += delivery.tokens
            if delivery.ended:
                return tokens


@pytest.mark.slow
def test_answers_in_a_batch_are_those_of_each_prompt_alone(
    checkpoint: Path, model: Any, engine: Engine
) -> None:
    assert type(engine) is EXPECTED[checkpoint.name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [*PROMPTS[:4], PROMPTS[4] * 3, "春"]
    lengths = [5, 12, 1, 9, 12, 7]
    expected = reference_tokens(checkpoint, prompts, max(lengths))
    jobs = [
        Collected(engine, tokenizer(prompt)["input_ids"], length)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    for job, length, tokens in zip(jobs, lengths, expected, strict=True):
        assert job.tokens() == tokens[:length]


@pytest.mark.slow
def test_a_request_is_answered_by_its_own_sampling_whatever_else_the_checkpoint_says(
    checkpoint: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.generation_config = GenerationConfig(
        num_beams=4, no_repeat_ngram_size=1, repetition_penalty=9.0, forced_eos_token_id=0
    )
    engine = make_engine(model, frozenset({0}), rows=3, context=128)
    try:
        prompt = AutoTokenizer.from_pretrained(checkpoint)(PROMPTS[0])["input_ids"]
        (expected,) = reference_tokens(checkpoint, PROMPTS[:1], 12)
        assert Collected(engine, prompt, 12).tokens() == expected
    finally:
        engine.close()


@pytest.mark.slow
def test_all_rows_may_fill_the_whole_context(model: Any, engine: Engine) -> None:
    torch.manual_seed(0)
    prompts = [torch.randint(5, 30_000, (108,)).tolist() for _ in range(3)]
    alone = [Collected(engine, prompt, 20).tokens() for prompt in prompts]
    together = [Collected(engine, prompt, 20) for prompt in prompts * 2]
    assert [job.tokens() for job in together] == alone * 2


@pytest.mark.slow
def test_an_end_token_ends_its_row_alone(checkpoint: Path, model: Any) -> None:
    engine = make_engine(model, frozenset({0}), rows=2, context=128)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    first, second = (tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2])
    free = [Collected(engine, first, 12).tokens(), Collected(engine, second, 12).tokens()]
    engine.close()
    end = next(token for token in free[0] if token not in free[1])
    engine = make_engine(model, frozenset({end}), rows=2, context=128)
    jobs = [Collected(engine, first, 12), Collected(engine, second, 12)]
    assert jobs[0].tokens() == free[0][: free[0].index(end) + 1]
    assert jobs[1].tokens() == free[1]
    engine.close()


@pytest.mark.slow
def test_a_cancelled_request_leaves_room_for_others(checkpoint: Path, engine: Engine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    expected = Collected(engine, prompt, 5).tokens()
    cancelled = [Collected(engine, prompt, 100) for _ in range(3)]  # as many as there are rows
    for job in cancelled:
        assert not job.deliveries.get(timeout=120).ended
        engine.cancel(job.job)
    assert Collected(engine, prompt, 5).tokens() == expected
    assert not any(
        delivery.ended for job in cancelled for delivery in list(job.deliveries.queue)
    ), "the cancelled went on to their end"
    if isinstance(engine, ContinuousBatching):
        assert not engine._jobs, "the cancelled are not forgotten"


@pytest.mark.slow
def test_every_request_is_sampled_as_it_asks(checkpoint: Path, engine: Engine) -> None:
    """Sampled at a temperature of 2, a flat model does not say 16 times what is likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    greedy = Collected(engine, prompt, 16).tokens()
    jobs = {
        "likeliest": Collected(engine, prompt, 16),
        "sampled": Collected(engine, prompt, 16, temperature=2.0, top_k=32_004),
        "nucleus": Collected(engine, prompt, 16, temperature=1.0, top_k=32_004, top_p=0.0),
        "top 1": Collected(engine, prompt, 16, temperature=2.0, top_k=1),
    }
    said = {name: job.tokens() for name, job in jobs.items()}
    assert said["likeliest"] == said["nucleus"] == said["top 1"] == greedy
    assert said["sampled"] != greedy


@pytest.mark.slow
def test_a_failure_is_told_to_those_who_wait(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model, frozenset({0}), rows=2, context=128)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the accelerator fell off the bus")

    monkeypatch.setattr(model, "forward", broken)
    error = Collected(engine, [5, 6], 3).deliveries.get(timeout=120).error
    assert error is not None and "fell off the bus" in error
    monkeypatch.undo()
    if isinstance(engine, PlainBatching):  # that batch alone is lost
        assert len(Collected(engine, [5, 6], 3).tokens()) == 3
        assert engine.why_dead() is None
    else:
        assert "fell off the bus" in str(engine.why_dead())
        with pytest.raises(EngineDeadError, match="fell off the bus"):
            Collected(engine, [5, 6], 3)
    engine.close()


@pytest.mark.slow
def test_a_closed_engine_takes_no_job(model: Any) -> None:
    engine = make_engine(model, frozenset({0}), rows=1, context=128)
    engine.close()
    with pytest.raises(EngineDeadError):
        Collected(engine, [1, 2], 3)


def test_rows_are_cut_as_by_transformers_warpers() -> None:
    torch.manual_seed(0)
    scores_BV = torch.randn(4, 100)
    asked = [(0.7, 100, 1.0), (1.5, 7, 1.0), (1.0, 100, 0.6), (0.5, 20, 0.9)]
    jobs = [Job([1], 1, t, p, k, lambda _: None) for t, k, p in asked]
    ours_BV = RowSampling(jobs, scores_BV.device)(torch.zeros(4, 1), scores_BV)
    for row, (temperature, top_k, top_p) in enumerate(asked):
        warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
        )
        theirs_V = warpers(torch.zeros(1, 1), scores_BV[row : row + 1])[0]
        assert torch.equal(ours_BV[row], theirs_V), row
