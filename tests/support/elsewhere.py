"""A second device on a machine without one: "cpu:1", whose tensors compute on the CPU and refuse what a GPU would.

A GPU refuses an operation on tensors of two devices. It makes the host wait for a copy that blocks, as one of much
pageable memory does whatever it is told, and for an operator whose result or shape depends on values. On a CPU alone
none of this can be seen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kfdist.comm.host_copy import HostCopy
from kfdist.curvature import blocks
from kfdist.linalg import uploads
from kfdist.runtime.apply import directions, side_by_side

ELSEWHERE = torch.device("cpu", 1)

READS = frozenset(
    """_linalg_check_errors _linalg_eigh _linalg_svd _local_scalar_dense _unique2 bincount equal masked_select nonzero
    unique_consecutive""".split()
)
"""Operators whose result on the host, or whose shape, depends on values; `bincount` looks for the largest one, and
decompositions look whether they have converged."""

TAKES_NUMBERS_ALONG = frozenset({"index_put", "index_put_", "where"})
"""Operators that copy a number of the host's to the device, and wait for that; others take it as an argument."""

_SENT: dict[int, Tensor] = {}
"""What `kfdist.linalg.uploads.sent` is about to copy, by its id."""


class There(Tensor):
    """A tensor that is elsewhere; `here` has its numbers."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=ELSEWHERE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, may_wait=True)


class Waits(AssertionError):
    """The host would wait for the device."""


class TwoDevices(AssertionError):
    """An operation on tensors of both devices."""


class Elsewhere(TorchDispatchMode):
    """Makes the device work in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self._may_wait = True
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Elsewhere":
        def copied(self: HostCopy, tensors: Sequence[Tensor], *, aside: bool = False) -> None:
            self._tensors = [tensor.here.clone() if isinstance(tensor, There) else tensor for tensor in tensors]
            self._event = None

        # The one way to the host that doesn't wait, which asks for CUDA's events.
        self._patch.setattr(HostCopy, "__init__", copied)
        # What pins memory for a GPU; here it says which copies are made like this.
        self._patch.setattr(uploads, "_staged", _noted)
        for user in (directions, side_by_side):
            self._patch.setattr(user, "joined_on", lambda device: device == ELSEWHERE)
        # Our tensors are of another class than a GPU's.
        self._patch.setattr(blocks, "_reason_against_parameter", lambda label, parameter: "")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, may_wait=self._may_wait)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Refuses, inside, what makes the host wait."""
        self._may_wait = False
        try:
            yield
        finally:
            self._may_wait = True

    def move(self, model: nn.Module) -> nn.Module:
        """Puts a model's parameters and buffers there."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(There(parameter.detach()), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else There(buffer)
        return model


def _noted(tensor: Tensor, device: torch.device) -> Tensor:
    if device != ELSEWHERE or isinstance(tensor, There):
        return tensor
    staged = tensor.clone()
    _SENT[id(staged)] = staged
    return staged


def _run(func: Any, args: Any, kwargs: dict[str, Any], *, may_wait: bool) -> Any:
    name = func.overloadpacket.__name__
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = [each for each in given if isinstance(each, There)]
    target = kwargs.get("device")
    goes = target is not None and torch.device(target) == ELSEWHERE
    if not there and not goes:
        return func(*args, **kwargs)
    if name == "copy_":
        crosses, returns = len(there) < len(given), not isinstance(args[0], There)
        blocks_ = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    else:
        leaves = bool(there) and target is not None and not goes
        crosses, returns = name == "_to_copy" and (leaves or not there), leaves
        blocks_ = not kwargs.get("non_blocking")
    host = [each for each in given if not isinstance(each, There)]
    by_sent = any([_SENT.pop(id(each), None) is not None for each in host])
    if crosses and blocks_ and not may_wait:
        raise Waits(f"{func}: a copy between host and device that blocks")
    if crosses and not returns and not by_sent and not may_wait:
        raise Waits(f"{func}: a copy from the host that `sent` doesn't make, which a GPU waits for if it is large")
    if there and name != "copy_" and any(each.dim() for each in host):
        raise TwoDevices(f"{func} got tensors of both devices; on the host: {[tuple(each.shape) for each in host]}")
    generators = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Generator)]
    if generators:
        raise TwoDevices(f"{func} draws on the device with a generator of the host")
    masked = name.startswith("index") and any(
        isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1:2])
    )
    if not may_wait and (name in READS or masked or (host and name in TAKES_NUMBERS_ALONG)):
        raise Waits(f"{func} reads values back to the host")
    if goes:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if returns:
        return args[0] if name == "copy_" else plain
    known = {id(each.here): each for each in there}
    return tree_map(lambda each: known.get(id(each), There(each)) if isinstance(each, Tensor) else each, plain)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, There) else value
