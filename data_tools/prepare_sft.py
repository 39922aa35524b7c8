"""Turn conversations into packed rows with labels on the answers, a manifest and charts.

    python data_tools/prepare_sft.py --input data/deepctrl-zh/sft_data_zh.jsonl \\
        --tokenizer data/tokenizer --output_dir data/sft_packed --seq_len 2048

Reads jsonl: DeepCtrl (instruction, input, output, history), `messages` with role and content, and
`conversations` with from and value or role and content. Lines that hold no conversation to train on
are counted by reason and kept in quarantine.jsonl. The same input and options give the same bytes,
whatever --num_proc is and however often the preparation was interrupted.

Each stage keeps its result in OUTPUT_DIR/stages/, so that a rerun goes on after the last one:
1. scan: processes read and tokenise parts of the input; what is valid and of the right length
   leaves a hash, its place, its kind and its length.
2. sample: the smallest hashes of each type are taken, types in proportion to what is there.
3. self-awareness: conversations about the model itself, from a YAML file or an endpoint.
4. pack: processes read the sample again, tokenise it and pack it, whole conversations only.
The final files, the charts and the manifest follow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.self_awareness import Question, SelfAwareness, ask_endpoint, exchange
from data_tools.sft_charts import (
    draw_attention_mask,
    draw_lengths,
    draw_utilisation,
)
from data_tools.sft_sampling import sample
from data_tools.sft_worker import (
    MULTI_TURN,
    SELF_AWARENESS,
    SINGLE_TURN,
    STAGE_VERSION,
    PackJob,
    ScanJob,
    Settings,
    Worker,
    priority,
    read_self_awareness,
)
from mini_llm.command_line import HelpFormatter, Parser
from mini_llm.data.conversation_files import (
    SUFFIXES,
    digest,
    pieces_of,
)
from mini_llm.data.conversations import (
    ChatEncoder,
    Conversation,
    why_invalid,
)
from mini_llm.data.input_files import InputFile
from mini_llm.data.jobs import available_cpus, run_jobs
from mini_llm.data.manifest import MANIFEST_NAME, TRAIN, VALIDATION, FileEntry, TokenizerEntry
from mini_llm.data.output_folder import (
    check_no_foreign_files,
    check_outside_input,
    check_same_preparation,
    clear_unfinished,
    explained_full_disk,
    only_preparation_of,
)
from mini_llm.data.packing import MIN_SEQ_LEN
from mini_llm.data.sft_files import (
    PackedConversations,
    SftManifest,
    SftSplit,
    load_sft_manifest,
    write_sft_manifest,
    write_sft_rows,
)
from mini_llm.data.text_files import list_files
from mini_llm.data.unit_files import read_array, read_record, write_unit
from mini_llm.durable import complete_or_absent

SCAN_BYTES = 32 << 20
# Best fit needs choice: with so many conversations at hand rows are > 99% full.
WINDOW_CONVERSATIONS = 8192

STAGES_NAME = "stages"
PLOTS_NAME = "plots"
QUARANTINE_NAME = "quarantine.jsonl"
ENDPOINT_ANSWERS_NAME = "endpoint_answers.jsonl"


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        prepare(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, sys.argv when none is given."""
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="jsonl of DeepCtrl records, `messages` or `conversations`: files, or folders of them",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens per row")
    parser.add_argument(
        "--single_turn",
        type=int,
        default=40_000,
        help="conversations with one answer to take; more than there are takes all",
    )
    parser.add_argument(
        "--multi_turn", type=int, default=10_000, help="conversations with several answers to take"
    )
    parser.add_argument(
        "--self_awareness",
        type=int,
        default=200,
        help="conversations about the model itself to make",
    )
    parser.add_argument(
        "--self_awareness_file",
        type=Path,
        default=Path(__file__).with_name("self_awareness.yaml"),
        help="who the model is, with questions and answers",
    )
    parser.add_argument(
        "--endpoint",
        help="base URL of an OpenAI-compatible server (…/v1) that answers the questions about the "
        "model instead of the file's own answers",
    )
    parser.add_argument("--endpoint_model", help="model to ask for at --endpoint")
    parser.add_argument(
        "--endpoint_key_variable",
        default="OPENAI_API_KEY",
        help="environment variable with the endpoint's key; unset: no key is sent",
    )
    parser.add_argument(
        "--min_tokens", type=int, default=1, help="leave out shorter conversations, in tokens"
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        help="leave out longer conversations, in tokens; --seq_len if unset",
    )
    parser.add_argument(
        "--too_long",
        choices=["drop", "truncate"],
        default="drop",
        help="truncate: leave out the last exchanges of a long conversation until it fits",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.01,
        help="share of the conversations, chosen by a hash of their text, that is held out",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the sample and the order of the rows"
    )
    parser.add_argument(
        "--num_proc", type=int, default=available_cpus(), help="processes that read and tokenise"
    )
    parser.add_argument("--rows_per_file", type=int, default=16384, help="rows per parquet file")
    parser.add_argument("--row_group_rows", type=int, default=64, help="rows per row group")
    return parser.parse_args(command_line)


