"""DeepSpeed alone, one process, a model of ten numbers: what its universal checkpoint leaves out.

    python tests/distributed/deepspeed_reproductions.py FOLDER

prints a JSON object, bug -> what happened; test_deepspeed_bugs.py reads it. Nothing of this project
but the start-up is used, so each function here is also what a bug report would show.
"""

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.engine import spare_cpu_the_extension_build
from mini_llm.parallel.environment import (
    end_process,
    join_as_single_process,
    prepare_environment,
)

prepare_environment()
join_as_single_process()
spare_cpu_the_extension_build()

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from torch import nn

TAG = "step"


class Model(nn.Module):
    """A matrix that decays, a vector that does not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 4))
        self.vector = nn.Parameter(torch.ones(2))
        self.register_buffer("buffer", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.matrix @ x + self.vector + self.buffer).square().sum()


def engine(stage: int, universal: bool = False, groups: int = 2) -> Any:
    """A fresh DeepSpeed engine around a :class:`Model`, whose optimizer has 1 or 2 groups."""
    model = Model()
    parameter_groups = [
        {"params": [model.matrix], "weight_decay": 0.1},
        {"params": [model.vector], "weight_decay": 0.0},
    ]
    if groups == 1:
        parameter_groups = [{"params": [model.matrix, model.vector], "weight_decay": 0.1}]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2147483647,
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW(parameter_groups, lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(trained: Any) -> None:
    trained.backward(trained(torch.ones(4)))
    trained.step()


def saved(folder: Path, stage: int, groups: int = 2) -> Path:
    """A DeepSpeed checkpoint after one step, with the buffer at 7."""
    trained = engine(stage, groups=groups)
    step(trained)
    trained.module.buffer.fill_(7)
    trained.save_checkpoint(str(folder), TAG)
    return folder / TAG


def convert(source: Path, target: Path, inject_missing_state: bool = True) -> Path:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=inject_missing_state,
            )
        )
    return target


def outcome(action: Callable[[], Any]) -> str:
    """What came of it: done, or the exception in one line."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return "done"


def reproduce(folder: Path) -> dict[str, Any]:
    from1, from3 = saved(folder / "saved1", stage=1), saved(folder / "saved3", stage=3)
    facts: dict[str, Any] = {}
    facts["converting dense ZeRO-1"] = outcome(
        lambda: convert(from1, folder / "not_injected" / TAG, inject_missing_state=False)
    )
    facts["converting to a path with +"] = outcome(lambda: convert(from1, folder / "c++" / TAG))
    shutil.copytree(from1, folder / "[1]" / TAG)
    facts["loading from a path with ["] = outcome(
        lambda: engine(1).load_checkpoint(str(folder / "[1]"), TAG)
    )
    universal1 = convert(from1, folder / "universal1" / TAG)
    universal3 = convert(from3, folder / "universal3" / TAG)

    one = engine(1, universal=True)
    one.load_checkpoint(str(folder / "universal1"), TAG)
    facts["buffer after loading"] = one.module.buffer.tolist()

    convert(saved(folder / "saved_one_group", stage=1, groups=1), folder / "one_group" / TAG)
    more = engine(1, universal=True)
    more.load_checkpoint(str(folder / "one_group"), TAG)
    facts["loaded with a group more"] = {
        "expected": one.module.vector.tolist(),
        "found": more.module.vector.tolist(),
    }

    three = engine(3, universal=True)
    three.load_checkpoint(str(folder / "universal3"), TAG)
    steps = [state["step"] for state in three.optimizer.optimizer.state.values()]
    facts["step tensors of ZeRO-3"] = len({tensor.data_ptr() for tensor in steps})
    facts["weight decay of ZeRO-3"] = [
        group["weight_decay"] for group in three.optimizer.optimizer.param_groups
    ]

    # From one stage to another: each obstacle is cleared to reach the next.
    def load_into(stage: int, name: str) -> Any:
        loading = engine(stage, universal=True)
        loading.load_checkpoint(str(folder / name), TAG)
        return loading

    file1, file3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
    facts["ZeRO-1 to 3, file name"] = outcome(lambda: load_into(3, "universal1"))
    (universal1 / file3).symlink_to(universal1 / file1)
    facts["ZeRO-1 to 3, optimizer"] = outcome(lambda: load_into(3, "universal1"))

    facts["ZeRO-3 to 1, file name"] = outcome(lambda: load_into(1, "universal3"))
    (universal3 / file1).symlink_to(universal3 / file3)
    facts["ZeRO-3 to 1, optimizer"] = outcome(lambda: load_into(1, "universal3"))
    path = universal3 / "zero" / "optimizer_state.pt"
    torch.save({**torch.load(path, weights_only=False), "ds_version": deepspeed.__version__}, path)
    facts["ZeRO-3 to 1, parameters"] = outcome(lambda: load_into(1, "universal3"))
    for path in universal3.glob("zero/*/*.pt"):
        torch.save({"param": torch.load(path)}, path)
    facts["ZeRO-3 to 1, step"] = outcome(lambda: step(load_into(1, "universal3")))
    return facts


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    print(json.dumps(reproduce(Path(sys.argv[1]))))
    end_process()
