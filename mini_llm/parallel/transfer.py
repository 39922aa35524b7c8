"""Between host and device without waiting: what a loop needs whose host runs ahead of its GPU."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """``tensor``, which lies on the host, on ``device``; the host goes on at once.

    From ordinary memory a GPU's copy waits until the work before it is done, so it starts from
    pinned memory.
    """
    if device is not None and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class OnTheWay:
    """A tensor's numbers on their way to the host; the tensor may change meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._numbers = tensor.clone()
            return
        self._numbers = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._numbers.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> list[float]:
        """The numbers of a one-dimensional tensor, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers
