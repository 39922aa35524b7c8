"""From a request to its response: transformers serve's handlers, around our engines.

Theirs are the bodies of the responses. Ours are the prompt and the generation, for theirs take the
first request's sampling for all, let the generation config ignore a request's temperature, know no
stop strings in a batch, report "length" for an answer that ends at its last token, and split
thoughts from the answer for some architectures only.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from openai.types import CompletionUsage
from starlette.responses import Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import ReasoningText

from .answer import Answer, AnswerText, GenerationFailedError, Thoughts, TooSlowError
from .engines import Engine, EngineDeadError
from .errors import ApiError
from .metrics import Metrics
from .requests import ChatRequest, CompletionRequest, GenerationRequest

LIKELIEST_BELOW = 0.01  # temperatures that are as good as 0, and could overflow the logits


@dataclass(frozen=True)
class Served:
    """The one model of a server, and what its answers are bound by.

    ``context`` and the maxima in tokens; ``seconds`` for one answer, the wait for a place included.
    """

    name: str
    tokenizer: Any
    is_chat_model: bool
    generation_config: Any
    vocab_size: int
    engine: Engine
    slots: asyncio.Semaphore
    metrics: Metrics
    context: int
    max_prompt_tokens: int
    max_new_tokens: int
    seconds: float

    def answer(
        self,
        request: GenerationRequest,
        prompt: list[int],
        max_new_tokens: int | None,
        thoughts: Thoughts | None = None,
    ) -> Answer:
        """The answer to a prompt, not yet begun. Raises ApiError for a prompt of a wrong length."""
        longest = min(self.max_prompt_tokens, self.context - 1)
        if not prompt:
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        if len(prompt) > longest:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, this server takes at most {longest}",
                code="context_length_exceeded",
            )
        if (reason := self.engine.why_dead()) is not None:
            raise ApiError(503, reason)
        config = self.generation_config
        temperature = request.temperature
        if temperature is None:
            temperature = (config.temperature or 1.0) if config.do_sample else 0.0
        top_k = (config.top_k or 0) if request.top_k is None else request.top_k
        top_p = (config.top_p or 1.0) if request.top_p is None else request.top_p
        self.metrics.prompt_tokens.inc(len(prompt))
        thinking = thoughts is not None and thoughts.open_in(prompt)
        return Answer(
            self.engine,
            self.slots,
            AnswerText(self.tokenizer, request.stops, thoughts, thinking=thinking),
            prompt=prompt,
            max_new_tokens=min(
                max_new_tokens or self.max_new_tokens,
                self.max_new_tokens,
                self.context - len(prompt),
            ),
            temperature=0.0 if temperature < LIKELIEST_BELOW else temperature,
            top_p=top_p,
            top_k=min(top_k or self.vocab_size, self.vocab_size),
            seconds=self.seconds,
        )


class EventStream(StreamingResponse):
    """Server-sent events; the generator is closed when the client goes, not some time later."""

    body_iterator: AsyncGenerator[str, None]

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        # A proxy that collected the events would defeat their purpose.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            await self.body_iterator.aclose()


class _Handler:
    """What both handlers share: running an answer, and telling how it went."""

    served: Served

    def usage(self, answer: Answer) -> CompletionUsage:
        """The number of tokens."""
        prompt, generated = len(answer.job.prompt), answer.generated_tokens
        return CompletionUsage(
            prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
        )

    async def pieces(self, answer: Answer) -> AsyncGenerator[str, None]:
        """The answer's pieces; what goes wrong as an ApiError."""
        metrics, begun = self.served.metrics, time.monotonic()
        pieces, first = answer.pieces(), True
        try:
            async for piece in pieces:
                if first:
                    metrics.first_text_seconds.observe(time.monotonic() - begun)
                    first = False
                yield piece
        except TooSlowError as error:
            raise ApiError(504, str(error)) from error
        except (GenerationFailedError, EngineDeadError) as error:
            status = 500 if self.served.engine.why_dead() is None else 503
            raise ApiError(status, str(error)) from error
        finally:
            await pieces.aclose()
            metrics.generated_tokens.inc(answer.generated_tokens)

    async def guarded(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """The events and the end mark, or the error that came between."""
        try:
            async for event in events:
                yield event
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield error.event()
        finally:
            await events.aclose()


class ChatHandler(_Handler, ChatCompletionHandler):
    """POST /v1/chat/completions."""

    def __init__(self, served: Served) -> None:
        super().__init__(model_manager=None, generation_state=None)  # which load and generate
        self.served = served
        self.thoughts = Thoughts(served.tokenizer)

    async def handle_request(self, body: ChatRequest) -> Response:
        """Answer, at once or as a stream."""
        prompt = self._prompt(body)
        wanted = body.max_completion_tokens or body.max_tokens
        answer = self.served.answer(body, prompt, wanted, self.thoughts)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        if body.stream:
            return EventStream(self.guarded(self._events(request_id, answer, body.include_usage)))
        content: list[str] = []
        thoughts: list[str] = []
        async for piece in self.pieces(answer):
            (thoughts if isinstance(piece, ReasoningText) else content).append(piece)
        completion = self._build_completion(
            request_id,
            "".join(content),
            self.served.name,
            answer.finish_reason,
            usage=self.usage(answer),
            reasoning_content="".join(thoughts) or None,
        )
        return JSONResponse(completion)

    def _prompt(self, body: ChatRequest) -> list[int]:
        tokenizer = self.served.tokenizer
        if not self.served.is_chat_model:
            has = (
                "does not stop at the end of" if tokenizer.chat_template else "has no template for"
            )
            raise ApiError(
                400,
                f"{self.served.name} {has} a chat's answer: it is a base model, which continues "
                "text; use /v1/completions",
            )
        options = body.chat_template_kwargs
        arguments = {} if options is None else options.model_dump(exclude_none=True)
        # In the event loop, for a fast tokenizer is not safe in two threads.
        try:
            encoded = tokenizer.apply_chat_template(
                [message.for_template() for message in body.messages],
                add_generation_prompt=True,
                return_dict=True,
                **arguments,
            )
        except TemplateError as error:
            raise ApiError(400, f"the chat template: {error}", param="messages") from error
        return list(encoded["input_ids"])

    async def _events(
        self, request_id: str, answer: Answer, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        name = self.served.name
        yield self._build_chunk_sse(request_id, role="assistant", content="", model=name)
        async for piece in self.pieces(answer):
            kind = "reasoning_content" if isinstance(piece, ReasoningText) else "content"
            yield self._build_chunk_sse(request_id, model=name, **{kind: piece})
        yield self._build_chunk_sse(request_id, model=name, finish_reason=answer.finish_reason)
        if include_usage:
            yield _usage_event("chat.completion.chunk", request_id, name, self.usage(answer))


class TextHandler(_Handler, CompletionHandler):
    """POST /v1/completions."""

    def __init__(self, served: Served) -> None:
        super().__init__(model_manager=None, generation_state=None)
        self.served = served

    async def handle_request(self, body: CompletionRequest) -> Response:
        """Go on from the prompt, at once or as a stream."""
        answer = self.served.answer(body, self._prompt(body), body.max_tokens)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        if body.stream:
            return EventStream(self.guarded(self._events(request_id, answer, body.include_usage)))
        text = "".join([piece async for piece in self.pieces(answer)])
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        completion = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.name,
            "choices": [choice],
            "usage": self.usage(answer).model_dump(exclude_none=True),
        }
        return JSONResponse(completion)

    def _prompt(self, body: CompletionRequest) -> list[int]:
        prompt = body.prompt
        if not isinstance(prompt, str):
            if not isinstance(prompt[0], str):
                size = self.served.vocab_size
                if not all(0 <= token < size for token in prompt):
                    raise ApiError(400, f"a token is not from 0 to {size - 1}", param="prompt")
                return list(prompt)
            prompt = prompt[0]
        return list(self.served.tokenizer(prompt)["input_ids"])

    async def _events(
        self, request_id: str, answer: Answer, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        name = self.served.name
        async for piece in self.pieces(answer):
            yield self._build_chunk_sse(request_id, name, text=piece)
        yield self._build_chunk_sse(request_id, name, finish_reason=answer.finish_reason)
        if include_usage:
            yield _usage_event("text_completion", request_id, name, self.usage(answer))


def _usage_event(kind: str, request_id: str, model: str, usage: CompletionUsage) -> str:
    """The event without a choice that ends a stream where the client wants the usage."""
    event = {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [],
        "usage": usage.model_dump(exclude_none=True),
    }
    return f"data: {json.dumps(event)}\n\n"
