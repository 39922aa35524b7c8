"""The gated delta rule and the short causal convolution before it.

Shapes: B rows, T tokens, K key heads, G value heads a key head, H = K·G value heads, k and v the
sizes of a key and of a value, C tokens of a chunk, M = ⌈T/C⌉ chunks. ``document_ids`` (B, T) number
the documents of packed rows; None means that a row is one document.

The state S (k, v) of a head is a linear associative memory. With decay α = exp(g) and writing
strength β, token t first forgets, then corrects what S recalls for its key (Yang, Kautz &
Hatamizadeh 2024, "Gated Delta Networks", eq. 10; S is the transpose of the paper's):

    S_t = α_t S_{t−1} + k_t ⊗ β_t (v_t − (α_t S_{t−1})ᵀ k_t),      o_t = S_tᵀ q_t

Three forms of it: :func:`delta_rule_step` (one token, decoding), :func:`delta_rule_reference` (a
loop of steps, slow, what the others are tested against) and :func:`delta_rule_chunked` (training).
:func:`delta_rule` and :func:`short_convolution` pick the form, or a CUDA kernel where there is one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch.autograd.function import once_differentiable

from .norm import rms_normalize
from .precision import products_like
from .triton import missing_for_triton

FLA_VERSION = "0.5.2"  # the oldest of flash-linear-attention that trains these models
CHUNK_SIZE = 64  # tokens: the work inside a chunk grows with C, the sequential steps with T/C


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(Σx² + ε) over the last dimension."""
    size = x.shape[-1]
    return rms_normalize(x, eps / size) * size**-0.5


