"""The server as a process, and the real client of OpenAI."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.conftest import REPOSITORY
from tests.serving import (
    ARCHITECTURES,
    KEY,
    PROMPTS,
    Server,
    make_checkpoint,
    reference_tokens,
    running_server,
)

NEW_TOKENS = 12
CLIENTS = 64
# Soak: the process may grow by so much between warm-up and end. What 64 requests hold at a time
# (buffers, events on their way) comes and goes by a few MB; a leak of a cache, or of all answers,
# of the thousands of requests would be more.
FLAT_BYTES = 25_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mini_llama3_tiny", tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with running_server(checkpoint) as server:
        yield server


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> list[str]:
    """What stock transformers says to PROMPTS."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [tokenizer.decode(ids) for ids in reference_tokens(checkpoint, PROMPTS[:3], NEW_TOKENS)]


def value(server: Server, metric: str) -> float:
    """A metric without labels."""
    with server.http() as http:
        found = re.search(rf"^{metric} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def wait_until_idle(server: Server) -> None:
    """Until no request is worked on any more."""
    for _ in range(600):
        if value(server, "mini_llm_requests_active") == 0:
            return
        time.sleep(0.1)
    raise AssertionError("requests whose clients are gone are still worked on")


def complete(server: Server, prompt: str) -> str:
    """A short answer, the likeliest."""
    answer = server.client().completions.create(
        model=server.model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0
    )
    return answer.choices[0].text


def test_openai_clients_get_their_text_at_once_and_as_a_stream(
    server: Server, reference: list[str]
) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [server.model]

    def ask(prompt: str) -> str:
        asked = {"model": server.model, "prompt": prompt, "temperature": 0}
        asked |= {"max_tokens": NEW_TOKENS}
        answer = client.completions.create(**asked)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None and answer.usage.completion_tokens == NEW_TOKENS
        stream = client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        events = list(stream)
        assert "".join(e.choices[0].text for e in events if e.choices) == answer.choices[0].text
        assert len(events) > NEW_TOKENS / 2, "it came at once"
        assert events[-1].usage == answer.usage
        return answer.choices[0].text

    with ThreadPoolExecutor(len(reference)) as pool:
        answers = list(pool.map(ask, PROMPTS[: len(reference)]))
    assert answers == reference
    assert all(re.search("[一-鿿]", answer) for answer in answers), "no Chinese"


def test_openai_client_streams_a_chat_until_a_stop_string(server: Server) -> None:
    client = server.client()
    asked = {"model": server.model, "temperature": 0, "max_tokens": NEW_TOKENS}
    asked |= {"messages": [{"role": "user", "content": "你好，请介绍一下春天。"}]}

    def said(**changes: object) -> tuple[str, str]:
        stream = client.chat.completions.create(**asked, **changes, stream=True)
        deltas = [event.choices[0] for event in stream]
        assert deltas[0].delta.role == "assistant"
        return "".join(d.delta.content or "" for d in deltas), deltas[-1].finish_reason

    whole, reason = said()
    assert reason == "length"
    assert client.chat.completions.create(**asked).choices[0].message.content == whole
    stop = whole[len(whole) // 2 :][:3]
    for stops in (stop, [stop, "something else"]):
        assert said(stop=stops) == (whole[: whole.index(stop)], "stop")


def test_bad_requests_get_their_status_and_the_server_goes_on(
    server: Server, reference: list[str]
) -> None:
    client = server.client()
    asked = {"model": server.model, "prompt": "从前"}
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        server.client(api_key="wrong").completions.create(**asked)
    with pytest.raises(openai.NotFoundError, match="'gpt2' is not served here"):
        client.completions.create(**{**asked, "model": "gpt2"})
    with pytest.raises(openai.BadRequestError, match="temperature: .* greater than or equal to 0"):
        client.completions.create(**asked, temperature=-1)
    with pytest.raises(openai.APIStatusError, match="at most 262144 are taken") as refused:
        client.completions.create(**{**asked, "prompt": "字" * 333_334})
    assert refused.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="this server takes at most 2047") as refused:
        client.completions.create(**{**asked, "prompt": "字" * 20_000})
    assert refused.value.code == "context_length_exceeded"
    with server.http() as http:
        broken = http.post(
            "/v1/completions", content=b'{"model": ', headers={"Content-Type": "application/json"}
        )
        assert broken.status_code == 400
        assert "the body is not JSON" in broken.json()["error"]["message"]
    assert complete(server, PROMPTS[0]) == reference[0]


def test_work_ends_when_the_client_goes(server: Server, reference: list[str]) -> None:
    before = value(server, "mini_llm_generated_tokens_total")
    asked = {"model": server.model, "prompt": "从前", "temperature": 0}  # up to 2,000 tokens
    for _ in range(3):
        stream = server.client().completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.5).completions.create(**asked)
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as half:
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            + f"Authorization: Bearer {KEY}\r\n".encode()
            + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
    wait_until_idle(server)
    assert value(server, "mini_llm_generated_tokens_total") - before < 3 * 2000
    with server.http() as http:
        assert 'route="/v1/completions",status="499"' in http.get("/metrics").text
    assert complete(server, PROMPTS[1]) == reference[1]


