"""What generates the tokens of several requests at once.

B rows of a batch, V entries of the vocabulary. Every request has its own sampling and length.
"""

import logging
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down"

PAGE_SIZE = 64  # tokens; what a request may leave unused in each layer's cache
PROMPT_TOKENS_PER_STEP = 512  # a longer prompt is read in several steps, between other answers'
SECONDS_TO_STOP = 10


class EngineDeadError(RuntimeError):
    """Nothing can be generated any more; the message says since when."""


@dataclass(frozen=True)
class Delivery:
    """New tokens of an answer; ``error`` says why it ended early."""

    tokens: list[int]
    ended: bool
    error: str | None = None


@dataclass(eq=False)
class Job:
    """One answer to generate: at most ``max_new_tokens``, a temperature of 0 being the likeliest.

    ``top_k`` is at least 1. ``deliver`` is called from the engine's thread.
    """

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    deliver: Callable[[Delivery], None]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    delivered: int = 0
    cancelled: bool = False

    @property
    def row_sampling(self) -> tuple[float, int, float]:
        """(temperature, top_k, top_p); the likeliest token is the only one of a top 1."""
        return (self.temperature, self.top_k, self.top_p) if self.temperature else (1.0, 1, 1.0)


class Engine(ABC):
    """Takes jobs from the event loop's thread and works on them in its own."""

    name: str
    end_tokens: frozenset[int]

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Begin with the job as soon as there is room. Raises EngineDeadError."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more; nothing more is delivered but what is on its way."""

    @abstractmethod
    def why_dead(self) -> str | None:
        """None while it works, else what ended it."""

    @abstractmethod
    def close(self) -> None:
        """End the thread, once; unfinished jobs get an error."""


def supports_continuous_batching(config: Any) -> bool:
    """Whether transformers' paged cache can hold this model's keys and values.

    It keeps pages of full attention, with one head size for keys and values alike: neither the
    recurrent state of a delta net (qwen3_next) nor latent attention, whose keys are longer than its
    values (deepseek_v3), fits in.
    """
    layer_types = getattr(config, "layer_types", None) or []
    return getattr(config, "kv_lora_rank", None) is None and set(layer_types) <= {"full_attention"}


def make_engine(model: Any, end_tokens: frozenset[int], *, rows: int, context: int) -> Engine:
    """The best engine for the model: at most ``rows`` answers at a time, of ``context`` tokens."""
    if supports_continuous_batching(model.config):
        return ContinuousBatching(model, end_tokens, rows=rows, context=context)
    return PlainBatching(model, end_tokens, rows=rows)


