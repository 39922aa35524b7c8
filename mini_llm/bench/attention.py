"""Attention over packed rows: the way of `sdpa` in these models against a dense mask.

The same question at three sizes, each forward and backward: attention alone (query, key and value
are there), one attention layer of a preset with its projections, and a whole small model. The dense
side is torch's fused attention with a boolean block-diagonal mask, as transformers calls it. On a
CPU the packed side is one fused call a document; on a GPU one variable-length kernel, which takes
half precision alone, so that there is no fp32 there.
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

from ..device import choose_device
from ..models import build_model, list_models, preset_config
from ..models.common.attention import (
    attend,
    has_varlen_kernel,
    prepare_attention_within,
)
from ..models.common.documents import Documents
from .measure import (
    device_name,
    interleaved,
    machine,
    markdown_table,
    median_and_range,
    peak_memory,
)
from .names import BenchmarkError

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


def run(
    seq_len: int, documents: int, seed: int, repeats: int, *, rows: int = 1, device: str = "cpu"
) -> dict[str, Any]:
    """Measure, print each figure when it is there, and return them all.

    Each timed call takes the next of `repeats` batches, so that the medians are over where the
    documents end too. On a CPU in fp32 and bf16, by CPU time; on a GPU in bf16, by the clock.

    Raises ValueError where there are more documents than tokens, for a device that cannot compute
    and for a GPU without the variable-length kernel.
    """
    if not 0 < documents <= seq_len:
        raise ValueError(f"--documents: {documents} is not between 1 and --seq_len {seq_len}")
    place = choose_device(device)
    cuda = place.type == "cuda"
    dtypes = ["bf16"] if cuda else list(DTYPES)
    half = torch.empty(0, dtype=torch.bfloat16, device=place)
    if cuda and not has_varlen_kernel(preset_config(WHOLE_MODEL), half):
        raise ValueError(
            f"--device: {device_name(place)} has no variable-length attention kernel (it needs "
            "compute capability 8.0), so its packed rows take the dense mask too; give cpu"
        )
    torch.manual_seed(seed)
    batches = [random_batch(rows, seq_len, documents) for _ in range(repeats)]
    squares = rows * seq_len**2
    share = statistics.median(sum(n * n for n in batch.lengths) / squares for batch in batches)
    compared = "clock" if cuda else "CPU time"
    print(
        f"batches of {rows} x {seq_len} tokens, {documents} documents a row, whose blocks are "
        f"{share:.3f} of the square (median); packed ÷ dense, {compared} of forward and backward"
    )
    comparisons: dict[str, Any] = {}
    for dtype in dtypes:
        for preset in list_models():
            if preset.endswith("_tiny"):
                continue
            model = _build(preset, dtype, seq_len, place, vocab_size=64, num_hidden_layers=4)
            for size, of in (("attention", attention_alone), ("layer", attention_layer)):
                name = f"{preset} {size} {dtype}"
                comparison = of(model, batches[0], rows)
                comparisons[name] = _compare(name, comparison, batches, dtype, place)
        name = f"{WHOLE_MODEL} {dtype}"
        model = _build(WHOLE_MODEL, dtype, seq_len, place)
        comparison = whole_model(model, batches[0], rows)
        comparisons[name] = _compare(name, comparison, batches, dtype, place)
    return {
        **machine("torch", "transformers"),
        "device": device_name(place),
        "compared": compared,
        "rows": rows,
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
            f"{of['packed_ms']:.3g} / {of['dense_ms']:.3g}",
            f"{of['packed_peak_mib']:.1f} / {of['dense_peak_mib']:.1f}",
        ]
        for name, of in figures.items()
        if isinstance(of, dict)
    ]
    return (
        f"Packed ÷ dense, {figures['compared']} of forward and backward of {figures['rows']} x "
        f"{figures['seq_len']} tokens, {figures['documents']} documents a row, medians of "
        f"{figures['repeats']} batches; {figures['device']}\n\n"
        + markdown_table(["what", "packed ÷ dense", "ms", "peak MiB"], rows)
    )


def random_batch(rows: int, seq_len: int, documents: int) -> Documents:
    """Full rows, each cut into documents at places drawn from torch's global generator."""
    lengths: list[int] = []
    for _ in range(rows):
        cuts = (torch.randperm(seq_len - 1)[: documents - 1] + 1).sort().values.tolist()
        bounds = zip([0, *cuts], [*cuts, seq_len], strict=True)
        lengths += [end - start for start, end in bounds]
    return Documents(tuple(lengths))


def position_ids(batch: Documents, rows: int) -> torch.Tensor:
    """(B, T) positions that begin again at 0 with each document."""
    return torch.cat([torch.arange(length) for length in batch.lengths]).view(rows, -1)


def block_diagonal_mask(batch: Documents, rows: int) -> torch.Tensor:
    """(B, 1, T, T) bool, True where a token is seen: no later one, and of the same document."""
    numbers = torch.arange(len(batch.lengths))
    ids = torch.repeat_interleave(numbers, torch.tensor(batch.lengths)).view(rows, -1)
    return (ids[:, :, None] == ids[:, None]).tril()[:, None]


