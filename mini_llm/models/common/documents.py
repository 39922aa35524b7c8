"""Where the documents of a packed batch lie.

A packed row is what transformers calls one: ``position_ids`` that restart at 0 and no attention
mask. Everything that must not cross a document boundary asks this module where the boundaries are.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Documents:
    """The documents of B packed rows of T tokens, on the host.

    ``lengths`` covers the flattened B·T tokens in order: a document's, then the next one's. A
    document never spans two rows. Padding counts as documents of one token. ``spans``, from who
    knows what is padding, are the same with that at the end of a row as one.
    """

    lengths: tuple[int, ...]
    spans: tuple[int, ...] | None = field(default=None, compare=False)

    def segments(self) -> list[tuple[int, bool]]:
        """(length, singles) runs covering all tokens; ``singles`` marks a run of 1-token documents.

        A row's padding tail is one run instead of hundreds of documents.
        """
        runs: list[tuple[int, bool]] = []
        for length in self.lengths:
            if length == 1 and runs and runs[-1][1]:
                runs[-1] = (runs[-1][0] + 1, True)
            else:
                runs.append((length, length == 1))
        return runs

    def cu_seq_lens(self, device: torch.device) -> torch.Tensor:
        """Boundaries (documents + 1,), int32, as variable-length kernels take them.

        A kernel pays for every document, however short: attention with memory for 128 tokens, and
        it takes 65,535 at most, the delta rule with a state. A batch of short documents in rows of
        their own has more tokens of padding. So that of a row is one document here, if it is
        known; what its tokens see of each other, nobody reads.
        """
        lengths = torch.tensor((0, *(self.spans or self.lengths)), dtype=torch.int32)
        boundaries = lengths.cumsum(0, dtype=torch.int32)
        if device.type == "cuda":
            boundaries = boundaries.pin_memory()  # from other memory the host waits for the copy
        boundaries = boundaries.to(device, non_blocking=True)
        # One compiled graph for any number of documents.
        torch._dynamo.maybe_mark_dynamic(boundaries, 0)
        return boundaries

    @property
    def max_length(self) -> int:
        """Tokens of the longest document, or of a row's padding if that is known."""
        return max(self.spans or self.lengths)


def find_documents(position_ids: torch.Tensor, batch_size: int) -> Documents | None:
    """The documents in ``position_ids`` (B or 1, T), or None if every row is a single one.

    A document begins wherever a position is not its left neighbour's plus one. Costs one host
    synchronisation on an accelerator; `data.collate` knows the documents without.
    """
    starts = _document_starts(position_ids, batch_size)
    offsets = starts.flatten().nonzero().flatten().tolist()
    if len(offsets) == batch_size:
        return None
    ends = [*offsets[1:], starts.numel()]
    return Documents(tuple(end - start for start, end in zip(offsets, ends, strict=True)))


def document_ids(cu_seq_lens: torch.Tensor, batch_size: int, row_length: int) -> torch.Tensor:
    """Boundaries in the B·T tokens -> (B, T) int32, the documents of each row counted from 0."""
    places = torch.arange(batch_size * row_length, device=cu_seq_lens.device, dtype=torch.int32)
    ids = torch.searchsorted(cu_seq_lens, places, right=True, out_int32=True)
    ids = ids.view(batch_size, row_length)
    return ids - ids[:, :1]


def _document_starts(position_ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    position_ids = position_ids.expand(batch_size, -1)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts
