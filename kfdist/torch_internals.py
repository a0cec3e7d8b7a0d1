"""Everything of torch that isn't public and is used all the same: what the next torch may break, in one place.

Each function says why the public interface won't do. tests/unit/test_torch_internals.py and
tests/distributed/test_group_internals.py check that each still exists and does what is assumed here.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore  # torch.distributed.TCPStore; only here is it typed
from torch.amp.grad_scaler import OptState
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import stateless
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the only way to see all operations
from torch.utils._pytree import tree_leaves as tree_leaves

Convolution = _ConvNd
"""Base class of all convolutions, transposed ones included; torch exports none."""

NO_BACKWARD = -1
"""What `running_backward` says outside of any backward."""

grouped_mm = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
"""What `torch.nn.functional.grouped_mm` calls without offering itself to a mode."""

foreach_add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_addcmul_ = torch._foreach_addcmul_  # pyright: ignore[reportPrivateImportUsage]
foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
foreach_div = torch._foreach_div  # pyright: ignore[reportPrivateImportUsage]
foreach_div_ = torch._foreach_div_  # pyright: ignore[reportPrivateImportUsage]
foreach_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
foreach_mul = torch._foreach_mul  # pyright: ignore[reportPrivateImportUsage]
foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
foreach_sqrt = torch._foreach_sqrt  # pyright: ignore[reportPrivateImportUsage]
"""Operations on lists of tensors, a few kernels for all of them; torch's own optimizers are made of these."""

_TRANSPOSES = frozenset({"TBackward0", "TransposeBackward0"})

_VIEWS = _TRANSPOSES | {
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Alias")
}
"""Nodes that only show or convert what the node before them made."""

_LAST_NODES = 100
"""How far from the output DistributedDataParallel's node is looked for."""


# Autograd ---------------------------------------------------------------------------------------------------------


def running_backward() -> int:
    """Returns the number of this thread's running backward, `NO_BACKWARD` outside; a nested one has its own.

    A hook isn't told which backward runs it.
    """
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Says whether the running backward leaves its graph for another one, which `retain_graph` asks for."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def when_backward_ends(function: Callable[[], None]) -> None:
    """Calls a function at the end of the running backward, unless that fails; hooks are called in the midst of it.

    What others asked for comes before it, as DistributedDataParallel's reduction, which changes gradients.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(function))


def accumulates(parameter: Tensor) -> bool:
    """Says whether the running backward adds to a parameter's `.grad`: `torch.autograd.grad` doesn't."""
    return _will_run(get_gradient_edge(parameter).node)


def accumulates_below() -> bool:
    """Says whether the running backward adds to the gradient of the leaf that is nearest to the running node.

    True where there is none, as before layers that are all checkpointed.
    """
    nodes: list[Any] = [torch._C._current_autograd_node()]
    seen = set(nodes)
    for node in nodes:
        if hasattr(node, "variable"):
            return _will_run(node)
        below = dict.fromkeys(function for function, _ in node.next_functions if function is not None)
        nodes += [function for function in below if function not in seen]
        seen.update(below)
    return True


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError:  # what torch.autograd.grad was asked for
        return False


def running_node() -> int | None:
    """Returns the number of the node whose backward is running in this thread; None outside of any backward."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def next_node() -> int:
    """Returns the number that the next node made in this thread will have; they rise by one from node to node."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]


def changes_in_place(tensor: Tensor) -> int | None:
    """Returns how often a tensor was changed in place, a count that it shares with its detached views.

    None for inference tensors, which don't count.
    """
    return None if tensor.is_inference() else tensor._version


# Modules ----------------------------------------------------------------------------------------------------------


def children_by_name(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Returns a module's children by name.

    `named_children` leaves out those that are there twice, and getattr finds what a wrapper passes on to its inside.
    A scripted module has a container of its own kind.
    """
    children = module._modules
    return children if isinstance(children, dict) else dict(children.items())