def attention_alone(model: PreTrainedModel, batch: Documents, rows: int) -> Comparison:
    """Attention over the query, key and value that a layer makes of random hidden states."""
    layer = _attention_of(model)
    inputs: list[torch.Tensor] = []

    def record(_: nn.Module, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> Any:
        inputs.extend(x.detach().requires_grad_() for x in (query, key, value))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["record"] = record
    model.config._attn_implementation = "record"
    hidden, rotary = _layer_inputs(model, batch, rows)
    layer(hidden, rotary, attention_mask=None)
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

    return _of_one_layer(call, model, hidden)


def attention_layer(model: PreTrainedModel, batch: Documents, rows: int) -> Comparison:
    """One attention layer with its projections."""
    layer = _attention_of(model)
    hidden, rotary = _layer_inputs(model, batch, rows)
    grad = torch.randn_like(hidden)

    def call(**how: Any) -> torch.Tensor:
        output, _ = layer(hidden, rotary, **how)
        output.backward(grad)
        hidden.grad = None
        layer.zero_grad()
        return output.detach()

    return _of_one_layer(call, model, hidden)


def whole_model(model: PreTrainedModel, batch: Documents, rows: int) -> Comparison:
    """A training step without the optimizer; how documents are kept apart is found out in it."""
    size = rows, sum(batch.lengths) // rows
    tokens = torch.randint(model.config.vocab_size, size, device=model.device)

    def call(positions: torch.Tensor, implementation: str) -> torch.Tensor:
        model.config._attn_implementation = implementation
        loss = model(input_ids=tokens, position_ids=positions, labels=tokens).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    def by(implementation: str) -> Callable[[Documents], dict[str, Any]]:
        return lambda batch: {
            "positions": position_ids(batch, rows).to(model.device),
            "implementation": implementation,
        }

    return Comparison(call, by("sdpa"), by(DENSE))


def _of_one_layer(
    call: Callable[..., torch.Tensor], model: PreTrainedModel, hidden: torch.Tensor
) -> Comparison:
    """The packed way as the model chooses it for ``hidden`` (B, T, D), and the mask."""

    def packed(batch: Documents) -> dict[str, Any]:
        mask, how = prepare_attention_within(batch, model.config, hidden, None, None, None)
        return {"attention_mask": mask, **how}

    def dense(batch: Documents) -> dict[str, Any]:
        return {"attention_mask": block_diagonal_mask(batch, len(hidden)).to(hidden.device)}

    return Comparison(call, packed, dense)


def _build(
    preset: str, dtype: str, seq_len: int, device: torch.device, **overrides: Any
) -> PreTrainedModel:
    model = build_model(preset, max_position_embeddings=seq_len, **overrides)
    model.config._attn_implementation = "sdpa"
    return model.to(device, DTYPES[dtype]).train()


def _attention_of(model: PreTrainedModel) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "num_key_value_groups"))


def _layer_inputs(model: PreTrainedModel, batch: Documents, rows: int) -> tuple[torch.Tensor, Any]:
    """Hidden states (B, T, D) that want a gradient, and cos and sin of their positions."""
    positions = position_ids(batch, rows).to(model.device)
    size = *positions.shape, model.config.hidden_size
    hidden = torch.randn(size, dtype=model.dtype, device=model.device)
    return hidden.requires_grad_(), model.model.rotary_emb(hidden, positions)


def _compare(
    name: str,
    comparison: Comparison,
    batches: list[Documents],
    dtype: str,
    device: torch.device,
) -> dict[str, float]:
    """Time both ways in turns and take their peak memory; print a line.

    A mask is there before its call is timed (a model builds it once for all its layers), and counts
    as memory.
    """
    call, ways = comparison.call, {"packed": comparison.packed, "dense": comparison.dense}
    packed, dense = (call(**how(batches[0])).float() for how in ways.values())
    if not (packed - dense).abs().max() <= TOLERANCE[dtype] * dense.abs().max():
        raise BenchmarkError(f"{name}: the two ways' results differ: a mistake of this program")

    def in_turn(how: Callable[[Documents], dict[str, Any]]) -> Callable[[], torch.Tensor]:
        arguments = cycle([how(batch) for batch in batches])
        return lambda: call(**next(arguments))

    turns = {way: in_turn(how) for way, how in ways.items()}
    taken = interleaved(turns, len(batches), device)
    clock = "clock" if device.type == "cuda" else "cpu"
    seconds = {way: of[clock] for way, of in taken.items()}
    ratios = [a / b for a, b in zip(seconds["packed"], seconds["dense"], strict=True)]
    figures = {"ratio": statistics.median(ratios)}
    for way, how in ways.items():
        figures[f"{way}_ms"] = statistics.median(seconds[way]) * 1e3
        figures[f"{way}_peak_mib"] = (
            peak_memory(lambda how=how: call(**how(batches[0])), device) / MIB  # type: ignore[misc]
        )
    print(
        f"{name}: {median_and_range(ratios)}; {figures['packed_ms']:.3g} and "
        f"{figures['dense_ms']:.3g} ms; peak memory {figures['packed_peak_mib']:.1f} and "
        f"{figures['dense_peak_mib']:.1f} MiB",
        flush=True,
    )
    return figures
