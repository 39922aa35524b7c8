"""Take a sample of text, the same share of every source, decided by a hash of each document.

    python data_tools/sample.py --input data/fineweb/4_5 --output_dir data/fineweb_5 --ratio 0.05

Reads parquet with the columns text, score, source and writes the same; reads DeepCtrl jsonl (its
source: data_source, else the file's name) and writes its lines as they are, byte for byte.

Of the n documents of a source, ratio * n are taken: those with the smallest hashes of text and
seed. Where that is no whole number, a hash of source and seed rounds it, up with the probability of
the fraction, else down. Therefore
- the sample is a matter of the documents alone: not of their files, their order or --num_proc;
- every document is as likely to be taken as any other: over many seeds a source with 3 documents
  gives 3 * ratio documents on average, not always 0 or always 1;
- in all, less than one document per source more or fewer than ratio * documents are taken;
- with the same seed, a larger ratio takes all that a smaller one does, always;
- documents with the same text are taken together, unless the count of their source ends among them.
The sample is written in the order of the hashes, a shuffled one; so the same documents and options
give the same bytes, however often the command was interrupted.

1. Processes hash the documents, each job a part of a file, into OUTPUT_DIR/unfinished/. Then the
   hashes of one source at a time are in memory, 8 bytes per document.
2. Processes read again and keep what is taken. Merging it takes about 60 bytes of memory per
   document of the sample, and about 1 GB. The disk holds the sample twice until it is done.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.sample_charts import draw_source_shares
from mini_llm.command_line import HelpFormatter, Parser
from mini_llm.data.input_files import InputFile, skip_or_raise
from mini_llm.data.jobs import available_cpus, run_jobs
from mini_llm.data.manifest import FileEntry
from mini_llm.data.output_folder import (
    check_no_foreign_files,
    check_outside_input,
    check_same_preparation,
    clear_unfinished,
    explained_full_disk,
    only_preparation_of,
)
from mini_llm.data.sampling import (
    SAMPLE_VERSION,
    TAKE,
    SamplingSettings,
    SamplingWorker,
    Share,
    plan_sampling,
    plan_shares,
    write_sample_files,
)
from mini_llm.data.text_files import TEXT_SUFFIXES, BadFileError, check_text_file, list_files
from mini_llm.data.unit_files import read_record
from mini_llm.durable import complete_or_absent

WORK_NAME = "unfinished"
SUMMARY_NAME = "sample.json"
CHART_NAME = "source_shares.png"
OUTPUT_FILE = re.compile(r"sample-\d{6,}\.(parquet|jsonl)")
# In the table and the chart; sample.json has all.
LISTED_SOURCES = 30
LONGEST_NAME = 48


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        sample(arguments)
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
        help="parquet (text, score, source) or DeepCtrl jsonl: files, or folders of them",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--ratio", type=float, required=True, help="share of the documents to take, above 0 to 1"
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="NAME=RATIO",
        help="another ratio for the documents of some sources; 0 leaves a source out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--skip_bad_files",
        action="store_true",
        help="leave out files that are damaged or have other columns, and list them in "
        f"{SUMMARY_NAME}, instead of stopping",
    )
    parser.add_argument(
        "--num_proc", type=int, default=available_cpus(), help="processes that read"
    )
    parser.add_argument("--rows_per_file", type=int, default=16384, help="documents per file")
    return parser.parse_args(command_line)


def sample(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the sample, or find it finished; return the content of its sample.json.

    Raises ValueError or OSError, naming the flag, for bad input.
    """
    ratios = check_arguments(arguments)
    output_dir, work = arguments.output_dir, arguments.output_dir / WORK_NAME
    paths = check_inputs(arguments.input, output_dir)
    skipped: dict[str, str] = {}
    for path in paths:
        try:
            if unused := check_text_file(path):
                print(f"{path}: the columns {', '.join(unused)} are not kept")
        except BadFileError as error:
            skip_or_raise(error, skipped, arguments.skip_bad_files)
    files = [InputFile.of(path) for path in paths]
    options = {
        # In an order of their own: that of the files does not matter.
        "inputs": sorted((file.description for file in files), key=lambda d: list(d.values())),
        "ratio": arguments.ratio,
        "source": ratios,
        "seed": arguments.seed,
        "skip_bad_files": arguments.skip_bad_files,
        "rows_per_file": arguments.rows_per_file,
    }
    said = f"{output_dir} already holds this sample: nothing to do"
    if (summary := finished_sample(output_dir, options)) is not None and not work.exists():
        print(said)
        return summary
    # Files that look like ours are ours only beside what says so.
    ours = [path.name for path in output_dir.glob("*") if OUTPUT_FILE.fullmatch(path.name)]
    if summary is None and not work.exists():
        ours = []
    check_no_foreign_files(output_dir, {WORK_NAME, SUMMARY_NAME, CHART_NAME, *ours})
    with only_preparation_of(output_dir, work):
        if (summary := finished_sample(output_dir, options)) is not None:
            print(said)
        else:
            clear_unfinished(output_dir, work, [*ours, CHART_NAME])
            files = [file for file in files if str(file.path) not in skipped]
            needs = "a sample takes twice its size in all"
            with explained_full_disk(output_dir, work, needs=needs, units="*-*.json"):
                summary = write_sample(files, arguments, ratios, options, skipped)
        shutil.rmtree(work)
    return summary


