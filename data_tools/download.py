"""Download the project's data sets: resumable, checked against the published sha256.

    python data_tools/download.py                                   # a menu, on a terminal
    python data_tools/download.py --dataset fineweb --files 100 --output_dir data/fineweb
    python data_tools/download.py --dataset deepctrl-zh --dry_run

Run again, it goes on where it was: complete files are checked and kept, unfinished ones (.part)
are continued. HF_ENDPOINT or --endpoint names a mirror of the hub. HF_TOKEN (hub) and
MODELSCOPE_API_TOKEN are sent to the endpoint alone; the data sets here need none.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import hashlib
import json
import os
import shlex
import shutil
import sys
import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_llm.command_line import Parser
from mini_llm.data.remote_files import (
    ENDPOINT_VARIABLES,
    ENDPOINTS,
    HUB,
    MODELSCOPE,
    PART_SUFFIX,
    TOKEN_VARIABLES,
    RemoteDataset,
    RemoteFile,
    WrongContentError,
    target_path,
    why_not_whole,
)

LOCK_NAME = ".download.lock"
LISTED_FILES = 10
READY_MADE = "wangkunqing/mini_llm_dataset"
TEXT, CONVERSATIONS, TOKENS, PACKED_CONVERSATIONS = "text", "conversations", "tokens", "sft_rows"


@dataclass(frozen=True)
class Dataset:
    """A choice of the menu: the files of a repository that match a pattern, and what they hold."""

    title: str
    content: str
    repos: dict[str, str]  # by source, the default source first
    patterns: tuple[str, ...]
    folder: str = ""


FINEWEB = "opencsg/Fineweb-Edu-Chinese-V2.1"
DEEPCTRL = "deepctrl/deepctrl-sft-data"
DATASETS = {
    "fineweb": Dataset(
        "FineWeb-Edu-Chinese V2.1, scores 4-5: text, score, source (9,745 parquet files, 69 GiB)",
        TEXT,
        {HUB: FINEWEB, MODELSCOPE: FINEWEB},
        ("4_5/*.parquet",),
        folder="4_5",
    ),
    "fineweb-5-percent": Dataset(
        "a ready-made 5% sample of it",
        TEXT,
        {MODELSCOPE: READY_MADE},
        ("*_5_percent*.zip", "*_5_percent*.parquet"),
    ),
    "fineweb-20-percent": Dataset(
        "a ready-made 20% sample of it",
        TEXT,
        {MODELSCOPE: READY_MADE},
        ("*_20_percent*.zip", "*_20_percent*.parquet"),
    ),
    "tokens-20-percent": Dataset(
        "the 20% sample as token ids (headerless uint16 .bin, mini_llm's first tokenizer)",
        TOKENS,
        {MODELSCOPE: READY_MADE},
        ("*_20_percent*.bin",),
    ),
    "tokens-fineweb": Dataset(
        "all of FineWeb 4-5 as token ids",
        TOKENS,
        {MODELSCOPE: READY_MADE},
        ("fineweb_edu.bin",),
    ),
    "tokens-deepctrl": Dataset(
        "DeepCtrl as token ids",
        TOKENS,
        {MODELSCOPE: READY_MADE},
        ("deepctrl*.bin",),
    ),
    "deepctrl-zh": Dataset(
        "DeepCtrl conversations, Chinese (jsonl, 16 GB)",
        CONVERSATIONS,
        {MODELSCOPE: DEEPCTRL},
        ("sft_data_zh.jsonl",),
    ),
    "deepctrl-en": Dataset(
        "DeepCtrl conversations, English (jsonl)",
        CONVERSATIONS,
        {MODELSCOPE: DEEPCTRL},
        ("sft_data_en.jsonl",),
    ),
    "sft-parquet": Dataset(
        "ready-made packed conversations (parquet)",
        PACKED_CONVERSATIONS,
        {MODELSCOPE: READY_MADE},
        ("*sft*.zip", "*sft*.parquet"),
    ),
}


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        download(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, sys.argv when none is given."""
    listing = "\n".join(f"  {name:19}{dataset.title}" for name, dataset in DATASETS.items())
    parser = Parser(
        description=f"{(__doc__ or '').rstrip()}\n\ndata sets:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset", choices=list(DATASETS), help="what to download; on a terminal, default: a menu"
    )
    parser.add_argument(
        "--source",
        choices=[HUB, MODELSCOPE],
        help="where from (default: hub for fineweb, else modelscope, which alone has the others)",
    )
    parser.add_argument(
        "--endpoint",
        help="address of the source or its mirror (default: HF_ENDPOINT, MODELSCOPE_ENDPOINT, or "
        "the source's own)",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="folder to write (default: data/ and the data set's name)"
    )
    parser.add_argument(
        "--files",
        type=int,
        help="download so many files, chosen by --seed, instead of all; a larger number with the "
        "same seed keeps those chosen before",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of --files (default: 0)")
    parser.add_argument(
        "--include",
        nargs="+",
        metavar="PATTERN",
        help="other files of the same repository than those of the data set, like 'train*.bin'",
    )
    parser.add_argument("--dry_run", action="store_true", help="print files and bytes, and stop")
    parser.add_argument(
        "--workers", type=int, default=8, help="files downloaded at once (default: 8)"
    )
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="do not read files that are there already to compare their sha256, only their size; "
        "what is downloaded is compared in any case",
    )
    return parser.parse_args(command_line)


