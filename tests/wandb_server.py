"""A loopback server that W&B's own process takes for W&B's, and that fails when told to.

It knows the calls of a run: who the user is, whether there is such a run, make it, and its stream
of files, of which it keeps the history: what a dashboard would show.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, REFUSE = "hang", "refuse"
KEY = "0123456789012345678901234567890123456789"


class WandbServer(ThreadingHTTPServer):
    """``history[run]`` are the lines that came, by their number; ``operations`` what was asked for.

    ``fault`` is HANG or REFUSE for all requests, or for those whose path or operation is
    ``fault_of``.
    """

    daemon_threads = True

    def __init__(self, fault: str = "", fault_of: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.fault_of = fault, fault_of
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving, and let those go that hang."""
        self.closing.set()
        self.shutdown()
        self.server_close()

    def environment(self) -> dict[str, str]:
        """What makes W&B come here."""
        return {"WANDB_MODE": "online", "WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            content = json.loads(body)
        except ValueError:
            content = {}
        named = re.match(r"\s*(?:query|mutation)\s+(\w+)", content.get("query", ""))
        operation = named[1] if named else self.path.rsplit("/", 1)[-1]
        if self.server.fault and self.server.fault_of in ("", operation):
            if self.server.fault == HANG:
                self.server.closing.wait()
            self._answer(401, {"errors": [{"message": "user is not logged in"}]})
        elif named:
            variables = content.get("variables") or {}
            self.server.operations.append((operation, variables))
            self._answer(200, {"data": self._data(operation, variables)})
        else:
            if operation == "file_stream":
                self._take(self.path.split("/")[-2], content)
            self._answer(200, {})

    do_PUT = do_GET = do_POST

    def _take(self, run: str, content: dict[str, Any]) -> None:
        lines = content.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        history = self.server.history.setdefault(run, {})
        for number, line in enumerate(lines["content"], start=lines["offset"]):
            history[number] = json.loads(line)

    def _data(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "someone"}
        project = {"id": "p", "name": "mini-llm", "entity": entity}
        name = variables.get("name") or variables.get("run") or ""
        lines = self.server.history.get(name, {})
        last = {k: v for k, v in (lines[max(lines)] if lines else {}).items()}
        bucket = {
            **{"id": "cnVu", "name": name, "displayName": name, "description": "", "tags": []},
            **{"config": "{}", "sweepName": None, "project": project, "stopped": False},
            **{"summaryMetrics": json.dumps(last), "historyTail": json.dumps([json.dumps(last)])},
            **{"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0},
            **{"eventsTail": "[]", "wandbConfig": '{"t": 1}'},
        }
        files = [
            {"name": file, "uploadUrl": f"{self.server.url}/upload/{file}", "uploadHeaders": []}
            for file in variables.get("files", [])
        ]
        answers: dict[str, dict[str, Any]] = {
            "Viewer": {
                "viewer": {
                    **{"id": "u", "entity": "someone", "username": "someone", "email": ""},
                    **{"flags": "{}", "teams": {"edges": []}},
                }
            },
            "RunResumeStatus": {"model": {**project, "bucket": bucket if lines else None}},
            "UpsertView2": {"upsertView": {"view": {"id": "v", "name": name}, "inserted": True}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": not lines}},
            "CreateRunFiles": {
                "createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}
            },
        }
        return answers.get(operation, {})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
