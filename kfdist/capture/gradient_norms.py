"""The norm of each micro-batch's own gradient, taken in its backward, before anything averages, clips or replaces it.

The graph's last node before a parameter's `.grad` is given what one backward adds to it: with DistributedDataParallel,
too, this rank's part alone, as its reduction comes afterwards. `torch.autograd.grad` doesn't come there.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from kfdist.capture.loss_scale import LossScale
from kfdist.capture.micro_batches import MicroBatch, MicroBatches
from kfdist.torch_internals import oddity

_SAMPLED = 8
"""Entries of each gradient that are kept, to compare their sum with `.grad`."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchNorms:
    """A rank's k micro-batches of a step; h_i is what the i-th added to `.grad`, of a loss divided by k.

    Attributes:
        count: k; 0 where the backwards don't say the rest.
        squares: sum_i |h_i|^2, over all parameters; float64, on the device.
        inverse_examples: sum_i 1 / b_i, where the i-th averages b_i examples.
        sample: A few entries of sum_i h_i, as `joined` puts them together.
        inverse_square_scale: What divides a GradScaler's scale out of a product of two gradients.
    """

    count: int
    squares: Tensor | float = 0.0
    inverse_examples: float = 0.0
    sample: Tensor | float = 0.0
    inverse_square_scale: Tensor | float = 1.0


@dataclass
class _Backward:
    """What one backward added.

    Attributes:
        norms: Of the gradients that it has made so far.
        samples: A few entries of each, by the parameter's number.
        summable: Whether each came at once and dense, so that their norms say the whole's.
    """

    norms: list[Tensor] = field(default_factory=list)
    samples: dict[int, Tensor] = field(default_factory=dict)
    summable: bool = True


class GradientNorms:
    """Takes the norms of a model's gradients while it is on.

    Args:
        parameters: The model's.
        batches: Says which backwards count, and which of them are of one micro-batch.
        loss_scale: The scale that is in the gradients.

    Attributes:
        watched: The parameters whose gradients are looked at; none while it is off.
    """

    def __init__(self, parameters: Sequence[Tensor], batches: MicroBatches, loss_scale: LossScale) -> None:
        self.watched: Sequence[Tensor] = ()
        self._parameters = list(parameters)
        self._batches = batches
        self._loss_scale = loss_scale
        self._backwards: dict[int, _Backward] = {}
        self._hooks: weakref.finalize[..., GradientNorms] | None = None

    def start(self) -> None:
        """Looks at gradients until `stop`, of the parameters that are trained by now.

        At none where parameters are sharded, or lazy and not yet initialised.
        """
        trained = [each for each in self._parameters if each.requires_grad]
        if self._hooks is not None and list(map(id, trained)) == list(map(id, self.watched)):
            return
        self.stop()
        if any(isinstance(each, UninitializedParameter) or oddity(each) for each in self._parameters):
            return
        seen = weakref.WeakMethod(self._see)
        self.watched = trained
        nodes = {i: get_gradient_edge(each).node for i, each in enumerate(self._parameters) if each.requires_grad}
        handles = [node.register_prehook(partial(_call, seen, i)) for i, node in nodes.items()]
        self._hooks = weakref.finalize(self, _remove, handles, list(nodes.values()))  # none but us holds the nodes

    def stop(self) -> None:
        """Removes the hooks."""
        if self._hooks is not None:
            self._hooks()
        self._hooks, self.watched = None, ()

    def forget(self) -> None:
        """Forgets the backwards so far."""
        self._backwards.clear()

    def found(self) -> MicroBatchNorms | None:
        """Returns what the backwards since the last `forget` were; None while it is off.

        They don't say it where there was none, one was of a part of its micro-batch (of several losses, or by reentrant
        checkpointing of shared layers), a gradient was sparse, or nobody knows a micro-batch's number of examples.
        """
        if not self.watched:
            return None
        examples = self._batches.examples()
        units: dict[MicroBatch, _Backward] = {}
        for number, backward in self._backwards.items():
            unit = self._batches.of_backward(number)
            if unit in units or not backward.summable:
                return MicroBatchNorms(count=0)
            units[unit] = backward
        if not units or units.keys() != examples.keys() or not all(examples.values()):
            return MicroBatchNorms(count=0)
        norms = [each for unit in units.values() for each in unit.norms]
        device, numbers = norms[0].device, range(len(self._parameters))
        samples = [joined([unit.samples.get(i) for i in numbers], self._parameters, device) for unit in units.values()]
        return MicroBatchNorms(
            count=len(units),
            squares=sum_of_squares(norms, device),
            inverse_examples=sum(1 / number for number in examples.values() if number),
            sample=torch.stack(samples).sum(0),
            inverse_square_scale=self._loss_scale.of_products(),
        )

    def _see(self, index: int, gradient: Tensor) -> None:
        if not len(self._batches):
            return  # of no forward that counts
        # Checkpointing nests backwards in the one that counts, which began last.
        backward = self._backwards.setdefault(self._batches.latest_backward, _Backward())
        if gradient.is_sparse or index in backward.samples:
            backward.summable = False
            return
        backward.norms.append(norm_of(gradient))
        backward.samples[index] = few(gradient).clone()


def norm_of(gradient: Tensor) -> Tensor:
    """Returns a gradient's norm: float64 for float64, else float32."""
    gradient = _real(gradient.detach())
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(gradient, dtype=dtype)


def sum_of_squares(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the square of the norm of all that these are the norms of; float64."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    dtype = max((each.dtype for each in norms), key=lambda dtype: dtype.itemsize)
    return torch.stack([each.to(device, dtype, non_blocking=True) for each in norms]).double().square().sum()


def few(gradient: Tensor) -> Tensor:
    """Returns a view of the first few entries of a gradient's first row; of complex ones, their parts."""
    gradient = gradient.detach()
    if gradient.dim() == 0 or not gradient.numel():
        return _real(gradient.reshape(-1)).flatten()
    return _real(gradient[(0,) * (gradient.dim() - 1)][:_SAMPLED]).flatten()


def _real(gradient: Tensor) -> Tensor:
    """Returns complex entries as their two parts, whose squares add up to those of the entries."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def joined(samples: Sequence[Tensor | None], parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns what `few` took of the parameters' gradients, end to end in float64; zeros where there is none."""
    parts = [
        torch.zeros_like(few(each)) if some is None else some for some, each in zip(samples, parameters, strict=True)
    ]
    return torch.cat([part.to(device, torch.float64, non_blocking=True) for part in parts])


def _call(
    see: "weakref.WeakMethod[Callable[[int, Tensor], None]]", index: int, gradients: tuple[Tensor | None, ...]
) -> None:
    bound, gradient = see(), gradients[0]
    if bound is not None and gradient is not None:
        bound(index, gradient)


def _remove(handles: Sequence[RemovableHandle], nodes: list[Node]) -> None:
    for handle in handles:
        handle.remove()
    nodes.clear()
