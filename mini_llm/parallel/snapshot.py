"""What a checkpoint will hold, copied at one moment and written while training goes on.

Accelerate and DeepSpeed decide what an engine's state is and hand it to ``torch.save``, file by
file. A :class:`Snapshot` takes its place while they do: it pickles what it is given at once, as
``torch.save`` would, but copies the memory of the tensors instead of writing it. :meth:`write`
makes the same files out of that, in any thread.

On a GPU the copies stay there where there is room, which takes as long as reading and writing them
once, and go to the host when they are written, on a stream of their own.
"""

import contextlib
import io
import os
import pickle
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

# Of the memory that the driver has left: the step that comes may need a little more than those
# before.
SHARE_OF_ROOM = 0.8


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in ordinary memory that shares nothing."""
    return tensor.detach().to("cpu", copy=True)


class Snapshot:
    """Copies of what is to be written; ``device`` is where the model lies.

    snapshot = Snapshot(device)
    with snapshot.taking_saves():
        accelerator.save_state(folder)  # makes the folders, writes no tensor
    weights = {name: snapshot.copy(value) for name, value in …}
    snapshot.close()  # from here on training may change everything
    snapshot.write()  # in a thread
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._files: deque[tuple[bytes, dict[int, torch.UntypedStorage], Any, Any]] = deque()
        # By the address of a storage: itself, so that the address is not given away, and its copy.
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._room = 0.0
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._room = SHARE_OF_ROOM * torch.cuda.mem_get_info(device)[0]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor``, on the device if it lies there and the copy has room."""
        size = tensor.numel() * tensor.element_size()
        if not tensor.is_cuda or size > self._room:
            return to_host(tensor)
        self._room -= size
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    @contextlib.contextmanager
    def taking_saves(self) -> Iterator[None]:
        """While it lasts, ``torch.save`` hands what it is given to this snapshot."""
        save = torch.save
        torch.save = self._take  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.save = save

    def _take(self, obj: Any, f: str | os.PathLike[str], **options: Any) -> None:
        content = io.BytesIO()
        pickler = _Pickler(content, self._copy_storage)
        pickler.dump(obj)
        self._files.append((content.getvalue(), pickler.storages, f, options))

    def _copy_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        address = storage._cdata
        if address not in self._copies:
            self._copies[address] = storage, self.copy(_bytes_of(storage)).untyped_storage()
        return self._copies[address][1]

    def close(self) -> None:
        """No copy is made after this."""
        self._copies.clear()
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads copies in another thread than made them."""
        if self._copied is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._copied)
        with torch.cuda.stream(stream):
            yield

    def write(self) -> None:
        """Write the files, and give the memory of each back. Raises what ``torch.save`` raises."""
        with self.reading():
            while self._files:
                content, storages, path, options = self._files.popleft()
                # The bytes are there when the call returns, so the device's may be given back.
                on_host = {
                    key: _bytes_of(copy).cpu().untyped_storage() for key, copy in storages.items()
                }
                storages.clear()
                torch.save(_Unpickler(io.BytesIO(content), on_host).load(), path, **options)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """As a tensor: a storage's own copies keep other Python threads waiting."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Pickler(pickle.Pickler):
    """Leaves the memory of tensors out, as torch's own pickler does, and keeps copies of it."""

    def __init__(self, file: io.BytesIO, copy: Any) -> None:
        super().__init__(file, protocol=torch.serialization.DEFAULT_PROTOCOL)
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._copy = copy

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype | None] | None:
        """Number and type of a tensor's memory; None for anything else."""
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
        elif isinstance(obj, torch.UntypedStorage):
            storage, dtype = obj, None
        else:
            return None
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = self._copy(storage)
        return key, dtype


class _Unpickler(pickle.Unpickler):
    """Puts the copies in the place of the memory that was left out."""

    def __init__(self, file: io.BytesIO, storages: dict[int, torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, pid: tuple[int, torch.dtype | None]) -> Any:
        """What :meth:`_Pickler.persistent_id` has named."""
        key, dtype = pid
        if dtype is None:
            return self._storages[key]
        return torch.storage.TypedStorage(
            wrap_storage=self._storages[key], dtype=dtype, _internal=True
        )
