"""Remote shards: fetched once, tried again, verified; against loopback servers that fail."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from mini_llm.data import shard_cache
from mini_llm.data.shard_cache import ShardCache
from mini_llm.data.stream import open_stream, open_validation
from tests.unit.data_fixtures import SEQ_LEN, write_packed_folder
from tests.unit.prepare_fixtures import make_tokenizer, write_shards

CUT = "cut"
RESET = "reset"
REPO = "/datasets/someone/texts"
COMMIT = "c" * 40


class Server(ThreadingHTTPServer):
    """Serves the files below `root`; `faults[path]` are what the next requests for it get."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Plain files, and the hub's way to list and resolve those of one data set."""

    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests[path] += 1
        fault = self.server.faults[path].pop(0) if self.server.faults[path] else None
        if isinstance(fault, int):
            return self.answer(fault, b"no")
        if fault == RESET:
            return self.connection.close()
        if path.startswith(f"/api{REPO}"):
            return self.hub(path.removeprefix(f"/api{REPO}"))
        for revision in ("main", COMMIT):
            path = path.replace(f"{REPO}/resolve/{revision}", "")
        file = self.server.root / path.lstrip("/")
        if not file.is_file():
            return self.answer(404, b"no such file")
        content = file.read_bytes()
        if fault == CUT:
            return self.answer(200, content[: len(content) // 2], length=len(content))
        return self.answer(200, content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        found = [self.entry(self.server.root / path) for path in body["paths"]]
        self.answer(200, json.dumps([entry for entry in found if entry]).encode())

    def hub(self, path: str) -> None:
        if path.startswith("/tree/"):
            folder = self.server.root / "/".join(path.split("/")[3:])
            if not folder.is_dir():
                return self.answer(404, b"{}")
            files = sorted(folder.rglob("*"))
            return self.answer(200, json.dumps([self.entry(file) for file in files]).encode())
        self.answer(200, json.dumps({"id": "someone/texts", "sha": COMMIT}).encode())

    def entry(self, path: Path) -> dict[str, Any] | None:
        kind = "directory" if path.is_dir() else "file" if path.is_file() else None
        size = path.stat().st_size if kind == "file" else 0
        name = path.relative_to(self.server.root).as_posix()
        return {"type": kind, "path": name, "size": size, "oid": "0" * 40} if kind else None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MINI_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shard_cache, "FIRST_WAIT_SECONDS", 0.001)
    # The suite runs offline; the servers here are on this machine.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("remote") / "tokenizer")


def first_rows(path: object, count: int, **options: Any) -> list[list[int]]:
    defaults: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 4}
    with open_stream({"main": {"path": path}}, **(defaults | options)) as stream:
        return [next(stream)["input_ids"].tolist() for _ in range(count)]


def test_failed_requests_are_tried_again_and_the_file_is_whole(server: Server) -> None:
    content = bytes(range(256)) * 40
    (server.root / "a.bin").write_bytes(content)
    server.faults["/a.bin"] = [503, CUT, RESET, 429]
    path = ShardCache(server.url).fetch("a.bin")
    assert path.read_bytes() == content
    assert server.requests["/a.bin"] == 5
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.bin", "a.bin.lock"]
    ShardCache(server.url).fetch("a.bin", size=len(content))
    assert server.requests["/a.bin"] == 5


@pytest.mark.parametrize(
    "error", [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError(1, "bad record mac")]
)
def test_network_that_goes_away_during_a_transfer_is_tried_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    (server.root / "a.bin").write_bytes(b"0123456789")
    copy, errors = shutil.copyfileobj, [error]

    def copy_or_fail(source: Any, target: Any, length: int) -> None:
        if errors:
            target.write(source.read(4))
            raise errors.pop()
        copy(source, target, length)

    monkeypatch.setattr(shard_cache.shutil, "copyfileobj", copy_or_fail)
    assert ShardCache(server.url).fetch("a.bin").read_bytes() == b"0123456789"
    assert server.requests["/a.bin"] == 2


def test_waits_grow_and_attempts_end_with_an_error_that_names_the_url(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(shard_cache.time, "sleep", waits.append)
    (server.root / "a.bin").write_bytes(b"x")
    server.faults["/a.bin"] = [500] * 99
    cache = ShardCache(server.url)
    with pytest.raises(ConnectionError, match=rf"{server.url}/a\.bin could not be read in 6 att"):
        cache.fetch("a.bin")
    assert waits == [0.001 * 2**attempt for attempt in range(5)]
    assert server.requests["/a.bin"] == 6
    assert not (cache.folder / "a.bin").exists()


def test_server_that_is_away_is_named(server: Server) -> None:
    gone = "http://127.0.0.1:9"  # the discard port: nothing listens
    with pytest.raises(ConnectionError, match=rf"{gone}/a\.bin could not be read .*refused"):
        ShardCache(gone).fetch("a.bin")


@pytest.mark.parametrize("folder", ["语 料", "%E8%AF%AD%20%E6%96%99"])
def test_url_with_spaces_and_chinese_is_read_as_it_is_or_quoted(
    server: Server, tokenizer: Path, folder: str
) -> None:
    write_shards(server.root / "语 料", 1)
    shard = server.root / "语 料" / "000000.parquet"
    expected = first_rows(str(shard), 4, tokenizer=tokenizer)
    url = f"{server.url}/{folder}/000000.parquet"
    assert first_rows(url, 4, tokenizer=tokenizer) == expected


def test_missing_and_refused_files_are_errors_at_once(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"/a\.bin does not exist \(HTTP 404\)"):
        ShardCache(server.url).fetch("a.bin")
    server.faults["/b.bin"] = [403]
    with pytest.raises(PermissionError, match=r"/b\.bin was refused \(HTTP 403\)"):
        ShardCache(server.url).fetch("b.bin")
    assert server.requests == {"/a.bin": 1, "/b.bin": 1}


def test_wrong_size_and_wrong_checksum_are_never_kept(server: Server) -> None:
    (server.root / "a.bin").write_bytes(b"right")
    cache = ShardCache(server.url)
    with pytest.raises(ConnectionError, match="it has 5 bytes, not the 4 announced"):
        cache.fetch("a.bin", size=4)
    with pytest.raises(ConnectionError, match="its sha256 is .*, the manifest says 000"):
        cache.fetch("a.bin", size=5, sha256="0" * 64)
    assert not (cache.folder / "a.bin").exists()


def test_processes_that_want_the_same_file_fetch_it_once(server: Server) -> None:
    (server.root / "a.bin").write_bytes(b"x" * 10_000)
    caches = [ShardCache(server.url) for _ in range(6)]
    threads = [threading.Thread(target=cache.fetch, args=["a.bin"]) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests["/a.bin"] == 1


def test_remote_prepared_folder_gives_the_rows_of_the_local_one(server: Server) -> None:
    write_packed_folder(server.root / "packed", [7, 5, 6], validation_rows=3)
    expected = first_rows(server.root / "packed", 40)
    server.faults["/packed/manifest.json"] = [502]
    server.faults["/packed/train/000001.parquet"] = [CUT, 503]
    url = f"{server.url}/packed"
    assert first_rows(url, 40) == expected
    assert first_rows(url, 40) == expected
    shards = {path: n for path, n in server.requests.items() if "train" in path}
    assert shards == {f"/packed/train/00000{i}.parquet": 1 + 2 * (i == 1) for i in range(3)}
    validation = open_validation({"main": {"path": url}}, seq_len=SEQ_LEN)["main"]
    assert [int(row["input_ids"][0]) for row in validation.rows] == [0, 1, 2]


def test_remote_shard_is_fetched_when_it_is_needed_and_the_next_one_ahead(server: Server) -> None:
    write_packed_folder(server.root / "packed", [12] * 6)
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 4}
    data = {"main": {"path": f"{server.url}/packed"}}
    with open_stream(data, prefetch=False, **options) as stream:
        for _ in range(8):
            next(stream)
        for thread in threading.enumerate():
            if thread.name == "mini_llm-fetch":
                thread.join()
        assert sum("train" in path for path in server.requests) == 2
        for _ in range(8):
            next(stream)
        assert sum(n for path, n in server.requests.items() if "train" in path) <= 3


def test_remote_shard_that_never_comes_raises_in_the_consumer_at_its_row(server: Server) -> None:
    write_packed_folder(server.root / "packed", [4] * 3)
    order = first_rows(server.root / "packed", 12)
    bad = f"/packed/train/{order[8][0] // 4:06d}.parquet"
    server.faults[bad] = [500] * 99
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 12}
    with open_stream({"main": {"path": f"{server.url}/packed"}}, **options) as stream:
        assert [next(stream)["input_ids"].tolist() for _ in range(8)] == order[:8]
        with pytest.raises(ConnectionError, match=rf"{bad} could not be read"):
            next(stream)


def test_remote_manifest_that_changed_is_seen_and_its_shards_fetched_anew(server: Server) -> None:
    write_packed_folder(server.root / "packed", [7])
    url = f"{server.url}/packed"
    with open_stream({"main": {"path": url}}, seq_len=SEQ_LEN, seed=0, rows_per_step=7) as stream:
        rows = [int(next(stream)["input_ids"][0]) for _ in range(7)]
        state = stream.state_dict()
    assert sorted(rows) == list(range(7))
    # Shards of the same name and size, other rows.
    shutil.rmtree(server.root / "packed")
    write_packed_folder(server.root / "packed", [7], first_row_id=100)
    with open_stream({"main": {"path": url}}, seq_len=SEQ_LEN, seed=0, rows_per_step=7) as stream:
        assert sorted(int(next(stream)["input_ids"][0]) for _ in range(7)) == list(range(100, 107))
        with pytest.raises(ValueError, match=r"\(fingerprint: 'main'"):
            stream.load_state_dict(state)


def test_raw_files_by_url_give_the_rows_of_the_local_ones(server: Server, tokenizer: Path) -> None:
    write_shards(server.root, 3)
    names = [f"{i:06d}.parquet" for i in range(3)]
    server.faults["/000002.parquet"] = [503, CUT]
    local = first_rows([str(server.root / name) for name in names], 60, tokenizer=tokenizer)
    remote = first_rows([f"{server.url}/{name}" for name in names], 60, tokenizer=tokenizer)
    assert remote == local


def test_hub_folder_of_raw_text_is_listed_and_read(
    server: Server, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    write_shards(server.root / "4_5", 2)
    local = first_rows(str(server.root / "4_5"), 30, tokenizer=tokenizer)
    server.faults[f"{REPO}/resolve/{COMMIT}/4_5/000001.parquet"] = [503, CUT]
    server.faults[f"{REPO}/resolve/main/4_5/000001.parquet"] = [503, CUT]
    remote = first_rows("hf://datasets/someone/texts/4_5", 30, tokenizer=tokenizer)
    assert remote == local
    assert sum(n for path, n in server.requests.items() if "000001.parquet" in path) >= 3


def test_hub_that_is_away_or_has_no_text_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.root / "empty").mkdir()
    (server.root / "empty/readme.md").write_text("no text files")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(FileNotFoundError, match=r"someone/texts/empty has no manifest.json and no"):
        first_rows("hf://datasets/someone/texts/empty", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"someone/texts/empty could not be read in 6"):
        first_rows("hf://datasets/someone/texts/empty", 1)


def test_hub_is_not_asked_while_offline_mode_is_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    write_packed_folder(server.root / "packed", [7, 5])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="someone/texts/packed .*HF_HUB_OFFLINE is set"):
        first_rows("hf://datasets/someone/texts/packed", 1)
    assert not server.requests


def test_full_disk_names_the_cache(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.root / "a.bin").write_bytes(b"x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_cache.shutil, "copyfileobj", full)
    cache = ShardCache(server.url)
    with pytest.raises(OSError, match="no space is left in .*cache.*MINI_LLM_CACHE"):
        cache.fetch("a.bin")
    assert [path.name for path in cache.folder.iterdir()] == ["a.bin.lock"]


def test_hub_folder_that_was_prepared_is_read_by_its_manifest(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    write_packed_folder(server.root / "packed", [7, 5])
    expected = first_rows(server.root / "packed", 12)
    assert first_rows("hf://datasets/someone/texts/packed", 12) == expected
