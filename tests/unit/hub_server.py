"""A loopback server that is like the hub and like ModelScope, and fails when told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

# What a request for a file may get instead of it, besides a status to answer with.
CUT = "cut"  # half of what was announced, then the end
RESET = "reset"  # the connection reset after a few bytes
WRONG = "wrong"  # other bytes of the right number
NO_RANGE = "no range"  # the whole file although a part was asked for
SLOW = "slow"  # 20 kB at once and then 100 bytes every 10 ms, as long as somebody reads


COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """Serves `files` (path → content) of whatever data set is asked for, at `main` and `COMMIT`.

    `faults[path]` are what the next requests for that file get; `sha256` replaces published sums
    (None: publishes none), `sizes` published sizes; `cdn` is another server that file requests are
    redirected to; `token` is needed where it is set; data sets in `unknown` do not exist.
    `requests` notes path and headers of all.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.sha256: dict[str, str | None] = {}
        self.sizes: dict[str, int] = {}
        self.page_files = 1000
        self.next_host: str | None = None
        self.cdn: HubServer | None = None
        self.token: str | None = None
        self.unknown: set[str] = set()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()

    def ranges(self) -> list[str]:
        """Return the ranges that were asked for, in order."""
        return [headers["Range"] for _, headers in self.requests if "Range" in headers]

    def downloads(self, path: str) -> int:
        """Return how often a file's content was asked for here."""
        names = (f"resolve/main/{quote(path)}", f"FilePath={quote(path, safe='')}", f"/cdn/{path}")
        return sum(request.endswith(names) for request, _ in self.requests)

    def size(self, path: str) -> int:
        """Return the published size."""
        return self.sizes.get(path, len(self.files[path]))

    def sum(self, path: str) -> str | None:
        """Return the published sha256."""
        return self.sha256.get(path, hashlib.sha256(self.files[path]).hexdigest())


class Handler(BaseHTTPRequestHandler):
    """List and file, of the hub and of ModelScope, and what else the hub's own client asks."""

    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.server.requests.append((self.path, dict(self.headers.items())))
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = [self.entry(path) for path in asked["paths"] if path in self.server.files]
        self.answer(200, json.dumps(found).encode())

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers.items())))
        where = urlsplit(self.path)
        path = unquote(where.path)
        asked = {key: values[0] for key, values in parse_qs(where.query).items()}
        if path.startswith("/cdn/"):
            return self.content(path.removeprefix("/cdn/"))
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.answer(401, b"who are you?")
        if any(f"/datasets/{repo}" in path for repo in self.server.unknown):
            return self.answer(404, b"no such data set", {"X-Error-Code": "RepoNotFound"})
        if re.fullmatch(rf"/api/datasets/[^/]+/[^/]+(/revision/(main|{COMMIT}))?", path):
            return self.answer(200, json.dumps({"id": "an/id", "sha": COMMIT}).encode())
        if tree := re.fullmatch(
            rf"/api/datasets/[^/]+/[^/]+/tree/(?:main|{COMMIT})(?:/(.*))?", path
        ):
            return self.hub_list(tree[1] or "", asked)
        if re.fullmatch(r"/api/v1/datasets/[^/]+/[^/]+/repo/tree", path):
            return self.modelscope_list(asked)
        if file := re.fullmatch(rf"/datasets/[^/]+/[^/]+/resolve/(?:main|{COMMIT})/(.*)", path):
            return self.file(file[1])
        if re.fullmatch(r"/api/v1/datasets/[^/]+/[^/]+/repo", path):
            return self.file(asked["FilePath"])
        return self.answer(404, b"nothing here")

    def below(self, folder: str) -> list[str]:
        return sorted(p for p in self.server.files if not folder or p.startswith(f"{folder}/"))

    def hub_list(self, folder: str, asked: dict[str, str]) -> None:
        if fault := self.next_fault("list"):
            return self.answer(int(fault), b"no")
        start = int(asked.get("cursor", 0))
        paths = self.below(folder)
        stop = start + self.server.page_files
        folders = {"4_5"}
        if asked.get("recursive") == "false":
            below = len(f"{folder}/") if folder else 0
            folders = {p[: p.index("/", below)] for p in paths if "/" in p[below:]}
            paths = [path for path in paths if "/" not in path[below:]]
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
        ]
        for path in paths[start:stop]:
            entries.append(self.entry(path))
        headers = {}
        if stop < len(paths):
            host = self.server.next_host or self.server.url
            address = f"{host}{urlsplit(self.path).path}?recursive=true&cursor={stop}"
            headers["Link"] = f'<{address}>; rel="next"'
        self.answer(200, json.dumps(entries).encode(), headers)

    def entry(self, path: str) -> dict[str, Any]:
        size = self.server.size(path)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": "0" * 40}
        if self.server.sum(path):
            entry["lfs"] = {"oid": self.server.sum(path), "size": size, "pointerSize": 1}
        return entry

    def modelscope_list(self, asked: dict[str, str]) -> None:
        if fault := self.next_fault("list"):
            return self.answer(int(fault), b"no")
        # Fewer than asked for, as a server with a limit of its own does.
        size = min(int(asked["PageSize"]), self.server.page_files)
        start = (int(asked["PageNumber"]) - 1) * size
        paths = self.below(asked.get("Root", ""))[start : start + size]
        files: list[dict[str, Any]] = [
            {
                "Type": "blob",
                "Path": path,
                "Size": self.server.size(path),
                "Sha256": self.server.sum(path) or "",
            }
            for path in paths
        ]
        if start == 0:
            files.append({"Type": "tree", "Path": "4_5", "Size": 0, "Sha256": ""})
        answer = {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": 1}}
        self.answer(200, json.dumps(answer).encode())

    def next_fault(self, path: str) -> int | str | None:
        faults = self.server.faults[path]
        return faults.pop(0) if faults else None

    def file(self, path: str) -> None:
        if self.server.cdn is not None:
            return self.answer(302, b"", {"Location": f"{self.server.cdn.url}/cdn/{quote(path)}"})
        self.content(path)

    def content(self, path: str) -> None:
        fault = self.next_fault(path)
        if isinstance(fault, int):
            return self.answer(fault, b"no")
        content = self.server.files.get(path)
        if content is None:
            return self.answer(404, b"no such file", {"X-Error-Code": "EntryNotFound"})
        if fault == WRONG:
            content = bytes(byte ^ 1 for byte in content)
        start = 0
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found and fault != NO_RANGE:
            start = int(found[1])
            if start >= len(content):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == SLOW:
            return self.drip(body)
        self.wfile.write(body[: len(body) // 2] if fault in (CUT, RESET) else body)
        if fault == RESET:
            # Closed without a farewell: the other side gets "connection reset".
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def drip(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the reader has gone
            self.wfile.write(body[:20_000])
            for start in range(20_000, len(body), 100):
                time.sleep(0.01)
                self.wfile.write(body[start : start + 100])

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