def download(arguments: argparse.Namespace) -> None:
    """Download what the arguments name. Raises OSError or ValueError with a sentence."""
    for flag, least in (("workers", 1), ("files", 1)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} must be at least {least}, got {value}")
    by_menu = arguments.dataset is None
    if by_menu:
        ask(arguments)
    dataset = DATASETS[arguments.dataset]
    output_dir = arguments.output_dir or Path("data") / arguments.dataset
    remote = open_remote(arguments.dataset, arguments.source, arguments.endpoint)
    print(f"{arguments.dataset}: {remote.repo} at {remote.endpoint}")
    found = remote.list_files(dataset.folder if not arguments.include else "")
    files = choose_files(
        found, arguments.include or dataset.patterns, arguments.files, arguments.seed, remote
    )
    targets = {file.path: target_path(output_dir, file.path) for file in files}
    missing = [f for f in files if why_not_whole(targets[f.path], f, hashed=False) is not None]
    show_plan(files, missing, output_dir, all_names=arguments.dry_run)
    if arguments.dry_run:
        return
    if by_menu and missing and input("download? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    check_disk_space(missing, targets, output_dir)
    lock = FileLock(output_dir / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--output_dir: another process is downloading to {output_dir}; wait for it or give "
            "another folder"
        ) from None
    with lock:
        fetch_all(remote, files, targets, arguments.workers, verify=not arguments.no_verify)
        for target in targets.values():
            if target.suffix == ".zip":
                unpack(target)
    show_next_step(dataset.content, output_dir, set(targets.values()))


def ask(arguments: argparse.Namespace) -> None:
    """Let the user choose a data set, and for several files how many; ValueError off a terminal."""
    if not sys.stdin.isatty():
        raise ValueError(f"--dataset: give one of {', '.join(DATASETS)}")
    names = list(DATASETS)
    for number, name in enumerate(names, 1):
        print(f"{number:3}  {name:19}{DATASETS[name].title}")
    answer = input(f"data set (1-{len(names)}): ").strip()
    if answer in names:
        arguments.dataset = answer
    elif answer.isdigit() and 1 <= int(answer) <= len(names):
        arguments.dataset = names[int(answer) - 1]
    else:
        raise ValueError(f"--dataset: {answer!r} is none of the numbers 1 to {len(names)}")
    if arguments.dataset == "fineweb" and arguments.files is None:
        answer = input("how many files, of about 7.6 MB each (Enter: all): ").strip()
        if answer and not (answer.isdigit() and int(answer)):
            raise ValueError(f"--files: {answer!r} is no number of files")
        arguments.files = int(answer) if answer else None


def open_remote(name: str, source: str | None, endpoint: str | None) -> RemoteDataset:
    """Return the data set at the chosen source; ValueError where that does not have it."""
    repos = DATASETS[name].repos
    default = next(iter(repos))
    source = source or default
    if source not in repos:
        raise ValueError(f"--source: {name} is not on {source}; leave it out or give {default}")
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLES[source]) or ENDPOINTS[source]
    return RemoteDataset(source, repos[source], endpoint, os.environ.get(TOKEN_VARIABLES[source]))


