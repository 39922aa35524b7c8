"""Attention over packed rows on the CPU: the per-document path against a dense mask.

The same question at three sizes, each forward and backward: attention alone (query, key and value
are there), one attention layer of a preset with its projections, and a whole small model. The dense
side is torch's fused attention with a boolean block-diagonal mask, as transformers calls it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models import build_model, list_models
from ..models.common.attention import attend
from ..models.common.documents import Documents
from .measure import interleaved, machine, markdown_table, median_and_range, peak_memory

# sdpa under another name. The models have a per-document path for "sdpa" only: under this name they
# build a block-diagonal mask, as for every implementation that they do not know.
DENSE = "sdpa_with_dense_mask"
AttentionInterface.register(DENSE, sdpa_attention_forward)
AttentionMaskInterface.register(DENSE, sdpa_mask)

WHOLE_MODEL = "mini_llama3_tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest difference of the two ways' outputs, as a share of the largest output.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
MIB = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """A forward and backward pass, and the keyword arguments with which it goes either way.

    The pass leaves no gradients behind, so that each starts with the same memory.
    """

    call: Callable[..., torch.Tensor]
    packed: Callable[[Documents], dict[str, Any]]
    dense: Callable[[Documents], dict[str, Any]]


def run(seq_len: int, documents: int, seed: int, repeats: int) -> dict[str, Any]:
    """Measure, print each figure when it is there, and return them all.

    Each timed call takes the next of `repeats` rows, so that the medians are over rows too. Raises
    ValueError where there are more documents than tokens.
    """
    if not 0 < documents <= seq_len:
        raise ValueError(f"--documents: {documents} is not between 1 and --seq_len {seq_len}")
    torch.manual_seed(seed)
    rows = [random_row(seq_len, documents) for _ in range(repeats)]
    share = statistics.median(sum(n * n for n in row.lengths) / seq_len**2 for row in rows)
    print(
        f"rows of {seq_len} tokens in {documents} documents, whose blocks are {share:.3f} of the "
        "square (median); packed ÷ dense, CPU time of forward and backward"
    )
    comparisons: dict[str, Any] = {}
    for dtype in DTYPES:
        for preset in list_models():
            if preset.endswith("_tiny"):
                continue
            model = _build(preset, dtype, seq_len, vocab_size=64, num_hidden_layers=4)
            for size, of in (("attention", attention_alone), ("layer", attention_layer)):
                name = f"{preset} {size} {dtype}"
                comparisons[name] = _compare(name, of(model, rows[0]), rows, TOLERANCE[dtype])
        name = f"{WHOLE_MODEL} {dtype}"
        model = _build(WHOLE_MODEL, dtype, seq_len)
        comparisons[name] = _compare(name, whole_model(model, rows[0]), rows, TOLERANCE[dtype])
    return {
        **machine("torch", "transformers"),
        "seq_len": seq_len,
        "documents": documents,
        "seed": seed,
        "repeats": repeats,
        "blocks_of_square": share,
        **comparisons,
    }


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [
        [
            name,
            f"{of['ratio']:.3f}",
            f"{of['packed_ms']:.0f} / {of['dense_ms']:.0f}",
            f"{of['packed_peak_mib']:.1f} / {of['dense_peak_mib']:.1f}",
        ]
        for name, of in figures.items()
        if isinstance(of, dict)
    ]
    return (
        f"Packed ÷ dense, CPU time of forward and backward of a row of {figures['seq_len']} tokens "
        f"in {figures['documents']} documents, medians of {figures['repeats']} rows\n\n"
        + markdown_table(["what", "packed ÷ dense", "ms", "peak MiB"], rows)
    )


def random_row(seq_len: int, documents: int) -> Documents:
    """A full row, cut into documents at places drawn from torch's global generator."""
    cuts = (torch.randperm(seq_len - 1)[: documents - 1] + 1).sort().values.tolist()
    bounds = zip([0, *cuts], [*cuts, seq_len], strict=True)
    return Documents(tuple(end - start for start, end in bounds))


def position_ids(row: Documents) -> torch.Tensor:
    """(1, T) positions that begin again at 0 with each document."""
    return torch.cat([torch.arange(length) for length in row.lengths]).unsqueeze(0)


def block_diagonal_mask(row: Documents) -> torch.Tensor:
    """(1, 1, T, T) bool, True where a token is seen: no later one, and of the same document."""
    ids = torch.repeat_interleave(torch.arange(len(row.lengths)), torch.tensor(row.lengths))
    return (ids[:, None] == ids).tril()[None, None]


