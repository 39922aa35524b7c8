"""Parts of a training step, forward and backward if they have both, against plain or stock forms.

- ``loss``: the LM head and its loss, chunk by chunk, against all logits in fp32;
- ``sft_loss``: the same where 3 of 5 positions are supervised, against computing them all;
- ``moe``: the routed experts of a layer, grouped, against one expert after another and against
  transformers' grouped kernel;
- ``delta_net``: the gated delta rule by chunks, against transformers' own;
- ``optimizer``: AdamW's update of all of a model's parameters, as a run makes it (fused), against
  torch's loop of single operations;
- ``model``: a whole model, against transformers' class with the same weights (for experts, with
  each of its implementations), and without multi-token prediction, which that leaves out.

All forms of one part are in one process and take turns. Their results must agree.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from ..device import choose_device
from ..models import build_model
from ..models.common.delta_net import delta_rule, find_kernels
from ..models.common.experts import Experts, eager_experts
from ..models.common.loss import (
    IGNORE_INDEX,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from ..training.optimizer import build_optimizer
from .measure import (
    device_name,
    interleaved,
    machine,
    markdown_table,
    median_and_range,
    peak_memory,
    without_mtp,
)
from .names import BenchmarkError
from .operators import Operators

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest difference of two forms' results, as a share of the largest result.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
OURS = "ours"
ANSWER = 16  # positions: the unit of spans that are supervised or not


@dataclass(frozen=True)
class Shape:
    """What a part is measured on: a preset with changes, a batch, a dtype and a device."""

    model: str
    overrides: dict[str, Any]
    precision: str
    rows: int
    seq_len: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands; whole models keep fp32 weights and run under autocast."""
        return DTYPES[self.precision]

    def build(self) -> Any:
        """The model, the same whenever it is built."""
        set_seed(0)
        fields = {"max_position_embeddings": self.seq_len, **self.overrides}
        return build_model(self.model, **fields)

    def randn(self, *size: int) -> torch.Tensor:
        """Random numbers that want a gradient."""
        x = torch.randn(*size, device=self.device, dtype=torch.float32).to(self.dtype)
        return x.requires_grad_()


# One form of a part: forward and backward; returns its output and leaves no gradient behind.
Form = Callable[[], torch.Tensor]


def loss_head(shape: Shape, *, supervised: float = 1.0) -> dict[str, Form]:
    """(N, D) hidden states and (V, D) weights to the summed loss, N = rows · seq_len.

    ``supervised`` is the share of positions with a target, in spans as answers are.
    """
    config = shape.build().config
    N, D, V = shape.rows * shape.seq_len, config.hidden_size, config.vocab_size
    hidden, weight = shape.randn(N, D), shape.randn(V, D)
    with torch.no_grad():
        weight.mul_(D**-0.5)
    targets = torch.randint(V, (N,), device=shape.device)
    span = torch.arange(N, device=shape.device) // ANSWER % 10
    targets[span >= 10 * supervised] = IGNORE_INDEX
    num_targets = int((targets != IGNORE_INDEX).sum())

    def form(function: Callable[..., torch.Tensor]) -> Form:
        return _form(lambda: function(hidden, weight, targets), [hidden, weight])

    forms = {"all logits": form(linear_cross_entropy_reference)}
    if supervised == 1.0:
        return {OURS: form(linear_cross_entropy)} | forms
    ours = partial(linear_cross_entropy, num_targets=num_targets)
    return {OURS: form(ours), "every position": form(linear_cross_entropy)} | forms


