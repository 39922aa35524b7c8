"""What a request may hold: OpenAI's fields, as far as the server does what they say.

A field that would change the answer and cannot be honoured is refused, not ignored. Fields without
an influence on the answer (``user``, ``metadata``, …) and unknown ones are let through.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# Field -> values that ask for nothing special, which clients send by default.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
STOP_STRINGS = 4  # as in OpenAI's API
STOP_STRING_LENGTH = 256  # characters


def _check_text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair, which JSON can hold, is no text")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
StopString = Annotated[Text, Field(min_length=1, max_length=STOP_STRING_LENGTH)]


class StreamOptions(BaseModel):
    """``include_usage``: a last event with the number of tokens."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of request share. What is left out, the checkpoint's generation config says.

    A temperature below 0.01 counts as 0, the likeliest token. ``top_k`` (0: all tokens) is an
    extension. ``seed`` is for a temperature of 0 alone: all requests draw from one source.
    """

    model_config = ConfigDict(strict=True)

    model: str = Field(description="The id that /v1/models gives")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="At most; the server has its own limit")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop: StopString | Annotated[list[StopString], Field(max_length=STOP_STRINGS)] | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            for name, neutral in NOT_SUPPORTED.items():
                if name in fields and fields[name] not in neutral:
                    raise ValueError(f"{name} is not supported by this server; leave it out")
        return fields

    @model_validator(mode="after")
    def _seed_without_sampling(self) -> "GenerationRequest":
        if self.seed is not None and self.temperature != 0:
            raise ValueError(
                "seed is not supported with sampling, where requests share their random numbers; "
                "leave it out or set temperature to 0"
            )
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: text that goes on from ``prompt``, a text or its tokens."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Annotated[list[int], Field(min_length=1)]
    )


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn of a conversation; ``developer`` is another name for ``system``."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} needs content")
        return self

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        message = {"role": self.role.replace("developer", "system"), "content": text}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class TemplateOptions(BaseModel):
    """``enable_thinking`` lets the model think first, or begins after empty thoughts.

    No other argument of a template can be set: some of transformers' would replace the template.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions: the assistant's next turn."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer max_tokens")
    chat_template_kwargs: TemplateOptions | None = None
