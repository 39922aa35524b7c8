"""The server's routes, limits and errors, around an engine that says what a test wants."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import GenerationConfig

from mini_llm.data import load_tokenizer
from mini_llm.data.tokenizer import DEFAULT_TOKENIZER, IM_END
from mini_llm.inference.ends import is_chat_model
from mini_llm.inference.serve.app import build_app
from mini_llm.inference.serve.engines import Delivery, Engine, Job
from mini_llm.inference.serve.guard import Limits
from mini_llm.inference.serve.handlers import Served
from mini_llm.inference.serve.metrics import Metrics
from mini_llm.inference.serve.serving import not_followed

TOKENIZER = load_tokenizer(DEFAULT_TOKENIZER)
KEY = "the-key"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}]}
TEXT = {"model": "tiny", "prompt": "从前"}
END = TOKENIZER.eos_token_id
CHAT_ENDS = frozenset({END, TOKENIZER.convert_tokens_to_ids(IM_END)})


class Parrot(Engine):
    """Says ``answer`` to everybody; None: nothing, ever."""

    name = "a parrot"
    end_tokens = frozenset({END})

    def __init__(self, answer: str | None = "春天来了。夏天也来了。") -> None:
        self.answer, self.death = answer, None
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        if self.answer is None:
            return
        tokens = [*TOKENIZER(self.answer)["input_ids"], END][: job.max_new_tokens]
        for number, token in enumerate(tokens, start=1):
            job.deliver(Delivery([token], number == len(tokens)))

    def cancel(self, job: Job) -> None:
        job.cancelled = True

    def why_dead(self) -> str | None:
        return self.death

    def close(self) -> None:
        pass


@pytest.fixture
def client() -> Iterator[Callable[..., TestClient]]:
    """A function from what is special about a server to a client of it."""
    clients = []

    def make(
        engine: Engine | None = None,
        *,
        key: str | None = KEY,
        rows: int = 2,
        waiting: int = 1,
        seconds: float = 60,
        body_bytes: int = 20_000,
        tokenizer: Any = TOKENIZER,
        ends: frozenset[int] = CHAT_ENDS,
        cors_origins: tuple[str, ...] = (),
    ) -> TestClient:
        served = Served(
            name="tiny",
            tokenizer=tokenizer,
            is_chat_model=is_chat_model(tokenizer, GenerationConfig(eos_token_id=list(ends))),
            generation_config=GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95),
            vocab_size=len(TOKENIZER),
            engine=engine or Parrot(),
            slots=asyncio.Semaphore(rows),
            metrics=Metrics(),
            context=100,
            max_prompt_tokens=60,
            max_new_tokens=50,
            seconds=seconds,
        )
        limits = Limits(body_bytes, 5, seconds + 1, rows + waiting)
        app = build_app(
            served, limits=limits, key=key, cors_origins=list(cors_origins), created=1_700_000_000
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        made = TestClient(app, "http://localhost", headers=headers, raise_server_exceptions=False)
        clients.append(made)
        return made.__enter__()

    yield make
    for made in clients:
        made.__exit__()


def error_of(response: Any, status: int) -> str:
    """The sentence of an error, whose shape is OpenAI's."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


def test_a_chat_answer_has_its_thoughts_apart(client: Callable[..., TestClient]) -> None:
    server = client(Parrot("<think>\n问候\n</think>\n\n你好！"))
    message = server.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "你好！", "reasoning_content": "问候"}


def test_the_end_is_told_from_the_limit(client: Callable[..., TestClient]) -> None:
    tokens = len(TOKENIZER("春天来了。夏天也来了。")["input_ids"]) + 1
    server = client()
    for limit, reason in ((tokens + 5, "stop"), (tokens, "stop"), (tokens - 1, "length")):
        answer = server.post("/v1/completions", json={**TEXT, "max_tokens": limit}).json()
        assert answer["choices"][0]["finish_reason"] == reason, limit
        assert answer["usage"]["completion_tokens"] == min(limit, tokens)


