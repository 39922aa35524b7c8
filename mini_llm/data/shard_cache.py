"""Remote shards: fetched whole into a local folder, with retries, before they are read.

`https://` is read with the standard library, `hf://` with huggingface_hub, which `HF_ENDPOINT`
points at another hub and `HF_TOKEN` lets into private data sets.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from ..durable import complete_or_absent

REMOTE_SCHEMES = ("https://", "http://", "hf://")
CACHE_VARIABLE = "MINI_LLM_CACHE"
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
TIMEOUT_SECONDS = 30
# What the same request may answer differently a little later.
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
# What a transfer ends with when the network goes away; Python has no type of its own for these.
UNREACHABLE_ERRORS = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
CHUNK_BYTES = 1 << 20
# Has a meaning of its own in a path or query; "%" begins what is quoted already.
KEPT_IN_URLS = "/%:?@!$&'()*+,;=~"


def is_remote(location: object) -> bool:
    """Whether a path of --data is a URL."""
    return isinstance(location, str) and location.startswith(REMOTE_SCHEMES)


def cache_folder() -> Path:
    """Return where shards are kept: $MINI_LLM_CACHE, else ~/.cache/mini_llm."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "mini_llm"


class ShardCache:
    """The local copy of what lies below one URL; `folder` is where its files appear.

    Several processes may share it: one fetches a file, the others wait for it. Nothing is ever
    removed from it.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")
        key = hashlib.sha256(self.base_url.encode()).hexdigest()[:16]
        self.folder = cache_folder() / "shards" / key
        self._background: threading.Thread | None = None

    def fetch(
        self,
        file: str,
        *,
        size: int | None = None,
        sha256: str | None = None,
        refresh: bool = False,
    ) -> Path:
        """Return the local path of `file`, fetched if it is not there or not the one described.

        `refresh` fetches it again in any case. Connection errors are tried again with longer and
        longer waits, a few times, then ConnectionError names the URL; FileNotFoundError where the
        server has no such file. Bytes of another size or sha256 than were given count as an error
        of the connection.
        """
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if refresh or not _is_whole(path, size, sha256):
                url = f"{self.base_url}/{file}"
                if url.startswith("hf://"):
                    _refuse_offline(url)
                retry(lambda: _download(url, path, size, sha256), url)
        return path

    def fetch_in_background(self, file: str, *, size: int | None, sha256: str | None) -> None:
        """Fetch `file` in a thread, if none is at work; an error there is left to `fetch`."""
        if self._background is not None and self._background.is_alive():
            return
        if (self.folder / file).is_file():
            return

        def work() -> None:
            # The reader that needs the file asks for it again and raises what goes wrong.
            with contextlib.suppress(OSError, ValueError):
                self.fetch(file, size=size, sha256=sha256)

        self._background = threading.Thread(target=work, name="mini_llm-fetch", daemon=True)
        self._background.start()


def retry(action: Callable[[], Any], url: str) -> Any:
    """Return what `action` returns, tried again after errors of the connection or the server."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            reason = _transient_reason(error)
            if reason is None:
                raise
            if attempt == ATTEMPTS - 1:
                raise ConnectionError(
                    f"--data: {url} could not be read in {ATTEMPTS} attempts ({reason}); check the "
                    "connection and HF_ENDPOINT, or download the data with data_tools/download.py"
                ) from error
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


class BadTransferError(ConnectionError):
    """A transfer that ended with other bytes than it should have."""


def _transient_reason(error: Exception) -> str | None:
    """Return what went wrong in a few words, None where trying again cannot help."""
    response = getattr(error, "response", None)  # of huggingface_hub's errors
    status = getattr(error, "code", None) or getattr(response, "status_code", None)
    if isinstance(status, int):
        return f"HTTP {status}" if status in TRANSIENT_STATUSES else None
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    lost = isinstance(error, OSError) and error.errno in UNREACHABLE_ERRORS
    if lost or isinstance(
        error, ConnectionError | TimeoutError | ssl.SSLError | http.client.HTTPException
    ):
        return f"{type(error).__name__}: {error}"
    # Timeouts, resets and cut transfers of the client that huggingface_hub brings.
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
        return f"{type(error).__name__}: {error}"
    return None


def _download(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    try:
        with complete_or_absent(path) as file:
            if url.startswith("hf://"):
                hub_file_system().get_file(url, outfile=file)
            else:
                _copy_from_url(url, file)
            file.flush()
            _check_transfer(Path(file.name), size, sha256)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"--data: {url} does not exist (HTTP {error.code})") from error
        if error.code not in TRANSIENT_STATUSES:
            raise PermissionError(f"--data: {url} was refused (HTTP {error.code})") from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"--data: no space is left in {path.parent} for {url}; give {CACHE_VARIABLE} a "
                "folder with more"
            ) from error
        raise


def open_url(url: str) -> Any:
    """Open a web address; what is not ASCII in it, and spaces, go as a browser sends them."""
    parts = urllib.parse.urlsplit(url)
    sendable = parts._replace(
        path=urllib.parse.quote(parts.path, safe=KEPT_IN_URLS),
        query=urllib.parse.quote(parts.query, safe=KEPT_IN_URLS),
    )
    return urllib.request.urlopen(sendable.geturl(), timeout=TIMEOUT_SECONDS)


def _copy_from_url(url: str, file: BinaryIO) -> None:
    with open_url(url) as response:
        shutil.copyfileobj(response, file, CHUNK_BYTES)
        announced = response.headers.get("Content-Length")
    if announced is not None and file.tell() != int(announced):
        raise BadTransferError(f"{file.tell()} of {announced} bytes came")


def _check_transfer(path: Path, size: int | None, sha256: str | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise BadTransferError(f"it has {found} bytes, not the {size} announced")
    if sha256 is not None and (digest := file_sha256(path)) != sha256:
        raise BadTransferError(f"its sha256 is {digest[:12]}, the manifest says {sha256[:12]}")


def _is_whole(path: Path, size: int | None, sha256: str | None) -> bool:
    try:
        _check_transfer(path, size, sha256)
    except (FileNotFoundError, BadTransferError):
        return False
    return True


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_offline(url: str) -> None:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise ConnectionError(
            f"--data: {url} cannot be read while HF_HUB_OFFLINE is set; unset it, or give a local "
            "folder, downloaded with data_tools/download.py"
        )


def hub_file_system() -> Any:
    """Return huggingface_hub's file system for `hf://` at $HF_ENDPOINT."""
    from huggingface_hub import HfFileSystem

    # Without the cache of listings a file that was replaced there is seen.
    return HfFileSystem(
        endpoint=os.environ.get("HF_ENDPOINT"), skip_instance_cache=True, use_listings_cache=False
    )


def list_hub_files(url: str) -> dict[str, int]:
    """Return URL and bytes of the files below an `hf://` URL, sorted by URL."""
    _refuse_offline(url)
    found = retry(lambda: hub_file_system().find(url, detail=True), url)
    return {f"hf://{path}": int(found[path]["size"]) for path in sorted(found)}
