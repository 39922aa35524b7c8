"""What a forward and backward pass dispatches: operators, host synchronisations, product dtypes."""

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros"),
    *("zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"),
    *("arange", "scalar_tensor"),
}
SYNCHRONISATIONS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2"}
PRODUCTS = {"mm", "bmm", "addmm", "_grouped_mm"}


class Operators(TorchDispatchMode):
    """Counts aten operators but views and allocations, and those that ask the device for a value.

    Synchronisations are what makes the host wait, were the tensors on a GPU: reading a number,
    results whose size depends on values (boolean indexing, ``repeat_interleave`` without a size),
    and numbers that torch copies there from ordinary memory (``x[0] = 1.0``, ``where`` with one).
    Reading a whole tensor (``tolist``, ``cpu``, ``equal``) waits too and is not counted: nothing
    shows of a tensor on the CPU whether it would be elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.product_dtypes: Counter[tuple[str, torch.dtype]] = Counter()
        self._copied_numbers = _CopiedNumbers(self.synchronisations)

    def __enter__(self) -> Any:
        self._copied_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copied_numbers.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        # _unsafe_view is a view that does not say so.
        if not is_view and name != "_unsafe_view" and name not in ALLOCATIONS:
            self.operators[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        sizeless = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in SYNCHRONISATIONS or by_mask or sizeless:
            self.synchronisations[name] += 1
        if name in PRODUCTS:
            self.product_dtypes[name, args[0].dtype] += 1
        return func(*args, **kwargs)


class _CopiedNumbers(TorchFunctionMode):
    """Counts Python's numbers that become tensors of the host, which no operator's inputs show."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.where, torch.Tensor.where):
            if any(isinstance(arg, (int, float)) for arg in (*args, *(kwargs or {}).values())):
                self._found["where"] += 1
        elif func is torch.Tensor.__setitem__:
            _, index, value = args
            places = index if isinstance(index, tuple) else (index,)
            if isinstance(value, (int, float)) and all(isinstance(i, int) for i in places):
                self._found["setitem"] += 1
        return func(*args, **(kwargs or {}))
