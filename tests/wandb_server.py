"""A loopback server that W&B's own process takes for W&B's, and that fails when told to.

It knows the calls of a run: who the user is, whether there is such a run, make it, and its stream
of files, of which it keeps the history: what a dashboard would show.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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


def uploaded_history(run: Path) -> dict[int, dict[str, Any]]:
    """What W&B's own ``wandb sync`` uploads of a run folder: its metrics by optimizer step.

    Fails the test where the parts of the run do not become one W&B run.
    """
    parts = sorted((run / "logs/wandb").glob("offline-run-*"))
    with WandbServer() as server:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *map(str, parts)],
            cwd=run.parent,  # where it leaves a folder wandb/
            env={**os.environ, **server.environment(), "WANDB_ERROR_REPORTING": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout
        assert len(server.history) == 1, list(server.history)
    (lines,) = server.history.values()
    steps: dict[int, dict[str, Any]] = {}
    for number in sorted(lines):
        values = {k: v for k, v in lines[number].items() if not k.startswith("_")}
        steps.setdefault(values.pop("step"), {}).update(values)
    return steps


def recorded_history(run: Path) -> dict[int, dict[str, Any]]:
    """What lies in the W&B files of a run folder, read without W&B: its metrics by optimizer step.

    A file is a LevelDB log (blocks of 32 KiB; chunks of checksum, length, kind) of W&B's records.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((run / "logs/wandb").glob("offline-run-*/run-*.wandb")):
        for content in _leveldb_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                # Of a table, which has several items under one name, the last is enough.
                line = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                values = {k: v for k, v in line.items() if not k.startswith("_")}
                steps.setdefault(values.pop("step"), {}).update(values)
    return steps


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    place, parts = 7, b""  # after W&B's own header
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


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