def moe(shape: Shape) -> dict[str, Form]:
    """The experts of one layer on N tokens whose K experts are drawn evenly."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = shape.build()
    layer = next((module for module in model.modules() if isinstance(module, Experts)), None)
    if layer is None:
        raise ValueError(f"--model: {shape.model} has no routed experts; give another preset")
    experts = layer.to(shape.device, shape.dtype)
    N, K = shape.rows * shape.seq_len, model.config.num_experts_per_tok
    hidden = shape.randn(N, model.config.hidden_size)
    index = torch.rand(N, experts.num_experts, device=shape.device).topk(K).indices
    gates = torch.rand(N, K, device=shape.device)
    grouped_mm = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def form(function: Callable[..., torch.Tensor]) -> Form:
        return _form(lambda: function(hidden, index, gates), [hidden, *experts.parameters()])

    return {
        OURS: form(experts),
        "one expert after another": form(lambda *of: eager_experts(experts, *of)),
        "transformers' grouped_mm": form(lambda *of: grouped_mm(experts, *of)),
    }


def delta_net(shape: Shape) -> dict[str, Form]:
    """The gated delta rule of one layer, of all its heads."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    config = shape.build().config
    if not hasattr(config, "linear_num_key_heads"):
        raise ValueError(f"--model: {shape.model} has no delta net; give mini_qwen3_next")
    B, T = shape.rows, shape.seq_len
    K, H = config.linear_num_key_heads, config.linear_num_value_heads
    query = shape.randn(B, T, K, config.linear_key_head_dim)
    key = shape.randn(B, T, K, config.linear_key_head_dim)
    value = shape.randn(B, T, H, config.linear_value_head_dim)
    log_decay = -torch.rand(B, T, H, device=shape.device).exp()
    beta = torch.rand(B, T, H, device=shape.device).to(shape.dtype)
    kernels = find_kernels()
    # transformers puts fla's kernel in its place where that is installed.
    in_pytorch = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)

    def stock() -> torch.Tensor:
        q, k = (x.repeat_interleave(H // K, dim=2) for x in (query, key))
        output: torch.Tensor = in_pytorch(
            q, k, value, log_decay, beta, use_qk_l2norm_in_kernel=True
        )[0]
        return output

    def ours() -> torch.Tensor:
        return delta_rule(query, key, value, log_decay, beta, kernels=kernels)[0]

    inputs = [query, key, value]
    return {OURS: _form(ours, inputs), "transformers, in PyTorch": _form(stock, inputs)}


def optimizer(shape: Shape) -> dict[str, Form]:
    """One update with gradients that never change."""

    def form(fused: bool) -> Form:
        built = shape.build().to(shape.device)
        adamw = build_optimizer(
            built, learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
        )
        set_seed(2)
        for group in adamw.param_groups:
            group["fused"] = fused or None
            group["foreach"] = False  # on a GPU the default without fused, several at a time
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter) * 1e-3
        largest = max(built.parameters(), key=torch.numel)

        def call() -> torch.Tensor:
            adamw.step()
            return largest.detach()

        return call

    return {OURS: form(fused=True), "single operations": form(fused=False)}


def model(shape: Shape) -> dict[str, Form]:
    """A training step without optimizer and without MTP: rows of one document each."""
    from transformers import AutoModelForCausalLM

    built = shape.build()
    tokens = torch.randint(
        built.config.vocab_size, (shape.rows, shape.seq_len), device=shape.device
    )

    def form(module: Any) -> Form:
        module = module.to(shape.device).train()

        def forward() -> torch.Tensor:
            enabled = shape.precision == "bf16"
            with torch.autocast(shape.device.type, dtype=torch.bfloat16, enabled=enabled):
                loss: torch.Tensor = module(input_ids=tokens, labels=tokens, use_cache=False).loss
            return loss

        return _form(forward, list(module.parameters()))

    forms = {OURS: form(built)}
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        has_experts = any(isinstance(module, Experts) for module in built.modules())
        for implementation in ("eager", "grouped_mm") if has_experts else (None,):
            stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if implementation is not None:
                stock.set_experts_implementation(implementation)
            label = "stock class" + (f", experts {implementation}" if implementation else "")
            forms[label] = form(stock)
    return forms


PARTS: dict[str, Callable[[Shape], dict[str, Form]]] = {
    "loss": loss_head,
    "sft_loss": partial(loss_head, supervised=0.6),
    "moe": moe,
    "delta_net": delta_net,
    "optimizer": optimizer,
    "model": model,
}


def _form(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Form:
    def call() -> torch.Tensor:
        output = forward()
        output.float().sum().backward()
        for x in inputs:
            x.grad = None
        return output.detach()

    return call


def run(
    part: str,
    preset: str,
    overrides: dict[str, Any],
    *,
    precision: str,
    rows: int,
    seq_len: int,
    repeats: int,
    device: str,
) -> dict[str, Any]:
    """Measure all forms of `part`, print the table and return the figures.

    Raises ValueError for a preset without that part, or for a model that transformers' class is
    not, and RuntimeError where forms do not agree.
    """
    if part == "model":
        overrides = without_mtp(preset, overrides)
    shape = Shape(preset, overrides, precision, rows, seq_len, choose_device(device))
    set_seed(1)
    forms = PARTS[part](shape)
    results = {name: form().float() for name, form in forms.items()}
    for name, result in results.items():
        difference = (result - results[OURS]).abs().max() / results[OURS].abs().max()
        if not difference <= TOLERANCE[precision]:
            raise BenchmarkError(
                f"{part}: ours and {name} differ by {difference:.1e} of the largest"
            )
    seconds = interleaved(forms, repeats, shape.device)
    compared = "clock" if shape.device.type == "cuda" else "cpu"
    figures: dict[str, Any] = {}
    for name, form in forms.items():
        counts = None
        if shape.device.type == "cpu":  # on a GPU our loss is compiled, which counting takes apart
            with Operators() as counts:
                form()
        pairs = zip(seconds[OURS][compared], seconds[name][compared], strict=True)
        figures[name] = {
            "cpu_seconds": statistics.median(seconds[name]["cpu"]),
            "clock_seconds": statistics.median(seconds[name]["clock"]),
            "compared_range": median_and_range(seconds[name][compared]),
            "ours_over_it": statistics.median(a / b for a, b in pairs),
            "peak_memory_bytes": peak_memory(form, shape.device),
            "operators": counts and counts.operators.total(),
            "host_syncs": counts and counts.synchronisations.total(),
        }
    found = {
        **machine("torch", "transformers"),
        "device": device_name(shape.device),
        "part": part,
        "model": preset,
        "overrides": overrides,
        "precision": precision,
        "rows": rows,
        "seq_len": seq_len,
        "repeats": repeats,
        "compared": compared,
        "forms": figures,
    }
    print(markdown(found), flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table, with the line that says on what."""
    compared = "CPU time" if found["compared"] == "cpu" else "by the clock"
    own = found["forms"][OURS]
    rows = [
        [
            name,
            of["compared_range"],
            f"{of['ours_over_it']:.3f}",
            f"{of['peak_memory_bytes'] / 2**20:,.1f}",
            # On a GPU a fused update takes nothing beyond what is there.
            f"{own['peak_memory_bytes'] / of['peak_memory_bytes']:.3f}"
            if of["peak_memory_bytes"]
            else "–",
            "–" if of["operators"] is None else f"{of['operators']:,}",
            "–" if of["host_syncs"] is None else f"{of['host_syncs']:,}",
        ]
        for name, of in found["forms"].items()
    ]
    header = ["form", "s", "ours ÷ it", "peak MiB", "ours ÷ it", "operators", "host syncs"]
    return (
        f"{found['part']} of {found['model']} {found['overrides'] or ''} in {found['precision']}: "
        f"{found['rows']} rows of {found['seq_len']} tokens; {compared}, "
        f"medians (minimum to maximum) of {found['repeats']} calls in turns; {found['device']}\n\n"
        + markdown_table(header, rows)
    )