def parameters_by_name(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Returns a module's own parameters by name, as they are now; of a scripted module in a dict of their own."""
    parameters = module._parameters
    return parameters if isinstance(parameters, dict) else dict(parameters.items())


def runs_compiled(module: nn.Module) -> bool:
    """Says whether `module.compile()` was called, which leaves no other trace."""
    return module._compiled_call_impl is not None


def with_tensors_for_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """Puts tensors in the place of parameters, by name, inside the `with`.

    `torch.func.functional_call` does the same but calls the module itself; here the caller does, as often as it likes.
    """
    return stateless._reparametrize_module(module, dict(tensors))


@contextmanager
def without_slow_loops() -> Iterator[None]:
    """Makes `torch.func.vmap` fail where it would run an operator that it doesn't know once for each slice, warning."""
    enabled = torch._C._functorch._is_vmap_fallback_enabled()  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._functorch._set_vmap_fallback_enabled(False)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(enabled)  # pyright: ignore[reportAttributeAccessIssue]


def entries_of(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers `[n]` of the rows that a sparse matrix has entries of, and these `[n, p]`, as a view.

    Several may be of one row, and then add up; the public `indices` and `values` refuse that.
    """
    return sparse._indices()[0], sparse._values()  # pyright: ignore[reportPrivateUsage]


def storage_id(storage: torch.UntypedStorage) -> int:
    """Returns a number that no other living storage has; empty ones share their address, `data_ptr`."""
    return storage._cdata


def base_of(view: Tensor) -> Tensor | None:
    """Returns what a tensor is a view of; None where it is no view."""
    return view._base


def oddity(tensor: Tensor) -> str:
    """Says what keeps a tensor from being measured: it has no values of its own, or not of one shape; else nothing."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # pyright: ignore[reportAttributeAccessIssue]
        return "inside torch.func"
    if tensor.is_nested:
        return "of a nested tensor"
    return "of a DTensor" if hasattr(tensor, "device_mesh") else ""


def product_edge(output: Tensor) -> tuple[GradientEdge, bool]:
    """Returns where in the graph the operation is that made an output, behind the views that torch put after it.

    A `linear` of three dimensions ends in a view, whose node is replaced when the output is changed in place; hooks on
    it, or on the tensor, then see nothing. The node of the product itself stays.

    Returns:
        The place, and whether the operation's own result is the output's transpose.
    """
    node, number, transposed = output.grad_fn, output.output_nr, False
    while node is not None and node.name() in _VIEWS:
        transposed ^= node.name() in _TRANSPOSES
        node, number = node.next_functions[0]
    assert node is not None, "an output of a product that requires a gradient has a node"
    return GradientEdge(node, number), transposed


def top_saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Returns what packs and unpacks what autograd saves here, as activation checkpointing does; None for nobody."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]


def batch_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the mean and the inverse deviation of each channel that a batch norm in training keeps for its backward.

    None where it keeps them otherwise, or somebody's hooks have them: then looking would call these.
    """
    node = output.grad_fn
    if top_saved_tensors_hooks() is not None or not hasattr(node, "_saved_result1") or output.dim() < 2:
        return None
    mean, scale = node._saved_result1.detach(), node._saved_result2.detach()  # type: ignore[union-attr]
    return (mean, scale) if mean.shape == scale.shape == output.shape[1:2] else None


def leave_function_mode(mode: TorchFunctionMode) -> None:
    """Takes a mode off the stack wherever it lies: `__exit__` would take off whatever lies on top."""
    above = []
    while torch._C._len_torch_function_stack():
        top = torch.overrides._pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        torch.overrides._push_mode(other)


# torch.compile ----------------------------------------------------------------------------------------------------


class EagerSteps:
    """Makes compiled code run eagerly until it is closed; several may be open at once.

    What torch.compile made before global hooks were there doesn't call them, and what it makes while they are there
    has them built in.
    """

    _open: ClassVar[set["EagerSteps"]] = set()
    _stance: ClassVar[Any] = None

    def __init__(self) -> None:
        if not self._open:
            # A compiled module passes the hooks twice, as itself and as its wrapper, and torch says so at every call.
            warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
            EagerSteps._stance = torch.compiler.set_stance("force_eager")
        self._open.add(self)

    def close(self) -> None:
        """Lets compiled code run again, when all are closed."""
        self._open.discard(self)
        if not self._open and self._stance is not None:
            EagerSteps._stance.__exit__(None, None, None)
            EagerSteps._stance = None


def eager_steps() -> EagerSteps | None:
    """Opens one; None where nothing can be compiled yet: torch loads the compiler, which takes a second, when asked."""
    return EagerSteps() if "torch._dynamo" in sys.modules else None


def never_compiled(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Returns an optimizer that does the same without loading the compiler, which takes a second.

    torch marks an optimizer's methods so that compiled code leaves them alone, and what the marks call is the compiler,
    at the first call of each, whether anything is compiled or not. So this is for who steps outside of compiled code.
    """
    step = inspect.unwrap(kind.step)

    def plain_step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return step(self, closure)

    plain = {name: inspect.unwrap(getattr(kind, name)) for name in _MARKED}
    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, **plain, "step": plain_step})


