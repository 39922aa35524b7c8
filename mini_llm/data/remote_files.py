"""Files of a data set on the Hugging Face hub or ModelScope: their list, and a fetch that resumes.

Both hubs are read the same way: a list with sizes and sha256, then plain GET with ranges. A file is
written to NAME.part, checked against the list, synced and renamed: NAME is whole or absent.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import requests
from requests.adapters import HTTPAdapter

HUB, MODELSCOPE = "hub", "modelscope"
ENDPOINTS = {HUB: "https://huggingface.co", MODELSCOPE: "https://www.modelscope.cn"}
ENDPOINT_VARIABLES = {HUB: "HF_ENDPOINT", MODELSCOPE: "MODELSCOPE_ENDPOINT"}
TOKEN_VARIABLES = {HUB: "HF_TOKEN", MODELSCOPE: "MODELSCOPE_API_TOKEN"}
REVISIONS = {HUB: "main", MODELSCOPE: "master"}
PART_SUFFIX = ".part"

# What the same request may answer differently a little later.
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
ATTEMPTS = 6  # in a row without a byte of progress
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
CHUNK_BYTES = 1 << 20
MODELSCOPE_PAGE_FILES = 200


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set: its path there, bytes, sha256 where one is published, and address."""

    path: str
    size: int
    sha256: str | None
    url: str


class WrongContentError(ValueError):
    """A file that came, twice, with other bytes than the hub's list says."""


class StoppedError(Exception):
    """The fetch was told to stop; what has come is kept."""


