"""The data files of a data set on the Hugging Face hub, by its name, configuration and split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .raw_stream import Location
from .shard_cache import list_hub_files, retry
from .text_files import TEXT_SUFFIXES

NAME = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULT_SPLIT = "train"


def is_hub_dataset(location: Location) -> bool:
    """Whether a path of --data is `org/name` and not a local path."""
    return (
        isinstance(location, str)
        and NAME.fullmatch(location) is not None
        and not Path(location).exists()
    )


def hub_dataset_files(name: str, config: str | None, split: str | None) -> dict[str, int | None]:
    """Return `hf://` URL and bytes of the files of a split, at the commit that is there now.

    `datasets` says which they are, as `load_dataset` would. Raises ConnectionError where there is
    no such data set or the hub cannot be reached, ValueError for an unknown configuration or split
    and for files that are neither parquet nor jsonl.
    """
    builder = _builder(name, config)
    data_files = builder.config.data_files
    if data_files is None:  # found in the cache of datasets, as a table instead of its files
        raise _unreachable(name, "only a copy in the cache of datasets is there")
    split = split or DEFAULT_SPLIT
    if split not in data_files:
        raise ValueError(
            f"--data: {name} has no split '{split}'; give its entry a split, of "
            f"{', '.join(map(str, data_files))}"
        )
    urls = [str(url) for url in data_files[split]]
    for url in urls:
        if not url.endswith(TEXT_SUFFIXES):
            raise ValueError(
                f"--data: the split '{split}' of {name} has the file {url.rsplit('/', 1)[-1]}, "
                f"which is not read while training: only {' and '.join(TEXT_SUFFIXES)} are; "
                "download it and write it as one of these"
            )
    sizes = list_hub_files(f"hf://datasets/{name}@{builder.hash}")
    return {url: sizes.get(url) for url in urls}


def _builder(name: str, config: str | None) -> Any:
    from datasets import load_dataset_builder
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise _unreachable(name, "HF_HUB_OFFLINE is set")
    try:
        return retry(lambda: load_dataset_builder(name, name=config), f"hf://datasets/{name}")
    except OSError as error:
        raise _unreachable(name, " ".join(str(error).split())) from error
    except (ValueError, RuntimeError) as error:  # of its configurations; a script
        raise ValueError(
            f"--data: {name}: {' '.join(str(error).split())}; give its entry a config that it has"
        ) from error


def _unreachable(name: str, reason: str) -> ConnectionError:
    return ConnectionError(
        f"--data: {name} is neither a local path nor reachable on the hub ({reason}); check the "
        "path or name, HF_ENDPOINT, HF_HUB_OFFLINE and, for a private data set, HF_TOKEN"
    )
