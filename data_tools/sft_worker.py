"""The jobs of prepare_sft.py: scan a range of the input; pack a window of the sample."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sft_charts import length_counts
from mini_llm.data.conversation_files import Found, digest, parse_line, read_lines
from mini_llm.data.conversations import (
    ChatEncoder,
    Conversation,
    Encoded,
    count_answers,
    without_last_exchange,
)
from mini_llm.data.input_files import InputFile, check_unchanged
from mini_llm.data.sft_files import pack_conversations
from mini_llm.data.text_files import MAX_LINE_BYTES, Rejected
from mini_llm.data.unit_files import random_keys, read_array, write_unit

# Part of what makes a stage's result: raise it when the same input should give another one.
STAGE_VERSION = 2
SINGLE_TURN, MULTI_TURN, SELF_AWARENESS = "single_turn", "multi_turn", "self_awareness"


@dataclass(frozen=True)
class Settings:
    """What a process needs to know, the same for all jobs."""

    tokenizer: str
    tokenizer_fingerprint: str
    min_tokens: int
    max_tokens: int
    truncate: bool
    validation_fraction: float
    seed: int
    stages: str

    def key(self) -> list[Any]:
        """Return all that a scan depends on but its file."""
        return [STAGE_VERSION, asdict(self) | {"tokenizer": "", "stages": ""}]


@dataclass(frozen=True)
class ScanJob:
    """A range of bytes of an input file to scan."""

    index: int
    file: InputFile
    start: int
    stop: int
    settings: Settings

    @property
    def name(self) -> str:
        """Of the unit it writes."""
        return f"scan-{self.index:06d}"

    @property
    def amount(self) -> int:
        """Of work, for the progress."""
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Return the sha256 of all that its result depends on."""
        content = [
            self.settings.key(),
            self.file.description,
            self.file.stamp[:2],
            self.start,
            self.stop,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class PackJob:
    """Conversations of one split to read again, tokenise and pack into rows.

    Conversation i starts at byte places[i] of inputs[files[i]]; where files[i] is -1 it is the
    self-awareness conversation of number places[i].
    """

    split: str
    index: int
    inputs: tuple[InputFile, ...]
    files: np.ndarray
    places: np.ndarray
    seq_len: int
    stage_key: str
    settings: Settings

    @property
    def name(self) -> str:
        """Of the unit it writes."""
        return f"pack-{self.split}-{self.index:06d}"

    @property
    def amount(self) -> int:
        """Of work, for the progress."""
        return len(self.files)

    @property
    def key(self) -> str:
        """Return the sha256 of all that its result depends on."""
        chosen = hashlib.sha256(self.files.tobytes() + self.places.tobytes()).hexdigest()
        content = [self.settings.key(), self.stage_key, self.split, self.index, chosen]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Fitted:
    """A conversation of the right length, or the reason why there is none."""

    messages: Conversation
    encoded: Encoded
    reason: str | None
    truncated: bool


class Worker:
    """Does scan and pack jobs and writes their units; the result is the number of tokens."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stages = Path(settings.stages)
        self._encoder = ChatEncoder(settings.tokenizer)
        if self._encoder.fingerprint != settings.tokenizer_fingerprint:
            raise ValueError(f"--tokenizer: {settings.tokenizer} was changed; run again")

    def __call__(self, job: ScanJob | PackJob) -> int:
        """Do one job."""
        return self._scan(job) if isinstance(job, ScanJob) else self._pack(job)

    def fit(self, messages: Conversation) -> Fitted:
        """Tokenise a conversation and bring it to the right length."""
        encoded = self._encoder.encode(messages)
        settings = self._settings
        answers = count_answers(messages)
        while (
            settings.truncate
            and len(encoded.input_ids) > settings.max_tokens
            and count_answers(messages) > 1
        ):
            messages = without_last_exchange(messages)
            encoded = self._encoder.encode(messages)
        reason = None
        if len(encoded.input_ids) > settings.max_tokens:
            reason = "too_long"
        elif len(encoded.input_ids) < settings.min_tokens:
            reason = "too_short"
        return Fitted(messages, encoded, reason, count_answers(messages) < answers)

    def _scan(self, job: ScanJob) -> int:
        settings = self._settings
        held_out_below = int(settings.validation_fraction * 2**64)
        rejected: Counter[str] = Counter()
        mended: Counter[str] = Counter()
        strata: dict[tuple[str, str], int] = {}
        rows: list[tuple[int, int, int, bool]] = []  # hash, place, stratum, held out
        lengths: list[int] = []
        quarantine = bytearray()
        input_lines = 0
        check_unchanged(job.file)
        for place, line in read_lines(job.file.path, job.start, job.stop):
            input_lines += 1
            if isinstance(line, Rejected):
                rejected[line.reason] += 1
                quarantine += quarantine_line(job.file.path, line)
                continue
            fit = self.fit(line.messages)
            mended.update(line.mended)
            if fit.truncated and fit.reason is None:
                mended["truncated"] += 1
            lengths.append(len(fit.encoded.input_ids))
            if fit.reason is not None:
                rejected[fit.reason] += 1
                continue
            stratum = strata.setdefault((kind_of(fit.messages), line.kind), len(strata))
            name = digest(fit.messages)
            # Two hashes, so that the sample says nothing about what is held out.
            held_out = int.from_bytes(name[:8]) < held_out_below
            rows.append((priority(name, settings.seed), place, stratum, held_out))
        check_unchanged(job.file)
        rows.sort(key=lambda row: row[:2])
        write_unit(
            self._stages,
            job.name,
            {
                "hashes": np.array([row[0] for row in rows], np.uint64),
                "places": np.array([row[1] for row in rows], np.int64),
                "strata": np.array([row[2] for row in rows], np.int32),
                "held_out": np.array([row[3] for row in rows], np.uint8),
                "quarantine": np.frombuffer(quarantine, np.uint8),
            },
            {
                "key": job.key,
                "input_lines": input_lines,
                "rejected": rejected,
                "mended": mended,
                "strata": list(strata),
                "lengths": length_counts(lengths).tolist(),
            },
        )
        return sum(lengths)

    def _pack(self, job: PackJob) -> int:
        encoded: list[Encoded] = []
        kinds = Counter({SELF_AWARENESS: int((job.files < 0).sum())})
        for item, messages in enumerate(self._chosen(job)):
            fit = self.fit(messages)
            if fit.reason is not None:
                raise RuntimeError(f"a chosen conversation is {fit.reason}")
            encoded.append(fit.encoded)
            if job.files[item] >= 0:
                kinds[kind_of(fit.messages)] += 1
        dtype = self._encoder.dtype
        tokens = np.concatenate([one.input_ids for one in encoded]).astype(dtype)
        labels = np.concatenate([one.labels for one in encoded])
        lengths = np.array([len(one.input_ids) for one in encoded], np.int64)
        packed = pack_conversations(tokens, labels >= 0, lengths, job.seq_len)
        # Best fit leaves the longest first: mix the rows.
        rows = len(packed.doc_lens)
        order = np.argsort(random_keys(rows, f"{self._settings.seed}/{job.name}"), kind="stable")
        doc_lens = [packed.doc_lens[row] for row in order]
        write_unit(
            self._stages,
            job.name,
            {
                "input_ids": packed.input_ids[order],
                "loss_mask": packed.loss_mask[order],
                "doc_ends": np.cumsum([len(row) for row in doc_lens], dtype=np.int64),
                "doc_lens": np.concatenate(doc_lens),
            },
            {
                "key": job.key,
                "rows": rows,
                "kinds": +kinds,
                "supervised_tokens": int(packed.loss_mask.sum()),
                "lengths": length_counts(lengths.tolist()).tolist(),
            },
        )
        return len(tokens)

    def _chosen(self, job: PackJob) -> list[Conversation]:
        """Return the conversations of a job, in its order, as they stand in the input."""
        chosen: dict[int, Conversation] = {}
        for index in np.unique(job.files).tolist():
            items = np.flatnonzero(job.files == index)
            if index < 0:
                made = read_self_awareness(self._stages)
                chosen.update((item, made[job.places[item]]) for item in items.tolist())
                continue
            check_unchanged(job.inputs[index])
            with job.inputs[index].path.open("rb") as lines:
                for item in items[np.argsort(job.places[items])].tolist():  # front to back
                    lines.seek(int(job.places[item]))
                    found = parse_line(lines.readline(MAX_LINE_BYTES))
                    assert isinstance(found, Found), "a line that was a conversation before"
                    chosen[item] = found.messages
            check_unchanged(job.inputs[index])
        return [chosen[item] for item in range(len(job.files))]


def kind_of(messages: Conversation) -> str:
    """Return whether a conversation has one answer or several."""
    return SINGLE_TURN if count_answers(messages) == 1 else MULTI_TURN


def priority(name: bytes, seed: int) -> int:
    """Return 64 random bits that decide whether, and where, a conversation stands."""
    return int.from_bytes(hashlib.sha256(f"{seed}/".encode() + name).digest()[:8])


def quarantine_line(file: Path, rejected: Rejected) -> bytes:
    """Return a rejected line as a line of the quarantine file."""
    content = {"file": file.name, **asdict(rejected)}
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def read_self_awareness(stages: Path) -> list[Conversation]:
    """Return the conversations about the model."""
    lines = read_array(stages, SELF_AWARENESS, "jsonl").tobytes()
    # Bytes: a str is also split at U+2028 and U+0085, which a JSON string may hold as they are.
    return [json.loads(line) for line in lines.splitlines()]
