"""From logits to the next token: penalties, temperature, and the ways of cutting off the tail.

Shapes: B rows, V entries of the vocabulary. The order is that of transformers: penalties on the
logits, temperature, top-k, top-p, min-p.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a row ends. The defaults sample from the model as it is.

    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: only the K likeliest tokens (Fan et al. 2018, §4.1); 0 means all.
    top_p: only the fewest tokens that together have this probability, counted among those that
        top_k left (Holtzman et al. 2020, §3.1, "nucleus").
    min_p: only tokens at least this share as probable as the likeliest (Nguyen et al. 2024).
    repetition_penalty: logits of tokens in prompt or answer are divided by it where they are
        positive and multiplied by it where not (Keskar et al. 2019, CTRL, §4.1).
    frequency_penalty, presence_penalty: taken off a token's logit once for each time that it is in
        the answer, and once if it is there at all (the parameters of OpenAI's API).
    max_new_tokens: at most so many a row.
    stop: strings at which a row ends, without showing them. A special token's text is that token.
    stop_token_ids: tokens at which a row ends; None means the end tokens of the model's generation
        config.
    seed: of the random numbers; a row's depend on it, on its prompt and on which of the prompt's
        samples it is, whatever else is in the batch. None draws one from torch's global generator.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            # Logits over less would overflow.
            (
                "temperature",
                self.temperature == 0 or self.temperature >= 1e-6,
                "0, or at least 1e-6",
            ),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("frequency_penalty", isfinite(self.frequency_penalty), "a finite number"),
            ("presence_penalty", isfinite(self.presence_penalty), "a finite number"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not fine:  # NaN too
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every answer before it begins")

    @classmethod
    def from_generation_config(cls, config: Any, **changes: Any) -> "Sampling":
        """Temperature, cuts and repetition penalty of transformers' generation config.

        ``changes`` replace fields. What the config does not set stays off: ``generate`` would cut
        at the 50 likeliest tokens where it has no top_k. Its other fields are not followed.
        """
        fields = {
            name: getattr(config, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if getattr(config, name, None) is not None
        }
        if not getattr(config, "do_sample", False):
            fields["temperature"] = 0.0
        return cls(**{**fields, **changes})

    @property
    def penalises_the_prompt(self) -> bool:
        """Whether it must be known which tokens the prompt has."""
        return self.repetition_penalty != 1

    @property
    def penalises_the_answer(self) -> bool:
        """Whether it must be known how often the answer has each token."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


class Penalties:
    """What rows have said so far, as far as ``sampling`` penalises it.

    ``seen_BV`` (bool) marks the tokens of prompt and answer, ``counts_BV`` (float) counts those of
    the answer alone; None where nothing asks for them.
    """

    def __init__(
        self, sampling: Sampling, prompts: list[list[int]], vocab_size: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        shape = (len(prompts), vocab_size)
        self.seen_BV = self.counts_BV = None
        if sampling.penalises_the_prompt:
            self.seen_BV = torch.zeros(shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen_BV[row, prompt] = True
            self.seen_BV = self.seen_BV.to(device)
        if sampling.penalises_the_answer:
            self.counts_BV = torch.zeros(shape, device=device)

    def apply(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The penalised logits."""
        if self.seen_BV is not None:
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
            logits_BV = torch.where(self.seen_BV, penalised, logits_BV)
        if self.counts_BV is not None:
            logits_BV = logits_BV - self.sampling.frequency_penalty * self.counts_BV
            logits_BV = logits_BV - self.sampling.presence_penalty * (self.counts_BV > 0)
        return logits_BV

    def add(self, tokens_B: torch.Tensor) -> None:
        """Every row said one more token."""
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, tokens_B[:, None], True)
        if self.counts_BV is not None:
            self.counts_BV.scatter_add_(
                1, tokens_B[:, None], torch.ones_like(self.counts_BV[:, :1])
            )

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows alone."""
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[rows]
        if self.counts_BV is not None:
            self.counts_BV = self.counts_BV[rows]


def choose(
    logits_BV: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor | None
) -> torch.Tensor:
    """The next token of every row (B,), given one uniform number in [0, 1) a row (fp64).

    ``uniform_B`` may be None where the temperature is 0. Nothing here waits for the device.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    assert uniform_B is not None
    weights, ids = candidates(logits_BV, sampling)
    # The inverse of the cumulative distribution, in fp64: in fp32 the sum over a vocabulary would
    # be off by more than rare tokens' probabilities.
    cumulative = weights.double().cumsum(-1)
    point_B1 = uniform_B[:, None] * cumulative[:, -1:]
    chosen_B1 = torch.searchsorted(cumulative, point_B1, right=True)
    return (chosen_B1 if ids is None else ids.gather(1, chosen_B1)).squeeze(1)


def candidates(
    logits_BV: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weights (B, C), tokens (B, C)): unnormalised, 0 for what is cut off.

    Tokens None means the vocabulary in its own order. Sorted by probability, what top-k and top-p
    leave is a beginning of the row.
    """
    weights, ids = (logits_BV.float() / sampling.temperature).softmax(-1), None
    if sampling.top_k or sampling.top_p < 1:
        V = logits_BV.shape[-1]
        weights, ids = weights.topk(min(sampling.top_k or V, V))
    if sampling.top_p < 1:
        exact = weights.double()
        cumulative = exact.cumsum(-1)
        likelier = cumulative - exact  # the probability of the tokens before this one
        weights = weights.masked_fill(likelier >= sampling.top_p * cumulative[:, -1:], 0.0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(
            weights < sampling.min_p * weights.amax(-1, keepdim=True), 0.0
        )
    return weights, ids


def uniform_numbers(seed: int, prompt: list[int], sample: int, count: int) -> torch.Tensor:
    """``count`` uniform numbers in [0, 1), fp64 on the CPU, that belong to one row.

    They depend on the three alone: neither on the batch nor on the device.
    """
    import hashlib

    key = f"{seed} {sample} {prompt}".encode()
    row_seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(row_seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
