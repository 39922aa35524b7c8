"""The routes, and how what goes wrong is told."""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .errors import ApiError
from .guard import KeyGuard, Limits, RequestGuard
from .handlers import ChatHandler, Served, TextHandler
from .requests import ChatRequest, CompletionRequest

# Pages on this machine, and the schemes under which desktop programs show theirs.
LOCAL_ORIGINS = (
    r"https?://(([a-z0-9-]+\.)?localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
    r"|(app|tauri|capacitor|vscode-webview)://.*"
)
PROMETHEUS_TEXT = "text/plain; version=1.0.0; charset=utf-8"


class ErrorFields(BaseModel):
    """What went wrong, in a sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error of this server."""

    error: ErrorFields


class ModelEntry(BaseModel):
    """A model that can be named in a request."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "mini_llm"
    max_model_len: int


class ModelList(BaseModel):
    """GET /v1/models."""

    object: str = "list"
    data: list[ModelEntry]


class Health(BaseModel):
    """GET /health."""

    status: str
    model: str
    batching: str


def build_app(
    served: Served,
    *,
    limits: Limits,
    key: str | None,
    cors_origins: list[str],
    created: int,
) -> FastAPI:
    """The server's app; ``created`` is the checkpoint's time in seconds since 1970.

    ``cors_origins``: pages of which origins a browser lets in; none means LOCAL_ORIGINS.
    """

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": description}
        for status, description in {
            400: "Not a valid request",
            401: "Wrong API key",
            403: "Not for this machine",
            404: "Unknown model",
            408: "The body came too slowly",
            413: "The body is too long",
            429: "Too many requests at a time",
            500: "Generation failed",
            503: "Nothing can be generated any more",
            504: "The answer took too long",
        }.items()
    }
    # For the OpenAPI description; "default" keeps FastAPI from adding a 422 that is never sent.
    errors["default"] = {"model": ErrorBody, "description": "Any other error"}
    app = FastAPI(
        title="mini-llm",
        docs_url=None,  # these pages load their scripts from the internet
        redoc_url=None,
        responses={401: errors[401]} if key is not None else {403: errors[403]},
    )
    chat, text = ChatHandler(served), TextHandler(served)
    entry = ModelEntry(id=served.name, created=created, max_model_len=served.context)

    def check_model(name: str) -> None:
        if name != served.name:
            message = f"the model {name!r} is not served here, only {served.name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def stream_of(what: str) -> dict[str, Any]:
        return {"description": what, "content": {"text/event-stream": {}}}

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={**errors, 200: {"model": ChatCompletion, **stream_of("The answer")}},
    )
    async def chat_completions(body: ChatRequest) -> Response:
        check_model(body.model)
        return await chat.handle_request(body)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={**errors, 200: {"model": Completion, **stream_of("The text")}},
    )
    async def completions(body: CompletionRequest) -> Response:
        check_model(body.model)
        return await text.handle_request(body)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[entry])

    @app.get("/v1/models/{name:path}", responses={404: errors[404], "default": errors["default"]})
    async def model(name: str) -> ModelEntry:
        check_model(name)
        return entry

    @app.get("/health", responses={503: {"model": Health, "description": "Out of order"}})
    async def health() -> JSONResponse:
        reason = served.engine.why_dead()
        state = Health(
            status="ok" if reason is None else reason,
            model=served.name,
            batching=served.engine.name,
        )
        return JSONResponse(state.model_dump(), 200 if reason is None else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=PROMETHEUS_TEXT)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _why_invalid(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return ApiError(error.status_code, str(error.detail), headers=headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        return ApiError(500, "an error in the server; its log has the details").response()

    describe = app.openapi

    def describe_with_model() -> dict[str, Any]:
        description = describe()
        for request in (ChatRequest, CompletionRequest):
            schema = description["components"]["schemas"][request.__name__]
            schema["properties"]["model"]["enum"] = [served.name]
        return description

    app.openapi = describe_with_model  # type: ignore[method-assign]

    # The last one added is the first that a request meets. A preflight request has no key.
    routes = frozenset(
        {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    )
    app.add_middleware(RequestGuard, limits=limits, metrics=served.metrics, routes=routes)
    app.add_middleware(KeyGuard, key=key)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=cors_origins,
        allow_origin_regex=None if cors_origins else LOCAL_ORIGINS,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    return app


def _why_invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, without what the client sent."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        where, reason = "", f"the body is not JSON: {first['ctx']['error']}"
    return ApiError(400, f"{where}: {reason}" if where else reason, param=where or None)
