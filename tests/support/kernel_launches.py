"""How many kernels operations on tensors launch: those that a thread dispatches, views and allocations left out."""

from collections import Counter
from typing import Any

from kfdist.torch_internals import TorchDispatchMode

_NO_KERNEL = frozenset(
    """_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh
    new_empty new_empty_strided permute promote_types result_type select slice split split_with_sizes squeeze t
    transpose unbind unsqueeze view""".split()
)


class Launches(TorchDispatchMode):
    """Counts, inside the `with`, the operations that launch a kernel on a GPU; the same ones on every device.

    One operation is taken for one launch; inside of a library's call there may be more.

    Attributes:
        by_name: How often each was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts it."""
        del types
        name = func.overloadpacket.__name__
        if name not in _NO_KERNEL:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))