def choose_files(
    found: Sequence[RemoteFile],
    patterns: Sequence[str],
    count: int | None,
    seed: int,
    remote: RemoteDataset,
) -> list[RemoteFile]:
    """Return the files that match a pattern, or `count` of them, sorted by path.

    The choice goes by a hash of seed and path, so more files contain the fewer.
    """
    files = [f for f in found if any(fnmatch.fnmatchcase(f.path, pattern) for pattern in patterns)]
    if not files:
        names = ", ".join(file.path for file in found[:LISTED_FILES])
        more = f" and {len(found) - LISTED_FILES} more" if len(found) > LISTED_FILES else ""
        raise ValueError(
            f"--include: no file of {remote.repo} matches {' or '.join(patterns)}; it has "
            f"{names or 'none'}{more}"
        )
    if count is None:
        return files
    if count > len(files):
        raise ValueError(f"--files {count} is more than the {len(files)} there are")
    chosen = sorted(files, key=lambda f: hashlib.sha256(f"{seed}/{f.path}".encode()).digest())
    return sorted(chosen[:count], key=lambda file: file.path)


def show_plan(
    files: Sequence[RemoteFile], missing: Sequence[RemoteFile], output_dir: Path, *, all_names: bool
) -> None:
    """Print files and bytes, all of them or the first few."""
    shown = files if all_names else files[:LISTED_FILES]
    for file in shown:
        print(f"{file.size:>16,}  {file.path}{'' if file in missing else '  (is there)'}")
    if len(shown) < len(files):
        print(f"{'…':>16}  and {len(files) - len(shown):,} more")
    total = sum(file.size for file in files)
    to_come = sum(file.size for file in missing)
    print(f"{total:>16,}  bytes in {len(files):,} files ({human_bytes(total)})")
    print(f"{to_come:>16,}  bytes of them to download to {output_dir} ({human_bytes(to_come)})")
    unchecked = sum(file.sha256 is None for file in files)
    if unchecked:
        print(f"no sha256 is published for {unchecked:,} files: their size alone is checked")


def check_disk_space(
    missing: Sequence[RemoteFile], targets: dict[str, Path], output_dir: Path
) -> None:
    """Raise OSError when the disk of the folder has no room for what is to come."""
    needed = 0
    for file in missing:
        part = targets[file.path].with_name(targets[file.path].name + PART_SUFFIX)
        needed += file.size - min(part.stat().st_size if part.exists() else 0, file.size)
        if file.path.endswith(".zip"):  # which is kept beside what it holds
            needed += file.size
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise OSError(
            f"--output_dir: {human_bytes(needed)} are needed and {human_bytes(free)} are free on "
            f"the disk of {output_dir}; free some, give another folder, or fewer --files"
        )


