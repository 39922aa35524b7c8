"""From a job's tokens to text, in the event loop: thoughts apart, nothing of a stop string."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from transformers.cli.serving.utils import ReasoningText

from mini_llm.data.tokenizer import THINK_END, THINK_START
from mini_llm.inference.generator import special_tokens
from mini_llm.inference.text import StopStrings, TokenText

from .engines import Delivery, Engine, Job


class GenerationFailedError(Exception):
    """The engine could not go on with an answer."""


class TooSlowError(Exception):
    """An answer was not finished within the time limit."""


class Thoughts:
    """Which tokens stand around thoughts, and so which part of a chat's answer is one.

    ``<think>\\n…\\n</think>\\n\\n…`` is what the models learn: the line breaks belong to the marks.
    """

    def __init__(self, tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        self.start, self.end = known.get(THINK_START), known.get(THINK_END)
        self.marks = {mark: known[mark] for mark in (THINK_START, THINK_END) if mark in known}

    def open_in(self, prompt: Sequence[int]) -> bool:
        """Whether the chat template began the thoughts for the model: ``<think>`` and a line break.

        The same mark further up is something that somebody said.
        """
        return self.start in prompt[-2:]


class AnswerText:
    """Turns tokens into pieces of text; a ReasoningText is a piece of thoughts.

    Without ``thoughts`` all is text. ``stopped`` is true once a stop string was found. A token that
    never shows (a special one, a mark around thoughts) is found where it is a stop string itself.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        thoughts: Thoughts | None = None,
        *,
        thinking: bool = False,
    ) -> None:
        self._text, self._stops = TokenText(tokenizer), StopStrings(stops)
        self._thoughts, self._thinking = thoughts, thinking
        self._stop_tokens: frozenset[int] = frozenset()
        if stops:
            hidden = special_tokens(tokenizer) | ({} if thoughts is None else thoughts.marks)
            self._stop_tokens = frozenset(hidden[stop] for stop in stops if stop in hidden)
        self.stopped = False
        self._at_start = thinking  # of thoughts, or of what follows them: its line breaks go
        self._line_breaks = ""  # perhaps those before the end of the thoughts

    def add(self, token: int) -> list[str]:
        """The pieces that this token finishes."""
        if token in self._stop_tokens:
            pieces = self.end()
            self.stopped = True
            return pieces
        if self._thoughts is not None:
            if token == self._thoughts.start and not self._thinking:
                return self._turn(thinking=True)
            if token == self._thoughts.end and self._thinking:
                return self._turn(thinking=False)
        return self._until_stop(self._text.add(token))

    def end(self) -> list[str]:
        """What is left when no more tokens come."""
        if self.stopped:
            return []
        pieces = self._until_stop(self._text.rest())
        return pieces if self.stopped else [*pieces, *self._shown(self._stops.rest())]

    def _until_stop(self, piece: str) -> list[str]:
        piece, self.stopped = self._stops.add(piece)
        return self._shown(piece)

    def _turn(self, *, thinking: bool) -> list[str]:
        pieces = self.end()
        self._thinking, self._at_start, self._line_breaks = thinking, True, ""
        return pieces

    def _shown(self, piece: str) -> list[str]:
        if self._at_start:
            piece = piece.lstrip("\n")
            self._at_start = not piece
        if not self._thinking:
            return [piece] if piece else []
        piece = self._line_breaks + piece
        shown = piece.rstrip("\n")
        self._line_breaks = piece[len(shown) :]
        return [ReasoningText(shown)] if shown else []


class Answer:
    """One answer, generated while :meth:`pieces` is iterated over; leaving it ends the work.

    ``slots`` bounds how many are generated at a time. ``finish_reason`` and ``generated_tokens``
    are whole when the pieces have come to their end.
    """

    def __init__(
        self,
        engine: Engine,
        slots: asyncio.Semaphore,
        text: AnswerText,
        *,
        prompt: list[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._engine, self._slots, self._text = engine, slots, text
        self._deadline, self._seconds = self._loop.time() + seconds, seconds
        self.job = Job(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            deliver=self._deliver,
        )
        self.finish_reason: Literal["stop", "length"] = "stop"
        self.generated_tokens = 0

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it comes. Raises TooSlowError, GenerationFailedError, EngineDeadError."""
        await self._in_time(self._slots.acquire())
        ended = False
        try:
            self._engine.submit(self.job)
            while not ended:
                delivery = await self._in_time(self._deliveries.get())
                ended = delivery.ended
                if delivery.error is not None:
                    raise GenerationFailedError(delivery.error)
                for token in delivery.tokens:
                    self.generated_tokens += 1
                    for piece in self._text.add(token):
                        yield piece
                    if self._text.stopped:
                        return
                if ended:
                    self.finish_reason = self._why_ended(delivery)
            for piece in self._text.end():
                yield piece
            if self._text.stopped:
                self.finish_reason = "stop"
        finally:
            if not ended:
                self._engine.cancel(self.job)
            self._slots.release()

    def _deliver(self, delivery: Delivery) -> None:
        """Called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._deliveries.put_nowait, delivery)

    def _why_ended(self, last: Delivery) -> Literal["stop", "length"]:
        full = self.generated_tokens >= self.job.max_new_tokens
        at_end = bool(last.tokens) and last.tokens[-1] in self._engine.end_tokens
        return "length" if full and not at_end else "stop"

    async def _in_time(self, awaitable: Any) -> Any:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await awaitable
        except TimeoutError:
            raise TooSlowError(
                f"the answer took longer than the {self._seconds:g} s that are allowed"
            ) from None
