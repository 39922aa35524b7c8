"""Saving what an engine needs to continue, and loading it under another ZeRO stage or ranks.

The same engine, stage and ranks load their own files as they are: bit for bit. Another stage or
number of ranks goes through DeepSpeed's universal checkpoint (Lian et al. 2024): rank 0 merges the
slices of all ranks into whole fp32 weights and moments, one folder a parameter, from which every
rank takes its slice. The checkpoint itself is never written to.

What DeepSpeed 0.19.8 leaves out of that way is mended in :func:`_complete` and
:func:`_load_universal`; tests/distributed/test_deepspeed_bugs.py notices when a mend is due to go.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from . import watchdog
from .engine import zero_stage
from .expert_parallel import expert_parallel_size, expert_shapes
from .snapshot import Snapshot

TAG = "pytorch_model"  # the folder in which Accelerate has DeepSpeed save
WAITING_SECONDS = 0.2
BUFFERS_NAME = "buffers.pt"


@dataclass(frozen=True)
class Experts:
    """The experts of a model that loads: (E, F, D) by module, and whether ranks share them."""

    shapes: dict[str, tuple[int, int, int]]
    spread: bool


class EngineMismatch(ValueError):
    """This engine cannot continue what another one wrote; the message says what works."""


def describe_engine(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """What decides whether the files of :func:`save_engine_state` load as they are; JSON-able."""
    stage = zero_stage(accelerator, model)
    if stage is not None:
        kind = "deepspeed"
    else:
        kind = "ddp" if accelerator.num_processes > 1 else "single"
    return {
        "kind": kind,
        "zero_stage": stage,
        "world_size": accelerator.num_processes,
        "bf16": accelerator.mixed_precision == "bf16",
        "expert_parallel_size": expert_parallel_size(model),
    }


def save_engine_state(accelerator: Accelerator, folder: Path, snapshot: Snapshot) -> None:
    """Let ``snapshot`` hold weights, optimizer and random states as they are to be in ``folder``.

    A collective. The folder is made here, and the few lines that DeepSpeed writes beside them.
    """
    with snapshot.taking_saves():
        # Pickled torch files: safetensors would drop one of two tied weights.
        accelerator.save_state(str(folder), safe_serialization=False)


def load_engine_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    folder: Path,
    *,
    written_by: dict[str, Any],
    scratch: Path,
) -> None:
    """Restore the prepared model, optimizer and random states in place; every rank calls it.

    ``folder`` is what :func:`save_engine_state` wrote and ``written_by`` the
    :func:`describe_engine` of then. ``scratch``, which all ranks see, holds a converted copy while
    loading takes: up to 36 bytes a parameter. Weight decay, betas, epsilon and clipping stay as
    this run asks for, whatever the other asked for. A rank that the writer did not have keeps the
    random state that it started with.

    Raises EngineMismatch for an engine whose state this one cannot continue.
    """
    here = describe_engine(accelerator, model)
    written_by = {"expert_parallel_size": 1, **written_by}  # not written before there was a choice
    check_engine(written_by, here, folder)
    if accelerator.is_main_process:
        for leftover in scratch.glob(".universal-*"):  # of a run that was killed while loading
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    with _own_settings(model, optimizer):
        if here["kind"] != "deepspeed":
            _load_whole(accelerator, folder)
        elif here == written_by or here["zero_stage"] == 0:  # at ZeRO-0 every rank holds everything
            _load_state(accelerator, folder)
        else:
            universal = scratch / f".universal-{folder.parent.name}"
            if accelerator.is_main_process:
                print(
                    f"converting {folder.parent}, written by {_in_words(written_by)}, for "
                    f"{_in_words(here)}",
                    flush=True,
                )
            experts = Experts(
                shapes=expert_shapes(accelerator.unwrap_model(model)),
                spread=here["expert_parallel_size"] > 1,
            )
            _convert_once(accelerator, folder, universal, experts)
            _load_universal(accelerator, model, universal)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(universal)


def check_engine(written_by: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raises EngineMismatch unless the engine ``here`` continues what ``written_by`` wrote."""
    uses_deepspeed = (written_by["kind"] == "deepspeed", here["kind"] == "deepspeed")
    splits_state = (bool(written_by["zero_stage"]), bool(here["zero_stage"]))
    if len(set(uses_deepspeed)) == 1 and len(set(splits_state)) == 1:
        return
    if written_by["zero_stage"]:
        same = "any of ZeRO-1, 2 and 3 on any number of ranks"
    elif written_by["kind"] == "deepspeed":
        same = "ZeRO-0 on any number of ranks"
    else:
        same = "DDP or a single process without DeepSpeed, on any number of ranks"
    raise EngineMismatch(
        f"--resume_from_checkpoint: {folder.parent} was written by {_in_words(written_by)}, whose "
        f"optimizer state {_in_words(here)} cannot continue; resume with {same}, or start a new "
        f"run from its weights: --model {folder.parent / 'model'} and another --output_dir"
    )


