"""The device that a command computes on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """What ``--device`` means: "auto" is the first GPU where there is one, else the CPU.

    Raises ValueError, in one sentence, for a device that cannot compute here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: {name} cannot be used here ({reason}); leave it out, or give cpu"
        ) from None
    return torch.device(name)