def write_sample(
    files: list[InputFile],
    arguments: argparse.Namespace,
    ratios: Mapping[str, float],
    options: dict[str, Any],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Go through all stages and write sample.json; `skipped` gets the bad files that turn up."""
    output_dir, work = arguments.output_dir, arguments.output_dir / WORK_NAME
    settings = SamplingSettings(str(work), arguments.seed)
    jobs = plan_sampling(files, settings)

    def run(stage: str) -> list[BadFileError]:
        return run_jobs(stage, jobs, work, partial(SamplingWorker, settings), arguments.num_proc)

    while bad := run("hash"):
        for error in bad:
            skip_or_raise(error, skipped, arguments.skip_bad_files)
        jobs = [job for job in jobs if str(job.file.path) not in skipped]
    records = {job.name: read_record(work, job.name) or {} for job in jobs}
    input_rows = sum(record["input_rows"] for record in records.values())
    rejected: Counter[str] = Counter()
    for record in records.values():
        rejected.update(record["rejected"])

    shares = plan_shares(records, work, arguments.ratio, ratios, arguments.seed)
    documents, sampled = sum(s.before for s in shares), sum(s.after for s in shares)
    if not sampled:
        flag = "--ratio" if documents else "--input"
        raise ValueError(
            f"{flag}: none of {documents:,} documents is taken ({input_rows:,} rows, "
            f"{rejected.total():,} rejected); give more text or a larger --ratio"
        )
    settings = replace(settings, shares=tuple(shares))
    jobs = [replace(job, stage=TAKE, depends_on=settings.fingerprint()) for job in jobs]
    for error in run("take"):
        raise error  # of the disk: the file was whole before
    entries = list(
        write_sample_files(
            output_dir,
            work,
            [job.name for job in jobs],
            shares,
            rows_per_file=arguments.rows_per_file,
            suffix=files[0].path.suffix,
        )
    )
    written = sum(entry["rows"] for entry in entries)
    if written != sampled or input_rows != documents + rejected.total():
        raise RuntimeError(
            f"{input_rows} rows were read, {documents} of them documents and {rejected.total()} "
            f"rejected; {written} of {sampled} documents were written: a mistake of this program"
        )
    listed = listed_sources(shares)
    if not draw_source_shares(output_dir / CHART_NAME, listed):
        print(f"{CHART_NAME}: no installed font has all characters of the names of the sources")
    summary = {
        "format_version": SAMPLE_VERSION,
        "options": options,
        "input_rows": input_rows,
        "sampled": sampled,
        "not_sampled": documents - sampled,
        "rejected": dict(sorted(rejected.items())),
        "skipped_files": [
            {"name": Path(file).name, "reason": reason}
            for file, reason in sorted(skipped.items(), key=lambda item: Path(item[0]).name)
        ],
        "sources": {s.source: {"before": s.before, "after": s.after} for s in shares},
        "files": entries,
    }
    with complete_or_absent(output_dir / SUMMARY_NAME) as file:
        file.write(json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
    report(summary, listed, output_dir)
    return summary


def check_arguments(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the ratios of --source by name; ValueError for a flag that is out of range."""
    if not 0 < arguments.ratio <= 1:
        raise ValueError(f"--ratio must be above 0 and at most 1, got {arguments.ratio}")
    if not 0 <= arguments.seed < 2**64:
        raise ValueError(f"--seed must lie between 0 and 2^64 - 1, got {arguments.seed}")
    for flag in ("num_proc", "rows_per_file"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(arguments, flag)}")
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ValueError(f"--output_dir: {arguments.output_dir} is a file; give a folder")
    ratios: dict[str, float] = {}
    for given in arguments.source:
        name, _, ratio = given.rpartition("=")
        try:
            ratios[name] = float(ratio)
        except ValueError:
            raise ValueError(f"--source {given} is not NAME=RATIO, like web=0.5") from None
        if "=" not in given or not 0 <= ratios[name] <= 1:
            raise ValueError(f"--source {given} is not NAME=RATIO with a ratio from 0 to 1")
    if len(ratios) < len(arguments.source):
        raise ValueError("--source has a name twice; give each one ratio")
    return dict(sorted(ratios.items()))


def check_inputs(inputs: Sequence[Path], output_dir: Path) -> list[Path]:
    """Return the input files by path, each once and all of one format."""
    check_outside_input(output_dir, inputs)
    paths = sorted(list_files(inputs, TEXT_SUFFIXES))
    if len({path.suffix for path in paths}) > 1:
        raise ValueError(
            "--input: parquet and jsonl cannot become one sample; give only the one, then only "
            "the other with another --output_dir"
        )
    return paths


# The output folder


def finished_sample(output_dir: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a finished folder, None when there is none yet.

    Raises ValueError, naming what differs, when the sample was taken with other options.
    """
    path = output_dir / SUMMARY_NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] != SAMPLE_VERSION:
            raise ValueError(f"format_version {found['format_version']}")
        files = [
            FileEntry(entry["file"], entry["rows"], 0, [], entry["sha256"], entry["bytes"])
            for entry in found["files"]
        ]
        options_then = found["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--output_dir: {path} was not written by this version of sample.py ({error}); give "
            "another folder or remove this one"
        ) from error
    check_same_preparation(output_dir, options, options_then, files, advice="remove this one")
    return found


# What the user sees


def listed_sources(shares: Sequence[Share]) -> list[tuple[str, int, int]]:
    """Return (name, documents before, after) of the sources, largest first, the rest as one."""
    ordered = sorted(shares, key=lambda share: (-share.before, share.source))
    kept, others = ordered[:LISTED_SOURCES], ordered[LISTED_SOURCES:]
    rows = [(shown_name(share.source), share.before, share.after) for share in kept]
    if others:
        before, after = sum(s.before for s in others), sum(s.after for s in others)
        rows.append((f"{len(others):,} others", before, after))
    return rows


def shown_name(source: str) -> str:
    """Return the name of a source as one short line."""
    line = "".join(c if c.isprintable() else " " for c in source).strip() or "(no name)"
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def report(
    summary: dict[str, Any], listed: Sequence[tuple[str, int, int]], output_dir: Path
) -> None:
    """Print what was sampled; the names last, because Chinese ones are wider than they are long."""
    sampled, documents = summary["sampled"], summary["sampled"] + summary["not_sampled"]
    print(f"{'documents':>14}{'share':>9}{'sampled':>14}{'share':>9}  source")
    for name, before, after in [*listed, ("all", documents, sampled)]:
        shares = before / documents, after / sampled
        print(f"{before:>14,}{shares[0]:>9.2%}{after:>14,}{shares[1]:>9.2%}  {name}")
    rejected = sum(summary["rejected"].values())
    print(
        f"input: {summary['input_rows']:,} rows = {sampled:,} sampled + "
        f"{summary['not_sampled']:,} not sampled + {rejected:,} rejected"
    )
    if rejected:
        reasons = ", ".join(f"{count:,} {why}" for why, count in summary["rejected"].items())
        print(f"rejected: {reasons}")
    if summary["skipped_files"]:
        names = ", ".join(file["name"] for file in summary["skipped_files"])
        print(f"skipped files: {len(summary['skipped_files'])} ({names})")
    print(f"{len(summary['files'])} files and {CHART_NAME}: {output_dir}")


if __name__ == "__main__":
    main()
