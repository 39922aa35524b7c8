"""Held-out loss and bits per byte, per source, over all ranks."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mini_llm.data.collate import IGNORE_INDEX, collate
from mini_llm.data.stream import HeldOut, Row
from mini_llm.parallel.compile import eagerly
from mini_llm.parallel.watchdog import beat

from .arguments import RunArguments


def load_held_out(
    args: RunArguments,
    open_rows: Callable[..., dict[str, HeldOut]],
    *,
    rank: int,
    world_size: int,
) -> dict[str, HeldOut]:
    """This rank's held-out rows of every source; they are few, so they stay in memory.

    ``open_rows`` is ``open_validation``, or ``open_sft_validation`` for conversations. Ranks with
    fewer rows get a row of padding, which counts nothing: under ZeRO-3 every forward is a
    collective, so all ranks must make as many. None are read for ``--eval_steps 0``. Raises what
    ``open_rows`` does.
    """
    if not args.eval_steps:
        return {}
    held_out = open_rows(
        args.data,
        seq_len=args.seq_len,
        max_rows=args.max_eval_rows or None,
        rank=rank,
        world_size=world_size,
        tokenizer=args.tokenizer,
    )
    for name, part in held_out.items():
        padding = Row(
            input_ids=np.zeros(args.seq_len, dtype=np.uint16),
            doc_lens=np.zeros(0, dtype=np.int32),
            source=name,
        )
        missing = math.ceil(part.total / world_size) - len(part.rows)
        held_out[name] = dataclasses.replace(part, rows=part.rows + [padding] * missing)
    return held_out


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    held_out: Mapping[str, HeldOut],
    *,
    batch_size: int,
    token_bytes: np.ndarray,
) -> dict[str, float]:
    """``eval/<source>/loss`` (nats per token) and ``…/bits_per_byte`` of each source.

    ``token_bytes`` (V,) is the number of UTF-8 bytes that each token stands for. Bits per byte are
    the nats of all predicted tokens, end-of-document included, over ln 2 × those tokens' bytes.
    """
    bytes_of = torch.from_numpy(token_bytes).to(accelerator.device)

    def measure(rows: list[Row]) -> torch.Tensor:
        batch = collate(rows, accelerator.device)
        labels = batch["labels"]
        with eagerly():
            loss_sum = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                documents=batch["documents"],
                labels=labels,
                num_items_in_batch=1,
                num_target_tokens=batch["num_target_tokens"],
                use_cache=False,
                skip_logits=True,
            ).loss
        targets = labels[:, 1:]
        counted = targets != IGNORE_INDEX
        num_bytes = (bytes_of[targets.clamp(min=0)] * counted).sum()
        return torch.stack((loss_sum.double(), counted.sum(), num_bytes))

    return evaluate_sources(
        model,
        held_out,
        measure,
        batch_size=batch_size,
        device=accelerator.device,
        sum_over_ranks=lambda totals: accelerator.reduce(totals, "sum"),
    )


@torch.no_grad()
def evaluate_sources(
    model: nn.Module,
    held_out: Mapping[str, HeldOut],
    measure: Callable[[list[Row]], torch.Tensor],
    *,
    batch_size: int,
    device: torch.device,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda totals: totals,
) -> dict[str, float]:
    """The metrics of :func:`evaluate` from what ``measure`` finds in ``batch_size`` rows at a time.

    ``measure`` returns (3,) on ``device``: nats, predicted tokens, UTF-8 bytes of those tokens.
    """
    was_training = model.training
    model.eval()
    metrics = {}
    for name, part in held_out.items():
        # float64 so that sums of millions stay exact
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for batch_rows in _batches(part.rows, batch_size):
            beat("evaluation")
            totals += measure(batch_rows)
        nats, tokens, num_bytes = sum_over_ranks(totals).tolist()
        if tokens:
            metrics[f"eval/{name}/loss"] = nats / tokens
            metrics[f"eval/{name}/bits_per_byte"] = nats / math.log(2) / max(num_bytes, 1)
    model.train(was_training)
    return metrics


def mean_loss(evaluation: Mapping[str, float]) -> float | None:
    """The mean over sources of the held-out losses of :func:`evaluate`, None without any."""
    losses = [value for key, value in evaluation.items() if key.endswith("/loss")]
    return sum(losses) / len(losses) if losses else None


def _batches(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    for first in range(0, len(rows), batch_size):
        yield rows[first : first + batch_size]
