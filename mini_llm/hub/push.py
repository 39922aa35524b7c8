"""Pushing a model to the Hugging Face hub, once; ``python -m mini_llm.hub push`` calls it.

Imports neither torch nor transformers unless ``drop_mtp`` asks for it: during training this runs in
a process of its own (background_push.py), which should be light.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mini_llm.plots import draw_loss
from mini_llm.training.checkpoint_files import is_complete, list_checkpoints

from .model_card import PICTURE, write_card

# All that ever leaves, and only from a checkpoint's own folder, never from one below.
ALLOWED = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "README.md", PICTURE),
)
MAIN_BRANCH = "main"
ATTEMPTS = 3  # of a whole push; the client itself repeats single requests too
FIRST_WAIT_SECONDS = 2.0
REQUEST_SECONDS = 60.0  # without a byte from the hub, after which a request has failed
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


class PushFailedError(Exception):
    """The hub could not be reached, or refused; one sentence that says what to do."""


@dataclass(frozen=True)
class Source:
    """A stock checkpoint, the run that wrote it, and at which step (None: at its end).

    ``tokens`` are those of each source up to ``step``.
    """

    weights: Path
    run: Path | None = None
    step: int | None = None
    tokens: dict[str, int] | None = None


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str = MAIN_BRANCH,
    drop_mtp: bool = False,
    commit_message: str = "",
    license: str = "",
    language: str = "",
) -> str:
    """Push the model in ``directory`` with a card of its run; return the commit's URL.

    ``directory`` is what :func:`find_source` takes. Repository (``private`` if it is made here) and
    branch are made if they are not there. Repeated, it sends what the hub does not have yet.
    ``drop_mtp`` leaves multi-token prediction out of weights and config, ``license`` and
    ``language`` replace those of the run on the card. Raises ValueError for what is wrong here,
    PushFailedError for what is wrong there.
    """
    check_target(repo_id, flag="--repo_id")
    source = find_source(directory)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _stage(
            source,
            folder / "model",
            drop_mtp=drop_mtp,
            repo_id=repo_id,
            license=license,
            language=language,
        )
        _refuse_secrets(folder / "model")
        message = commit_message or f"Weights of {_name_of(source)}"
        return _upload(folder / "model", repo_id, private, revision, message)


def check_target(repo_id: str | None, *, flag: str) -> None:
    """Raise ValueError, naming ``flag``, where no push could succeed; asks nobody for it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not repo_id or repo_id.count("/") != 1:
        raise ValueError(f"{flag} is {repo_id or 'empty'}; give owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{flag}: {error}") from error
    if constants.is_offline_mode():
        raise ValueError(
            f"{flag} {repo_id}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be "
            "pushed; unset it"
        )
    if get_token() is None:
        raise ValueError(
            f"{flag} {repo_id}: there is no token for the hub; run `hf auth login`, or set "
            "HF_TOKEN to one with the right to write"
        )


def find_source(directory: Path) -> Source:
    """What ``directory`` holds: a run folder, its ``final/``, one of its ``checkpoints/step-N``.

    Any other stock checkpoint is taken with the README.md that it has. Raises ValueError where
    there are no weights.
    """
    directory = directory.resolve()
    if (directory / "run.json").is_file() or (directory / "checkpoints").is_dir():
        if (directory / "final").is_dir():
            directory = directory / "final"
        else:
            found = list_checkpoints(directory)
            if not found:
                raise ValueError(f"{directory} holds neither final/ nor a whole checkpoint yet")
            directory = found[-1]
    if (directory / "state.json").is_file():
        if directory.parent.name == "checkpoints" and not is_complete(directory):
            raise ValueError(
                f"{directory} is not whole: it is being written, or its run was killed meanwhile; "
                "give another step"
            )
        directory = directory / "model"
    if not (directory / "config.json").is_file() or not list(directory.glob("model*.safetensors")):
        raise ValueError(
            f"{directory} has no config.json with model.safetensors; give a run's folder, its "
            "final/ or one of its checkpoints/step-N"
        )
    if directory.name == "model" and (directory.parent / "state.json").is_file():
        run = directory.parent.parent.parent
        state = json.loads((directory.parent / "state.json").read_text())
        source = Source(directory, run, int(state["step"]), state.get("tokens"))
    else:
        run = directory.parent
        source = Source(directory, run)
    return source if (run / "run.json").is_file() else Source(directory)


def _name_of(source: Source) -> str:
    return source.weights.name if source.step is None else f"step {source.step}"


