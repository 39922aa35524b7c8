"""What a forward and backward pass dispatches: operators, host synchronisations, product dtypes."""

from collections import Counter
from typing import Any

import torch
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

    Synchronisations are what makes the host wait: reading a number, and results whose size depends
    on values (boolean indexing, ``repeat_interleave`` without a size).
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.product_dtypes: Counter[tuple[str, torch.dtype]] = Counter()

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