def prepare(arguments: argparse.Namespace) -> SftManifest:
    """Run the whole preparation, or return the manifest of one that is already done.

    Raises ValueError or OSError, naming the flag, for bad input.
    """
    check_arguments(arguments)
    check_outside_input(arguments.output_dir, arguments.input)
    encoder = ChatEncoder(arguments.tokenizer)
    about_itself = SelfAwareness.of(arguments)
    files = [InputFile.of(path) for path in list_files(arguments.input, SUFFIXES)]
    for file in files:
        if not file.path.stat().st_size:
            raise ValueError(
                f"--input: {file.path} is empty (0 bytes); get it again or leave it out"
            )
    settings = Settings(
        tokenizer=str(arguments.tokenizer),
        tokenizer_fingerprint=encoder.fingerprint,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens or arguments.seq_len,
        truncate=arguments.too_long == "truncate",
        validation_fraction=arguments.validation_fraction,
        seed=arguments.seed,
        stages=str(arguments.output_dir / STAGES_NAME),
    )
    options = {
        "inputs": [file.description for file in files],
        "seq_len": arguments.seq_len,
        "single_turn": arguments.single_turn,
        "multi_turn": arguments.multi_turn,
        "self_awareness": arguments.self_awareness,
        "self_awareness_file": about_itself.sha256 if arguments.self_awareness else None,
        "endpoint": arguments.endpoint,
        "endpoint_model": arguments.endpoint_model,
        "min_tokens": settings.min_tokens,
        "max_tokens": settings.max_tokens,
        "too_long": arguments.too_long,
        "validation_fraction": arguments.validation_fraction,
        "seed": arguments.seed,
        "rows_per_file": arguments.rows_per_file,
        "row_group_rows": arguments.row_group_rows,
    }
    vocabulary = TokenizerEntry(encoder.fingerprint, encoder.vocab_size)
    output_dir, stages = arguments.output_dir, arguments.output_dir / STAGES_NAME
    check_no_foreign_files(output_dir, {STAGES_NAME, PLOTS_NAME, QUARANTINE_NAME, MANIFEST_NAME})
    with only_preparation_of(output_dir, stages):
        if (manifest := reusable_manifest(output_dir, options, vocabulary)) is not None:
            print(f"{output_dir} is already prepared with these options: nothing to do")
            return manifest
        clear_unfinished(output_dir, stages, [TRAIN, VALIDATION, PLOTS_NAME, QUARANTINE_NAME])
        needs = "the stages and rows take up to 8 bytes per token of the sample"
        with explained_full_disk(output_dir, stages, needs=needs, units="*-*.json"):
            return prepare_files(files, arguments, settings, options, vocabulary, about_itself)


def reusable_manifest(
    output_dir: Path, options: dict[str, Any], tokenizer: TokenizerEntry
) -> SftManifest | None:
    """Return the manifest of a finished folder, None when there is none yet.

    Raises ValueError, naming what differs, when the folder was prepared with other options.
    """
    if not (output_dir / MANIFEST_NAME).exists():
        return None
    found = load_sft_manifest(output_dir)
    check_same_preparation(
        output_dir,
        {**options, "tokenizer": tokenizer},
        {**found.options, "tokenizer": found.tokenizer},
        [entry for split in found.splits.values() for entry in split.files],
        advice=f"remove its {MANIFEST_NAME} to prepare it anew with the stages that still fit",
    )
    return found