class _TransientError(Exception):
    """What may be over a little later; `wait` is how long the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class RemoteDataset:
    """One data set on one hub. Threads may share it.

    `token`, if any, is sent to the endpoint alone, never to where it redirects. Raises ValueError
    for an endpoint that is no web address.
    """

    def __init__(self, source: str, repo: str, endpoint: str, token: str | None = None) -> None:
        self.source = source
        self.repo = repo
        self.endpoint = endpoint.rstrip("/")
        if urlsplit(self.endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
            raise ValueError(f"--endpoint: {endpoint} is no address like {ENDPOINTS[source]}")
        self.stop = threading.Event()
        self._token = token
        self._reached = False
        self._sessions = threading.local()

    # The list

    def list_files(self, folder: str = "") -> list[RemoteFile]:
        """Return all files below a folder of the data set, sorted by path.

        Raises FileNotFoundError, PermissionError or ConnectionError with a sentence on what to do.
        """
        entries = self._hub_entries if self.source == HUB else self._modelscope_entries
        try:
            files = {file.path: file for file in entries(folder)}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--source {self.source}: {self.endpoint} does not list files as that hub does "
                f"({type(error).__name__}: {error}); check --endpoint"
            ) from error
        return [files[path] for path in sorted(files)]

    def _hub_entries(self, folder: str) -> Iterator[RemoteFile]:
        revision = REVISIONS[HUB]
        place = f"/{quote(folder)}" if folder else ""
        url: str | None = (
            f"{self.endpoint}/api/datasets/{self.repo}/tree/{revision}{place}?recursive=true"
        )
        while url is not None:
            page, response = self._read_json(url)
            for entry in page:
                if entry["type"] == "file":
                    yield RemoteFile(
                        path=entry["path"],
                        size=int(entry["size"]),
                        sha256=(entry.get("lfs") or {}).get("oid"),
                        url=f"{self.endpoint}/datasets/{self.repo}/resolve/{revision}/"
                        f"{quote(entry['path'])}",
                    )
            url = response.links.get("next", {}).get("url")
            if url is not None and urlsplit(url)[:2] != urlsplit(self.endpoint)[:2]:
                raise ValueError(
                    f"--endpoint: {self.endpoint} goes on with its list at another host ({url}); "
                    "use an endpoint that does not"
                )

    def _modelscope_entries(self, folder: str) -> Iterator[RemoteFile]:
        base = f"{self.endpoint}/api/v1/datasets/{self.repo}/repo"
        revision = REVISIONS[MODELSCOPE]
        seen: set[str] = set()
        number = 1
        while True:
            question = {
                "Revision": revision,
                "Root": folder,
                "Recursive": "True",
                "PageNumber": number,
                "PageSize": MODELSCOPE_PAGE_FILES,
            }
            answer, _ = self._read_json(f"{base}/tree?{urlencode(question)}", page=number)
            if answer.get("Success") is False or answer["Data"] is None:
                raise FileNotFoundError(
                    f"--source {self.source}: {self.endpoint} cannot list {self.repo} "
                    f"({answer.get('Message')}); check the data set's name"
                )
            page = answer["Data"]["Files"] or []
            # A server may give fewer entries a page than asked for: only an empty page, or one
            # that was seen before, is the end.
            new = [entry for entry in page if entry["Path"] not in seen]
            if not new:
                return
            seen.update(entry["Path"] for entry in new)
            for entry in new:
                if entry["Type"] != "tree":
                    where = urlencode({"Revision": revision, "FilePath": entry["Path"]})
                    yield RemoteFile(
                        path=entry["Path"],
                        size=int(entry["Size"]),
                        sha256=entry.get("Sha256") or None,
                        url=f"{base}?{where}",
                    )
            number += 1

    def _read_json(self, url: str, page: int = 1) -> tuple[Any, requests.Response]:
        def read() -> tuple[Any, requests.Response]:
            response = self._get(url, {}, page=page)
            try:
                return response.json(), response
            except requests.JSONDecodeError as error:
                raise TypeError(f"no JSON at {url}") from error

        return self._retry(read, url)

    # The files

    def fetch(self, file: RemoteFile, target: Path, count: Callable[[int], None]) -> None:
        """Write `file` to `target`, going on where an earlier fetch was interrupted.

        `count` is called with the bytes that came, those of an earlier fetch too, and with negative
        numbers when they have to come again. Raises FileNotFoundError, PermissionError,
        ConnectionError, WrongContentError, or StoppedError.
        """
        part = target.with_name(target.name + PART_SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.sha256 is None:
            # Nothing would show that what is left belongs to another version of the file.
            part.unlink(missing_ok=True)
        count(_size(part))
        faults: list[str] = []
        while len(faults) < 2:
            self._retry(
                lambda: self._go_on(file, part, count), file.path, progress=lambda: _size(part)
            )
            fault = why_not_whole(part, file)
            if fault is None:
                part.replace(target)
                return
            faults.append(fault)
            _remove(part, count)
        raise WrongContentError(
            f"{file.path}: {faults[-1]}, and twice so; it may have been replaced there just now: "
            "run the same command again, or take another --source"
        )

    def _go_on(self, file: RemoteFile, part: Path, count: Callable[[int], None]) -> None:
        done = _size(part)
        if done > file.size:
            _remove(part, count)
            done = 0
        if done == file.size and part.exists():
            return
        headers = {"Range": f"bytes={done}-"} if done else {}
        with self._get(file.url, headers, stream=True) as response:
            if done and response.status_code == 200:  # a server without ranges
                _remove(part, count)
                done = 0
            elif done and _range_start(response) != done:  # also HTTP 416
                _remove(part, count)
                raise _TransientError(
                    f"HTTP {response.status_code} with another range than {headers['Range']}"
                )
            rest = response.headers.get("Content-Length")
            if rest is not None and done + int(rest) != file.size:
                raise WrongContentError(
                    f"{file.path}: the server has {done + int(rest):,} bytes of it, its list says "
                    f"{file.size:,}; it may have been replaced there just now: run the same "
                    "command again"
                )
            with part.open("ab") as written:
                try:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        if self.stop.is_set():
                            raise StoppedError
                        written.write(chunk)
                        count(len(chunk))
                        done += len(chunk)
                        if done > file.size:
                            return  # which the check of the whole file says
                except requests.RequestException as error:
                    raise _TransientError(_reason(error)) from error
                written.flush()
                os.fsync(written.fileno())
        if done < file.size:
            raise _TransientError(f"it ended after {done:,} of {file.size:,} bytes")

    # Requests

    def _get(
        self, url: str, headers: dict[str, str], *, stream: bool = False, page: int = 1
    ) -> requests.Response:
        try:
            response = self._session().get(
                url, headers=headers, stream=stream, timeout=(CONNECT_SECONDS, READ_SECONDS)
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _TransientError(_reason(error)) from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise _TransientError(_reason(error)) from error
        self._reached = True
        status = response.status_code
        if status in (200, 206) or (status == 416 and "Range" in headers):
            return response
        response.close()
        # ModelScope now and then denies a later page of a list whose first pages it gave.
        if status in TRANSIENT_STATUSES or (status == 403 and page > 1):
            raise _TransientError(f"HTTP {status}", _asked_wait(response))
        what = f"--source {self.source}: {url} "
        if status in (404, 410):
            raise FileNotFoundError(
                f"{what}does not exist (HTTP {status}); check the data set's name there, or "
                "take another --source"
            )
        if status in (401, 403):
            variable = TOKEN_VARIABLES[self.source]
            raise PermissionError(
                f"{what}was refused (HTTP {status}); "
                + (
                    f"check the token in {variable}"
                    if self._token
                    else f"set {variable} to a token with access"
                )
                + ", or take another --source"
            )
        raise ConnectionError(f"{what}was answered with HTTP {status}; check --endpoint")

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = requests.Session()
            # As stored, so that a range is one of the file.
            session.headers.update({"Accept-Encoding": "identity", "User-Agent": "mini-llm"})
            session.auth = self._authorise
            adapter = HTTPAdapter(max_retries=0)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
        return session

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # requests takes the header away when a redirect leads to another host, port or scheme.
        same_host = urlsplit(request.url or "")[:2] == urlsplit(self.endpoint)[:2]
        if self._token and same_host:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _retry(
        self, action: Callable[[], Any], what: str, progress: Callable[[], int] = lambda: 0
    ) -> Any:
        failures, seen = 0, progress()
        while True:
            if self.stop.is_set():
                raise StoppedError
            try:
                return action()
            except _TransientError as error:
                now = progress()
                failures = 1 if now > seen else failures + 1
                seen = max(seen, now)  # what comes a second time is no progress
                # Where nothing was ever reached, waiting is of no use.
                if failures >= (ATTEMPTS if self._reached else 2):
                    raise ConnectionError(self._why_given_up(what, error)) from error
                wait = max(error.wait, FIRST_WAIT_SECONDS * 2 ** (failures - 1))
                self.stop.wait(min(wait, LONGEST_WAIT_SECONDS))

    def _why_given_up(self, what: str, error: _TransientError) -> str:
        other = MODELSCOPE if self.source == HUB else HUB
        advice = (
            f"check the connection, set {ENDPOINT_VARIABLES[self.source]} or --endpoint to a "
            f"mirror, or take --source {other}"
        )
        if not self._reached:
            return f"--source {self.source}: {self.endpoint} cannot be reached ({error}); {advice}"
        return (
            f"--source {self.source}: {what} could not be read in {ATTEMPTS} attempts ({error}); "
            f"run the same command again, which goes on where it was, or {advice}"
        )


def target_path(folder: Path, path: str) -> Path:
    """Return where a file of a data set is written; ValueError for one outside `folder`."""
    parts = PurePosixPath(path).parts
    good = (
        parts
        and re.search(r"[\\:\x00-\x1f]", path) is None
        and not path.startswith("/")
        and ".." not in parts
        and not path.endswith((PART_SUFFIX, "/"))
    )
    target = folder / path
    # Also where a link inside the folder leads out of it.
    if not good or not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--output_dir: {path!r} is no name of a file inside {folder}, so nothing is written; "
            "the data set is broken or not the one meant: check --endpoint"
        )
    return target


def why_not_whole(path: Path, file: RemoteFile, *, hashed: bool = True) -> str | None:
    """Return how a local file differs from the published one, None where it does not.

    `hashed` false looks at its size alone.
    """
    if not path.is_file():
        return "it does not exist"
    size = path.stat().st_size
    if size != file.size:
        return f"it has {size:,} bytes, {file.size:,} are published"
    if not hashed or file.sha256 is None:
        return None
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        return f"its sha256 is {digest}, {file.sha256} is published"
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remove(part: Path, count: Callable[[int], None]) -> None:
    count(-_size(part))
    part.unlink(missing_ok=True)


def _range_start(response: requests.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _asked_wait(response: requests.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _reason(error: BaseException) -> str:
    """Return the innermost cause in a few words: requests wraps it three times."""
    while True:
        inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    # urllib3 begins with the connection or the pool.
    return re.sub(r"^\S*Connection\w*\([^)]*\): ", "", " ".join(str(error).split()))