def _prepare_query_key(
    query_BTKk: torch.Tensor, key_BTKk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length queries and keys in fp32 (or better), queries scaled by 1/sqrt(k)."""
    dtype = torch.promote_types(query_BTKk.dtype, torch.float32)
    query, key = l2_normalize(query_BTKk.to(dtype)), l2_normalize(key_BTKk.to(dtype))
    return query * query.shape[-1] ** -0.5, key


def _per_value_head(x_BTKk: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, K, k) -> (B, T, H, k): a key head serves H/K consecutive value heads."""
    B, T, K, k = x_BTKk.shape
    return x_BTKk[:, :, :, None].expand(B, T, K, heads // K, k).reshape(B, T, heads, k)


def delta_rule_step(
    state_BHkv: torch.Tensor,
    query_BHk: torch.Tensor,
    key_BHk: torch.Tensor,
    value_BHv: torch.Tensor,
    log_decay_BH: torch.Tensor,
    beta_BH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the equation above -> output (B, H, v) and the new state.

    Products and sums instead of matmuls: autocast leaves them in fp32.
    """
    state = state_BHkv * log_decay_BH.exp()[..., None, None]
    recalled = (state * key_BHk[..., None]).sum(-2)
    correction = beta_BH[..., None] * (value_BHv - recalled)
    state = state + key_BHk[..., None] * correction[..., None, :]
    return (state * query_BHk[..., None]).sum(-2), state


def delta_rule_reference(
    query_BTKk: torch.Tensor,
    key_BTKk: torch.Tensor,
    value_BTHv: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule token by token -> outputs (B, T, H, v) and the last state (B, H, k, v).

    The readable reference, and how single tokens are decoded. A new document finds an empty state.
    """
    B, T, H, v = value_BTHv.shape
    query, key = _prepare_query_key(query_BTKk, key_BTKk)
    query, key = _per_value_head(query, H), _per_value_head(key, H)
    value, log_decay, beta = (x.to(query.dtype) for x in (value_BTHv, log_decay_BTH, beta_BTH))
    state = query.new_zeros(B, H, query.shape[-1], v) if initial_state is None else initial_state
    state = state.to(query.dtype)
    outputs = []
    for t in range(T):
        if document_ids is not None and t > 0:
            same = document_ids[:, t] == document_ids[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0.0)
        output, state = delta_rule_step(
            state, query[:, t], key[:, t], value[:, t], log_decay[:, t], beta[:, t]
        )
        outputs.append(output)
    return torch.stack(outputs, 1).to(query_BTKk.dtype), state


# torch.compile would unroll the loop over chunks: 4 more generated kernels a chunk and layer kind.
@torch.compiler.disable
def delta_rule_chunked(
    query_BTKk: torch.Tensor,
    key_BTKk: torch.Tensor,
    value_BTHv: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference above as matrix products over chunks (the paper's §3.3).

    In a chunk that starts with state S, let Γ_ij be the decay from token j to token i ≥ j, γ_i that
    from the chunk's start to i, and δ_j that from j to its end. Token i writes k_i ⊗ u_i, where

        u_i = β_i (v_i − γ_i Sᵀ k_i − Σ_{j<i} Γ_ij (k_i·k_j) u_j),

    a unit lower-triangular system for all u at once. Its right-hand side is linear in S, so A is
    inverted for every chunk in parallel, U = A⁻¹ βV and W = A⁻¹ βγK, and what is sequential is

        u = U − W S,      S ← γ_C S + (δ K)ᵀ u,      o = γ Q S + (Γ ⊙ Q Kᵀ) u.

    Γ, γ and δ are zero across a document boundary, exactly, so that nothing is carried over it.
    The matmuls run in autocast's dtype (:func:`delta_rule` sees to it that it is the run's);
    decays, the inverse and the state stay in fp32.
    """
    B, T, H, v = value_BTHv.shape
    K, k = key_BTKk.shape[2:]
    C = min(chunk_size, T)
    padding = -T % C
    M = (T + padding) // C
    query, key = _prepare_query_key(query_BTKk, key_BTKk)
    dtype = query.dtype

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, …) -> (B, heads, M, C, …); padding writes nothing (β = 0) and keeps S."""
        if padding:
            x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, padding))
        return x.reshape(B, M, C, *x.shape[2:]).movedim(3, 1).contiguous()

    def per_value_head(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """(B, K, M, …) ⊙ (B, H, M, …) -> (B, H, M, …), without a copy of x for each value head."""
        return (x[:, :, None] * factor.unflatten(1, (K, H // K))).flatten(1, 2)

    q, key_, value = chunks(query), chunks(key), chunks(value_BTHv.to(dtype))
    beta = chunks(beta_BTH.to(dtype))[..., None]  # (B, H, M, C, 1)
    log_decay = chunks(log_decay_BTH.to(dtype))  # (B, H, M, C)

    # Decays. log Γ_ij = Σ_{j<m≤i} g_m is summed as it stands: a difference of two running sums
    # would lose digits, and to sums over other documents too.
    visible = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    log_pairs = log_decay[..., None].expand(*log_decay.shape, C)
    log_pairs = log_pairs.masked_fill(~visible.tril(-1), 0.0).cumsum(-2)
    log_rest = log_pairs[..., -1, :]
    log_enter = log_decay.cumsum(-1)
    log_carry = log_enter[..., -1]
    if document_ids is not None:
        within, enters, stays, carries = _document_masks(document_ids, padding, C)
        visible = visible & within
        log_enter = log_enter.masked_fill(~enters, -torch.inf)
        log_rest = log_rest.masked_fill(~stays, -torch.inf)
        log_carry = log_carry.masked_fill(~carries, -torch.inf)
    pairs = _VisibleDecays.apply(log_pairs, visible)  # Γ (B, H, M, C, C)
    enter = log_enter.exp()[..., None]  # γ (B, H, M, C, 1)
    rest = log_rest.exp()[..., None]  # δ (B, H, M, C, 1)
    carry = log_carry.exp()[..., None, None]  # γ_C (B, H, M, 1, 1)

    # Inside the chunks, all at once.
    key_t = key_.transpose(-1, -2)
    system = per_value_head(key_ @ key_t, pairs * beta)  # its strictly lower part is A's
    scores = per_value_head(q @ key_t, pairs)
    inverse = _UnitLowerInverse.apply(system)
    U, W = inverse @ (value * beta), inverse @ per_value_head(key_, enter * beta)
    write_t = per_value_head(key_, rest).transpose(-1, -2)  # (B, H, M, k, C)
    read = per_value_head(q, enter)

    # From chunk to chunk.
    state = q.new_zeros(B, H, k, v) if initial_state is None else initial_state.to(dtype)
    states, written = [], []
    for U_m, W_m, write_m, carry_m in zip(
        U.unbind(2), W.unbind(2), write_t.unbind(2), carry.unbind(2), strict=True
    ):
        states.append(state)
        u = U_m - W_m @ state
        written.append(u)
        state = state * carry_m + write_m @ u
    output = read @ torch.stack(states, 2) + scores @ torch.stack(written, 2)
    output = output.movedim(1, 3).reshape(B, M * C, H, v)[:, :T]
    return output.to(query_BTKk.dtype), state


class _VisibleDecays(torch.autograd.Function):
    """exp of (…, C, C) log decays where ``visible``, and exactly 0 elsewhere.

    A decay below e^-60, which no fp32 sum beside it notices, is taken as that: a CPU needs up to
    twenty times as long for an exponential that underflows. One pass over memory in the gradient.
    """

    @staticmethod
    def forward(ctx: Any, log_decay: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        decays = log_decay.clamp(min=-60.0).exp_().mul_(visible)
        ctx.save_for_backward(decays)
        return decays

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (decays,) = ctx.saved_tensors
        return grad * decays, None


class _UnitLowerInverse(torch.autograd.Function):
    """(…, C, C) -> (I + its strictly lower part)⁻¹, in fp32.

    Half the work of solving for right-hand sides twice as wide as C, and the gradient, which
    autograd takes by solving again, is two products: dL = −Xᵀ dX Xᵀ for the inverse X.
    """

    @staticmethod
    def forward(ctx: Any, system: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(
            system, identity.expand_as(system), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()


def _document_masks(
    document_ids_BT: torch.Tensor, padding: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which decays stay inside a document: (pairs, into, out of, across) each chunk.

    pairs (B, 1, M, C, C): tokens i and j share a document. into (B, 1, M, C): token i's document
    was there before the chunk. out of (B, 1, M, C): token j's document is there at its end. across
    (B, 1, M): one document spans the chunk from before its start to its end.
    """
    ids = document_ids_BT
    if padding:  # more of the last document, so that its state survives to the end
        ids = torch.cat((ids, ids[:, -1:].expand(-1, padding)), 1)
    ids = ids.view(ids.shape[0], 1, -1, chunk)  # (B, 1, M, C)
    last = ids[..., -1:]
    before = torch.cat((ids[:, :, :1, :1], last[:, :, :-1]), 2)  # the initial state is the first's
    return (
        ids[..., :, None] == ids[..., None, :],
        ids == before,
        ids == last,
        (last == before).squeeze(-1),
    )


def convolution_reference(
    x_BTC: torch.Tensor,
    weight_CW: torch.Tensor,
    history_BWC: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_t = Σ_{d<W} w_{W−1−d} ⊙ x_{t−d}, a filter of width W a channel: (B, T, C) -> (B, T, C).

    What lies before a document's start is zero. ``history`` (B, W−1, C) is what preceded the rows'
    first token, zeros if None. The taps are summed in fp32; one that would reach back over a
    document's start is masked.
    """
    T, W = x_BTC.shape[1], weight_CW.shape[-1]
    weight = _in_fp32(weight_CW)
    history = x_BTC.new_zeros(x_BTC.shape[0], W - 1, x_BTC.shape[-1])
    padded = torch.cat((history if history_BWC is None else history_BWC, x_BTC), 1)
    if document_ids is not None:  # the history belongs to the first document of each row
        document_ids = torch.cat((document_ids[:, :1].expand(-1, W - 1), document_ids), 1)
    out = x_BTC * weight[:, W - 1]
    for first in range(W - 1):  # the tap that looks W − 1 − first tokens back
        earlier = padded[:, first : first + T]
        if document_ids is not None:
            same = document_ids[:, first : first + T] == document_ids[:, W - 1 :]
            earlier = earlier.masked_fill(~same[..., None], 0.0)
        out = out + earlier * weight[:, first]
    return out.to(x_BTC.dtype)


class _ShortConvolution(torch.autograd.Function):
    """The reference above without history: one pass over memory a tap, each adding in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: torch.Tensor,
        weight_CW: torch.Tensor,
        document_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_BTC, weight_CW, document_ids)
        x, taps = _in_fp32(x_BTC), _in_fp32(weight_CW).T.contiguous().flip(0)  # tap d looks d back
        out = x * taps[0]
        for d, within in _reaches(x.shape[1], len(taps), document_ids):
            earlier = x[:, :-d] if within is None else x[:, :-d] * within
            out[:, d:].addcmul_(earlier, taps[d])
        return out.to(x_BTC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_BTC, weight_CW, document_ids = ctx.saved_tensors
        x, grad = _in_fp32(x_BTC), _in_fp32(grad_BTC)
        taps = _in_fp32(weight_CW).T.contiguous().flip(0)
        grad_x, grad_taps = grad * taps[0], torch.zeros_like(taps)
        grad_taps[0] = (grad * x).sum((0, 1))
        for d, within in _reaches(x.shape[1], len(taps), document_ids):
            later = grad[:, d:] if within is None else grad[:, d:] * within
            grad_x[:, :-d].addcmul_(later, taps[d])
            grad_taps[d] = (later * x[:, :-d]).sum((0, 1))
        return grad_x.to(x_BTC.dtype), grad_taps.flip(0).T.to(weight_CW.dtype), None


def _in_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reaches(
    T: int, W: int, document_ids_BT: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor | None]]:
    """(d, mask) of each tap d ≥ 1 that a row of T tokens has a use for.

    The mask (B, T − d, 1) is 1 where token t + d and token t share a document; None: everywhere.
    """
    for d in range(1, min(W, T)):
        within = None
        if document_ids_BT is not None:
            within = (document_ids_BT[:, d:] == document_ids_BT[:, :-d])[..., None]
        yield d, within


# ---- Which form computes it ----------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The kernels that are there, for tensors on one type of device; None: the PyTorch form."""

    delta_rule: Callable[..., Any] | None = None
    convolution: Callable[..., Any] | None = None
    device_type: str = "cuda"
    refused: str = ""  # why fla, which is installed, does not compute the delta rule

    def names(self, half_precision: bool, device_type: str = "cuda") -> dict[str, str]:
        """What computes the delta rule and the convolution, by package, for the start banner."""
        names = {"delta_rule": "pytorch", "short_convolution": "pytorch"}
        if device_type != self.device_type:
            return names
        if self.refused and half_precision:
            names["delta_rule"] = f"pytorch ({self.refused})"
        elif self.delta_rule is not None and half_precision:
            names["delta_rule"] = "fla"
        if self.convolution is not None:
            names["short_convolution"] = "causal_conv1d"
        return names


def why_fla_is_wrong(
    capability: tuple[int, int], triton_version: str | None, fla_version: str | None
) -> str:
    """Why fla's gated delta rule must not be used on this GPU, or "".

    fla before 0.5 takes as many key as value heads and does not look; before 0.5.2 it refuses to
    train on Hopper. There it computes wrong gradients with some versions of triton (fla issue 640),
    which it says itself, but not before the first backward pass.
    """
    if fla_version is not None and Version(fla_version) < Version(FLA_VERSION):
        return f"fla {fla_version} is too old; it needs {FLA_VERSION} or later"
    if triton_version is None or capability[0] != 9:
        return ""
    if not Version("3.4.0") <= Version(triton_version) < Version("3.7.1"):
        return ""
    return f"fla is wrong on Hopper with triton {triton_version}; it needs 3.7.1 or later"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def find_kernels() -> Kernels:
    """The kernels of ``fla`` and ``causal_conv1d``, looked for once, and only with a CUDA device.

    Raises ValueError, in one sentence, for a package that is installed but cannot be imported.
    """
    if not torch.cuda.is_available():
        return Kernels()
    kernels = Kernels()
    fla = _version("flash-linear-attention") or _version("fla-core")
    if find_spec("fla") is not None:
        refused = why_fla_is_wrong(torch.cuda.get_device_capability(), _version("triton"), fla)
        if not refused and (missing := missing_for_triton()) is not None:
            refused = f"fla needs {missing}"
        kernels = replace(kernels, refused=refused)
        if not refused:
            kernel = _import("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
            kernels = replace(kernels, delta_rule=kernel)
    if find_spec("causal_conv1d") is not None:
        kernels = replace(kernels, convolution=_import("causal_conv1d", "causal_conv1d_fn"))
    return kernels


def _import(module: str, name: str) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{package} is installed but cannot be used ({error}); reinstall it for this torch, or "
            "uninstall it"
        ) from error
    return found


class Boundaries(NamedTuple):
    """The documents of packed rows, as the recurrence and the convolution take them.

    ``document_ids`` (B, T) int32 count the documents of each row from 0; ``cu_seqlens``
    (documents + 1,) are their boundaries in the B·T tokens of the flattened batch.
    """

    document_ids: torch.Tensor
    cu_seqlens: torch.Tensor


def delta_rule(
    query_BTKk: torch.Tensor,
    key_BTKk: torch.Tensor,
    value_BTHv: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    beta_BTH: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    boundaries: Boundaries | None = None,
    kernels: Kernels | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule -> outputs (B, T, H, v) and the last state (B, H, k, v) in fp32.

    fla's kernel is for bf16 and fp16: it would multiply fp32 in TF32. Products of 16-bit inputs are
    16-bit products, under autocast and without.
    """
    inputs = (query_BTKk, key_BTKk, value_BTHv, log_decay_BTH, beta_BTH)
    document_ids = None if boundaries is None else boundaries.document_ids
    if query_BTKk.shape[1] == 1:
        return delta_rule_reference(*inputs, initial_state)
    half_precision = query_BTKk.dtype in (torch.bfloat16, torch.float16)
    kernel = None if kernels is None else kernels.delta_rule
    on_its_device = kernels is not None and query_BTKk.device.type == kernels.device_type
    if kernel is None or not (half_precision and on_its_device):
        with products_like(query_BTKk):
            return delta_rule_chunked(*inputs, initial_state, document_ids)
    if boundaries is None:
        output, state = kernel(
            *inputs,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return output, state
    # Variable lengths want one row; with the documents' boundaries the rows need none of their own.
    output, states = kernel(
        *(x.flatten(0, 1).unsqueeze(0) for x in inputs),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=boundaries.cu_seqlens,
    )
    last_documents = (boundaries.document_ids[:, -1] + 1).cumsum(0) - 1
    return output.view_as(value_BTHv), states[last_documents]


def short_convolution(
    x_BTC: torch.Tensor,
    weight_CW: torch.Tensor,
    history_BWC: torch.Tensor | None = None,
    boundaries: Boundaries | None = None,
    kernels: Kernels | None = None,
) -> torch.Tensor:
    """:func:`convolution_reference` by the fastest means there is."""
    document_ids = None if boundaries is None else boundaries.document_ids
    if torch.compiler.is_compiling() and (kernels is None or kernels.convolution is None):
        return convolution_reference(x_BTC, weight_CW, history_BWC, document_ids)
    # No kernel takes history beside documents, so history goes in front as tokens.
    rows = x_BTC
    if history_BWC is not None:
        rows = torch.cat((history_BWC, x_BTC), 1)
        if document_ids is not None:
            more = document_ids[:, :1].expand(-1, history_BWC.shape[1])
            document_ids = torch.cat((more, document_ids), 1)
    kernel = None if kernels is None else kernels.convolution
    if kernels is not None and kernel is not None and x_BTC.device.type == kernels.device_type:
        out = kernel(rows.transpose(1, 2), weight_CW, seq_idx=document_ids).transpose(1, 2)
    else:
        out = _ShortConvolution.apply(rows, weight_CW, document_ids)
    return out[:, -x_BTC.shape[1] :]
