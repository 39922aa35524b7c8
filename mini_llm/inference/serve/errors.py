"""Errors in the shape that OpenAI's clients read."""

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


@dataclass
class ApiError(Exception):
    """What goes wrong with a request: an HTTP status and a sentence for its sender."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """``{"error": {…}}``."""
        kind = KINDS.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> Response:
        """The whole response."""
        # In ASCII: half of a surrogate pair, which JSON can hold, would not go into UTF-8.
        text = json.dumps(self.body())
        return Response(text, self.status, self.headers, media_type="application/json")

    def event(self) -> str:
        """The error as an event of a stream, whose status is sent already."""
        return f"data: {json.dumps(self.body())}\n\n"
