"""Text from a causal language model, step by step: what transformers' ``generate`` does, readably.

    generator = Generator(model, tokenizer)
    results = generator.generate(["从前", "Once upon a time"], Sampling(temperature=0.8, seed=1))
    for piece in generator.stream("从前"):
        print(piece, end="", flush=True)

Prompts of different lengths run in one batch, shorter ones padded on the left, where an attention
mask hides the padding; rows that are finished leave the batch. The host waits for the device once a
step, for the chosen tokens. Shapes: B rows, T tokens of a row, S positions in the cache, V entries
of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch

from mini_llm.models.common.base import MiniPreTrainedModel

from .cache import preallocated_cache
from .sampling import Penalties, Sampling, choose, uniform_numbers
from .text import StopStrings, TokenText

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Result:
    """What came of a prompt.

    ``text`` is without special tokens and without the stop string. ``token_ids`` are all that were
    generated, the end token too. ``finish_reason`` is "stop" after an end token or a stop string,
    "length" after max_new_tokens or where the context was full. ``logprobs`` are the natural
    logarithms of the tokens' probabilities by the model, before penalties, temperature and cuts.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None


class Generator:
    """Generates with a causal language model (one of ours, or of transformers) and its tokenizer.

    The model is put into eval mode; it computes where it lies and in its own dtype.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        text_config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)

    def default_sampling(self, **changes: Any) -> Sampling:
        """The sampling of the model's generation config, fields in ``changes`` replaced."""
        return Sampling.from_generation_config(self.model.generation_config, **changes)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        n: int = 1,
        logprobs: bool = False,
        batch_size: int = 32,
    ) -> list[Result]:
        """Complete texts or lists of token ids; ``n`` samples of each, side by side.

        At most ``batch_size`` rows run at a time. Without ``sampling`` the model's generation
        config decides. Raises ValueError for a prompt that is empty or fills the context.
        """
        sampling = sampling or self.default_sampling()
        rows = self._rows(prompts, sampling, n, logprobs)
        for start in range(0, len(rows), batch_size):
            for _ in self._decode(rows[start : start + batch_size], sampling):
                pass
        return [row.result() for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> "TextStream":
        """Complete one prompt; iterate over the text's pieces while they come.

        Raises ValueError like :meth:`generate`.
        """
        sampling = sampling or self.default_sampling()
        (row,) = self._rows([prompt], sampling, 1, False, streams=True)
        return TextStream(row, self._decode([row], sampling))

    def end_tokens(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """``asked``, or where that is None the end tokens of the model's generation config."""
        ends = self.model.generation_config.eos_token_id if asked is None else asked
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, as the tokenizer begins a text."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return list(prompt)

    def _rows(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int,
        logprobs: bool,
        streams: bool = False,
    ) -> "list[_Row]":
        """One row for each sample, those of a prompt side by side."""
        if isinstance(prompts, str):
            raise ValueError("prompts is a text; give a list of texts")
        ends, strings = self._ends(sampling)
        seed = sampling.seed
        if seed is None and sampling.temperature > 0:
            seed = int(torch.randint(2**62, ()))
        rows = []
        for number, prompt in enumerate(prompts, start=1):
            tokens = self.encode(prompt)
            budget = sampling.max_new_tokens
            if not tokens:
                raise ValueError(f"prompt {number} is empty; give at least one token of text")
            if self.context is not None:
                if len(tokens) >= self.context:
                    raise ValueError(
                        f"prompt {number} has {len(tokens)} tokens, which leaves no room for an "
                        f"answer in the model's context of {self.context}; shorten it"
                    )
                budget = min(budget, self.context - len(tokens))
            for sample in range(n):
                uniform = None
                if sampling.temperature > 0:
                    assert seed is not None
                    uniform = uniform_numbers(seed, tokens, sample, budget)
                rows.append(
                    _Row(
                        prompt=tokens,
                        budget=budget,
                        ends=ends,
                        tokenizer=self.tokenizer,
                        text=TokenText(self.tokenizer) if strings or streams else None,
                        stops=StopStrings(strings),
                        uniform=uniform,
                        logprobs=[] if logprobs else None,
                    )
                )
        return rows

    def _ends(self, sampling: Sampling) -> tuple[frozenset[int], list[str]]:
        """(end tokens, stop strings): the text of a special token never shows, its id does."""
        ends = self.end_tokens(sampling.stop_token_ids)
        special = special_tokens(self.tokenizer)
        strings = [stop for stop in sampling.stop if stop not in special]
        return frozenset((*ends, *(special[s] for s in sampling.stop if s in special))), strings

    @torch.inference_mode()
    def _decode(self, rows: "list[_Row]", sampling: Sampling) -> Iterator[None]:
        """Give every row a token a step until all are finished; stops after each step."""
        device = self.model.device
        prompts = [rows[0].prompt]
        prompt_of_row = [0]
        for before, row in pairwise(rows):
            if row.prompt is not before.prompt:
                prompts.append(row.prompt)
            prompt_of_row.append(len(prompts) - 1)
        batch = _Batch(self.model, prompts, max(row.budget for row in rows))
        logits_BV = batch.read_prompts()
        if len(prompts) < len(rows):  # a prompt is read once for all its samples
            copies = torch.tensor(prompt_of_row, device=device)
            batch.select(copies)
            logits_BV = logits_BV[copies]
        penalties = Penalties(sampling, [row.prompt for row in rows], logits_BV.shape[-1], device)
        uniform_TB = _uniform(rows, device)
        step = 0
        while True:
            logits_BV = logits_BV.float()
            tokens_B = choose(
                penalties.apply(logits_BV),
                sampling,
                None if uniform_TB is None else uniform_TB[step],
            )
            penalties.add(tokens_B)
            self._give(rows, tokens_B, logits_BV)
            yield
            going_on = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not going_on:
                return
            if len(going_on) < len(rows):
                rows = [rows[i] for i in going_on]
                kept = torch.tensor(going_on, device=device)
                batch.select(kept)
                penalties.select(kept)
                tokens_B = tokens_B[kept]
                uniform_TB = None if uniform_TB is None else uniform_TB[:, kept]
            logits_BV = batch.read(tokens_B)
            step += 1

    def _give(self, rows: "list[_Row]", tokens_B: torch.Tensor, logits_BV: torch.Tensor) -> None:
        """Every row its token, and its log-probability where rows want them: one wait."""
        if rows[0].logprobs is None:
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                row.add(token)
            return
        chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
        logprobs_B = (chosen_B - logits_BV.logsumexp(-1)).double()
        for row, (token, logprob) in zip(
            rows, torch.stack((tokens_B.double(), logprobs_B), 1).tolist(), strict=True
        ):
            row.logprobs.append(logprob)  # type: ignore[union-attr]
            row.add(int(token))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that never show in a text, those of the chat template too."""
    added = tokenizer.added_tokens_decoder.items()
    return {str(token): index for index, token in added if token.special}


class TextStream(Iterator[str]):
    """The text of one prompt, piece by piece; no piece is empty or ends within a character.

    ``token_ids`` and ``text`` grow with it; ``finish_reason`` is None until it has ended.
    """

    def __init__(self, row: "_Row", steps: Iterator[None]) -> None:
        self._row, self._steps = row, steps

    def __next__(self) -> str:
        while self._row.finish_reason is None:
            next(self._steps)
            if piece := self._row.take():
                return piece
        raise StopIteration

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, the end token too."""
        return self._row.tokens

    @property
    def text(self) -> str:
        """All text so far."""
        return self._row.shown

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """As in :class:`Result`."""
        return self._row.finish_reason


@dataclass(eq=False)
class _Row:
    """What the host knows of one row: its prompt, its tokens, the text of them."""

    prompt: list[int]  # the same object for all samples of a prompt
    budget: int  # tokens that it may have at most
    ends: frozenset[int]
    tokenizer: Any
    text: TokenText | None  # None where the text is wanted at the end alone
    stops: StopStrings
    uniform: torch.Tensor | None  # (budget,) uniform numbers
    logprobs: list[float] | None
    tokens: list[int] = field(default_factory=list)
    shown: str = ""  # all text that may be seen
    taken: int = 0  # characters of it that take() gave
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, token: int) -> None:
        """One more token; sets ``finish_reason`` where it is the last."""
        self.tokens.append(token)
        if token in self.ends:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.budget:
            self.finish_reason = "length"
        if self.text is None:
            return
        shown, stopped = self.stops.add(self.text.add(token))
        self.shown += shown
        if not stopped and self.finish_reason is not None:
            shown, stopped = self.stops.add(self.text.rest())
            self.shown += shown
            if not stopped:
                self.shown += self.stops.rest()
        if stopped:
            self.finish_reason = "stop"

    def take(self) -> str:
        """The text that came since the last time."""
        piece, self.taken = self.shown[self.taken :], len(self.shown)
        return piece

    def result(self) -> Result:
        """The finished row."""
        assert self.finish_reason is not None
        text = self.shown
        if self.text is None:
            text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Result(text, self.tokens, self.finish_reason, self.logprobs)


def _uniform(rows: list[_Row], device: torch.device) -> torch.Tensor | None:
    """(T, B) uniform numbers, a column a row, or None where nothing is drawn."""
    if rows[0].uniform is None:
        return None
    columns = [row.uniform for row in rows if row.uniform is not None]
    return torch.nn.utils.rnn.pad_sequence(columns).to(device)


class _Batch:
    """What the device knows: the rows' cache, and where in it their padding is."""

    def __init__(self, model: Any, prompts: list[list[int]], new_tokens: int) -> None:
        self.model = model
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        capacity = longest + new_tokens
        self.prompts_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.prompts_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        self.prompts_BT = self.prompts_BT.to(model.device)
        self.cache = preallocated_cache(model.config, capacity)
        self.filled = 0  # positions of the cache
        # A stock class may read the padding of its recurrent layers from a mask of positions.
        self.takes_score_masks = (
            isinstance(model, MiniPreTrainedModel) and model.config._attn_implementation == "sdpa"
        )
        # Rows of one length have no padding: no mask, and positions are those of the cache.
        self.mask_BS = self.lengths_B = None
        if bool((lengths < longest).any()):
            self.lengths_B = lengths.to(model.device)
            position_S = torch.arange(capacity, device=model.device)
            self.mask_BS = position_S >= (longest - self.lengths_B)[:, None]

    def read_prompts(self) -> torch.Tensor:
        """The prompts -> logits (B, V) of what follows each."""
        positions = None
        if self.mask_BS is not None:
            mask_BT = self.mask_BS[:, : self.prompts_BT.shape[1]]
            positions = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        return self._forward(self.prompts_BT, positions)

    def read(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """One more token a row -> logits (B, V) of what follows."""
        positions = None
        if self.lengths_B is not None:
            positions = self.lengths_B[:, None]
            self.lengths_B = self.lengths_B + 1
        return self._forward(tokens_B[:, None], positions)

    def _forward(self, tokens_BT: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        self.filled += tokens_BT.shape[1]
        outputs = self.model(
            input_ids=tokens_BT,
            attention_mask=self._attention_mask(tokens_BT.shape[1]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = outputs.logits[:, -1]
        return logits_BV

    def _attention_mask(self, new_tokens: int) -> torch.Tensor | None:
        """What hides the padding, as the model takes it.

        A single token sees all that is no padding, so the mask of its scores is there already; from
        a mask of positions (B, S) transformers would build it in each step, waiting for the device.
        """
        if self.mask_BS is None:
            return None
        mask_BS = self.mask_BS[:, : self.filled]
        if new_tokens == 1 and self.takes_score_masks:
            return mask_BS[:, None, None]
        return mask_BS.long()

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self.cache.reorder_cache(rows)
        if self.mask_BS is not None and self.lengths_B is not None:
            self.mask_BS, self.lengths_B = self.mask_BS[rows], self.lengths_B[rows]
