"""torch.compile, one decoder layer at a time.

Under DeepSpeed Accelerate ignores its own ``--dynamo_backend``, so the layers are compiled here,
before ``accelerator.prepare``. Layer by layer, the layers of one kind share a compiled graph, and
gradient checkpointing, which lies around a layer, and ZeRO-3's gathering stay as they are. What
would make a graph anew for other documents or unroll a loop over the row says so where it stands
(``torch.compiler.disable``): packed attention on a CPU and the chunked delta rule.
"""

import os
import shutil
from contextlib import AbstractContextManager

import torch
from torch import nn

from mini_llm.models.common.triton import missing_for_triton

_MOST_GRAPHS = 64


def wants_compile(
    torch_compile: bool | None, device: torch.device, *, zero_stage: int, expert_parallel_size: int
) -> bool:
    """``--torch_compile``, or without it whether compiling pays.

    It does on a GPU. Not asked for, it is left out under ZeRO-3, which gathers weights in the midst
    of a layer, and with spread experts.
    """
    if torch_compile is None:
        return device.type == "cuda" and zero_stage < 3 and expert_parallel_size == 1
    return torch_compile


def eagerly() -> AbstractContextManager[object]:
    """Inside, what was compiled runs as it is written.

    For passes of other shapes than training's (evaluation, samples): each would be compiled anew.
    """
    return torch.compiler.set_stance("force_eager")


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`compile_layers` was here."""
    return all(layer._compiled_call_impl is not None for layer in decoder_layers(model))


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Let every decoder layer of ``model`` be compiled when it first runs; its weights stay.

    Raises RuntimeError where torch.compile could not generate code for ``device``.
    """
    if device.type == "cpu" and find_compiler() is None:
        raise RuntimeError(
            "on a CPU torch.compile needs a C++ compiler and there is none; install g++ or name "
            "another in CXX, or leave the flag out"
        )
    if device.type == "cuda" and (missing := missing_for_triton()) is not None:
        raise RuntimeError(
            f"on a GPU torch.compile, which is on by default, needs {missing}; install gcc and "
            "Python's headers (python3-dev), or give --torch_compile false"
        )
    # All layers are one function to torch.compile, which keeps 8 graphs of a function and lets what
    # comes later run eagerly: three kinds of layers (dense, experts, multi-token prediction) with
    # batches of changing shape (--packing false) have more.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    for layer in decoder_layers(model):
        layer.compile()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the decoder inside ``model``, multi-token prediction included."""
    layers = getattr(model.get_decoder(), "layers", None)  # type: ignore[operator]
    if not isinstance(layers, nn.ModuleList):
        raise RuntimeError(f"{type(model).__name__} has no list of decoder layers")
    return layers


def find_compiler() -> str | None:
    """The C++ compiler that inductor would call: the one that CXX names, else g++."""
    return shutil.which(os.environ.get("CXX", "g++"))
