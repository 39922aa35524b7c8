"""What stands before the routes: the key, and the limits of a request, in plain ASGI.

A request passes KeyGuard, then RequestGuard. Both answer in the shape of :class:`ApiError`.
"""

import asyncio
import hashlib
import hmac
import re
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

OPEN_PATHS = ("/health",)  # what a load balancer asks has no key
LOCAL_HOST = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
CLIENT_GONE = 499  # nginx's status for it; nobody receives it, but it is counted


@dataclass(frozen=True)
class Limits:
    """Of requests that generate: bytes of a body, seconds for a body, for everything, how many."""

    max_body_bytes: int
    body_seconds: float
    seconds: float
    max_requests: int


class KeyGuard:
    """Lets a request through that has ``Authorization: Bearer KEY``.

    Without a key the server is for this machine alone, and a request must name it as its host: else
    a web page could reach it by letting the name of its own site point to this machine.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self.digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            error = self._why_refused(dict(scope["headers"]))
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _why_refused(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.digest is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if LOCAL_HOST.fullmatch(host):
                return None
            return ApiError(
                403,
                f"the host {host!r} is not this machine; without an API key, requests go to "
                "http://localhost",
            )
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Digests have one length: the time of the comparison says nothing about the key.
        right = hmac.compare_digest(_digest(key.strip()), self.digest)
        if scheme.lower() == b"bearer" and right:
            return None
        return ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RequestGuard:
    """Reads a request's body within the limits and ends its work when the client goes.

    It also counts: ``active`` are the requests to generate that are being worked on or wait.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, routes: frozenset[str]
    ) -> None:
        self.app, self.limits, self.metrics, self.routes = app, limits, metrics, routes
        self.active = 0
        metrics.watch("requests_active", "Requests to generate, running or waiting", self._active)

    def _active(self) -> int:
        return self.active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = 500, time.monotonic()

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        generates = scope["method"] == "POST"
        self.active += generates
        try:
            if generates and self.active > self.limits.max_requests:
                raise ApiError(
                    429,
                    f"the server works on {self.limits.max_requests} requests already; "
                    "try again later",
                    headers={"Retry-After": "1"},
                )
            body = await self._read(scope, receive)
            if not await self._run(scope, body, receive, counted_send):
                status = CLIENT_GONE
        except ApiError as error:
            await error.response()(scope, receive, counted_send)
        except _ClientGoneError:
            status = CLIENT_GONE
        finally:
            self.active -= generates
            # Other paths are not labels: anybody could make up as many as the memory holds.
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError where it is too long or too slow."""
        most = self.limits.max_body_bytes
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    body, more = message.get("body", b""), message.get("more_body", False)
                    size += len(body)
                    # What is too long is read, and dropped: a client that is still sending when
                    # the connection closes does not see the answer.
                    if size <= most:
                        chunks.append(body)
                    else:
                        chunks.clear()
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise ApiError(
                408,
                f"the request's body took longer than {seconds:g} s",
                headers={"Connection": "close"},
            ) from None
        if size > most:
            raise ApiError(413, f"the request's body has {size} bytes, at most {most} are taken")
        return b"".join(chunks)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Give the app the body; False where the client, or the time, was gone before the end."""
        gone = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(receive())  # the next message is that the client is gone
        try:
            # The app keeps to the time itself, but for a client that does not read what it gets.
            await asyncio.wait(
                {work, watch}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if work.done():
                await work  # raises what it raised
                return True
            return False
        finally:
            gone.set()
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


class _ClientGoneError(Exception):
    """The client closed the connection while it sent its request."""
