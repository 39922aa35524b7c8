"""Attention: transformers' interface, and what packed rows get in place of a dense mask.

A dense block-diagonal mask makes a packed row of ten documents pay for T² scores of which nine
tenths are masked. Under ``sdpa`` no T × T mask is built: on a GPU, in half precision, torch's
variable-length kernel takes the documents' boundaries (:func:`varlen_attention`); on the CPU, which
has no such kernel, the fused kernel runs once a document (:func:`packed_attention`).
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .documents import Documents, find_documents
from .precision import compute_dtype

# torch 2.11 takes fewer key/value than query heads as they are, later ones want to be told.
_ENABLE_GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def query_groups(heads: int, kv_heads: int) -> int:
    """How many query heads share a key/value head. ValueError if that is no whole number."""
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
        )
    return heads // kv_heads


def repeat_kv(x_BKTd: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, K, T, d) -> (B, K·groups, T, d): each key/value head serves ``groups`` query heads."""
    if groups == 1:
        return x_BKTd
    B, K, T, d = x_BKTd.shape
    return x_BKTd[:, :, None].expand(B, K, groups, T, d).reshape(B, K * groups, T, d)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scaling + mask) v, step by step: the readable reference.

    query (B, H, T, d), key and value (B, K, S, d) -> output (B, T, H, d), weights (B, H, T, S).
    """
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# It loops over the lengths of the batch's documents, so that traced, every batch would be compiled
# anew. (Only the CPU takes this path; kernels for GPUs get the lengths as a tensor.)
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention inside each document, one fused call a document.

    query (B, H, T, d), key and value (B, K, T, d) -> (B, T, H, d). Runs of one-token documents
    (padding) skip the kernel: a softmax over one score is 1, so the output is the value itself.
    """
    B, H, T, _ = query.shape
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    segments = documents.segments()
    lengths = [length for length, _ in segments]

    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, heads, T, d) -> one (heads, length, d) a segment."""
        flat = x.transpose(1, 2).reshape(B * T, x.shape[1], x.shape[3]).transpose(0, 1)
        return flat.split(lengths, dim=1)

    outputs = []
    for (_, singles), q, k, v in zip(segments, split(query), split(key), split(value), strict=True):
        if singles:
            output = repeat_kv(v[None], groups)
        else:
            output = F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                is_causal=True,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=groups > 1,
            )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).view(B, T, H, value.shape[-1])


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Causal attention inside each document, one kernel for all; bf16 or fp16 on a GPU.

    query (B, H, T, d), key and value (B, K, T, d), boundaries (documents + 1,) in the B·T tokens ->
    (B, T, H, d).
    """
    B, _, T, _ = query.shape
    dtype = compute_dtype(query)
    # (B, heads, T, d) -> (B·T, heads, d)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    # T bounds every document's length. The longest one's own would do too, but it is another number
    # in every batch, and a compiled layer would be compiled anew for it.
    output: Any = varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, T, T, scale=scaling, window_size=(-1, 0), **_ENABLE_GQA
    )
    return output.unflatten(0, (B, T))


def why_no_varlen_kernel(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What keeps :func:`varlen_attention` from computing a model's attention there, or ""."""
    if device.type != "cuda":
        return "no GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "fp32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU older than Ampere"
    if config.attention_dropout:
        return "attention_dropout"
    key = value = config.head_dim
    if hasattr(config, "qk_nope_head_dim"):  # MLA, whose values are padded to the keys' size
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        value = max(key, config.v_head_dim)
    if key != value or key % 8 or key > 256:
        return f"heads of {max(key, value)}"  # multiples of 8 up to 256, keys as large as values
    return ""


def has_varlen_kernel(config: PreTrainedConfig, inputs_embeds: torch.Tensor) -> bool:
    """Whether :func:`varlen_attention` can compute a model's attention on these inputs."""
    return not why_no_varlen_kernel(config, inputs_embeds.device, compute_dtype(inputs_embeds))


def check_attention(implementation: str, device: torch.device, *, bf16: bool) -> None:
    """Refuse, with ValueError, an ``--attn_implementation`` that cannot train on ``device``."""
    if implementation == "flex_attention" and device.type != "cuda":
        raise ValueError("it has no gradient on a CPU; give sdpa, or use a GPU")
    if "flash" in implementation and device.type != "cuda":
        raise ValueError("it needs a GPU; give sdpa")
    if "flash" in implementation and not bf16:
        raise ValueError("it computes in half precision alone; add --bf16 true, or give sdpa")


def prepare_attention(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: Documents | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Once a forward: (mask for every layer, keyword arguments for :func:`attend`).

    A packed row keeps its documents apart by the cheapest means that the implementation has: fused
    calls a document (sdpa on the CPU), variable-length kernels (sdpa on a GPU in half precision,
    flash attention), or a block-diagonal mask (the rest). ``position_ids`` None means one document
    a row; ``documents`` are those in ``position_ids``, from who knows them. The keyword arguments
    stand above a caller's own boundaries (transformers' flattening collator gives some).
    """
    documents = packed_documents(
        inputs_embeds, attention_mask, position_ids, past_key_values, documents
    )
    return prepare_attention_within(
        documents, config, inputs_embeds, attention_mask, position_ids, past_key_values
    )


def packed_documents(
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: Documents | None = None,
) -> Documents | None:
    """The documents of packed rows, or None where every row is one document.

    ``documents`` None: they are looked for in ``position_ids``, for which the host waits.
    """
    # get_seq_length() is an int for dynamic caches and a tensor for static ones; both compare.
    nothing_cached = past_key_values is None or past_key_values.get_seq_length() == 0
    if position_ids is None or attention_mask is not None or not nothing_cached:
        return None
    num_rows = inputs_embeds.shape[0]
    if documents is None:
        return find_documents(position_ids, num_rows)
    return documents if len(documents.lengths) > num_rows else None


def prepare_attention_within(
    documents: Documents | None,
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> tuple[Any, dict[str, Any]]:
    """:func:`prepare_attention` for a model that has already found its documents."""
    if isinstance(attention_mask, dict):  # generate() has made the masks, one per layer type
        return attention_mask["full_attention"], {}
    if documents is None:
        # position_ids are left out: transformers would look for documents in them once more.
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return mask, {}
    implementation = config._attn_implementation
    if implementation == "sdpa" and inputs_embeds.device.type == "cpu":
        return None, {"documents": documents}
    if implementation == "sdpa" and has_varlen_kernel(config, inputs_embeds):
        return None, {
            "documents": None,
            "cu_seq_lens": documents.cu_seq_lens(inputs_embeds.device),
        }
    if "flash" in implementation:
        boundaries = documents.cu_seq_lens(inputs_embeds.device)
        return None, {
            "documents": None,
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": documents.max_length,
            "max_length_k": documents.max_length,
        }
    # No cache is named here: with one, transformers would not look for documents (silent leak).
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
    return mask, {"documents": None}


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    documents: Documents | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the implementation that the config names.

    query (B, H, T, d), key and value (B, K, S, d) -> output (B, T, H, d) and, from ``eager`` only,
    the weights. ``documents`` or ``cu_seq_lens`` come from :func:`prepare_attention`.
    """
    if cu_seq_lens is not None:
        return varlen_attention(query, key, value, cu_seq_lens, scaling), None
    if documents is not None:
        out = packed_attention(module, query, key, value, documents, scaling, dropout)
        return out, None
    config: PreTrainedConfig = module.config
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
    output, weights = interface(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return output, weights