def test_a_stop_string_is_not_shown_and_ends_the_work(client: Callable[..., TestClient]) -> None:
    engine = Parrot(None)
    server = client(engine)

    def say_without_an_end(job: Job) -> None:
        for token in TOKENIZER("春天来了。夏天也来了。")["input_ids"]:
            job.deliver(Delivery([token], False))

    engine.submit = lambda job: (engine.jobs.append(job), say_without_an_end(job))  # type: ignore[method-assign]
    answer = server.post("/v1/completions", json={**TEXT, "stop": ["夏天"]}).json()
    assert answer["choices"][0] == {
        "text": "春天来了。",
        "index": 0,
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert engine.jobs[0].cancelled


@pytest.mark.parametrize("stop", ["<|im_start|>", "</think>"])
def test_a_token_that_never_shows_is_a_stop_string_too(
    client: Callable[..., TestClient], stop: str
) -> None:
    engine = Parrot("<think>\n想\n</think>\n\n好<|im_start|>不")
    answer = client(engine).post("/v1/chat/completions", json={**CHAT, "stop": stop}).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == ("好" if stop == "<|im_start|>" else "")
    assert choice["message"]["reasoning_content"] == "想"
    assert choice["finish_reason"] == "stop"
    said = engine.answer.partition(stop)[0] + stop
    assert answer["usage"]["completion_tokens"] == len(TOKENIZER(said)["input_ids"])
    assert engine.jobs[0].cancelled
    text = client(engine).post("/v1/completions", json={**TEXT, "stop": stop}).json()
    assert text["choices"][0]["text"] == engine.answer.partition(stop)[0]


def test_a_request_without_sampling_gets_the_checkpoints(client: Callable[..., TestClient]) -> None:
    engine = Parrot()
    server = client(engine)
    for asked, expected in (
        ({}, (0.8, len(TOKENIZER), 0.95)),
        ({"temperature": 0}, (1.0, 1, 1.0)),
        ({"temperature": 5e-324}, (1.0, 1, 1.0)),
        ({"temperature": 2, "top_p": 0.5, "top_k": 7}, (2, 7, 0.5)),
        ({"temperature": 1, "top_k": 10**9}, (1, len(TOKENIZER), 0.95)),
    ):
        assert server.post("/v1/completions", json={**TEXT, **asked}).status_code == 200
        assert engine.jobs[-1].row_sampling == expected


def test_no_answer_is_longer_than_server_and_context_allow(
    client: Callable[..., TestClient],
) -> None:
    engine = Parrot()
    server = client(engine)
    for prompt, asked, expected in (([5], None, 50), ([5], 10**12, 50), ([5] * 60, 45, 40)):
        body = {**TEXT, "prompt": prompt, "max_tokens": asked}
        assert server.post("/v1/completions", json=body).status_code == 200
        assert engine.jobs[-1].max_new_tokens == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
        ({"stop": ""}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"n": 2}, "n is not supported by this server; leave it out"),
        ({"logprobs": 3}, "logprobs is not supported by this server; leave it out"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"seed": 1}, "seed is not supported with sampling"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [-1]}, "a token is not from 0 to"),
        ({"prompt": [10**30]}, "a token is not from 0 to"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "字" * 500}, "tokens, this server takes at most 60"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_a_bad_value_is_told_in_a_sentence(
    client: Callable[..., TestClient], changes: dict[str, Any], message: str
) -> None:
    engine = Parrot()
    body = json.dumps({**TEXT, **changes})
    response = client(engine).post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert message in error_of(response, 400)
    assert not engine.jobs


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1e999}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"1" * 6000 + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_a_bad_request(
    client: Callable[..., TestClient], body: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    assert error_of(client().post("/v1/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: List should have at least 1 item"),
        ([{"role": "tool", "content": "a"}], "messages.0.role"),
        ([{"role": "user"}], "a message of the role user needs content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ("hello", "messages: Input should be a valid list"),
    ],
)
def test_a_conversation_that_is_none_is_a_bad_request(
    client: Callable[..., TestClient], messages: Any, message: str
) -> None:
    response = client().post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert message in error_of(response, 400)


def test_a_request_cannot_bring_its_own_template(client: Callable[..., TestClient]) -> None:
    """transformers would run it."""
    options = {"chat_template": "{{ 7 * 7 }}"}
    body = {**CHAT, "chat_template_kwargs": options}
    assert "chat_template" in error_of(client().post("/v1/chat/completions", json=body), 400)


def test_the_parts_of_a_message_are_one_text(client: Callable[..., TestClient]) -> None:
    engine = Parrot()
    server = client(engine)
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert server.post("/v1/chat/completions", json=CHAT).status_code == 200
    body = {**CHAT, "messages": [{"role": "user", "content": parts}]}
    assert server.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.jobs[0].prompt == engine.jobs[1].prompt


def test_a_base_model_has_no_chat(client: Callable[..., TestClient]) -> None:
    without_template = load_tokenizer(DEFAULT_TOKENIZER)
    without_template.chat_template = None
    for server, reason in (
        (client(tokenizer=without_template), "has no template for a chat's answer"),
        (client(ends=frozenset({END})), "does not stop at the end of a chat's answer"),
    ):
        message = error_of(server.post("/v1/chat/completions", json=CHAT), 400)
        assert reason in message and "/v1/completions" in message
        assert server.post("/v1/completions", json=TEXT).status_code == 200


def test_another_model_is_not_found(client: Callable[..., TestClient]) -> None:
    server = client()
    body = {**TEXT, "model": "gpt2"}
    assert "'gpt2'" in error_of(server.post("/v1/completions", json=body), 404)
    assert error_of(server.get("/v1/models/gpt2"), 404)
    assert server.get("/v1/models/tiny").json()["id"] == "tiny"


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/docs"])
def test_what_transformers_serve_has_besides_is_not_there(
    client: Callable[..., TestClient], path: str
) -> None:
    assert error_of(client().post(path, json={"model": "gpt2"}), 404)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY} {KEY}", KEY],
)
def test_without_the_key_only_the_health_is_told(
    client: Callable[..., TestClient], header: str
) -> None:
    server = client()
    headers = {"Authorization": header}
    assert "API key" in error_of(server.post("/v1/completions", json=TEXT, headers=headers), 401)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert error_of(server.get(path, headers=headers), 401)
    assert server.get("/health", headers=headers).json()["status"] == "ok"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_key_opens(client: Callable[..., TestClient], scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {KEY}"}
    assert client().get("/v1/models", headers=headers).status_code == 200


def test_without_a_key_another_host_name_is_refused(client: Callable[..., TestClient]) -> None:
    """A page whose name was made to point to this machine sends its own name."""
    server = client(key=None)
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert server.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert error_of(server.get("/v1/models", headers={"Host": host}), 403)


def test_a_long_body_is_refused_whether_or_not_it_is_announced(
    client: Callable[..., TestClient],
) -> None:
    server = client(body_bytes=1000)
    long = json.dumps({**TEXT, "prompt": "a" * 2000}).encode()

    def chunks() -> Iterator[bytes]:
        yield from (long[:900], long[900:])

    headers = {"Content-Type": "application/json"}
    for body in (long, chunks()):
        response = server.post("/v1/completions", content=body, headers=headers)
        assert "at most 1000" in error_of(response, 413)


def test_more_requests_than_there_are_places_are_sent_away(
    client: Callable[..., TestClient],
) -> None:
    server = client(rows=1, waiting=0)
    guard = server.app.middleware_stack  # type: ignore[attr-defined]
    while not hasattr(guard, "active"):
        guard = guard.app
    guard.active = 1
    response = server.post("/v1/completions", json=TEXT)
    assert "try again later" in error_of(response, 429)
    assert int(response.headers["Retry-After"]) >= 1
    assert server.get("/health").status_code == 200, "what does not generate is not counted"
    guard.active = 0
    assert server.post("/v1/completions", json=TEXT).status_code == 200
    assert guard.active == 0


def test_an_answer_that_takes_too_long_is_given_up(client: Callable[..., TestClient]) -> None:
    engine = Parrot(None)
    server = client(engine, seconds=0.3, rows=1)
    assert "longer than the 0.3 s" in error_of(server.post("/v1/completions", json=TEXT), 504)
    assert engine.jobs[0].cancelled
    stream = server.post("/v1/completions", json={**TEXT, "stream": True})
    assert stream.status_code == 200
    assert (
        "longer than the 0.3 s" in json.loads(stream.text.split("data: ")[-1])["error"]["message"]
    )
    assert len(engine.jobs) == 2, "the place of the first was not given to the second"


def test_an_engine_that_died_is_not_healthy(client: Callable[..., TestClient]) -> None:
    engine = Parrot()
    server = client(engine)
    engine.death = "generation failed: out of memory"
    assert server.get("/health").status_code == 503
    assert "out of memory" in error_of(server.post("/v1/completions", json=TEXT), 503)


def test_a_failure_in_the_server_is_told_without_its_details(
    client: Callable[..., TestClient],
) -> None:
    engine = Parrot()

    def broken(_: Job) -> None:
        raise KeyError("secret")

    engine.submit = broken  # type: ignore[method-assign]
    message = error_of(client(engine).post("/v1/completions", json=TEXT), 500)
    assert "secret" not in message


@pytest.mark.parametrize(
    ("origin", "allowed", "let_in"),
    [
        ("http://localhost:3000", (), True),
        ("http://127.0.0.1", (), True),
        ("tauri://localhost", (), True),
        ("http://tauri.localhost", (), True),
        ("app://obsidian.md", (), True),
        ("https://evil.example", (), False),
        ("http://localhost.evil.example", (), False),
        ("http://evillocalhost", (), False),
        ("null", (), False),
        ("https://chat.example.org", ("https://chat.example.org",), True),
        ("http://localhost:3000", ("https://chat.example.org",), False),
        ("https://evil.example", ("*",), True),
    ],
)
def test_a_browser_lets_in_the_pages_that_may(
    client: Callable[..., TestClient], origin: str, allowed: tuple[str, ...], let_in: bool
) -> None:
    server = client(cors_origins=allowed)
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = server.options(  # without the key, as browsers send it
        "/v1/chat/completions", headers={**asked, "Authorization": ""}
    )
    assert (preflight.status_code == 200) is let_in
    for response in (
        server.get("/v1/models", headers={"Origin": origin}),
        server.get("/v1/models", headers={"Origin": origin, "Authorization": ""}),  # the error too
    ):
        assert ("access-control-allow-origin" in response.headers) is let_in


def test_metrics_count_requests_and_tokens(client: Callable[..., TestClient]) -> None:
    server = client()
    server.post("/v1/completions", json={**TEXT, "max_tokens": 3})
    server.post("/v1/completions", json={**TEXT, "max_tokens": 3, "stream": True})
    server.post("/v1/completions", json={**TEXT, "temperature": -1})
    server.get("/v1/models/nowhere")
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = dict(re.findall(r"^(mini_llm_\S+) (\S+)$", response.text, re.MULTILINE))
    requests = {name: float(value) for name, value in values.items() if "requests_total" in name}
    assert requests == {
        'mini_llm_requests_total{route="/v1/completions",status="200"}': 2,
        'mini_llm_requests_total{route="/v1/completions",status="400"}': 1,
        'mini_llm_requests_total{route="other",status="404"}': 1,
    }
    assert float(values["mini_llm_generated_tokens_total"]) == 6
    prompt = len(TOKENIZER(TEXT["prompt"])["input_ids"])
    assert float(values["mini_llm_prompt_tokens_total"]) == 2 * prompt
    assert float(values["mini_llm_requests_active"]) == 0
    assert float(values["mini_llm_time_to_first_text_seconds_count"]) == 2


def test_the_description_names_what_a_request_may_hold(client: Callable[..., TestClient]) -> None:
    description = client().get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    for route in ("/v1/chat/completions", "/v1/completions"):
        statuses = set(description["paths"][route]["post"]["responses"])
        assert {"200", "400", "401", "404", "413", "429", "504"} <= statuses
        assert "422" not in statuses


def test_what_no_answer_follows_of_a_generation_config_is_named() -> None:
    followed = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "max_length": 9}
    assert not_followed(GenerationConfig(**followed, eos_token_id=[1, 2], pad_token_id=0)) == ""
    config = GenerationConfig(**followed, min_p=0.1, num_beams=2, repetition_penalty=1.2)
    assert sorted(not_followed(config).split(", ")) == [
        "min_p 0.1",
        "num_beams 2",
        "repetition_penalty 1.2",
    ]