class ContinuousBatching(Engine):
    """transformers' continuous batching: a request joins and leaves the batch at any step."""

    name = "continuous batching"

    def __init__(self, model: Any, end_tokens: frozenset[int], *, rows: int, context: int) -> None:
        self.end_tokens = end_tokens
        self._jobs: dict[str, Job] = {}
        self._closing = False
        # The manager takes temperature, top_k and top_p from each request, if their defaults are
        # not neutral: with neutral ones it leaves the step out for all requests.
        defaults = GenerationConfig(
            do_sample=True,
            temperature=0.5,
            top_k=model.config.vocab_size,
            top_p=0.5,
            eos_token_id=sorted(end_tokens),
        )
        config = ContinuousBatchingConfig(
            per_request_processors=True,
            page_size=PAGE_SIZE,
            # Room for every row's whole context: nobody's cache is ever thrown out for another's.
            num_blocks=rows * ceil(context / PAGE_SIZE),
            max_requests_per_batch=rows,
            max_batch_tokens=max(PROMPT_TOKENS_PER_STEP, rows),
            # Sharing the pages of equal beginnings saves little where a context is short.
            allow_block_sharing=False,
        )
        self._manager = model.init_continuous_batching(
            generation_config=defaults, continuous_batching_config=config
        )
        self._manager.start()
        self._thread = threading.Thread(target=self._deliver, name="deliver", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        temperature, top_k, top_p = job.row_sampling
        self._jobs[job.id] = job
        accepted = self._manager.add_request(
            job.prompt,
            request_id=job.id,
            max_new_tokens=job.max_new_tokens,
            streaming=True,
            eos_token_id=sorted(self.end_tokens),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        if accepted is None:
            del self._jobs[job.id]
            raise EngineDeadError(self.why_dead() or SHUTTING_DOWN)

    def cancel(self, job: Job) -> None:
        if self._jobs.pop(job.id, None) is not None:
            self._manager.cancel_request(job.id)

    def why_dead(self) -> str | None:
        error = self._manager.background_thread_status.fatal_error
        return None if error is None else f"generation failed: {error}"

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._manager.stop(block=True, timeout=SECONDS_TO_STOP, hard_stop=True)
        self._thread.join(SECONDS_TO_STOP)

    def _deliver(self) -> None:
        """Hand every result to its job, until the manager ends."""
        while not self._closing:
            output = self._manager.get_result(timeout=0.2)
            if output is not None:
                self._deliver_one(output)
            elif self.why_dead() is not None:
                break
        for job in list(self._jobs.values()):
            job.deliver(Delivery([], True, self.why_dead() or SHUTTING_DOWN))
        self._jobs.clear()

    def _deliver_one(self, output: Any) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:  # cancelled since
            return
        # A result holds all tokens of the answer so far.
        tokens = output.generated_tokens[job.delivered :]
        job.delivered += len(tokens)
        if output.is_finished():
            self._jobs.pop(job.id, None)
        job.deliver(Delivery(tokens, output.is_finished(), output.error))


class PlainBatching(Engine):
    """``model.generate`` on what waits, shorter prompts padded on the left.

    For caches that continuous batching cannot hold. A batch goes on until its last row has ended;
    what comes meanwhile is in the next one.
    """

    name = "plain batching"

    def __init__(self, model: Any, end_tokens: frozenset[int], *, rows: int) -> None:
        self._model, self.end_tokens, self._rows = model, end_tokens, rows
        # generate would take what it is not told from there: beams, forced tokens, penalties.
        model.generation_config = GenerationConfig()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._changed:
            if self._closing:
                raise EngineDeadError(SHUTTING_DOWN)
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        job.cancelled = True

    def why_dead(self) -> str | None:
        return None if self._thread.is_alive() else "the generating thread has ended"

    def close(self) -> None:
        with self._changed:
            if self._closing:
                return
            self._closing = True
            unfinished = [job for job in self._waiting + self._running if not job.cancelled]
            for job in unfinished:
                job.cancelled = True
            self._changed.notify()
        self._thread.join(SECONDS_TO_STOP)
        for job in unfinished:
            job.deliver(Delivery([], True, SHUTTING_DOWN))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                wanted = [job for job in self._waiting if not job.cancelled]
                self._running, self._waiting = wanted[: self._rows], wanted[self._rows :]
            if not self._running:
                continue
            try:
                self._generate(self._running)
            except Exception as error:  # this batch's requests learn of it, the next may be fine
                logger.exception("a batch failed")
                for job in self._running:
                    job.deliver(Delivery([], True, f"generation failed: {error}"))

    def _generate(self, jobs: list[Job]) -> None:
        longest = max(len(job.prompt) for job in jobs)
        prompts = torch.zeros(len(jobs), longest, dtype=torch.long)
        mask = torch.zeros_like(prompts)
        for row, job in enumerate(jobs):
            prompts[row, longest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, longest - len(job.prompt) :] = 1
        device = self._model.device
        self._model.generate(
            input_ids=prompts.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                do_sample=True,
                max_new_tokens=max(job.max_new_tokens for job in jobs),
                pad_token_id=min(self.end_tokens, default=0),
                eos_token_id=sorted(self.end_tokens) or None,
                # Neutral, for what is None here has a default that is not.
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            ),
            logits_processor=LogitsProcessorList([RowSampling(jobs, device)]),
            stopping_criteria=StoppingCriteriaList([RowEnds(jobs, self.end_tokens)]),
        )


class RowSampling(LogitsProcessor):
    """Each row's own temperature, top-k and top-p; what is cut off gets −∞."""

    def __init__(self, jobs: list[Job], device: torch.device) -> None:
        temperature, top_k, top_p = zip(*(job.row_sampling for job in jobs), strict=True)
        self.temperature_B1 = torch.tensor(temperature, device=device)[:, None]
        self.top_k_B1 = torch.tensor(top_k, device=device)[:, None]
        self.top_p_B1 = torch.tensor(top_p, device=device)[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) -> the same, scaled and cut."""
        scores_BV = scores.float() / self.temperature_B1
        sorted_BV, order_BV = scores_BV.sort(descending=True, stable=True)
        probability_BV = sorted_BV.softmax(-1)
        likelier_BV = probability_BV.cumsum(-1) - probability_BV  # of the tokens before this one
        rank_V = torch.arange(scores.shape[-1], device=scores.device)
        cut_BV = (rank_V >= self.top_k_B1) | ((likelier_BV >= self.top_p_B1) & (rank_V > 0))
        return scores_BV.masked_fill(cut_BV.scatter(1, order_BV, cut_BV), -torch.inf)


class RowEnds(StoppingCriteria):
    """Hands each row its token, and ends it at an end token or its own length."""

    def __init__(self, jobs: list[Job], end_tokens: frozenset[int]) -> None:
        self.jobs, self.end_tokens = jobs, end_tokens
        self.ended = [False] * len(jobs)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Tokens (B, T) of which the last are new -> which rows have ended (B,)."""
        for row, (job, token) in enumerate(zip(self.jobs, input_ids[:, -1].tolist(), strict=True)):
            if self.ended[row] or job.cancelled:
                self.ended[row] = True
                continue
            job.delivered += 1
            self.ended[row] = token in self.end_tokens or job.delivered == job.max_new_tokens
            job.deliver(Delivery([token], self.ended[row]))
        return torch.tensor(self.ended, device=input_ids.device)
