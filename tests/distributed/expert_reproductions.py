"""DeepSpeed with experts spread over two ranks: what it gets wrong.

    accelerate launch … tests/distributed/expert_reproductions.py FOLDER

writes FOLDER/facts.json, fault -> what happened; test_deepspeed_bugs.py reads it. Of this project
only the start-up and the module that tags its weights as experts are used.
"""

# ruff: noqa: E402
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.engine import spare_cpu_the_extension_build
from mini_llm.parallel.environment import end_process, prepare_environment, rank

prepare_environment()
spare_cpu_the_extension_build()

import deepspeed
import torch
from torch import nn

from mini_llm.parallel.spread_experts import SpreadExperts, Wire

E, F, D = 4, 4, 8  # experts, their width, that of the model


class Whole(nn.Module):
    """Stacked experts that nobody has spread."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * F, D, generator=random))
        self.down_proj = nn.Parameter(torch.randn(E, D, F, generator=random))
        self.act_fn = nn.functional.silu


class Model(nn.Module):
    """Two experts a rank that train, two that are frozen, and a dense matrix behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = SpreadExperts(Whole(), 2, rank(), Wire())
        self.frozen = SpreadExperts(Whole().requires_grad_(False), 2, rank(), Wire())
        self.dense = nn.Parameter(torch.eye(D))

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        N = len(x_ND)
        chosen_N1 = (torch.arange(N) % E).unsqueeze(1)
        return (self.experts(x_ND, chosen_N1, torch.ones(N, 1)) @ self.dense).square().mean()


def engine(stage: int, contiguous: bool = True) -> Any:
    """A fresh engine around a :class:`Model`."""
    model = Model()
    name = model.experts.ep_group_name
    groups: list[dict[str, Any]] = [
        {"params": [model.dense], "name": "dense"},
        {"params": list(model.experts.parameters()), "name": name, "moe": True},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "contiguous_gradients": contiguous},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2147483647,
    }
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def gradient_norm(contiguous: bool) -> float:
    """Of the mean over ranks of the loss; both have the same batch."""
    trained = engine(1, contiguous)
    trained.backward(trained(torch.linspace(-1, 1, 8 * D).view(8, D)))
    trained.step()
    return float(trained.get_global_grad_norm())


def gradient_norm_of_one_process() -> float:
    """The same without DeepSpeed and without spreading."""
    whole, dense = Whole(), nn.Parameter(torch.eye(D))
    x_ND = torch.linspace(-1, 1, 8 * D).view(8, D)
    rows = []
    for n, x_D in enumerate(x_ND):
        gate_F, up_F = (whole.gate_up_proj[n % E] @ x_D).chunk(2)
        rows.append(whole.down_proj[n % E] @ (whole.act_fn(gate_F) * up_F))
    (torch.stack(rows) @ dense).square().mean().backward()
    gradients = [weight.grad for weight in (*whole.parameters(), dense)]
    return torch.nn.utils.get_total_norm(gradients).item()


def saving(folder: Path, stage: int) -> str:
    """What comes of a checkpoint of a model some of whose spread experts are frozen."""
    try:
        engine(stage).save_checkpoint(str(folder), "step")
    except RuntimeError as error:
        return str(error)
    return "done"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    facts: dict[str, Any] = {
        "norm": gradient_norm_of_one_process(),
        "norm, contiguous": gradient_norm(contiguous=True),
        "norm, not contiguous": gradient_norm(contiguous=False),
        "saving, ZeRO-1": saving(folder / "1", stage=1),
        "saving, ZeRO-3": saving(folder / "3", stage=3),
    }
    if rank() == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    end_process()