def prepare_files(
    files: list[InputFile],
    arguments: argparse.Namespace,
    settings: Settings,
    options: dict[str, Any],
    vocabulary: TokenizerEntry,
    about_itself: SelfAwareness,
) -> SftManifest:
    """Go through all stages and write charts and manifest."""
    stages = Path(settings.stages)
    scan_jobs = [
        ScanJob(index, file, start, stop, settings)
        for index, (file, start, stop) in enumerate(
            (file, start, stop)
            for file in files
            for start, stop in pieces_of(file.path, SCAN_BYTES)
        )
    ]
    # What all stages after the scan depend on; more than each needs, but easy to be sure of.
    depends_on = [STAGE_VERSION, options, asdict(vocabulary)]
    depends_on += [job.key for job in scan_jobs]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()

    make_worker = partial(Worker, settings)
    run_jobs("scan", scan_jobs, stages, make_worker, arguments.num_proc)
    scans = [read_record(stages, job.name) or {} for job in scan_jobs]
    input_lines = sum(scan["input_lines"] for scan in scans)
    rejected: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    for scan in scans:
        rejected.update(scan["rejected"])
        mended.update(scan["mended"])

    quotas = {SINGLE_TURN: arguments.single_turn, MULTI_TURN: arguments.multi_turn}
    if (read_record(stages, "sample") or {}).get("key") != key:
        sample(scan_jobs, quotas, settings, key)
    sampled = read_record(stages, "sample") or {}
    if sampled["duplicates"]:
        rejected["duplicate"] = sampled["duplicates"]

    if (read_record(stages, SELF_AWARENESS) or {}).get("key") != key:
        make_self_awareness(about_itself, arguments, settings, key)
    made = read_record(stages, SELF_AWARENESS) or {}

    pack_jobs = plan_packing(files, arguments.seq_len, settings, key)
    run_jobs("pack", pack_jobs, stages, make_worker, arguments.num_proc)
    splits = {}
    row_tokens: list[np.ndarray] = []
    for split in (TRAIN, VALIDATION):
        jobs = [job for job in pack_jobs if job.split == split]
        records = [read_record(stages, job.name) or {} for job in jobs]
        kinds: Counter[str] = Counter()
        for record in records:
            kinds.update(record["kinds"])
        entries = list(
            write_files(
                arguments.output_dir,
                split,
                jobs,
                stages,
                rows_per_file=arguments.rows_per_file,
                row_group_rows=arguments.row_group_rows,
                row_tokens=row_tokens,
            )
        )
        rows, tokens = sum(e.rows for e in entries), sum(e.tokens for e in entries)
        splits[split] = SftSplit(
            rows=rows,
            tokens=tokens,
            supervised_tokens=sum(record["supervised_tokens"] for record in records),
            conversations=sum(kinds.values()),
            conversations_per_kind=dict(sorted(kinds.items())),
            utilisation=round(tokens / (rows * arguments.seq_len), 6) if rows else 0.0,
            files=entries,
        )
    if not splits[TRAIN].rows:
        raise ValueError(
            f"--input: no conversation is left to train on ({input_lines} lines, "
            f"{named(rejected) or 'none rejected'}); give other input, a larger --max_tokens or a "
            "smaller --validation_fraction"
        )
    written = sum(split.conversations for split in splits.values())
    from_input = written - made["conversations"]
    if input_lines != from_input + sum(rejected.values()) + sampled["not_sampled"]:
        raise RuntimeError(
            f"{input_lines} lines were read but {from_input} written, {sum(rejected.values())} "
            f"rejected and {sampled['not_sampled']} not sampled: a mistake of this program"
        )
    write_quarantine(arguments.output_dir / QUARANTINE_NAME, scan_jobs, stages)
    plots = arguments.output_dir / PLOTS_NAME
    before = sum((np.array(scan["lengths"]) for scan in scans), np.zeros(1, np.int64))
    after = sum(
        (np.array((read_record(stages, job.name) or {})["lengths"]) for job in pack_jobs),
        np.zeros(1, np.int64),
    )
    draw_lengths(plots / "lengths.png", before, after, arguments.seq_len)
    draw_utilisation(
        plots / "utilisation.png", np.concatenate(row_tokens), written, arguments.seq_len
    )
    first = read_rows(stages, pack_jobs[0].name)
    draw_attention_mask(plots / "attention_mask.png", first.doc_lens[0], first.loss_mask[0])
    manifest = write_sft_manifest(
        arguments.output_dir,
        SftManifest(
            seq_len=arguments.seq_len,
            tokenizer=vocabulary,
            splits=splits,
            input_lines=input_lines,
            rejected=dict(sorted(rejected.items())),
            not_sampled=sampled["not_sampled"],
            mended=dict(sorted(mended.items())),
            sampling={**sampled["sampling"], SELF_AWARENESS: made["sampling"]},
            options=options,
        ),
    )
    report(manifest, arguments.output_dir)
    return manifest


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a flag that is out of range."""
    if arguments.seq_len < MIN_SEQ_LEN:
        raise ValueError(f"--seq_len must be at least {MIN_SEQ_LEN}, got {arguments.seq_len}")
    if not 0 <= arguments.validation_fraction < 1:
        raise ValueError(
            f"--validation_fraction must lie in [0, 1), got {arguments.validation_fraction}"
        )
    for flag in ("num_proc", "rows_per_file", "row_group_rows", "min_tokens"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(arguments, flag)}")
    for flag in (SINGLE_TURN, MULTI_TURN, SELF_AWARENESS):
        if getattr(arguments, flag) < 0:
            raise ValueError(f"--{flag} must not be negative, got {getattr(arguments, flag)}")
    most = arguments.seq_len if arguments.max_tokens is None else arguments.max_tokens
    if not arguments.min_tokens <= most <= arguments.seq_len:
        raise ValueError(
            f"--max_tokens {most} must lie between --min_tokens {arguments.min_tokens} and "
            f"--seq_len {arguments.seq_len}: no conversation is split over rows"
        )
    if bool(arguments.endpoint) != bool(arguments.endpoint_model):
        raise ValueError("--endpoint and --endpoint_model belong together; give both or neither")
    if arguments.endpoint and not arguments.endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--endpoint {arguments.endpoint} must start with http:// or https://")


# Self-awareness


def make_self_awareness(
    about_itself: SelfAwareness, arguments: argparse.Namespace, settings: Settings, key: str
) -> None:
    """Draw or ask for the conversations about the model and write the unit of that name."""

    def random_order(question: Question) -> int:
        name = digest(exchange(question.question, question.answer))
        return priority(name, settings.seed)

    drawn = sorted(about_itself.questions, key=random_order)[: arguments.self_awareness]
    rejected: Counter[str] = Counter()
    if arguments.endpoint:
        answers = ask_endpoint(drawn, arguments, Path(settings.stages) / ENDPOINT_ANSWERS_NAME)
    else:
        answers = [question.answer for question in drawn]
    conversations: dict[bytes, Conversation] = {}
    found = []
    for question, answer in zip(drawn, answers, strict=True):
        messages = exchange(question.question, answer)
        reason = why_invalid(messages)
        if reason is None and not all(fact in answer for fact in question.must_say):
            reason = "lacks_a_fact"
        if reason is None and digest(messages) in conversations:
            reason = "duplicate"
        if reason is None:
            conversations[digest(messages)] = messages
            found.append(messages)
        else:
            rejected[reason] += 1
    worker = Worker(settings)
    kept = []
    for messages in found:
        fit = worker.fit(messages)
        if fit.reason is None:
            kept.append(fit.messages)
        else:
            rejected[fit.reason] += 1
    if len(kept) < arguments.self_awareness:
        print(
            f"--self_awareness {arguments.self_awareness:,}: only {len(kept):,} are there "
            f"({len(drawn)} drawn, {named(rejected) or 'none rejected'})"
        )
    lines = "".join(json.dumps(messages, ensure_ascii=False) + "\n" for messages in kept)
    sampling = {
        "asked_for": arguments.self_awareness,
        "available": len(about_itself.questions),
        "taken": len(kept),
        "rejected": dict(sorted(rejected.items())),
        "answers_of": arguments.endpoint_model or arguments.self_awareness_file.name,
    }
    write_unit(
        Path(settings.stages),
        SELF_AWARENESS,
        {"jsonl": np.frombuffer(lines.encode(), np.uint8)},
        {"key": key, "conversations": len(kept), "sampling": sampling},
    )


# Packing and the final files


def plan_packing(
    files: Sequence[InputFile], seq_len: int, settings: Settings, key: str
) -> list[PackJob]:
    """Divide the sample, in the order of the hashes, into windows of one split."""
    stages = Path(settings.stages)
    made = read_self_awareness(stages)
    names = [digest(messages) for messages in made]
    threshold = int(settings.validation_fraction * 2**64)

    def column(name: str, of_made: list[int]) -> np.ndarray:
        found = read_array(stages, "sample", name)
        return np.concatenate([found, np.array(of_made, found.dtype)])

    hashes = column("hash", [priority(name, settings.seed) for name in names])
    order = np.argsort(hashes, kind="stable")
    file_of = column("file", [-1] * len(made))[order]
    places = column("place", list(range(len(made))))[order]
    held_out = column("held_out", [int.from_bytes(name[:8]) < threshold for name in names])[order]
    unique = tuple({file.path: file for file in files}.values())
    jobs = []
    for split, members in ((TRAIN, held_out == 0), (VALIDATION, held_out == 1)):
        chosen = np.flatnonzero(members)
        for index, start in enumerate(range(0, len(chosen), WINDOW_CONVERSATIONS)):
            window = chosen[start : start + WINDOW_CONVERSATIONS]
            jobs.append(
                PackJob(
                    split, index, unique, file_of[window], places[window], seq_len, key, settings
                )
            )
    return jobs


def read_rows(
    stages: Path, name: str, start: int = 0, stop: int | None = None
) -> PackedConversations:
    """Return the packed rows start..stop of a unit."""
    ends = read_array(stages, name, "doc_ends")
    lengths = np.split(read_array(stages, name, "doc_lens"), ends[:-1])
    return PackedConversations(
        read_array(stages, name, "input_ids", start, stop),
        read_array(stages, name, "loss_mask", start, stop),
        lengths[start:stop],
    )


def write_files(
    output_dir: Path,
    split: str,
    jobs: Sequence[PackJob],
    stages: Path,
    *,
    rows_per_file: int,
    row_group_rows: int,
    row_tokens: list[np.ndarray],
) -> Iterator[FileEntry]:
    """Write the rows of the jobs one after the other, as files of `rows_per_file` rows.

    Yields each file's entry and adds the tokens of each row to `row_tokens`.
    """

    def row_ranges() -> Iterator[tuple[str, int]]:
        for job in jobs:
            rows = (read_record(stages, job.name) or {})["rows"]
            yield from ((job.name, row) for row in range(rows))

    rows = row_ranges()
    index = 0
    while chunk := list(islice(rows, rows_per_file)):
        parts = []
        for name in dict.fromkeys(name for name, _ in chunk):
            numbers = [row for unit, row in chunk if unit == name]
            parts.append(read_rows(stages, name, numbers[0], numbers[-1] + 1))
        packed = PackedConversations(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.loss_mask for part in parts]),
            [row for part in parts for row in part.doc_lens],
        )
        row_tokens.append(np.array([row.sum() for row in packed.doc_lens], np.int64))
        yield write_sft_rows(
            output_dir, f"{split}/{index:06d}.parquet", packed, row_group_rows=row_group_rows
        )
        index += 1


def write_quarantine(path: Path, jobs: Sequence[ScanJob], stages: Path) -> None:
    """Write the rejected lines in the order of the input; no file when there are none."""
    parts = (read_array(stages, job.name, "quarantine").tobytes() for job in jobs)
    first = next((part for part in parts if part), None)
    if first is None:
        return
    with complete_or_absent(path) as file:
        file.write(first)
        for part in parts:
            file.write(part)


# What the user sees


def named(counts: dict[str, int]) -> str:
    """Return counts as a phrase, empty when there are none."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def report(manifest: SftManifest, output_dir: Path) -> None:
    """Print what was prepared."""
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.conversations:,} conversations "
            f"({named(split.conversations_per_kind) or 'none'}), {split.tokens:,} tokens, "
            f"{split.supervised_tokens:,} of them supervised, in {split.rows:,} rows of "
            f"{manifest.seq_len}; {split.utilisation:.2%} used, none split"
        )
    if not manifest.splits[VALIDATION].rows:
        print("validation: empty; raise --validation_fraction to hold conversations out")
    rejected = sum(manifest.rejected.values())
    taken = manifest.input_lines - rejected - manifest.not_sampled
    print(
        f"input: {manifest.input_lines:,} lines = {taken:,} taken + {manifest.not_sampled:,} not "
        f"sampled + {rejected:,} rejected"
    )
    if manifest.rejected:
        print(f"rejected: {named(manifest.rejected)}")
    if manifest.mended:
        print(f"mended: {named(manifest.mended)}")
    if (output_dir / QUARANTINE_NAME).exists():
        print(f"rejected lines: {output_dir / QUARANTINE_NAME}")
    print(f"charts: {output_dir / PLOTS_NAME}")


if __name__ == "__main__":
    main()
