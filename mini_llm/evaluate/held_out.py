"""Held-out bits per byte, and the same by the length of documents and by position in them.

The figures of a source are those of ``training/evaluation.py``; here every token's loss is looked
at as well.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mini_llm.data.collate import IGNORE_INDEX, collate, one_document_per_row
from mini_llm.data.packed_stream import Row
from mini_llm.data.stream import HeldOut
from mini_llm.training.evaluation import evaluate_sources

from .checkpoint import is_ours

LOGITS_AT_A_TIME = 1 << 26  # of a forward pass, at least one row: 256 MB in float32
BUCKETS = 32  # powers of two
NATS, TOKENS, BYTES = range(3)


class Histogram:
    """Nats, predicted tokens and their bytes in buckets of powers of two, float64 [3, BUCKETS].

    Bucket k is for lengths, or positions, of 2^k to 2^(k+1) − 1.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((3, BUCKETS))
        self.documents = np.zeros(BUCKETS, np.int64)

    def add(self, numbers: np.ndarray, nats: np.ndarray, num_bytes: np.ndarray) -> None:
        """Count predicted tokens, each under its number: all arrays [predicted tokens]."""
        bucket = buckets_of(numbers)
        for kind, weights in enumerate((nats, np.ones(len(nats)), num_bytes)):
            self.sums[kind] += np.bincount(bucket, weights, minlength=BUCKETS)

    def rows(self) -> list[dict[str, Any]]:
        """One object a bucket that has tokens, the shortest first."""
        return [
            {"from": 1 << k, "to": (2 << k) - 1, **figures(*self.sums[:, k])}
            | ({"documents": int(self.documents[k])} if self.documents.any() else {})
            for k in range(BUCKETS)
            if self.sums[TOKENS, k]
        ]


def buckets_of(numbers: np.ndarray) -> np.ndarray:
    """The power of two below or at each number ≥ 1: int64, of the same shape."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1


def figures(nats: float, tokens: float, num_bytes: float) -> dict[str, Any]:
    """Loss (nats a token), perplexity, bits per byte (None without bytes), tokens and bytes."""
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "tokens": int(tokens),
        "bytes": int(num_bytes),
    }


class TokenLosses:
    """Measures rows for ``evaluate_sources``, and keeps what it saw by source.

    ``token_bytes`` (V,) are the UTF-8 bytes of each token, for rows that do not bring their own.
    """

    def __init__(self, model: Any, device: torch.device, token_bytes: np.ndarray | None) -> None:
        self.by_length: dict[str, Histogram] = {}
        self.by_position: dict[str, Histogram] = {}
        self.totals: dict[str, np.ndarray] = {}
        self._model = model
        self._device = device
        self._token_bytes = token_bytes
        self._is_ours = is_ours(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def __call__(self, rows: list[Row]) -> torch.Tensor:
        """(3,) float64: nats, predicted tokens, their bytes."""
        totals = np.zeros(3)
        for part in self._parts(rows):
            totals += self._measure(part)
        return torch.from_numpy(totals).to(self._device)

    def _parts(self, rows: list[Row]) -> Iterator[list[Row]]:
        """The rows in groups of one length whose logits fit; stock classes get single documents.

        Only this project's classes keep the documents of a packed row apart, all of them.
        """
        if not self._is_ours and any(len(row["doc_lens"]) != 1 for row in rows):
            rows = one_document_per_row(rows)
        rows = sorted(rows, key=lambda row: int(row["doc_lens"].sum()))
        group: list[Row] = []
        for row in rows:
            longest = self._width(row)
            if group and (len(group) + 1) * longest * self._vocabulary > LOGITS_AT_A_TIME:
                yield _padded(group, self._width(group[-1]))
                group = []
            group.append(row)
        if group:
            yield _padded(group, self._width(group[-1]))

    def _width(self, row: Row) -> int:
        """The tokens that a row must keep: padding behind single documents is cut off."""
        return len(row["input_ids"]) if self._is_ours else max(int(row["doc_lens"].sum()), 1)

    def _measure(self, rows: list[Row]) -> np.ndarray:
        batch = collate(rows, self._device)
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        if self._is_ours:
            inputs["position_ids"] = batch["position_ids"]
        logits = self._model(**inputs).logits
        targets = batch["labels"][:, 1:]
        nats = torch.stack(
            [
                F.cross_entropy(logits_TV[:-1].float(), targets_T, reduction="none")
                for logits_TV, targets_T in zip(logits, targets, strict=True)
            ]
        )
        is_target = (targets != IGNORE_INDEX).cpu().numpy()
        token_nats = nats.double().cpu().numpy()[is_target]
        token_bytes = np.stack([self._bytes_of(row) for row in rows])[:, 1:][is_target]
        lengths = np.stack([_document_lengths(row) for row in rows])[:, 1:][is_target]
        positions = batch["position_ids"][:, 1:].cpu().numpy()[is_target]

        source = rows[0]["source"]
        by_length = self.by_length.setdefault(source, Histogram())
        by_length.add(lengths, token_nats, token_bytes)
        for row in rows:
            buckets = buckets_of(row["doc_lens"])
            by_length.documents += np.bincount(buckets, minlength=BUCKETS)
        self.by_position.setdefault(source, Histogram()).add(positions, token_nats, token_bytes)
        sums = np.array([token_nats.sum(), len(token_nats), token_bytes.sum()])
        self.totals[source] = self.totals.get(source, np.zeros(3)) + sums
        return sums

    def _bytes_of(self, row: Row) -> np.ndarray:
        if "token_bytes" in row:
            return row["token_bytes"]
        assert self._token_bytes is not None
        return self._token_bytes[row["input_ids"]]


def _document_lengths(row: Row) -> np.ndarray:
    """The length of the document of each token, 0 on padding."""
    lengths = np.repeat(row["doc_lens"], row["doc_lens"])
    return np.pad(lengths, (0, len(row["input_ids"]) - len(lengths)))


def _padded(rows: Sequence[Row], width: int) -> list[Row]:
    """Rows of ``width`` tokens: padded at the end, or cut, where only padding is lost."""

    def fitted(array: np.ndarray) -> np.ndarray:
        return np.pad(array[:width], (0, max(width - len(array), 0)))

    padded = []
    for row in rows:
        made = row | {"input_ids": fitted(row["input_ids"])}
        if "token_bytes" in row:
            made["token_bytes"] = fitted(row["token_bytes"])
        if "loss_mask" in row:
            made["loss_mask"] = fitted(row["loss_mask"])
        padded.append(made)
    return padded


def evaluate_held_out(
    model: Any,
    held_out: Mapping[str, HeldOut],
    *,
    batch_size: int,
    device: torch.device,
    token_bytes: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """By source: :func:`figures`, and ``by_length`` and ``by_position``, lists of them.

    ``token_bytes`` as in ``TokenLosses``. A source without a predicted token is left out.
    """
    losses = TokenLosses(model, device, token_bytes)
    metrics = evaluate_sources(model, held_out, losses, batch_size=batch_size, device=device)
    results = {}
    for name, totals in losses.totals.items():
        if not totals[TOKENS]:
            continue
        results[name] = figures(*totals) | {
            "loss": metrics[f"eval/{name}/loss"],
            "bits_per_byte": metrics[f"eval/{name}/bits_per_byte"] if totals[BYTES] else None,
            "rows": held_out[name].total,
            "by_length": losses.by_length[name].rows(),
            "by_position": losses.by_position[name].rows(),
        }
    return results