def _stage(
    source: Source, folder: Path, *, drop_mtp: bool, repo_id: str, license: str, language: str
) -> None:
    """Fill ``folder`` with exactly what is to be pushed: links to files, and a new card."""
    folder.mkdir()
    config = json.loads((source.weights / "config.json").read_text())
    drops = drop_mtp and config.get("num_nextn_predict_layers", 0) > 0
    if drops:
        _save_without_mtp(source.weights, folder)
    for pattern in ALLOWED:
        for path in source.weights.glob(pattern):
            is_replaced = (drops and path.name.startswith("model")) or (
                source.run is not None and path.name in ("README.md", PICTURE)
            )
            if path.is_file() and not is_replaced and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    if source.run is not None:
        with TemporaryDirectory() as temporary:
            write_card(
                folder,
                source.run,
                step=source.step,
                tokens=source.tokens,
                picture=_draw(source.run, source.step, Path(temporary)),
                repo_id=repo_id,
                without_mtp=drops,
                license=license,
                language=language,
            )


def _save_without_mtp(weights: Path, folder: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    from mini_llm.models import load_model

    disable_progress_bar()
    load_model(weights, dtype="auto").save_pretrained(folder, drop_mtp=True)


def _draw(run: Path, step: int | None, folder: Path) -> Path | None:
    """Draw the losses up to ``step`` in a folder of our own: the run may be drawing its own now."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [
        line
        for line in lines
        if line.endswith("\n") and (step is None or json.loads(line)["step"] <= step)
    ]
    if not kept:
        return None
    (folder / "metrics.jsonl").write_text("".join(kept))
    return draw_loss(folder, folder)


def _refuse_secrets(folder: Path) -> None:
    """Raise ValueError if a file holds this user's token, or what looks like one."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".png"):
            continue
        content = path.read_bytes()
        if token in content or _TOKEN.search(content):
            raise ValueError(
                f"{path.resolve() if path.is_symlink() else path.name} holds a token of the hub; "
                "take it out, and revoke it if others could read it; nothing was pushed"
            )


def _upload(folder: Path, repo_id: str, private: bool, revision: str, message: str) -> str:
    """Make the repository and send the folder; tried again where that can help."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the client's own retries; what matters is in the last error
    _limit_requests()
    api = HfApi()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision != MAIN_BRANCH:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            info = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                allow_patterns=list(ALLOWED),
            )
            return str(info.commit_url)
        except Exception as error:
            reason, may_pass = explain(error, repo_id)
            if not may_pass or attempt == ATTEMPTS:
                raise PushFailedError(reason) from error
        time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _limit_requests() -> None:
    """Give the client a time limit; by itself it waits for ever for a hub that hangs."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limited() -> Any:
        client = default_client_factory()
        client.timeout = REQUEST_SECONDS
        return client

    set_client_factory(limited)


def explain(error: Exception, repo_id: str) -> tuple[str, bool]:
    """An error of the hub's client in a sentence, and whether trying again may help.

    Raises ``error`` itself if it is none that this project knows.
    """
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            return (
                f"{hub} does not accept the token (401); run `hf auth login`, or set HF_TOKEN to a "
                "token with the right to write",
                False,
            )
        if status == 403:
            return (
                f"the token may not write to {repo_id} (403); take one with the right to write "
                "there, or another name",
                False,
            )
        if status == 404:
            return f"{hub} has no {repo_id}, or hides it from this token (404)", False
        if status is not None:
            said = " ".join((getattr(cause, "server_message", None) or "").split())
            reason = f"{hub} answered {status}" + (f" ({said})" if said else "")
            return reason, status in TRANSIENT_STATUSES
        if isinstance(cause, json.JSONDecodeError):
            return f"{hub} answered something that is no JSON", True
        # Of the HTTP library that huggingface_hub brings: no connection, a cut one, no answer.
        from_client = type(cause).__module__.split(".")[0] in ("httpx", "httpx2")
        if from_client or isinstance(cause, ConnectionError | TimeoutError):
            detail = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            if "xet-write-token" in detail and "404" in detail:
                return f"{hub} has no Xet storage; set HF_HUB_DISABLE_XET=1", False
            return f"{hub} cannot be reached ({detail}); check the connection and HF_ENDPOINT", True
    if isinstance(error, ValueError):  # metadata or a file that the hub's client refuses
        return f"{hub} would not take it ({' '.join(str(error).split())})", False
    raise error


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