_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _marked_where_compiled(name: str) -> Callable[..., Any]:
    marked = getattr(torch.optim.Optimizer, name)
    plain = inspect.unwrap(marked)

    @functools.wraps(plain)
    def method(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (marked if "torch._dynamo" in sys.modules else plain)(self, *args, **kwargs)

    return method


class CompilerFreeOptimizer(torch.optim.Optimizer):
    """The last base of an optimizer that loads no compiler, for who steps outside of compiled code.

    For the reason that `never_compiled` gives. Where the compiler is loaded, torch's methods are as they are.
    """

    add_param_group, zero_grad, state_dict, load_state_dict = map(_marked_where_compiled, _MARKED)


# GradScaler -------------------------------------------------------------------------------------------------------


def scaler_cycle(scaler: torch.amp.GradScaler) -> Mapping[int, Mapping[str, Any]]:
    """Returns the scaler's table of optimizers, an object that each `update` replaces by another."""
    return scaler._per_optimizer_states


def was_unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer | None) -> bool:
    """Says whether `unscale_` was called since the last update, for an optimizer or, given None, for any."""
    cycle = scaler_cycle(scaler)
    states = cycle.values() if optimizer is None else filter(None, [cycle.get(id(optimizer))])
    return any(state["stage"] is OptState.UNSCALED for state in states)


def device_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """Returns the scale without a host sync, which `get_scale` makes; None before the first `scale`."""
    return scaler._get_scale_async()


# torch.utils.data ------------------------------------------------------------------------------------------------


def end_loader_processes(source: Any) -> None:
    """Ends the processes of a DataLoader or of its iterator; safe twice, and where there are none.

    By themselves they end with the iterator, which lives as long as the traceback of an error that passed through it.
    One that reads is given ten seconds to finish, and then killed.

    Args:
        source: A DataLoader with persistent processes, or an iterator of one; None does nothing.
    """
    iterator = getattr(source, "_iterator", source)
    if not hasattr(iterator, "_shutdown_workers"):
        return
    iterator._shutdown_workers()
    for process in iterator._workers:
        if process.is_alive():  # torch asks by SIGTERM, which it may ignore
            process.kill()
            process.join(timeout=1.0)


# torch.distributed ------------------------------------------------------------------------------------------------


@contextmanager
def without_first_reduction(output: Tensor) -> Iterator[None]:
    """Keeps DistributedDataParallel(static_graph=True) from reducing gradients that aren't there yet.

    It reduces all of them at the end of the first backward that passes its output, whoever starts it.

    Args:
        output: What the wrapper returned, or something cut out of it.
    """
    wrapper = _static_wrapper(output)
    if wrapper is None:
        yield
        return
    enqueued = wrapper._static_graph_delay_allreduce_enqueued
    wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        wrapper._static_graph_delay_allreduce_enqueued = enqueued


def _static_wrapper(output: Tensor) -> Any:
    """Returns the DistributedDataParallel with a static graph that gave the output, or None.

    Its node is looked for among the last few: what is between it and the output is the caller's slicing of the output.
    """
    nodes = [output.grad_fn]
    for node in nodes:
        if node is None or len(nodes) > _LAST_NODES:
            continue
        wrapper = getattr(node, "ddp_weakref", lambda: None)()
        if wrapper is not None:
            return wrapper if wrapper.static_graph else None
        nodes.extend(each for each, _ in node.next_functions)
    return None


def group_timeout(process_group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """Returns how long a group's collectives on a device may take, which a further group has to be told."""
    return process_group._get_backend(device).options._timeout


def group_count() -> int:
    """Returns how many process groups this process is in; torch names locally synchronised groups by it."""
    return len(dist.distributed_c10d._world.pg_names)