def attention_alone(model: PreTrainedModel, row: Documents) -> Comparison:
    """Attention over the query, key and value that a layer makes of random hidden states."""
    layer = _attention_of(model)
    inputs: list[torch.Tensor] = []

    def record(_: nn.Module, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> Any:
        inputs.extend(x.detach().requires_grad_() for x in (query, key, value))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["record"] = record
    model.config._attn_implementation = "record"
    layer(*_layer_inputs(model, row), attention_mask=None)
    model.config._attn_implementation = "sdpa"
    scaling: Any = layer.scaling
    grad = torch.randn_like(inputs[0]).transpose(1, 2)

    def call(**how: Any) -> torch.Tensor:
        query, key, value = inputs
        output, _ = attend(layer, query, key, value, scaling=scaling, **how)
        output.backward(grad)
        for x in inputs:
            x.grad = None
        return output.detach()

    return Comparison(call, _documents_argument, _mask_argument)


def attention_layer(model: PreTrainedModel, row: Documents) -> Comparison:
    """One attention layer with its projections."""
    layer = _attention_of(model)
    hidden, rotary = _layer_inputs(model, row)
    grad = torch.randn_like(hidden)

    def call(**how: Any) -> torch.Tensor:
        output, _ = layer(hidden, rotary, **how)
        output.backward(grad)
        hidden.grad = None
        layer.zero_grad()
        return output.detach()

    return Comparison(call, _documents_argument, _mask_argument)


def whole_model(model: PreTrainedModel, row: Documents) -> Comparison:
    """A training step without the optimizer; how documents are kept apart is found out in it."""
    tokens = torch.randint(model.config.vocab_size, (1, sum(row.lengths)))

    def call(positions: torch.Tensor, implementation: str) -> torch.Tensor:
        model.config._attn_implementation = implementation
        loss = model(input_ids=tokens, position_ids=positions, labels=tokens).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return Comparison(
        call,
        lambda row: {"positions": position_ids(row), "implementation": "sdpa"},
        lambda row: {"positions": position_ids(row), "implementation": DENSE},
    )


def _documents_argument(row: Documents) -> dict[str, Any]:
    return {"attention_mask": None, "documents": row}


def _mask_argument(row: Documents) -> dict[str, Any]:
    return {"attention_mask": block_diagonal_mask(row)}


def _build(preset: str, dtype: str, seq_len: int, **overrides: Any) -> PreTrainedModel:
    model = build_model(preset, max_position_embeddings=seq_len, **overrides)
    model.config._attn_implementation = "sdpa"
    return model.to(DTYPES[dtype]).train()


def _attention_of(model: PreTrainedModel) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "num_key_value_groups"))


def _layer_inputs(model: PreTrainedModel, row: Documents) -> tuple[torch.Tensor, Any]:
    """Hidden states (1, T, D) that want a gradient, and cos and sin of their positions."""
    hidden = torch.randn(1, sum(row.lengths), model.config.hidden_size, dtype=model.dtype)
    return hidden.requires_grad_(), model.model.rotary_emb(hidden, position_ids(row))


def _compare(
    name: str, comparison: Comparison, rows: list[Documents], tolerance: float
) -> dict[str, float]:
    """Time both ways in turns and take their peak memory; print a line.

    A mask is there before its call is timed (a model builds it once for all its layers), and counts
    as memory.
    """
    call, ways = comparison.call, {"packed": comparison.packed, "dense": comparison.dense}
    packed, dense = (call(**how(rows[0])).float() for how in ways.values())
    if (packed - dense).abs().max() > tolerance * dense.abs().max():
        raise RuntimeError(f"{name}: the two ways' results differ: a mistake of this program")

    def in_turn(how: Callable[[Documents], dict[str, Any]]) -> Callable[[], torch.Tensor]:
        arguments = cycle([how(row) for row in rows])
        return lambda: call(**next(arguments))

    taken = interleaved({way: in_turn(how) for way, how in ways.items()}, len(rows))
    seconds = {way: of["cpu"] for way, of in taken.items()}
    ratios = [a / b for a, b in zip(seconds["packed"], seconds["dense"], strict=True)]
    figures = {"ratio": statistics.median(ratios)}
    for way, how in ways.items():
        figures[f"{way}_ms"] = statistics.median(seconds[way]) * 1e3
        figures[f"{way}_peak_mib"] = peak_memory(lambda how=how: call(**how(rows[0]))) / MIB  # type: ignore[misc]
    print(
        f"{name}: {median_and_range(ratios)}; {figures['packed_ms']:.0f} and "
        f"{figures['dense_ms']:.0f} ms; peak memory {figures['packed_peak_mib']:.1f} and "
        f"{figures['dense_peak_mib']:.1f} MiB",
        flush=True,
    )
    return figures