def run_example(server: Server, *command: str) -> str:
    """The output of a program that finds the server as examples do."""
    environment = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment, "MODEL": server.model},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_python_example_runs(server: Server) -> None:
    output = run_example(server, sys.executable, "examples/chat_client.py", "你是谁？")
    assert output.startswith(f"{server.model}: ")
    assert re.search(r"^从前.*  \((stop|length)\)$", output, re.MULTILINE)


def test_the_curl_example_runs(server: Server) -> None:
    output = run_example(server, "examples/curl.sh")
    assert f'"id":"{server.model}"' in output
    assert '"object":"chat.completion"' in output
    assert "data: [DONE]" in output
    assert "mini_llm_generated_tokens_total" in output


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("serve_any"))


@pytest.fixture(scope="module")
def any_server(any_checkpoint: Path) -> Iterator[Server]:
    """A server of each architecture, for the slow tests below; the last of them ends it."""
    with running_server(any_checkpoint) as server:
        yield server


@pytest.mark.slow
def test_chat_and_stop_strings_work_for_every_architecture(any_server: Server) -> None:
    test_openai_client_streams_a_chat_until_a_stop_string(any_server)


async def soak(
    server: Server, seconds: float, expected: list[str], warmed_up: Callable[[], None]
) -> int:
    """CLIENTS clients ask one after the other, each its own question; returns how many answers.

    For so long at least: until the server has warmed up, it has given as many answers as there are
    clients, and three times as many until the end.
    """
    client = openai.AsyncOpenAI(
        api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=300
    )
    answers, end, warm = 0, time.monotonic() + seconds, time.monotonic() + seconds / 3

    async def ask(number: int) -> None:
        nonlocal answers
        asked = {"model": server.model, "prompt": PROMPTS[number % len(PROMPTS)], "temperature": 0}
        asked |= {"max_tokens": NEW_TOKENS - number // len(PROMPTS)}
        while time.monotonic() < end or answers < 3 * CLIENTS:
            if answers % 2:
                text = (await client.completions.create(**asked)).choices[0].text
            else:
                stream = await client.completions.create(**asked, stream=True)
                text = "".join([e.choices[0].text async for e in stream])
            assert text == expected[number], f"client {number} got {text!r}"
            answers += 1

    async def watch() -> None:
        while time.monotonic() < warm or answers < CLIENTS:
            await asyncio.sleep(0.1)
        warmed_up()

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for number in range(CLIENTS):
            group.create_task(ask(number))
    return answers


@pytest.mark.slow
def test_64_clients_get_each_its_own_answer_and_memory_stays_flat(
    any_checkpoint: Path, any_server: Server
) -> None:
    name = any_server.model
    tokenizer = AutoTokenizer.from_pretrained(any_checkpoint)
    tokens = reference_tokens(any_checkpoint, PROMPTS, NEW_TOKENS)
    expected = [
        tokenizer.decode(tokens[number % len(PROMPTS)][: NEW_TOKENS - number // len(PROMPTS)])
        for number in range(CLIENTS)
    ]
    assert len(set(expected)) == CLIENTS, "an answer that went to the wrong client would not show"
    with any_server.http() as http:
        batching = http.get("/health").json()["batching"]
    assert batching == ("continuous batching" if "llama3" in name else "plain batching")
    sizes: list[int] = []
    seconds = 60 if "llama3" in name else 6  # the whole time for one: the rest of it is the same
    answers = asyncio.run(
        soak(any_server, seconds, expected, lambda: sizes.append(any_server.resident_bytes()))
    )
    assert answers >= 3 * CLIENTS
    assert value(any_server, "mini_llm_requests_active") == 0
    growth = any_server.resident_bytes() - sizes[0]
    print(f"{name}: {answers} answers, {growth / 1e6:+.1f} MB from {sizes[0] / 1e6:.0f} MB")
    assert growth < FLAT_BYTES


@pytest.mark.slow
def test_a_signal_ends_the_server_though_answers_are_running(any_server: Server) -> None:
    """The fixture asks for the exit status 0 and a log without a traceback."""
    asked = {"model": any_server.model, "prompt": "从前", "temperature": 0, "stream": True}
    streams = [any_server.client().completions.create(**asked) for _ in range(3)]
    next(iter(streams[0]))  # with plain batching, the others wait for this one
    any_server.process.send_signal(signal.SIGINT)
    for stream in streams:
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert any_server.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_fuzzer_over_the_description_finds_no_error_of_the_server(
    checkpoint: Path, tmp_path: Path
) -> None:
    with running_server(checkpoint, "--max_new_tokens_limit", "4") as server:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
                *(
                    "--header",
                    f"Authorization: Bearer {KEY}",
                    "--phases",
                    "examples,coverage,fuzzing",
                ),
                *("--checks", "not_a_server_error,status_code_conformance"),
                *("--mode", "all", "--max-examples", "40", "--seed", "0", "--no-color"),
            ],
            cwd=tmp_path,  # it leaves a cache
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        with server.http() as http:
            assert http.get("/health").json()["status"] == "ok"
            metrics = http.get("/metrics").text
        assert 'status="5' not in metrics
        for route in ("/v1/chat/completions", "/v1/completions"):
            for status in (200, 400):  # it got through, and it did not
                count = rf'requests_total{{route="{route}",status="{status}"}} (\S+)'
                found = re.search(count, metrics)
                assert found is not None and float(found[1]) >= 10, (route, status)