def _in_words(description: dict[str, Any]) -> str:
    name = {
        "deepspeed": f"DeepSpeed ZeRO-{description['zero_stage']}",
        "ddp": "DistributedDataParallel",
        "single": "plain PyTorch",
    }[description["kind"]]
    precision = "bf16" if description["bf16"] else "fp32"
    size = description["expert_parallel_size"]
    experts = f", experts spread over {size}" if size > 1 else ""
    return f"{name} on {description['world_size']} rank(s) in {precision}{experts}"


@contextlib.contextmanager
def _own_settings(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Keep this run's hyper-parameters over a load, which would bring the checkpoint's.

    A ZeRO-3 universal load is worse: it gives every parameter group those of group 0, and so
    weight decay to the norms.
    """
    kept = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    zero = getattr(model, "optimizer", None)
    clip_grad = getattr(zero, "clip_grad", None)
    yield
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    if clip_grad is not None:
        zero.clip_grad = clip_grad  # type: ignore[union-attr]


def _load_state(accelerator: Accelerator, folder: Path) -> None:
    with _plain_name(folder) as plain:
        accelerator.load_state(str(plain))


@contextlib.contextmanager
def _plain_name(folder: Path) -> Iterator[Path]:
    """A link to ``folder`` by a name without special characters.

    DeepSpeed takes the paths it reads from for glob patterns, and the converter for regular
    expressions too: a run in ``c++ [2]/`` would not resume.
    """
    with tempfile.TemporaryDirectory(prefix="mini_llm_") as links:
        link = Path(links, "state")
        link.symlink_to(folder.resolve())
        yield link


def _load_whole(accelerator: Accelerator, folder: Path) -> None:
    """Load files that hold everything on one rank, as DDP and a single process write them."""

    def load_weights(models: list[nn.Module], folder: str) -> None:
        weights = torch.load(Path(folder) / "pytorch_model.bin", map_location="cpu")
        # Written by DDP, the names begin with its attribute for the model inside.
        nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, "module.")
        for model in models:
            accelerator.unwrap_model(model).load_state_dict(weights)
        models.clear()  # done: Accelerate would look for names as this engine has them

    hook = accelerator.register_load_state_pre_hook(load_weights)
    _load_state(accelerator, folder)
    hook.remove()


def _convert_once(
    accelerator: Accelerator, folder: Path, universal: Path, experts: Experts
) -> None:
    """Have rank 0 write ``universal`` while the others wait, however long it takes.

    They wait for a file, for a collective would give up after its time limit.
    """
    watchdog.rest("converting the checkpoint")
    converted, failed = universal / "converted", universal / "failed"
    if accelerator.is_main_process:
        try:
            _convert(folder, universal, experts)
        except BaseException:
            shutil.rmtree(universal, ignore_errors=True)  # a full disk must take the mark
            universal.mkdir(parents=True)
            failed.touch()
            raise
        converted.touch()
    while not converted.exists():
        if failed.exists():
            raise RuntimeError(f"rank 0 could not convert {folder} to a universal checkpoint")
        time.sleep(WAITING_SECONDS)
    watchdog.beat("loading the checkpoint")
    accelerator.wait_for_everyone()


def _convert(folder: Path, universal: Path, experts: Experts) -> None:
    """Merge the slices in ``folder`` to ``universal``, complete for any stage and ranks to load.

    ``experts`` are those of the model that will load it.
    """
    from deepspeed.checkpoint import ds_to_universal

    (universal / TAG).mkdir(parents=True)
    with (
        _plain_name(folder) as source,
        _plain_name(universal) as target,
        contextlib.redirect_stdout(io.StringIO()),  # it narrates on both
        contextlib.redirect_stderr(io.StringIO()),
    ):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source / TAG),
                output_folder=str(target / TAG),
                num_extract_workers=1,  # more would fork a process that has a process group
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # ZeRO-1 and 2 write it only under tensor parallelism
            )
        )
    _complete(folder / TAG, universal / TAG)
    rename_experts(universal / TAG / "zero", experts)
    for states in folder.glob("random_states_*.pkl"):
        shutil.copyfile(states, universal / states.name)


def _complete(source: Path, universal: Path) -> None:
    """Rewrite what the converter left so that every stage reads it.

    Each parameter's folder gets its tensors as ZeRO-1 and 2 want them, in a dict, and its step,
    which a ZeRO-3 conversion has not. The optimizer's and the engine's own files are written anew:
    each stage looks for other keys and another file name, and as converted they still hold rank
    0's weights and moments, which every rank would read for nothing.
    """
    shard = _load_trusted(min(source.glob("*_optim_states.pt")))
    zero = shard["optimizer_state_dict"]
    by_zero3 = "base_optimizer_state" not in zero
    inner = zero["optimizer_state_dict" if by_zero3 else "base_optimizer_state"]
    step = torch.as_tensor(inner["state"][0]["step"], dtype=torch.float32, device="cpu")
    for parameter in {path.parent for path in universal.glob("zero/*/*.pt")}:
        if by_zero3:
            for path in parameter.iterdir():
                tensor = _load_trusted(path)
                if torch.is_tensor(tensor):  # those of spread experts are in a dict already
                    torch.save({"param": tensor}, path)
        torch.save(step, parameter / "step.pt")
    # A load goes through as many groups as the checkpoint has; spread experts are one more. What
    # is in them does not matter: this run's own settings are put back (_own_settings).
    groups = inner["param_groups"] * 2
    optimizer = {
        "ds_version": shard["ds_version"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
    }
    torch.save(optimizer, universal / "zero" / "optimizer_state.pt")

    written = sorted(universal.glob("*_model_states.pt"))
    engine = _load_trusted(written[0])
    buffers = {name: engine["module"][name] for name in engine["buffer_names"]}
    torch.save(buffers, universal / BUFFERS_NAME)
    for path in written:
        path.unlink()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save({**engine, "module": None}, universal / name)


def rename_experts(zero: Path, experts: Experts) -> None:
    """Give whole experts the names that they have where they are spread, or where they are not.

    ``zero`` has a folder for each parameter. Spread (spread_experts.py) they are ``w1`` (gate),
    ``w2`` (down) and ``w3`` (up), each (E, …), else the stock ``gate_up_proj`` and ``down_proj``.
    """
    for stem, (E, F, D) in experts.shapes.items():
        split = {weight: zero / f"{stem}.experts.{weight}" for weight in ("w1", "w2", "w3")}
        stock = {weight: zero / f"{stem}.{weight}" for weight in ("gate_up_proj", "down_proj")}
        there, here = (stock, split) if experts.spread else (split, stock)
        if not all(folder.is_dir() for folder in there.values()):
            continue  # they have the right names already, or are frozen
        step = next(iter(there.values())) / "step.pt"
        for folder in here.values():
            folder.mkdir()
            shutil.copyfile(step, folder / "step.pt")
        for kind in ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"):
            old = {name: _load_trusted(path / kind)["param"] for name, path in there.items()}
            if experts.spread:  # as ZeRO-3 wrote them, they are flat
                gate, up = old["gate_up_proj"].view(E, 2 * F, D).chunk(2, dim=1)
                new = {"w1": gate, "w2": old["down_proj"].view(E, D, F), "w3": up}
                mark = {"is_expert_param": True, "ep_num_experts": E}
            else:
                new = {"gate_up_proj": torch.cat([old["w1"], old["w3"]], 1), "down_proj": old["w2"]}
                mark = {}
            for name, tensor in new.items():
                content = {"param": tensor.clone(), "cat_dim": 0, **mark}
                torch.save(content, here[name] / kind)
        for folder in there.values():
            shutil.rmtree(folder)


def _load_trusted(path: Path) -> Any:
    """Unpickle a file that DeepSpeed wrote into one of this project's checkpoints."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _load_universal(accelerator: Accelerator, model: Any, universal: Path) -> None:
    """Load a completed universal checkpoint, buffers and all, into a DeepSpeed engine."""
    from deepspeed.utils import logger

    config, level = model._config, logger.level
    config.load_universal_checkpoint = True  # the config file's checkpoint.load_universal
    logger.setLevel("ERROR")  # every rank would warn that there is no tensor parallelism
    try:
        _load_state(accelerator, universal)
    finally:
        config.load_universal_checkpoint = False
        logger.setLevel(level)

    # Buffers are left as they were initialised: router biases would be 0.
    saved = torch.load(universal / TAG / BUFFERS_NAME, map_location="cpu")
    buffers = dict(model.module.named_buffers())
    for name, value in saved.items():
        buffers[name].copy_(value)

    # ZeRO-3 gives all groups one `step` tensor, which then counts once a group; and on a GPU the
    # fused AdamW wants it beside the weights.
    zero = model.optimizer
    fused = any(group.get("fused") for group in zero.optimizer.param_groups)
    for parameter, state in zero.optimizer.state.items():
        state["step"] = state["step"].clone().to(parameter.device if fused else "cpu")
