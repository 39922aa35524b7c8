"""A loopback server that takes what the hub's own client uploads, and fails when told to.

It knows the calls for making repositories and branches, for asking which files go through LFS, for
LFS itself (batch, upload, verify), for commits, and those with which a snapshot is downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

HANG = "hang"  # no answer until the server is closed
WRITER, READER = (
    "hf_writer_secret_token_0123456789abcdefgh",
    "hf_reader_secret_token_0123456789abcd",
)
LFS_SUFFIXES = (".safetensors", ".png", "tokenizer.json")


@dataclass
class Repository:
    """Branches, each a list of commits, the newest last: (id, message, path -> content)."""

    private: bool
    branches: dict[str, list[tuple[str, str, dict[str, bytes]]]] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit."""
        return self.commit(revision)[2]

    def commit(self, revision: str) -> tuple[str, str, dict[str, bytes]]:
        """The newest commit of a branch, or the one of that id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next(c for commits in self.branches.values() for c in commits if c[0] == revision)

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        """Add a commit; return its id."""
        number = sum(len(commits) for commits in self.branches.values())
        name = hashlib.sha1(f"{branch} {number}".encode()).hexdigest()
        self.branches.setdefault(branch, []).append((name, message, files))
        return name


class HubUploadServer(ThreadingHTTPServer):
    """Repositories by name, for `WRITER`'s token to write and `READER`'s to read.

    `faults[kind]` are what the next requests of that kind get instead of an answer: a status, or
    HANG. Kinds are whoami, create, validate, preupload, batch, upload, verify, commit. `received`
    has kind, headers (names in lower case) and body of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS
        self.verified: set[str] = set()
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving, and let those go that hang."""
        self.closing.set()
        self.shutdown()
        self.server_close()

    def count(self, kind: str) -> int:
        """How many requests of a kind came."""
        return sum(kind == other for other, _, _ in self.received)

    def bodies(self) -> bytes:
        """All that came in bodies, files of commits decoded."""
        found = [body for _, _, body in self.received]
        for kind, _, body in self.received:
            if kind == "commit":
                found += [
                    base64.b64decode(v["content"]) for k, v in operations(body) if k == "file"
                ]
        return b"\n".join(found)


def operations(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a commit's body."""
    return [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]


# Method, path, kind, and whether it takes a token with the right to write.
NAME, REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami", False),
    ("POST", r"/api/repos/create", "create", True),
    ("POST", r"/api/validate-yaml", "validate", False),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", "preupload", True),
    ("POST", rf"/api/models/{NAME}/branch/{REVISION}", "branch", True),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", "commit", True),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch", True),
    ("POST", r"/lfs/verify", "verify", True),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}", "tree", False),
    ("GET", rf"/api/models/{NAME}(/revision/{REVISION})?", "info", False),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "file", False),
]


class Handler(BaseHTTPRequestHandler):
    """One method for each kind of request."""

    server: HubUploadServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:  # to storage, where the address is the permission
        body = self.body()
        if not self.fails("upload", body):
            self.server.objects[self.path.rsplit("/", 1)[-1]] = body
            self.answer(200, {})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def fails(self, kind: str, body: bytes) -> bool:
        """Note the request; give it its fault, if it has one."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append((kind, headers, body))
        faults = self.server.faults[kind]
        fault = faults.pop(0) if faults else None
        if fault == HANG:
            self.server.closing.wait()
            self.close_connection = True
        elif fault is not None:
            self.answer(int(fault), {"error": "as the test wanted"})
        return fault is not None

    def route(self, method: str) -> None:
        path = urlsplit(self.path).path
        for wanted, pattern, kind, writes in ROUTES:
            found = re.fullmatch(pattern, path)
            if found is None or wanted != method:
                continue
            body = self.body() if method == "POST" else b""
            if self.fails(kind, body):
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in (WRITER, READER):
                return self.answer(401, {"error": "Invalid username or password."})
            if writes and token != WRITER:
                return self.answer(403, {"error": "You have no right to write here."})
            parts = {key: unquote(value) for key, value in found.groupdict().items() if value}
            if "repo" in parts and parts["repo"] not in self.server.repositories:
                return self.answer(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
            return getattr(self, kind)(body, **parts)
        self.answer(404, {"error": f"{method} {path} is not known here"})

    def whoami(self, body: bytes) -> None:
        self.answer(200, {"name": "owner", "type": "user"})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        repository = Repository(private=asked.get("visibility") == "private")
        repository.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[name] = repository
        self.answer(200, url)

    def validate(self, body: bytes) -> None:
        errors, text = [], json.loads(body)["content"]
        try:
            fields = yaml.safe_load(text.split("---\n")[1])
            errors = [{"message": f"{key} is empty"} for key, value in fields.items() if not value]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        there = self.server.repositories[repo].files(revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path, content = asked["path"], there.get(asked["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = None if content is None else entry(path, content)["oid"]
            if content is not None and mode == "lfs":
                oid = hashlib.sha256(content).hexdigest()
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        repository = self.server.repositories[repo]
        if revision in repository.branches:
            return self.answer(409, {"error": "Reference already exists"})
        repository.branches[revision] = list(repository.branches["main"])
        self.answer(200, {})

    def batch(self, body: bytes, repo: str) -> None:
        answers = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.url}/storage/{asked['oid']}"}
                verify = {"href": f"{self.server.url}/lfs/verify"}
                asked = {**asked, "actions": {"upload": upload, "verify": verify}}
            answers.append(asked)
        self.answer(200, {"transfer": "basic", "objects": answers})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        content = self.server.objects.get(asked["oid"], b"")
        if hashlib.sha256(content).hexdigest() != asked["oid"] or len(content) != asked["size"]:
            return self.answer(422, {"error": "another content than announced"})
        self.server.verified.add(asked["oid"])
        self.answer(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self.server.repositories[repo]
        files, message = dict(repository.files(revision)), ""
        for key, value in operations(body):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        name = repository.add(revision, message, files)
        url = f"{self.server.url}/{repo}/commit/{name}"
        self.answer(200, {"commitUrl": url, "commitOid": name, "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        repository = self.server.repositories[repo]
        name, _, files = repository.commit(revision)
        siblings = [{"rfilename": path} for path in files]
        facts = {"id": repo, "sha": name, "private": repository.private, "siblings": siblings}
        self.answer(200, facts)

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.repositories[repo].files(revision)
        self.answer(200, [entry(path, content) for path, content in files.items()])

    def file(self, body: bytes, repo: str, revision: str, path: str) -> None:
        name, _, files = self.server.repositories[repo].commit(revision)
        if path not in files:
            return self.answer(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{etag(path, files[path])}"', "X-Repo-Commit": name}
        self.send(200, files[path], headers)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as a repository's tree lists it."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    listed: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return listed


def etag(path: str, content: bytes) -> str:
    """What the hub gives as a file's ETag: sha256 of an LFS file, git's sum of another."""
    listed = entry(path, content)
    return str(listed.get("lfs", listed)["oid"])
