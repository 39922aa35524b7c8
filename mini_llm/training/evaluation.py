"""Held-out loss and bits per byte, per source, over all ranks."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mini_llm.data.collate import IGNORE_INDEX, collate
from mini_llm.data.manifest import VALIDATION, load_manifest
from mini_llm.data.stream import validation_rows


def load_held_out(
    data: dict[str, Any], *, rank: int, world_size: int, max_rows: int
) -> dict[str, list[Any]]:
    """This rank's held-out rows of every source; they are few, so they stay in memory.

    Ranks with fewer rows get a row of padding, which counts nothing: under ZeRO-3 every forward is
    a collective, so all ranks must make as many.
    """
    held_out = {}
    for name, source in data.items():
        manifest = load_manifest(source["path"])
        total = manifest.splits[VALIDATION].rows
        total = min(total, max_rows) if max_rows else total
        rows: list[Any] = list(
            validation_rows(Path(source["path"]), rank=rank, world_size=world_size, max_rows=total)
        )
        padding = {
            "input_ids": np.zeros(manifest.seq_len, dtype=np.uint16),
            "doc_lens": np.zeros(0, dtype=np.int32),
            "source": name,
        }
        held_out[name] = rows + [padding] * (math.ceil(total / world_size) - len(rows))
    return held_out


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    held_out: dict[str, list[Any]],
    *,
    batch_size: int,
    token_bytes: np.ndarray,
) -> dict[str, float]:
    """``eval/<source>/loss`` (nats per token) and ``…/bits_per_byte`` of each source.

    ``token_bytes`` (V,) is the number of UTF-8 bytes that each token stands for. Bits per byte are
    the nats of all predicted tokens, end-of-document included, over ln 2 × those tokens' bytes.
    """
    was_training = model.training
    model.eval()
    bytes_of = torch.from_numpy(token_bytes).to(accelerator.device)
    metrics = {}
    for name, rows in held_out.items():
        # nats, predicted tokens, their bytes; float64 so that sums of millions stay exact
        totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        for batch_rows in _batches(rows, batch_size):
            batch = collate(batch_rows, accelerator.device)
            labels = batch["labels"]
            loss_sum = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=labels,
                num_items_in_batch=1,
                use_cache=False,
                skip_logits=True,
            ).loss
            targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
            totals += torch.stack(
                (loss_sum.double(), totals.new_tensor(targets.numel()), bytes_of[targets].sum())
            )
        nats, tokens, num_bytes = accelerator.reduce(totals, "sum").tolist()
        if tokens:
            metrics[f"eval/{name}/loss"] = nats / tokens
            metrics[f"eval/{name}/bits_per_byte"] = nats / math.log(2) / max(num_bytes, 1)
    model.train(was_training)
    return metrics


def _batches(rows: list[Any], batch_size: int) -> Iterator[list[Any]]:
    for first in range(0, len(rows), batch_size):
        yield rows[first : first + batch_size]
