r"""Products of the exact Fisher with a direction, through the network's output (algorithms.md 1.2, step 4).

With the network's output z, its Jacobian J with respect to the parameters and the loss L(z), the mean over the batch as
torch computes it, u^T F v = (J u)^T H (J v), H = d^2 L / dz^2. For the losses that are negative log-likelihoods, H is
the Fisher of the predicted distribution: diag(p) - p p^T for cross-entropy (whatever the labels and their smoothing;
0 for ignored ones), 2/C for the mean squared error over C outputs, p (1 - p) for binary cross-entropy on logits, each
over the number of terms that the mean counts. H is never formed: H v comes from differentiating the loss twice with
respect to the output, and J u from one pass in forward mode, or else from differentiating the backward pass.

Source: Schraudolph (2002) for the product; Pearlmutter's and the "double backward" trick for J u without forward mode.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfdist.errors import KfdistError
from kfdist.torch_internals import with_tensors_for_parameters

Differentiable = Callable[[], tuple[Tensor, Tensor]]
"""Runs the model and returns (output, loss), in the gradient mode of the caller."""


class Differentiation(StrEnum):
    """How J u is computed."""

    FORWARD = "forward"
    """Forward-mode automatic differentiation: about the cost of two forwards."""
    DOUBLE_BACKWARD = "double_backward"
    """The derivative of the backward pass, which is linear in its argument: one more backward, and its graph."""


class NoForwardDerivative(KfdistError):
    """An operator of the model has no derivative in forward mode."""


@dataclass(frozen=True)
class OutputProduct:
    """A direction seen at the output.

    Attributes:
        change: J u, in the output's shape.
        curvature: H J u, the same shape.
    """

    change: Tensor
    curvature: Tensor


class OutputFisher:
    """The Fisher at the present parameters and batch, as products with directions.

    It keeps the graph of one forward alive.

    Args:
        run: Runs the model, always on the same data; called once here, and once for each direction in forward mode.
        model: The module whose parameters move.

    Attributes:
        loss: The loss of that forward, a scalar.

    Raises:
        KfdistError: The loss does not depend on the output.
    """

    def __init__(self, run: Differentiable, model: nn.Module) -> None:
        self._run = run
        self._model = model
        self._rows: tuple[Tensor, dict[nn.Parameter, Tensor]] | None = None
        with torch.enable_grad(), _plain_attention():
            self._output, loss = run()
            (slope,) = torch.autograd.grad(loss, self._output, create_graph=True, allow_unused=True)
        if slope is None:
            raise KfdistError(
                "the closure's loss does not depend on the output it returned; return the tensor that the loss was "
                "computed from"
            )
        self._slope = slope
        self.loss = loss.detach()

    def along(self, direction: Mapping[nn.Parameter, Tensor], how: Differentiation) -> OutputProduct:
        """Computes J u and H J u of a direction u in the space of the parameters.

        Args:
            direction: u, per parameter; parameters left out don't move.
            how: How J u is computed.

        Raises:
            NoForwardDerivative: `how` is forward mode, and an operator has no derivative in it.
        """
        with _plain_attention():
            forward = how is Differentiation.FORWARD
            change = self._forward_mode(direction) if forward else self._double_backward(direction)
        return OutputProduct(change, self._hessian_product(change))

    def _forward_mode(self, direction: Mapping[nn.Parameter, Tensor]) -> Tensor:
        # Without a graph: that of the tangents would cost twice the memory of the training forward's.
        with torch.no_grad(), forward_ad.dual_level():
            moving = {id(p): forward_ad.make_dual(p.detach(), u) for p, u in direction.items()}
            # Every name of a tied parameter must be replaced, or part of its derivative is lost.
            named = self._model.named_parameters(remove_duplicate=False)
            swapped = {name: moving[id(parameter)] for name, parameter in named if id(parameter) in moving}
            try:
                with with_tensors_for_parameters(self._model, swapped):
                    output, _ = self._run()
            except (NotImplementedError, RuntimeError) as error:
                if _lacks_forward_mode(error):
                    raise NoForwardDerivative(str(error)) from error
                raise
            tangent = forward_ad.unpack_dual(output).tangent
            return torch.zeros_like(self._output) if tangent is None else tangent.clone()

    def _double_backward(self, direction: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Computes J u = d/dw (J^T w)^T u, for any w: the backward pass is linear in its argument."""
        if self._rows is None:
            self._rows = self._backward_of_a_variable(list(direction))
        w, rows = self._rows
        moving = {p: u for p, u in direction.items() if p in rows}
        if not moving:
            return torch.zeros_like(self._output)
        (change,) = torch.autograd.grad([rows[p] for p in moving], w, list(moving.values()), retain_graph=True)
        return change.detach()

    def _backward_of_a_variable(self, parameters: list[nn.Parameter]) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Returns w, and J^T w with its graph for each parameter that the output depends on."""
        with torch.enable_grad():
            w = torch.zeros_like(self._output, requires_grad=True)
            rows = torch.autograd.grad(
                self._output, parameters, w, create_graph=True, retain_graph=True, allow_unused=True
            )
        return w, {p: row for p, row in zip(parameters, rows, strict=True) if row is not None and row.requires_grad}

    def _hessian_product(self, change: Tensor) -> Tensor:
        """Differentiates the loss twice with respect to the output, along `change`."""
        if not self._slope.requires_grad:  # the loss is linear in the output
            return torch.zeros_like(change)
        (product,) = torch.autograd.grad(self._slope, self._output, change, retain_graph=True, allow_unused=True)
        return torch.zeros_like(change) if product is None else product.detach()


def _plain_attention() -> AbstractContextManager[object]:
    """Avoids the fused attention kernels, which have neither forward mode nor a double backward."""
    return sdpa_kernel(SDPBackend.MATH)


def _lacks_forward_mode(error: Exception) -> bool:
    """Recognises torch's messages for an operator, or an autograd.Function, without a forward derivative."""
    text = str(error).lower()
    return any(mark in text for mark in ("forward ad", "forward-ad", "forward mode", "forward-mode", "jvp"))
