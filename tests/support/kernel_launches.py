"""How many kernels operations on tensors launch: those that a thread dispatches, views and allocations left out."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kfdist.torch_internals import TorchDispatchMode, storage_id, tree_leaves

_NO_KERNEL = frozenset(
    """_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand lift_fresh
    new_empty new_empty_strided permute promote_types result_type select slice split split_with_sizes squeeze t
    transpose unbind unsqueeze view""".split()
)


class Launches(TorchDispatchMode):
    """Counts, inside the `with`, the operations that launch a kernel on a GPU; the same ones on every device.

    One operation is taken for one launch; inside of a library's call there may be more.

    Args:
        on_host: Tensors that are the host's beside a GPU, too: operations on these alone launch nothing.

    Attributes:
        by_name: How often each was called.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self._on_host = {storage_id(each.untyped_storage()) for each in on_host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts it."""
        del types
        name = func.overloadpacket.__name__
        if name not in _NO_KERNEL and not (self._on_host and self._is_the_hosts((args, kwargs))):
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))

    def _is_the_hosts(self, given: Any) -> bool:
        tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        return bool(tensors) and all(storage_id(each.untyped_storage()) in self._on_host for each in tensors)