def fetch_all(
    remote: RemoteDataset,
    files: Sequence[RemoteFile],
    targets: dict[str, Path],
    workers: int,
    *,
    verify: bool,
) -> None:
    """Bring all files, `workers` at once.

    A file that is missing or wrong at the source does not stop the others; then ValueError names
    all of these. What concerns all files (no connection, no access, a full disk) stops at once.
    """
    total = sum(file.size for file in files)
    failed: list[str] = []
    # Off a terminal a line now and then is enough.
    every = 0.2 if sys.stderr.isatty() else 30.0
    pool = ThreadPoolExecutor(workers)
    lock = threading.Lock()  # the bar adds up for one thread only
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=every, maxinterval=every) as bar:

        def count(size: int) -> None:
            with lock:
                bar.update(size)

        def bring(file: RemoteFile) -> None:
            target = targets[file.path]
            if target.exists():
                fault = why_not_whole(target, file, hashed=verify)
                if fault is None:
                    count(file.size)
                    return
                bar.write(f"{target}: {fault}; it is downloaded again")
            remote.fetch(file, target, count)

        try:
            futures = {pool.submit(bring, file): file for file in files}
            for done, future in enumerate(as_completed(futures), 1):
                try:
                    future.result()
                except (FileNotFoundError, WrongContentError) as error:
                    failed.append(str(error))
                    bar.write(str(error))
                bar.set_postfix_str(f"{done:,}/{len(files):,} files", refresh=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    f"--output_dir: no space is left on the disk of {next(iter(targets.values()))};"
                    " free some and run the same command again: what has come is kept"
                ) from error
            raise
        finally:
            remote.stop.set()
            pool.shutdown(cancel_futures=True)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(files):,} files could not be downloaded, the others are there: "
            + "; ".join(failed)
        )


def unpack(archive: Path) -> None:
    """Unpack a zip archive into the folder of its name, complete or absent; keep the archive."""
    folder = archive.with_suffix("")
    if folder.exists() and folder.stat().st_mtime_ns >= archive.stat().st_mtime_ns:
        return
    unfinished = folder.with_name(folder.name + PART_SUFFIX)
    for leftover in (unfinished, folder):  # of an interrupted run, of an older archive
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                target_path(unfinished, member.filename.rstrip("/"))
            size = sum(member.file_size for member in members)
            if size > shutil.disk_usage(archive.parent).free:
                raise OSError(
                    f"--output_dir: {archive} holds {human_bytes(size)}, more than is free on its "
                    "disk; free some and run the same command again"
                )
            for member in tqdm(members, desc=f"unpack {archive.name}", unit="file"):
                content.extract(member, unfinished)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"--output_dir: {archive} is no whole zip archive ({error}); remove it and run the "
            "same command again"
        ) from error
    unfinished.rename(folder)
    os.utime(folder)  # newer than its archive, which is how it is known to be whole
    print(f"unpacked {archive} to {folder}")


def show_next_step(content: str, output_dir: Path, targets: set[Path]) -> None:
    """Print the command that uses what was downloaded."""
    suffixes = {target.suffix for target in targets}
    others = [p for p in output_dir.rglob("*") if p.suffix in suffixes and p not in targets]
    if others and ".zip" not in suffixes:
        print(
            f"note: {output_dir} also holds {len(others):,} files of other downloads ("
            f"{others[0].name}, …), which the command below would read too"
        )
    packed = shlex.quote(f"{output_dir}_packed")
    prepare = f"--input {shlex.quote(str(output_dir))} --output_dir {packed} --tokenizer"
    theirs = "THE_TOKENIZER_THEY_WERE_MADE_WITH"
    mapping = json.dumps({"sft": {"path": str(output_dir), "weight": 1}}, ensure_ascii=False)
    commands = {
        TEXT: f"python data_tools/prepare_pretrain.py {prepare} mini_llm/tokenizer",
        CONVERSATIONS: f"python data_tools/prepare_sft.py {prepare} mini_llm/tokenizer",
        TOKENS: f"python data_tools/prepare_pretrain.py --input_format tokens {prepare} {theirs}",
        # Without --config it would be the quickstart's run, into its folder.
        PACKED_CONVERSATIONS: "./launch.sh sft --config recipes/configs/mini_llama3/sft.yaml "
        f"--data {shlex.quote(mapping)} --tokenizer {theirs}",
    }
    print(f"next: {commands[content]}")


def human_bytes(count: float) -> str:
    """Return bytes with a unit: 7.6 MB, 69.2 GB (powers of 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    main()
